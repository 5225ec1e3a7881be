"""Leave to run jobs under throttles that all workers share. Called by handle, for each job that has passed the gates.

A worker asks for a block of slots at a time and waits for each of them at most a moment; a job whose turn is further
away goes back into the store, and the pacing lets it go in time (`control/throttle_release.py`).
"""

from __future__ import annotations

import logging
import time
from collections import deque

from pipeline_app.domain.outcome import Move, Outcome
from pipeline_app.errors import StoreError
from pipeline_app.flow.claim import Work
from pipeline_app.runtime import Runtime, Throttle
from pipeline_app.store import throttles

logger = logging.getLogger(__name__)

#: Slots are asked for so much time ahead at once.
BLOCK_S = 0.25
#: A job waits in a worker at most this long for its slot, and a message's jobs together.
PATIENCE_S = 1.0
#: A slot that is missed by more than this, or by a quarter of the interval if that is more, is lost: run late, it would
#: come too close to those that follow.
LATE_S = 0.005


class Leave:
    """What one message's jobs may do under throttles."""

    def __init__(self, rt: Runtime, work: Work) -> None:
        self._rt = rt
        self._work = work
        self._place = rt.memory.flags().throttles.at(work.plan.run, work.task, work.partition)
        #: Throttle -> times of the slots that are ours, in seconds since 1970.
        self._slots: dict[str, deque[float]] = {}
        #: Throttles that gave no more leave.
        self._shut: set[str] = set()
        self._locked: set[str] = set()
        #: Throttle -> what handlers reported and the store does not know yet.
        self._spent: dict[str, float] = {}
        self._waited_s = 0.0
        #: When the job before was let go; None for the first.
        self._let_go_at: float | None = None

    def wait(self, job_id: str, jobs_left: int) -> Outcome | None:
        """Wait for the job's turn; its outcome if that is too far away.

        `jobs_left` is how many jobs of the message may still run, this one included.
        """
        if self._place.is_empty:
            return None
        applying = list(self._place.matching(self._work.jobs[job_id]["tags"]))
        while True:
            for throttle in applying:
                if not self._has_slot(throttle, jobs_left):
                    return Outcome(job_id=job_id, move=Move.THROTTLE, waits_for=throttle.id)
            rated = [throttle for throttle in applying if throttle.rate_per_s is not None]
            if not rated:
                return None
            pause = max(self._slots[throttle.id][0] for throttle in rated) - self._now()
            if pause > 0:
                self._waited_s += pause
                time.sleep(pause)
            # On a machine that is busy one may wake too late: then the slots are lost, and there are others.
            if not any(self._is_late(throttle) for throttle in rated):
                for throttle in rated:
                    self._slots[throttle.id].popleft()
                self._let_go_at = self._now()
                return None

    def spent(self, job_id: str, amounts: dict[str, float]) -> None:
        """Note what the job's handler reported."""
        if not amounts or self._place.is_empty:
            return
        for throttle in self._place.matching(self._work.jobs[job_id]["tags"]):
            amount = amounts.get(throttle.unit) if throttle.unit is not None else None
            if amount:
                self._spent[throttle.id] = self._spent.get(throttle.id, 0.0) + amount
                # The next job is let go by what is spent by then.
                self._slots.pop(throttle.id, None)

    def settle(self) -> None:
        """Tell the store what was spent, and give back locks. Raises StoreError; then ask again."""
        for throttle in list(self._spent):
            throttles.spend(self._rt.store, throttle, self._spent[throttle])
            del self._spent[throttle]
        for throttle in list(self._locked):
            throttles.unlock(self._rt.store, throttle, self._work.message)
            self._locked.discard(throttle)

    def _has_slot(self, throttle: Throttle, jobs_left: int) -> bool:
        if throttle.id in self._shut:
            return False
        slots = self._slots.setdefault(throttle.id, deque())
        while slots and self._is_late(throttle):
            slots.popleft()
        if slots:
            return True
        return self._ask(throttle, slots, jobs_left)

    def _is_late(self, throttle: Throttle) -> bool:
        """Whether the next slot is missed."""
        if throttle.rate_per_s is None:
            return False
        return self._slots[throttle.id][0] < self._now() - max(LATE_S, 0.25 / throttle.rate_per_s)

    def _ask(self, throttle: Throttle, slots: deque[float], jobs_left: int) -> bool:
        number = jobs_left
        if throttle.rate_per_s is not None:
            number = max(1, min(jobs_left, int(throttle.rate_per_s * BLOCK_S)))
            # A handler that takes longer than the slots are apart would miss those in between: others can have them.
            if self._let_go_at is None or self._now() - self._let_go_at > 1.0 / throttle.rate_per_s:
                number = 1
        if throttle.unit is not None:
            number = 1
        try:
            if self._spent.get(throttle.id):
                throttles.spend(self._rt.store, throttle.id, self._spent.pop(throttle.id))
            grant = throttles.admit(
                self._rt.store,
                throttle.id,
                number=number,
                message=self._work.message,
                token=self._work.token,
                patience_s=max(0.0, PATIENCE_S - self._waited_s),
                # What a hold let go does not go behind those that wait, either: it probes whether they may go on.
                released=self._work.released_by is not None,
            )
        except StoreError as exc:
            logger.warning("no leave: throttle=%s: %s", throttle.id, exc)
            grant = None
        if grant is None:
            self._shut.add(throttle.id)
            return False
        if throttle.concurrency is not None:
            self._locked.add(throttle.id)
        # A burst may begin in the past: that is now.
        slots.extend(max(grant.start + n * grant.interval_s, grant.at) for n in range(number))
        return True

    def _now(self) -> float:
        return self._rt.store.now().timestamp()
