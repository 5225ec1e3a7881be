"""Cancelling a run: first the flag, which every worker asks before each handler, then the jobs, page by page.

A job that a worker records while this goes on is found by the next look; the sweep looks until nothing is left.
"""

from __future__ import annotations

import logging
from collections import defaultdict

from pipeline_app.control import seeding
from pipeline_app.domain.partition import queue_name
from pipeline_app.domain.plan import RunPlan
from pipeline_app.domain.states import JobState
from pipeline_app.flow.lifeline import FLAGS
from pipeline_app.runtime import Runtime
from pipeline_app.store import jobs, manifests, messages, partitions, transition, workers
from pipeline_app.store.client import Document
from pipeline_app.store.transition import JobMove, NotFittingError, Transition

logger = logging.getLogger(__name__)

PAGE = 2000
_OPEN = (JobState.WAITING, JobState.PENDING, JobState.RETRY_WAITING, JobState.HELD)


def cancel(rt: Runtime, run: str) -> int:
    """Cancel a run; returns how many jobs this call moved to `cancelled`. Cancelling again is harmless.

    A handler that runs already ends; what it did is refused. Raises NotFoundError, StoreError.
    """
    manifest = manifests.get(rt.store, run)
    manifests.update(rt.store, manifest["_id"], {"cancelled_at": rt.store.now()}, cancelled_at=None)
    workers.bump(rt.store, FLAGS)
    return _move_all(rt, RunPlan.of(manifest))


def sweep(rt: Runtime) -> None:
    """Finish what a cancelling process left, and what workers recorded meanwhile."""
    for manifest in manifests.matching(rt.store, {"cancelled_at": {"$ne": None}, "cancel_done": False}):
        plan = RunPlan.of(manifest)
        for row in manifests.batches(rt.store, plan.run, "interrupted"):
            # Nobody seeds on in a cancelled run: closed, its jobs can be cancelled.
            seeding.close_batch(rt, row)
        moved = _move_all(rt, plan)
        # The jobs of a seed batch that is still open come later.
        if moved == 0 and not manifests.batches(rt.store, plan.run, "open", "closing", "removing"):
            manifests.update(rt.store, plan.run, {"cancel_done": True})


def _move_all(rt: Runtime, plan: RunPlan) -> int:
    moved = 0
    # A batch that may be taken back takes its counters with it: what it has in them must still be true.
    hidden = seeding.hidden_batches(rt)
    while rows := jobs.in_state(rt.store, plan.run, _OPEN, PAGE, hidden):
        # Asked again: a batch is there before its jobs are.
        hidden = seeding.hidden_batches(rt)
        moved += _move(rt, plan, [row for row in rows if row["batch"] not in hidden])
    queues = [
        queue_name(plan.pipeline, stage.name, row["partition"])
        for row in partitions.of_pipelines(rt.store, [plan.pipeline])
        for stage in plan.stages
        if row["stage"] == stage.name
    ]
    messages.close_open(rt.store, plan.run, queues)
    return moved


def _move(rt: Runtime, plan: RunPlan, rows: list[Document]) -> int:
    left = {row["_id"]: row for row in rows}
    while left:
        now = rt.store.now()
        whole = Transition(now=now)
        groups: dict[tuple[str, str, str], list[Document]] = defaultdict(list)
        for row in left.values():
            groups[row["stage"], row["partition"], row["state"]].append(row)
        for (stage, partition, state), group in groups.items():
            whole.moves.append(
                JobMove(
                    keys=[row["_id"] for row in group],
                    guard={"state": state, "stage": stage},
                    set={"state": JobState.CANCELLED, "message": None},
                    unset=("due_at", "reason"),
                )
            )
            whole.count((plan.run, stage, partition), JobState(state), JobState.CANCELLED, len(group))
            ids = [row["job"] for row in group]
            whole.events.append(transition.event(plan.run, stage, "cancelled", jobs=ids, now=now))
        try:
            with rt.counting() as whole.worker:
                transition.apply(rt.store, whole)
            return len(left)
        except NotFittingError as exc:
            left = {key: row for key, row in left.items() if key not in exc.jobs}
    return 0
