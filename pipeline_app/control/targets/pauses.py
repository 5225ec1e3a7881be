"""Pausing a run, one of its stages or a partition, and letting it go on. Kept in the store: no restart forgets it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline_app.domain.plan import RunPlan
from pipeline_app.domain.target import Target
from pipeline_app.errors import NotFoundError
from pipeline_app.flow.announce import announce
from pipeline_app.runtime import Runtime
from pipeline_app.store import holds, jobs, manifests, partitions
from pipeline_app.store.client import Document


def pause(
    rt: Runtime,
    run: str,
    *,
    stage: str | None = None,
    partition: str | None = None,
    reason: str = "",
    actor: str = "",
) -> dict[str, Any]:
    """Start nothing more of a run, a stage or a partition until it is resumed; what runs ends.

    Returns its row, with how many `workers` have heard of it and how many are alive; the others see it within a second.
    Raises NotFoundError (run, stage or partition), StoreError.
    """
    target = _target(rt, run, stage, partition)
    row = holds.close(rt.store, holds.PAUSE, target, until=None, reason=reason, actor=actor)
    told, alive = announce(rt, count=True)
    return {**_row(row, jobs.count_kept_by(rt.store, [row["_id"]])), "workers": told, "workers_alive": alive}


def resume(
    rt: Runtime, run: str, *, stage: str | None = None, partition: str | None = None
) -> list[dict[str, Any]]:
    """Let what was paused with the same words go on; returns the rows. Raises NotFoundError, StoreError."""
    target = _target(rt, run, stage, partition)
    pause_id = target.digest(holds.PAUSE)
    rows = [row for row in listing(rt, run) if row["pause"] == pause_id]
    if not rows or not holds.end(rt.store, pause_id):
        others = [f"--stage {row['stage']}" if row["stage"] else "the whole run" for row in listing(rt, run)]
        raise NotFoundError(
            f"{target} is not paused", hint="paused are: " + ", ".join(others) if others else "nothing of it is paused"
        )
    announce(rt)
    return rows


def listing(rt: Runtime, run: str | None = None) -> list[dict[str, Any]]:
    """What is paused, oldest first; of a run or of all. Raises NotFoundError, StoreError."""
    run = None if run is None else manifests.get(rt.store, run)["_id"]
    rows = holds.listing(rt.store, kind="pause", run=run, ended=False)
    kept = jobs.count_kept_by(rt.store, [row["_id"] for row in rows])
    return [_row(row, kept) for row in rows]


def _target(rt: Runtime, run: str, stage: str | None, partition: str | None) -> Target:
    plan = RunPlan.of(manifests.get(rt.store, run))
    task = None if stage is None else f"{plan.pipeline}.{plan.stage(stage).name}"
    if partition is not None:
        known = sorted({row["partition"] for row in partitions.of_pipelines(rt.store, [plan.pipeline])})
        if partition not in known:
            shown = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
            raise NotFoundError(
                f"pipeline {plan.pipeline} has no partition {partition!r}", hint=f"its partitions are {shown}"
            )
    return Target(run=plan.run, stage=task, partition=partition)


def _row(row: Document, kept: Mapping[str, int]) -> dict[str, Any]:
    return {
        "pause": row["_id"],
        "run": row["run"],
        "stage": None if row["stage"] is None else row["stage"].partition(".")[2],
        "partition": row["partition"],
        "reason": row["reason"],
        "actor": row["actor"],
        "created_at": row["created_at"],
        "waiting_jobs": kept[row["_id"]],
    }
