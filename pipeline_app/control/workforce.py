"""The workers of a stage, on whatever machine: who they are, asking them to stop, and whether they have.

The commands of `stage` call it. A worker is asked through its record in the store, and stops itself: see
`worker/lifeline.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from pipeline_app.domain.partition import queue_stage
from pipeline_app.domain.plan import RunPlan
from pipeline_app.domain.selector import Selectors, written
from pipeline_app.errors import NotFoundError, RefusedError
from pipeline_app.runtime import Runtime
from pipeline_app.store import partitions, workers
from pipeline_app.store.client import Document

#: What is told of a worker that was started or stopped.
SHOWN = ("worker", "host", "pid", "pool", "concurrency", "select", "skip")


def stage_name(plan: RunPlan, stage: str) -> str:
    """`survey.load`, after checking that the run has that stage; `stage` may be written so. Raises NotFoundError."""
    return f"{plan.pipeline}.{plan.stage(stage.removeprefix(f'{plan.pipeline}.')).name}"


def check_pipeline(rt: Runtime, plan: RunPlan) -> bool:
    """Whether workers of this project know the run's definition; its jobs would wait for others.

    Raises RefusedError if this project does not even have the pipeline.
    """
    own = rt.pipelines.get(plan.pipeline)
    if own is None:
        raise RefusedError(
            f"this project has no pipeline {plan.pipeline!r}, which run {plan.run} uses", hint="see celeryconfig.py"
        )
    return own.hash == plan.hash


def queues(rt: Runtime, stage: str, selectors: Selectors) -> list[str]:
    """The stage's queues that a worker with these selectors would consume now.

    Raises NotFoundError if there are selectors and no partition fits, StoreError.
    """
    rows = [row for row in partitions.of_pipelines(rt.store, [stage.partition(".")[0]]) if _is_of(row, stage)]
    found = [row["_id"] for row in rows if selectors.admit(row["tags"])]
    if selectors and not found:
        select, skip = selectors.written()
        meant = [*(f"--select {item}" for item in select), *(f"--skip {item}" for item in skip)]
        known = "; ".join(written(row["tags"]) or "default" for row in rows[:10])
        hint = f"they are {known}" if rows else "they come with the first jobs: seed the run before"
        raise NotFoundError(f"no partition of {stage} fits {' '.join(meant)}", hint=hint)
    return found


def _is_of(row: Document, stage: str) -> bool:
    return f"{row['pipeline']}.{row['stage']}" == stage


def of_stage(rt: Runtime, stage: str) -> list[Document]:
    """The workers with a lease that run the stage, or partitions of it; oldest first. Raises StoreError."""
    rows = [row for row in workers.alive(rt.store) if stage in _stages(row)]
    return sorted(rows, key=lambda row: (row["started_at"], row["worker"]))


def runs_others(row: Document, stage: str) -> list[str]:
    """What else that worker runs: other stages, and queues that are none of ours."""
    return sorted((_stages(row) | set(row.get("other_queues", ()))) - {stage})


def runs_all(row: Document, stage: str) -> bool:
    """Whether the worker follows the stage, and does not only run partitions of it that were named one by one."""
    return stage in row["queues"]


def _stages(row: Document) -> set[str]:
    return {queue_stage(queue) for queue in row["queues"]}


def has_selectors(row: Document, selectors: Selectors) -> bool:
    """Whether the worker was started with exactly these."""
    return (row["select"], row["skip"]) == selectors.written()


def names_on(rt: Runtime, host: str) -> set[str]:
    """Names that workers of this machine have, without the host. Raises StoreError."""
    return {row["worker"].removesuffix(f"@{host}") for row in workers.alive(rt.store) if row["host"] == host}


def registered(rt: Runtime, host: str, pids: Collection[int]) -> list[Document]:
    """Of these processes of this machine those that are workers by now. Raises StoreError."""
    return [row for row in workers.alive(rt.store) if row["host"] == host and row["pid"] in pids]


def ask_to_stop(rt: Runtime, rows: Sequence[Document], *, now: bool) -> None:
    """Let these workers finish what runs, and end; `now`: give it back and end. Raises StoreError."""
    workers.request_stop(rt.store, [row["_id"] for row in rows], workers.NOW if now else workers.WARM)


def still_running(rt: Runtime, rows: Iterable[Document], *, now: bool) -> list[Document]:
    """Which of the workers that were asked to stop have not yet. Raises StoreError."""
    asked = {_process(row) for row in rows}
    left = [row for row in workers.alive(rt.store) if _process(row) in asked]
    # A process that lost its lease meanwhile, or had just begun anew, has another record, which nobody has asked.
    anew = [row for row in left if row.get("stop") is None]
    if anew:
        ask_to_stop(rt, anew, now=now)
    return left


def _process(row: Document) -> tuple[str, str, int]:
    return row["worker"], row["host"], row["pid"]


def as_dicts(rt: Runtime, rows: Sequence[Document]) -> list[dict[str, Any]]:
    """These workers as the commands show them, as they are now. Raises StoreError."""
    now = workers.by_ids(rt.store, [row["_id"] for row in rows])
    return [_as_dict(now.get(row["_id"], row)) for row in rows]


def _as_dict(row: Document) -> dict[str, Any]:
    return {**{name: row[name] for name in SHOWN}, "state": row["state"], "log": row.get("log")}
