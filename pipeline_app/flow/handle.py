"""Run a stage's handler for each job, and say how it ended. What a handler raises is an outcome, never our error."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from datetime import datetime, timedelta

from billiard.common import terminate_handler_fired

from pipeline_app.domain.job import Job, idempotency_key
from pipeline_app.domain.outcome import AttemptOutcome, ErrorRecord, Move, Outcome
from pipeline_app.domain.pipeline import Stage
from pipeline_app.domain.states import DeadKind
from pipeline_app.errors import RateLimited
from pipeline_app.flow import alone, gates
from pipeline_app.flow.claim import Work
from pipeline_app.flow.closing import Closings
from pipeline_app.flow.execute import execute, permanent_kind
from pipeline_app.flow.throttling import Leave
from pipeline_app.runtime import Runtime

logger = logging.getLogger("pipeline_app.handlers")


def handle(
    rt: Runtime, work: Work, stage: Stage, ready: Sequence[str], leave: Leave, closings: Closings
) -> list[Outcome]:
    """The outcome of every job in `ready`, each asked about once more right before its handler.

    What throttles and holds are still to be told is in `leave` and `closings` afterwards.
    """
    outcomes: list[Outcome] = []
    for position, job_id in enumerate(ready):
        # The gates also after the wait: a hold that was set meanwhile is in force.
        outcome = (
            gates.ask(gates.LATE_GATES, rt, work, job_id, rt.store.now())
            or leave.wait(job_id, len(ready) - position)
            or (gates.ask(gates.LATE_GATES, rt, work, job_id, rt.store.now()) if leave.has_waited else None)
        )
        outcomes.append(outcome or _attempt(rt, work, stage, job_id, leave, closings))
    return outcomes


def _attempt(rt: Runtime, work: Work, stage: Stage, job_id: str, leave: Leave, closings: Closings) -> Outcome:
    started_at = rt.store.now()
    begin = time.perf_counter()
    job = job_of(work, job_id)
    try:
        if work.jobs[job_id]["losses"]:
            output = alone.run(rt, work, stage, job)  # a suspect: its process died before
        else:
            output = execute(stage.handler, work.inputs[job_id], job, work.message)
    except alone.LostAloneError as exc:
        return _lost(work, stage, job_id, exc.error, started_at, time.perf_counter() - begin)
    except RateLimited as exc:
        return _deferred(work, stage, job_id, exc, closings, started_at, time.perf_counter() - begin)
    except BaseException as exc:  # MemoryError and SystemExit would end the worker and come back for the next one
        if terminate_handler_fired():
            raise  # this SystemExit is the pool ending its child, not the handler's: the claim is given back
        return _failed(rt, work, stage, job_id, exc, started_at, time.perf_counter() - begin)
    finally:
        leave.spent(job_id, job.spent)
    return Outcome(
        job_id=job_id,
        move=Move.ADVANCE,
        attempt=AttemptOutcome.OK,
        output=output,
        started_at=started_at,
        duration_s=time.perf_counter() - begin,
    )


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
    rt: Runtime, work: Work, stage: Stage, job_id: str, exc: BaseException, started_at: datetime, duration_s: float
) -> Outcome:
    failures = work.jobs[job_id]["failures"] + 1
    kind = exc.kind if isinstance(exc, alone.FailedAloneError) else permanent_kind(exc)
    again = kind is None and stage.retry.allows(failures)
    # Milliseconds are what MongoDB keeps; a whole one more never makes a job early.
    due_at = rt.store.now() + timedelta(seconds=stage.retry.delay_s(failures)) if again else None
    return Outcome(
        job_id=job_id,
        move=Move.RETRY if again else Move.BURY,
        attempt=AttemptOutcome.FAILED,
        error=_error(exc),
        kind=None if again else kind or DeadKind.EXHAUSTED,
        due_at=due_at,
        started_at=started_at,
        duration_s=duration_s,
    )


def _error(exc: BaseException) -> ErrorRecord:
    """The record of what the handler raised, here or in a process of its own."""
    if isinstance(exc, (alone.FailedAloneError, alone.RateLimitedAloneError)):
        return exc.error
    return ErrorRecord.of(exc)
