"""One worker of all leads by a lease: it does the duties that everything needs to go on by itself.

Each duty looks at what is stored and makes one small transition after another, each of them guarded: two leaders at
once do no harm, and a leader that dies in the middle leaves nothing half done.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pipeline_app.domain.outage import Outage
from pipeline_app.errors import BrokerError, StoreError
from pipeline_app.runtime import Runtime
from pipeline_app.store import workers

logger = logging.getLogger(__name__)

LEASE_S = 10.0
#: A leader says that it still leads this often.
RENEW_S = 1.0
#: An answer that takes longer than this came out of an outage.
SLOW_S = 2.0
#: A duty that could not reach the broker is left out for this long, each time twice as long, at most LONGEST_PAUSE_S.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 5.0


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
        #: Since when the store answers; endless while it does not.
        self._calm_since = time.monotonic()
        self._last: dict[str, float] = {}
        self._store_away = Outage()
        self._broker_away = Outage()
        #: Duty that waits for the broker -> how long, and until when.
        self._pauses: dict[str, tuple[float, float]] = {}

    def start(self) -> None:
        """Begin, in a thread."""
        self._thread = threading.Thread(target=self._run, name=f"pipeline-{self._name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the duty that is under way, and let another worker lead."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=LEASE_S)
            if self._thread.is_alive():
                return  # in the middle of a duty: it leads until its lease ends
        rt = self._runtime()
        try:
            workers.give_up_lead(rt.store, self._name, rt.process)
        except StoreError as exc:
            logger.info("the lead ends by itself: %s", exc)

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            rt = self._runtime()
            try:
                asks = self._asks(rt)
                if self._leads:
                    self.round(rt)
                if asks or self._leads:
                    self._answers(self._store_away, "store")
            except StoreError as exc:
                self._waits(self._store_away, self._name, "store", exc)
                self._calm_since = math.inf
                self._leads = False
            except Exception:
                # The next round may do better; without this thread nothing that waits would ever go on.
                logger.exception("%s", self._name)

    def _asks(self, rt: Runtime) -> bool:
        """Ask whether this one leads, if it is time for that; whether it was."""
        asks = self._is_time("", RENEW_S)
        if asks:
            self._leads = self._lead(rt)
        return asks

    def _lead(self, rt: Runtime) -> bool:
        begun = time.monotonic()
        leads = workers.lead(rt.store, self._name, rt.process, LEASE_S)
        now = time.monotonic()
        # An outage may have no error: the question that was asked in it is answered when it ends.
        if now - begun > SLOW_S or self._calm_since > now:
            self._calm_since = now
        return leads

    def round(self, rt: Runtime) -> None:
        """Every duty that is due, each whether or not the one before it could be done; none once another leads.

        Raises StoreError: without the store none can.
        """
        for duty in self._duties:
            if self._asks(rt) and not self._leads:
                return
            if duty.calm_s and time.monotonic() - self._calm_since <= duty.calm_s:
                continue
            pause, until = self._pauses.get(duty.name, (0.0, 0.0))
            if time.monotonic() < until or not self._is_time(duty.name, duty.every_s):
                continue
            try:
                duty.do(rt)
                if self._pauses.pop(duty.name, None) and not self._pauses:
                    self._answers(self._broker_away, "broker")
            except StoreError:
                raise
            except BrokerError as exc:
                self._waits(self._broker_away, duty.name, "broker", exc)
                pause = min(max(pause * 2, FIRST_PAUSE_S), LONGEST_PAUSE_S)
                self._pauses[duty.name] = pause, time.monotonic() + pause
            except Exception:
                # A duty that trips over something must not keep all the others from being done.
                logger.exception("%s", duty.name)

    def _waits(self, outage: Outage, who: str, what: str, exc: Exception) -> None:
        if outage.goes_on(datetime.now(UTC)):
            logger.warning("%s waits for the %s since %s: %s", who, what, f"{outage.since:%H:%M:%SZ}", exc)

    def _answers(self, outage: Outage, what: str) -> None:
        away = outage.ends(datetime.now(UTC))
        if away is not None:
            logger.warning("%s goes on: the %s was away for %.0f s", self._name, what, away.total_seconds())

    def _is_time(self, what: str, every_s: float) -> bool:
        now = time.monotonic()
        if now - self._last.get(what, float("-inf")) < every_s:
            return False
        self._last[what] = now
        return True
