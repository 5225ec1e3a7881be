"""Leave to run jobs under throttles that all workers share. Called by handle, for each job that has passed the gates.

A worker asks for a block of slots at a time and waits for each of them at most a moment; a job whose turn is further
away goes back into the store, and the pacing lets it go in time (`control/duties/throttle_release.py`).
"""

from __future__ import annotations

import logging
import time
from collections import deque

from pipeline_app.domain.outcome import Outcome
from pipeline_app.domain.target import Place
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
#: On a machine that always wakes late the job goes all the same after so many lost slots.
LOST_SLOTS = 3


class Leave:
    """What one message's jobs may do under throttles."""

    def __init__(self, rt: Runtime, work: Work) -> None:
        self._rt = rt
        self._work = work
        #: Throttle -> times of the slots that are ours, in seconds since 1970.
        self._slots: dict[str, deque[float]] = {}
        #: Throttles that gave no more leave, and those that were taken away meanwhile.
        self._shut: set[str] = set()
        self._gone: set[str] = set()
        self._locked: set[str] = set()
        #: Throttle -> what handlers reported and the store does not know yet.
        self._spent: dict[str, float] = {}
        self._waited_s = 0.0
        #: When the job before was let go; None for the first.
        self._let_go_at: float | None = None

    @property
    def _place(self) -> Place[Throttle]:
        """As it is now: a throttle that is set or taken away applies to chunks that run already."""
        work = self._work
        return self._rt.memory.flags().throttles.at(work.plan.run, work.task, work.partition)

    @property
    def has_waited(self) -> bool:
        """Whether a job of the message had to wait for a slot."""
        return self._waited_s > 0

    def wait(self, job_id: str, jobs_left: int) -> Outcome | None:
        """Wait for the job's turn; its outcome if that is too far away.

        `jobs_left` is how many jobs of the message may still run, this one included.
        """
        place = self._place
        if place.is_empty:
            return None
        applying = list(place.matching(self._work.jobs[job_id]["tags"]))
        for lost in range(LOST_SLOTS + 1):
            for throttle in applying:
                if not self._has_slot(throttle, jobs_left):
                    return Outcome(job_id=job_id, move=throttle.move, waits_for=throttle.id)
            rated = [slots for throttle in applying if (slots := self._rated_slots(throttle))]
            if not rated:
                return None
            pause = max(slots[0] for slots in rated) - self._now()
            if pause > 0:
                self._waited_s += pause
                time.sleep(pause)
            # On a machine that is busy one may wake too late: then the slots are lost, and there are others.
            if lost < LOST_SLOTS and any(self._is_late(throttle) for throttle in applying):
                continue
            for slots in rated:
                slots.popleft()
            self._let_go_at = self._now()
            break
        return None

    def spent(self, job_id: str, amounts: dict[str, float]) -> None:
        """Note what the job's handler reported."""
        if not amounts:
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
            self._tell_spent(throttle)
        for throttle in list(self._locked):
            throttles.unlock(self._rt.store, throttle, self._work.message)
            self._locked.discard(throttle)

    def _tell_spent(self, throttle: str) -> None:
        if throttle in self._spent:
            throttles.spend(self._rt.store, throttle, self._spent[throttle])
            del self._spent[throttle]

    def _rated_slots(self, throttle: Throttle) -> deque[float] | None:
        return None if throttle.rate_per_s is None else self._slots.get(throttle.id)

    def _has_slot(self, throttle: Throttle, jobs_left: int) -> bool:
        if throttle.id in self._gone:
            return True
        if throttle.id in self._shut:
            return False
        slots = self._slots.setdefault(throttle.id, deque())
        while slots and self._is_late(throttle):
            slots.popleft()
        return bool(slots) or self._ask(throttle, slots, jobs_left)

    def _is_late(self, throttle: Throttle) -> bool:
        """Whether the next slot is missed."""
        slots = self._rated_slots(throttle)
        if not slots or throttle.rate_per_s is None:
            return False
        return slots[0] < self._now() - max(LATE_S, 0.25 / throttle.rate_per_s)

    def _ask(self, throttle: Throttle, slots: deque[float], jobs_left: int) -> bool:
        number = self._number(throttle, jobs_left)
        try:
            self._tell_spent(throttle.id)
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
        except throttles.GoneError:
            self._gone.add(throttle.id)
            return True
        except StoreError as exc:
            logger.warning("no leave: throttle=%s: %s", throttle.id, exc)
            grant = None
        if grant is None:
            self._shut.add(throttle.id)
            return False
        if throttle.concurrency is not None:
            self._locked.add(throttle.id)
        # Not before the answer is here: a burst may begin in the past, and the way to the store takes its time.
        now = self._now()
        slots.extend(max(grant.start + n * grant.interval_s, now) for n in range(number))
        return True

    def _number(self, throttle: Throttle, jobs_left: int) -> int:
        """How many slots to ask for at once."""
        if throttle.unit is not None:
            return 1
        if throttle.rate_per_s is None:
            return jobs_left
        # A handler that takes longer than the slots are apart would miss those in between: others can have them.
        if self._let_go_at is None or self._now() - self._let_go_at > 1.0 / throttle.rate_per_s:
            return 1
        return max(1, min(jobs_left, int(throttle.rate_per_s * BLOCK_S)))

    def _now(self) -> float:
        return self._rt.store.now().timestamp()
