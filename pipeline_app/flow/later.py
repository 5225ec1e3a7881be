"""Calls that are made again later, all from one thread of the process. For what could not be given back.

What keeps a claim from being given back although the store is there is a bug of ours, or data that somebody changed. It
must not keep other messages waiting; nor be left, for while the process lives nobody else gives back what it claimed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

#: How much later.
AGAIN_S = 10.0


class Later:
    """Each call is made AGAIN_S from now, once; it may ask to be made again."""

    def __init__(self) -> None:
        self._calls: dict[str, Callable[[], object]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, message: str, call: Callable[[], object]) -> None:
        """Make this call for `message`; it must not raise."""
        with self._lock:
            self._calls[message] = call
            if self._thread is None:
                self._thread = threading.Thread(target=self._run_until_idle, name="pipeline-later", daemon=True)
                self._thread.start()

    def _run_until_idle(self) -> None:
        while True:
            time.sleep(AGAIN_S)
            with self._lock:
                calls, self._calls = self._calls, {}
                if not calls:
                    self._thread = None
                    return
            for call in calls.values():
                call()
