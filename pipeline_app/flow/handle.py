"""Run a stage's handler for each job, and say how it ended. What a handler raises is an outcome, never our error."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from billiard.common import terminate_handler_fired

from pipeline_app.domain.job import Job, idempotency_key
from pipeline_app.domain.outcome import AttemptOutcome, ErrorRecord, Move, Outcome
from pipeline_app.domain.pipeline import Stage
from pipeline_app.domain.states import DeadKind
from pipeline_app.errors import RateLimited
from pipeline_app.flow import alone, gates
from pipeline_app.flow.board import Board
from pipeline_app.flow.claim import Work
from pipeline_app.flow.closing import Closings
from pipeline_app.flow.deadline import OvertakenError, Watch, Watchdog, time_limit_error
from pipeline_app.flow.execute import execute, permanent_kind
from pipeline_app.flow.frames import let_go
from pipeline_app.flow.throttling import Leave
from pipeline_app.runtime import Runtime

logger = logging.getLogger("pipeline_app.handlers")


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A message of which jobs are to be run, and all that takes part in that.

    Nothing in it may lead back to it once its handlers have ended: it would stay, with the inputs of all jobs, until
    the collector of garbage finds it.
    """

    rt: Runtime
    work: Work
    stage: Stage
    #: What became of those of the message's jobs that the gates did not let through.
    refused: Sequence[Outcome]
    #: What throttles and holds are still to be told is in these two afterwards.
    leave: Leave
    closings: Closings
    watchdog: Watchdog
    board: Board
    #: Called, in a thread of its own, if a handler runs past its time limit: with this chunk and the outcomes of all
    #: jobs, for a record on behalf of the thread that is stuck.
    on_overdue: Callable[[Chunk, Sequence[Outcome]], None]
    #: Whether the worker stops: then no other of the message's jobs begins.
    stopping: Callable[[], bool] = lambda: False


def handle(chunk: Chunk, ready: Sequence[str]) -> list[Outcome]:
    """The outcome of every job: those that were refused, and those in `ready`.

    Each of these is asked about once more right before its handler.

    Raises OvertakenError if a handler ran past its time limit and ended after all: `on_overdue` was called then.
    """
    rt, work, leave = chunk.rt, chunk.work, chunk.leave
    outcomes = list(chunk.refused)
    for position, job_id in enumerate(ready):
        if chunk.stopping():
            return outcomes + again(ready[position:])
        # The gates also after the wait: a hold that was set meanwhile is in force.
        outcome = (
            gates.ask(gates.LATE_GATES, rt, work, job_id, rt.store.now())
            or leave.wait(job_id, len(ready) - position)
            or (gates.ask(gates.LATE_GATES, rt, work, job_id, rt.store.now()) if leave.has_waited else None)
        )
        outcomes.append(outcome or _attempt(chunk, ready, position, outcomes))
    return outcomes


def _attempt(chunk: Chunk, ready: Sequence[str], position: int, before: Sequence[Outcome]) -> Outcome:
    rt, work, stage, job_id = chunk.rt, chunk.work, chunk.stage, ready[position]
    started_at = rt.store.now()
    begin = time.perf_counter()
    job = job_of(work, job_id)
    try:
        if work.jobs[job_id]["losses"]:
            output = alone.run(rt, work, stage, job)  # a suspect: its process died before
        else:
            output = _within_limits(chunk, job, started_at, lambda late: [*before, late, *again(ready[position + 1 :])])
    except OvertakenError as exc:
        # Its message is being recorded: what the handler spent is told after that.
        exc.settled.wait()
        raise
    except alone.LostAloneError as exc:
        return _lost(work, stage, job_id, exc.error, started_at, time.perf_counter() - begin)
    except RateLimited as exc:
        return _deferred(work, stage, job_id, exc, chunk.closings, started_at, time.perf_counter() - begin)
    except BaseException as exc:  # MemoryError and SystemExit would end the worker and come back for the next one
        if terminate_handler_fired():
            raise  # this SystemExit is the pool ending its child, not the handler's: the claim is given back
        kind = exc.kind if isinstance(exc, alone.FailedAloneError) else permanent_kind(exc)
        return _failed(rt, work, stage, job_id, _error(exc), kind, started_at, time.perf_counter() - begin)
    finally:
        chunk.leave.spent(job_id, job.spent)
    return Outcome(
        job_id=job_id,
        move=Move.ADVANCE,
        attempt=AttemptOutcome.OK,
        output=output,
        started_at=started_at,
        duration_s=time.perf_counter() - begin,
    )


def _within_limits(
    chunk: Chunk, job: Job, started_at: datetime, with_others: Callable[[Outcome], list[Outcome]]
) -> Any:
    """The output of the job's handler, if that ends within the stage's limits.

    `with_others` puts the outcome of a job that ran past the hard one among those of the message's other jobs.
    """
    work, stage = chunk.work, chunk.stage

    def call() -> Any:
        return execute(stage.handler, work.inputs[job.id], job, work.message)

    if stage.soft_time_limit_s is None and stage.time_limit_s is None:
        return call()

    def overdue(stack: str) -> None:
        chunk.board.ends()
        late = time_out(chunk.rt, work, stage, job.id, started_at, stack)
        chunk.on_overdue(chunk, with_others(late))

    if stage.time_limit_s is not None:
        chunk.board.begins(work.message, work.job_ids.index(job.id), stage.time_limit_s)
    try:
        return Watch(chunk.watchdog, stage.soft_time_limit_s, stage.time_limit_s, overdue).run(call)
    finally:
        chunk.board.ends()


def time_out(rt: Runtime, work: Work, stage: Stage, job_id: str, started_at: datetime, stack: str = "") -> Outcome:
    """The outcome of a job whose handler ran longer than it may: a failed attempt, tried again by policy."""
    assert stage.time_limit_s is not None
    duration_s = (rt.store.now() - started_at).total_seconds()
    return _failed(rt, work, stage, job_id, time_limit_error(stage.time_limit_s, stack), None, started_at, duration_s)


def again(job_ids: Sequence[str]) -> list[Outcome]:
    """The outcomes of jobs whose message ends before their turn."""
    return [Outcome(job_id=job_id, move=Move.AGAIN) for job_id in job_ids]


def job_of(work: Work, job_id: str) -> Job:
    """What the handler may know about the job."""
    document = work.jobs[job_id]
    ids = {"run": work.plan.run, "stage": work.stage, "job": job_id}
    return Job(
        id=job_id,
        run=work.plan.run,
        stage=work.stage,
        tags=document["tags"],
        attempt=document["failures"] + 1,
        key=idempotency_key(work.plan.run, job_id, work.stage, document["generation"]),
        log=logging.LoggerAdapter(logger, ids),
    )


def _deferred(
    work: Work,
    stage: Stage,
    job_id: str,
    exc: RateLimited,
    closings: Closings,
    started_at: datetime,
    duration_s: float,
) -> Outcome:
    """The target takes no more: it is closed, and the job is held until it is open, at no cost but a deferral."""
    hold = closings.close(work, job_id, exc)
    again = work.jobs[job_id]["deferrals"] + 1 < stage.deferrals
    return Outcome(
        job_id=job_id,
        move=Move.HOLD if again else Move.BURY,
        attempt=AttemptOutcome.DEFERRED,
        error=_error(exc),
        kind=None if again else DeadKind.EXHAUSTED,
        waits_for=hold if again else None,
        started_at=started_at,
        duration_s=duration_s,
    )


def _lost(
    work: Work, stage: Stage, job_id: str, error: ErrorRecord, started_at: datetime, duration_s: float
) -> Outcome:
    """Its own process died: that was the job's own doing, and the last time ends it."""
    again = work.jobs[job_id]["losses"] + 1 < stage.losses
    return Outcome(
        job_id=job_id,
        move=Move.LOSE if again else Move.BURY,
        attempt=AttemptOutcome.LOST,
        error=error,
        kind=None if again else DeadKind.WORKER_LOST,
        started_at=started_at,
        duration_s=duration_s,
    )


def _failed(
    rt: Runtime,
    work: Work,
    stage: Stage,
    job_id: str,
    error: ErrorRecord,
    kind: DeadKind | None,
    started_at: datetime,
    duration_s: float,
) -> Outcome:
    """Tried again by the stage's policy, unless the error makes a dead letter of that `kind`."""
    failures = work.jobs[job_id]["failures"] + 1
    allowed = kind is None and stage.retry.allows(failures)
    # Milliseconds are what MongoDB keeps; a whole one more never makes a job early.
    due_at = rt.store.now() + timedelta(seconds=stage.retry.delay_s(failures)) if allowed else None
    return Outcome(
        job_id=job_id,
        move=Move.RETRY if allowed else Move.BURY,
        attempt=AttemptOutcome.FAILED,
        error=error,
        kind=None if allowed else kind or DeadKind.EXHAUSTED,
        due_at=due_at,
        started_at=started_at,
        duration_s=duration_s,
    )


def _error(exc: BaseException) -> ErrorRecord:
    """The record of what the handler raised, here or in a process of its own; its frames are let go."""
    if isinstance(exc, (alone.FailedAloneError, alone.RateLimitedAloneError)):
        return exc.error
    record = ErrorRecord.of(exc)
    # Handlers keep what they caught, to raise it when all their tries have failed.
    let_go(exc)
    return record
