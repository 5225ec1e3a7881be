"""Run a stage's handler for each job, and say how it ended. What a handler raises is an outcome, never our error."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from datetime import datetime, timedelta

from billiard.common import terminate_handler_fired

from pipeline_app.domain.handler import to_storable
from pipeline_app.domain.job import Job, idempotency_key
from pipeline_app.domain.outcome import AttemptOutcome, ErrorRecord, Move, Outcome
from pipeline_app.domain.pipeline import Stage
from pipeline_app.domain.states import DeadKind
from pipeline_app.errors import InvalidInputError, InvalidResultError, PermanentError
from pipeline_app.flow import gates
from pipeline_app.flow.claim import Work
from pipeline_app.runtime import Runtime
from pipeline_app.store import outputs

logger = logging.getLogger("pipeline_app.handlers")

#: Errors that no second attempt mends, and the kind of dead letter that each becomes.
PERMANENT: dict[type[BaseException], DeadKind] = {
    PermanentError: DeadKind.PERMANENT,
    InvalidInputError: DeadKind.INVALID_INPUT,
    InvalidResultError: DeadKind.INVALID_RESULT,
}


def handle(rt: Runtime, work: Work, stage: Stage, ready: Sequence[str]) -> list[Outcome]:
    """The outcome of every job in `ready`, each asked about once more right before its handler."""
    return [
        gates.ask(gates.LATE_GATES, rt, work, job_id, rt.store.now()) or _attempt(rt, work, stage, job_id)
        for job_id in ready
    ]


def _attempt(rt: Runtime, work: Work, stage: Stage, job_id: str) -> Outcome:
    started_at = rt.store.now()
    begin = time.perf_counter()
    try:
        value = stage.handler.validate(work.inputs[job_id])
        result = to_storable(stage.handler.call(value, job_of(work, job_id)))
        output = outputs.encode_output(work.plan.run, job_id, work.stage, work.message, result)
    except BaseException as exc:  # MemoryError and SystemExit would end the worker and come back for the next one
        if terminate_handler_fired():
            raise  # this SystemExit is the pool ending its child, not the handler's: the claim is given back
        return _failed(rt, work, stage, job_id, exc, started_at, time.perf_counter() - begin)
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


def _failed(
    rt: Runtime, work: Work, stage: Stage, job_id: str, exc: BaseException, started_at: datetime, duration_s: float
) -> Outcome:
    failures = work.jobs[job_id]["failures"] + 1
    kind = next((kind for error, kind in PERMANENT.items() if isinstance(exc, error)), None)
    again = kind is None and stage.retry.allows(failures)
    # Milliseconds are what MongoDB keeps; a whole one more never makes a job early.
    due_at = rt.store.now() + timedelta(seconds=stage.retry.delay_s(failures)) if again else None
    return Outcome(
        job_id=job_id,
        move=Move.RETRY if again else Move.BURY,
        attempt=AttemptOutcome.FAILED,
        error=ErrorRecord.of(exc),
        kind=None if again else kind or DeadKind.EXHAUSTED,
        due_at=due_at,
        started_at=started_at,
        duration_s=duration_s,
    )
