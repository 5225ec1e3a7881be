"""Running jobs through all stages of a pipeline in this process, without any service: `pipeline-app try`.

Everything that a worker would judge is judged here: the payload, the handler's annotation, its result, and whether
MongoDB could hold it. Nothing waits: a failure that would be retried is shown as that, and ends the job's trial.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipeline_app.domain.handler import to_storable
from pipeline_app.domain.job import Job, JobLine, idempotency_key
from pipeline_app.domain.outcome import ErrorRecord
from pipeline_app.domain.pipeline import Pipeline, Stage
from pipeline_app.domain.states import DeadKind
from pipeline_app.errors import BadJobLineError, RateLimited
from pipeline_app.flow.execute import permanent_kind
from pipeline_app.store.encoding import UnstorableError, encode
from pipeline_app.store.outputs import encode_output

#: Stands for a run and for message ids where there are none.
RUN = "try"

logger = logging.getLogger("pipeline_app.handlers")


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a stage made of a job."""

    job_id: str
    stage: str
    partition: str
    #: ok, would_retry, would_hold (its target is closed) or dead_lettered.
    outcome: str
    #: What the stage made of it, as it would be stored; None unless the outcome is ok.
    result: Any
    duration_s: float
    #: Kind of the dead letter that it would be.
    kind: str | None
    #: Seconds until it would be tried again.
    retry_in_s: float | None
    error: dict[str, str] | None


def run(pipeline: Pipeline, lines: Iterable[JobLine]) -> Iterator[Step]:
    """Take each job through the stages, as far as it gets; its steps are given as they are made.

    Raises BadJobLineError for a payload that seeding would refuse.
    """
    for line in lines:
        try:
            encode({"payload": line.payload})
        except UnstorableError as exc:
            raise BadJobLineError(f"job {line.job_id!r}: its payload cannot be stored: {exc}") from exc
        yield from _job(pipeline, line)


def _job(pipeline: Pipeline, line: JobLine) -> Iterator[Step]:
    value = line.payload
    for stage in pipeline.stages:
        step = _step(pipeline, stage, line, value)
        yield step
        if step.outcome != "ok":
            return
        value = step.result


def _step(pipeline: Pipeline, stage: Stage, line: JobLine, value: Any) -> Step:
    def made(outcome: str, **more: Any) -> Step:
        fields: dict[str, Any] = {"result": None, "kind": None, "retry_in_s": None, "error": None, **more}
        return Step(
            job_id=line.job_id,
            stage=stage.name,
            partition=pipeline.partition(line.tags, line.order_key),
            outcome=outcome,
            duration_s=round(time.perf_counter() - begin, 6),
            **fields,
        )

    begin = time.perf_counter()
    expires_at = line.expiry()
    if expires_at is not None and datetime.now(UTC) > expires_at:
        return made("dead_lettered", kind=DeadKind.EXPIRED)
    try:
        result = to_storable(stage.handler.call(stage.handler.validate(value), _as_job(stage, line)))
        encode_output(RUN, line.job_id, stage.name, RUN, result)
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # noqa: BLE001 - also SystemExit, as in a worker
        error = ErrorRecord.of(exc).as_dict()
        if isinstance(exc, RateLimited):
            return made("would_hold", error=error)
        kind = permanent_kind(exc)
        if kind is None and stage.retry.allows(1):
            return made("would_retry", error=error, retry_in_s=round(stage.retry.delay_s(1), 3))
        return made("dead_lettered", error=error, kind=kind or DeadKind.EXHAUSTED)
    return made("ok", result=result)


def _as_job(stage: Stage, line: JobLine) -> Job:
    ids = {"run": RUN, "stage": stage.name, "job": line.job_id}
    return Job(
        id=line.job_id,
        run=RUN,
        stage=stage.name,
        tags=line.tags,
        attempt=1,
        key=idempotency_key(RUN, line.job_id, stage.name, 0),
        log=logging.LoggerAdapter(logger, ids),
    )
