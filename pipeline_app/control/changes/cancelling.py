"""Cancelling a run, or some of its jobs.

Of a run, the flag comes first, which every worker asks before each handler, then the jobs, page by page. A job that a
worker records while this goes on is found by the next look; the sweep looks until nothing is left. A selection is
cancelled by whoever asks for it, page by page: nothing but calling again finishes it for a caller that was killed.

A job is cancelled at once, also under a handler that runs: what that records is refused. A handler all of whose jobs
were cancelled has the grace of its stage to end, then it is stopped.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from datetime import datetime, timedelta
from typing import Any

from pipeline_app.control.changes import selecting
from pipeline_app.control.changes.fitting import apply_fitting
from pipeline_app.control.changes.selecting import PAGE, UNFINISHED, Progress, silent
from pipeline_app.control.contained import contained
from pipeline_app.control.seed import seeding
from pipeline_app.domain.job import job_key
from pipeline_app.domain.partition import queue_name
from pipeline_app.domain.plan import RunPlan
from pipeline_app.domain.selection import Selection
from pipeline_app.domain.states import JobState, MessageState
from pipeline_app.flow.announce import announce
from pipeline_app.flow.enqueue import split
from pipeline_app.flow.forward import publish_or_leave
from pipeline_app.flow.give_back import give_back
from pipeline_app.runtime import Runtime
from pipeline_app.store import jobs, manifests, messages, partitions, transition, workers
from pipeline_app.store.client import Document
from pipeline_app.store.transition import JobMove, Transition

logger = logging.getLogger(__name__)

#: A worker that was told to end a handler does so within this; if it does not, its message is closed all the same.
OBEYS_S = 10.0
#: Jobs in one question.
ASKED = 10_000


def cancel(rt: Runtime, run: str) -> int:
    """Cancel a run; returns how many jobs this call moved to `cancelled`. Cancelling again is harmless.

    Raises NotFoundError, StoreError.
    """
    manifest = manifests.get(rt.store, run)
    manifests.update(rt.store, manifest["_id"], {"cancelled_at": rt.store.now()}, cancelled_at=None)
    announce(rt)
    return _cancel_all(rt, RunPlan.of(manifest))


def cancel_jobs(rt: Runtime, run: str, selection: Selection, *, actor: str = "", progress: Progress = silent) -> int:
    """Cancel the jobs of a selection that are not at rest; returns how many this call moved to `cancelled`.

    Only those that match now: the run goes on. Raises NotFoundError (run, stage or job), UsageError, StoreError; then
    some are cancelled, and calling again cancels the others.
    """
    plan = selecting.find_run(rt, run, selection)

    def change(rows: list[Document]) -> int:
        named = sorted({row["message"] for row in rows if row["message"] is not None})
        # Before the jobs: of whoever is killed in between, marks are left that say nothing as long as jobs live.
        messages.mark_cancelled(rt.store, named)
        done = _cancel(rt, plan, rows, actor)
        if messages.among(rt.store, named, MessageState.CLAIMED):
            announce(rt)  # those that did not start yet, in messages that run, need not
        open_ones = messages.among(rt.store, named, MessageState.OPEN)
        messages.close_deserted(rt.store, [row["_id"] for row in _deserted(rt, open_ones)])
        return done

    return selecting.change_all(rt, plan, selection, change, progress)


def preview(rt: Runtime, run: str, selection: Selection) -> dict[str, Any]:
    """What cancelling would change: `{"matched", "by_stage", "by_status", "by_partition"}`.

    Raises NotFoundError (run, stage or job), UsageError, StoreError.
    """
    return selecting.summary(selecting.places(rt, selecting.find_run(rt, run, selection), selection))


def sweep(rt: Runtime) -> None:
    """Finish what a cancelling process left of a run, and what workers recorded meanwhile."""
    for manifest in manifests.matching(rt.store, {"cancelled_at": {"$ne": None}, "cancel_done": False}):
        plan = RunPlan.of(manifest)
        for row in manifests.batches(rt.store, plan.run, "interrupted"):
            # Nobody seeds on in a cancelled run: closed, its jobs can be cancelled.
            seeding.close_batch(rt, row)
        moved = _cancel_all(rt, plan)
        # The jobs of a seed batch that is still open come later.
        if moved == 0 and not manifests.batches(rt.store, plan.run, "open", "closing", "removing"):
            manifests.update(rt.store, plan.run, {"cancel_done": True})


def stop_handlers(rt: Runtime) -> None:
    """Stop handlers that run for cancelled jobs alone and whose grace is over.

    In a pool of processes the child that runs one is ended. No other pool can do that: there only its message is
    closed, so that nothing shows as running, and what the handler records later is refused.
    """
    marked = messages.claimed(rt.store, cancelled_at={"$exists": True})
    overdue = []
    for row in marked:
        with contained("looking at", row["_id"]):
            if _overdue(rt, row) >= timedelta(0):
                overdue.append(row)
    if not overdue:
        return
    pools = {row["_id"]: row.get("pool") for row in workers.alive(rt.store)}
    told: list[str] = []
    deserted = _deserted(rt, overdue)
    # One that was recorded between the two questions looks deserted, too: its process has begun something else by now.
    still = {row["_id"] for row in messages.among(rt.store, [row["_id"] for row in deserted], MessageState.CLAIMED)}
    for row in [row for row in deserted if row["_id"] in still]:
        obeys = pools.get(row["worker"]) == "prefork" and not rt.settings.broker_is_embedded
        if obeys and _overdue(rt, row) < timedelta(seconds=OBEYS_S):
            told.append(row["_id"])
            continue
        logger.info("closing, its jobs were cancelled: message=%s worker=%s", row["_id"], row["worker"])
        with contained("closing", row["_id"]):
            publish_or_leave(rt, give_back(rt, row, lost=None))
    if told:
        logger.info("stopping handlers, their jobs were cancelled: messages=%s", ", ".join(told))
        # The worker gives them back. Said every round until it has: a word may get lost.
        arguments = {"task_id": told, "terminate": True, "signal": "SIGTERM"}
        rt.publisher.broadcast("revoke", arguments, answers=0, timeout_s=0.0)


def _overdue(rt: Runtime, message: Document) -> timedelta:
    """How long the grace of a marked message's handler is over; negative before."""
    grace_s = rt.memory.need_plan(message["run"]).stage(message["stage"]).grace_s
    ends_at: datetime = message["cancelled_at"] + timedelta(seconds=grace_s)
    return rt.store.now() - ends_at


def _deserted(rt: Runtime, rows: list[Document]) -> list[Document]:
    """Those of these messages that none of their jobs names any more; no job ever comes back to a message."""
    keys = [job_key(row["run"], job_id) for row in rows for job_id in row["jobs"]]
    named: set[str | None] = set()
    for some in split(keys, ASKED):
        named.update(jobs.named(rt.store, some).values())
    return [row for row in rows if row["_id"] not in named]


def _cancel_all(rt: Runtime, plan: RunPlan) -> int:
    moved = 0
    # A batch that may be taken back takes its counters with it: what it has in them must still be true.
    hidden = seeding.hidden_batches(rt)
    while rows := jobs.in_state(rt.store, plan.run, UNFINISHED, PAGE, hidden):
        # Asked again: a batch is there before its jobs are.
        hidden = seeding.hidden_batches(rt)
        moved += _cancel(rt, plan, [row for row in rows if row["batch"] not in hidden], "")
    queues = [
        queue_name(plan.pipeline, stage.name, row["partition"])
        for row in partitions.of_pipelines(rt.store, [plan.pipeline])
        for stage in plan.stages
        if row["stage"] == stage.name
    ]
    messages.close_open(rt.store, plan.run, queues)
    # After those: what was claimed until then is marked, and there is nothing left to claim.
    claimed = messages.claimed(rt.store, run=plan.run, cancelled_at={"$exists": False})
    messages.mark_cancelled(rt.store, [row["_id"] for row in claimed])
    return moved


def _cancel(rt: Runtime, run: RunPlan, rows: list[Document], actor: str) -> int:
    """Cancel those of these jobs that are where they were; in one transaction."""

    def plan(whole: Transition, fitting: list[Document]) -> None:
        groups: dict[tuple[str, str, str], list[Document]] = defaultdict(list)
        for row in fitting:
            groups[row["stage"], row["partition"], row["state"]].append(row)
        for (stage, partition, state), group in groups.items():
            whole.moves.append(
                JobMove(
                    keys=[row["_id"] for row in group],
                    # Under another message by now, its handler would not be stopped.
                    guard={"state": state, "stage": stage, "message": {"$in": list({row["message"] for row in group})}},
                    set={"state": JobState.CANCELLED, "message": None},
                    unset=jobs.PARKED_FIELDS,
                )
            )
            whole.count((run.run, stage, partition), JobState(state), JobState.CANCELLED, len(group))
            ids = [row["job"] for row in group]
            whole.events.append(transition.event(run.run, stage, "cancelled", jobs=ids, now=whole.now, actor=actor))

    return len(apply_fitting(rt, {row["_id"]: row for row in rows}, plan)[0])
