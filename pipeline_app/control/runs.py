"""Making runs, and what is asked of a run as a whole."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pipeline_app.control.sight.status import Status, status
from pipeline_app.domain.job import check_run_name
from pipeline_app.domain.pipeline import MAX_BOUND, Pipeline, signatures
from pipeline_app.domain.plan import RunPlan
from pipeline_app.errors import NotFoundError, UsageError
from pipeline_app.flow.forward import task_name
from pipeline_app.runtime import Runtime
from pipeline_app.store import manifests, schema
from pipeline_app.store.client import Document

#: How often `wait` looks.
LOOK_EVERY_S = 0.5


def create_run(
    rt: Runtime, run: str, pipeline: Pipeline | str, *, then: Any = None, bound: int | None = None
) -> Document:
    """Make a run of a pipeline; returns its manifest.

    Args:
        pipeline: a Pipeline, or the name of one in celeryconfig.py.
        then: signatures of your own Celery tasks to call with the results, instead of the pipeline's.
        bound: jobs that may be unfinished at a time before seeders wait, instead of the pipeline's.

    Raises NotFoundError (no such pipeline), RunExistsError, UsageError (the name, the bound), StoreError.
    """
    check_run_name(run)
    if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int) or not 1 <= bound <= MAX_BOUND):
        raise UsageError(f"a bound is a whole number from 1 to {MAX_BOUND:,}, not {bound!r}")
    chosen = find_pipeline(rt, pipeline) if isinstance(pipeline, str) else pipeline
    rt.store.synchronise()
    schema.ensure(rt.store)
    rt.memory.forget(run)
    return manifests.create(
        rt.store,
        run,
        pipeline=chosen.name,
        definition=chosen.definition(),
        hash=chosen.hash,
        then=_own_tasks(chosen, then) if then is not None else chosen.then,
        bound=bound if bound is not None else chosen.bound,
        order_partitions=chosen.order_partitions,
    )


def _own_tasks(pipeline: Pipeline, then: Any) -> list[Document]:
    """The signatures behind our stages, whether or not our stages stand before them."""
    found = signatures(then)
    ours = [task_name(pipeline.name, stage.name) for stage in pipeline.stages]
    if [part["task"] for part in found[: len(ours)]] == ours:
        return found[len(ours) :]
    return found


def find_pipeline(rt: Runtime, name: str) -> Pipeline:
    """The application's pipeline of that name. Raises NotFoundError."""
    pipeline = rt.pipelines.get(name)
    if pipeline is None:
        known = ", ".join(sorted(rt.pipelines)) or "none: set `pipelines` in celeryconfig.py"
        raise NotFoundError(f"there is no pipeline {name!r}", hint=f"known pipelines: {known}")
    return pipeline


def wait(
    rt: Runtime,
    run: str,
    *,
    timeout_s: float | None = None,
    stage: str | None = None,
    progress: Callable[[Status], None] = lambda status: None,
) -> Status:
    """Wait until every job of the run is at rest (or, with `stage`, past that stage), and return the last status.

    Returns as soon as the answer is known: also when the time is over, or when a seed batch was interrupted; the
    status says which. Raises NotFoundError, StoreError.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    manifest = manifests.get(rt.store, run)
    plan = RunPlan.of(manifest)
    if stage is not None:
        plan.stage(stage)
    while True:
        now = status(rt, plan.run, queues=False)
        progress(now)
        if now.is_past(stage) or now.interrupted:
            return now
        if deadline is not None and time.monotonic() >= deadline:
            return now
        pause = LOOK_EVERY_S if deadline is None else min(LOOK_EVERY_S, max(0.0, deadline - time.monotonic()))
        time.sleep(pause)
