"""Calls that are made again later, from a thread of their own. For what could not be given back.

What keeps a claim from being given back although the store is there is a bug of ours, or data that somebody changed. It
must not keep whoever met it from its other work; nor be left, for while the process lives nobody else gives back what
it has claimed.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

#: How much later, at most.
AGAIN_S = 10.0


class Later:
    """Each call is made once, with those that were added at about the same time; it may ask to be made again."""

    def __init__(self) -> None:
        self._calls: dict[str, Callable[[], object]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, message: str, call: Callable[[], object]) -> None:
        """Make this call for `message`, unless there is one already: the first knows best what happened."""
        with self._lock:
            self._calls.setdefault(message, call)
            if self._thread is None:
                thread = threading.Thread(target=self._run_until_idle, name="pipeline-later", daemon=True)
                # No more threads on this machine: who adds the next one tries again.
                with contextlib.suppress(RuntimeError):
                    thread.start()
                    self._thread = thread

    def _run_until_idle(self) -> None:
        while True:
            time.sleep(AGAIN_S)
            with self._lock:
                calls, self._calls = self._calls, {}
                if not calls:
                    self._thread = None
                    return
            for message, call in calls.items():
                try:
                    call()
                except Exception:
                    logger.exception("not done, trying again: message=%s", message)
                    self.add(message, call)
