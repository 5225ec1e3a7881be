"""Which of a message's jobs may run. The order is the tuple; a gate looks at memory only, never at the network.

A job can be stopped at a gate without touching the others of its chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime

from pipeline_app.domain.outcome import Move, Outcome
from pipeline_app.domain.states import DeadKind
from pipeline_app.flow.claim import Work
from pipeline_app.runtime import Runtime

#: Says what becomes of the job instead of running, or None to let it pass.
Gate = Callable[[Runtime, Work, str, datetime], Outcome | None]


def duplicate(rt: Runtime, work: Work, job_id: str, now: datetime) -> Outcome | None:  # noqa: ARG001
    """A job that names another message by now is not this message's any more."""
    job = work.jobs.get(job_id)
    if job is None or job["message"] != work.message:
        return Outcome(job_id=job_id, move=Move.SKIP)
    return None


def cancelled(rt: Runtime, work: Work, job_id: str, now: datetime) -> Outcome | None:  # noqa: ARG001
    """Nothing of a cancelled run starts."""
    return Outcome(job_id=job_id, move=Move.CANCEL) if rt.memory.is_cancelled(work.plan.run) else None


def expired(rt: Runtime, work: Work, job_id: str, now: datetime) -> Outcome | None:  # noqa: ARG001
    """A job is not started after its time."""
    expires_at = work.jobs[job_id].get("expires_at")
    if expires_at is None or now <= expires_at:
        return None
    return Outcome(job_id=job_id, move=Move.BURY, kind=DeadKind.EXPIRED)


def taken(rt: Runtime, work: Work, job_id: str, now: datetime) -> Outcome | None:  # noqa: ARG001
    """A job that was cancelled since its message was claimed is not this message's any more."""
    left = rt.memory.flags().left_in.get(work.message)
    return None if left is None or job_id in left else Outcome(job_id=job_id, move=Move.SKIP)


def closed(rt: Runtime, work: Work, job_id: str, now: datetime) -> Outcome | None:  # noqa: ARG001
    """A job whose target is held, or whose place is paused, waits in the store; what the hold itself let go passes."""
    place = rt.memory.flags().closures.at(work.plan.run, work.task, work.partition)
    if place.is_empty:
        return None
    for closure in place.matching(work.jobs[job_id]["tags"]):
        if closure.passes is None or closure.passes != work.released_by:
            move = Move.PAUSE if closure.is_pause else Move.HOLD
            return Outcome(job_id=job_id, move=move, waits_for=closure.id)
    return None


def is_open(rt: Runtime, run: str, task: str, partition: str) -> bool:
    """Whether nothing at all is closed or throttled there."""
    flags = rt.memory.flags()
    return flags.closures.at(run, task, partition).is_empty and flags.throttles.at(run, task, partition).is_empty


def keeper(rt: Runtime, run: str, task: str, partition: str, tags: Mapping[str, str]) -> tuple[Move, str] | None:
    """What keeps a job that comes to that place now, so that it need not travel there to be told; None if nothing does.

    Jobs under a rate wait for their turn from the start: a queue in front of the line would be in its way. Other
    throttles may have room, which only the worker who asks finds out.
    """
    flags = rt.memory.flags()
    for closure in flags.closures.at(run, task, partition).matching(tags):
        return (Move.PAUSE if closure.is_pause else Move.HOLD), closure.id
    for throttle in flags.throttles.at(run, task, partition).matching(tags):
        if throttle.rate_per_s is not None or throttle.is_ordered:
            return throttle.move, throttle.id
    return None


#: Asked once, when a chunk is claimed.
GATES: tuple[Gate, ...] = (duplicate, cancelled, expired, closed)
#: Asked again right before each job's handler: a chunk may take long.
LATE_GATES: tuple[Gate, ...] = (cancelled, taken, expired, closed)


def ask(gates: tuple[Gate, ...], rt: Runtime, work: Work, job_id: str, now: datetime) -> Outcome | None:
    """The first objection of `gates`, or None."""
    for gate in gates:
        outcome = gate(rt, work, job_id, now)
        if outcome is not None:
            return outcome
    return None


def sort(rt: Runtime, work: Work) -> tuple[list[str], list[Outcome]]:
    """The jobs that may run, and the verdicts on the others."""
    now = rt.store.now()
    ready: list[str] = []
    refused: list[Outcome] = []
    for job_id in work.job_ids:
        outcome = ask(GATES, rt, work, job_id, now)
        if outcome is None:
            ready.append(job_id)
        else:
            refused.append(outcome)
    return ready, refused
