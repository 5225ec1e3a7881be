"""One worker of all leads by a lease: it does the duties that everything needs to go on by itself.

Each duty looks at what is stored and makes one small transition after another, each of them guarded: two leaders at
once do no harm, and a leader that dies in the middle leaves nothing half done.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline_app.errors import BrokerError, StoreError
from pipeline_app.runtime import Runtime
from pipeline_app.store import workers

logger = logging.getLogger(__name__)

LEASE_S = 10.0
#: A leader says that it still leads this often.
RENEW_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Duty:
    """Something that a leader does."""

    do: Callable[[Runtime], None]
    #: How often at most, seconds; 0 is every round.
    every_s: float = 0.0
    #: Only after the store has answered for this long: right after an outage every lease looks ended.
    calm_s: float = 0.0

    @property
    def name(self) -> str:
        """For logs."""
        return f"{self.do.__module__.rpartition('.')[2]}.{self.do.__qualname__}"


class Leader:
    """One worker's part in the duties of that `name`: it leads, or stands by."""

    def __init__(self, runtime: Callable[[], Runtime], name: str, duties: Sequence[Duty], every_s: float) -> None:
        self._runtime = runtime
        self._name = name
        self._duties = duties
        self._every_s = every_s
        self._leads = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._calm_since = time.monotonic()
        self._last: dict[str, float] = {}

    def start(self) -> None:
        """Begin, in a thread."""
        self._thread = threading.Thread(target=self._run, name=f"pipeline-{self._name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the duty that is under way, and let another worker lead."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=LEASE_S)
        rt = self._runtime()
        try:
            workers.give_up_lead(rt.store, self._name, rt.process)
        except StoreError as exc:
            logger.info("the lead ends by itself: %s", exc)

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            rt = self._runtime()
            try:
                if self._is_time("", RENEW_S):
                    self._leads = workers.lead(rt.store, self._name, rt.process, LEASE_S)
                if self._leads:
                    self.round(rt)
            except StoreError as exc:
                logger.info("%s waits for the store: %s", self._name, exc)
                self._calm_since = time.monotonic()
                self._leads = False
            except Exception:
                # The next round may do better; without this thread nothing that waits would ever go on.
                logger.exception("%s", self._name)

    def round(self, rt: Runtime) -> None:
        """Every duty that is due, each whether or not the one before it could be done.

        Raises StoreError: without the store none can.
        """
        for duty in self._duties:
            if duty.calm_s and time.monotonic() - self._calm_since <= duty.calm_s:
                continue
            if not self._is_time(duty.name, duty.every_s):
                continue
            try:
                duty.do(rt)
            except StoreError:
                raise
            except BrokerError as exc:
                logger.info("%s waits for the broker: %s", duty.name, exc)
            except Exception:
                # A duty that trips over something must not keep all the others from being done.
                logger.exception("%s", duty.name)

    def _is_time(self, what: str, every_s: float) -> bool:
        now = time.monotonic()
        if now - self._last.get(what, float("-inf")) < every_s:
            return False
        self._last[what] = now
        return True
