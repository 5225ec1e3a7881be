"""Moving waiting jobs to another stage, and changing in which order they are let go.

A job that a worker has claimed is not waiting: it stays where it is. A job that is moved keeps the input that it has:
moved forward it passes over the stages in between, moved back an earlier stage gets what a later one was to get. (To
start again from an earlier stage with that stage's own input is a replay.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline_app.control.changes import selecting
from pipeline_app.control.changes.fitting import apply_fitting
from pipeline_app.control.changes.selecting import UNFINISHED, Place, Progress, silent
from pipeline_app.control.targets import throttles
from pipeline_app.domain.job import job_key
from pipeline_app.domain.plan import RunPlan
from pipeline_app.domain.selection import Selection
from pipeline_app.domain.states import JobState, MessageState
from pipeline_app.errors import UsageError
from pipeline_app.flow.enqueue import enqueued_state, new_messages
from pipeline_app.flow.forward import publish_or_leave
from pipeline_app.runtime import Runtime
from pipeline_app.store import jobs, messages, transition
from pipeline_app.store.client import Document
from pipeline_app.store.transition import JobMove, NotFittingError, Transition

#: Jobs in one transaction, each of which may need a message of its own.
JOBS_PAGE = 1000
LOWEST_PRIORITY, HIGHEST_PRIORITY = -1000, 1000


def move_jobs(
    rt: Runtime, run: str, selection: Selection, to: str, *, actor: str = "", progress: Progress = silent
) -> int:
    """Move the waiting jobs of a selection to stage `to`; returns how many this call moved.

    Those in the broker go to the other stage's queue. Those that wait in the store go on waiting for the same. Their
    budgets begin anew, as in every stage. Raises NotFoundError (run, stage or job), UsageError, StoreError; then some
    are moved, and calling again moves the others.
    """
    plan = _find(rt, run, selection, to)

    def change(rows: list[Document]) -> int:
        there = [row for row in rows if row["stage"] != to]
        parked = [row for row in there if row["state"] != JobState.PENDING]
        pending = [row for row in there if row["state"] == JobState.PENDING]
        return _move_parked(rt, plan, to, parked, actor) + _move_pending(rt, plan, to, pending, actor)

    return selecting.change_all(rt, plan, selection, change, progress, once=True)


def preview_move(rt: Runtime, run: str, selection: Selection, to: str) -> dict[str, Any]:
    """What moving would change: `{"matched", "by_stage", "by_status", "by_partition"}`.

    Raises NotFoundError (run, stage or job), UsageError, StoreError.
    """
    plan = _find(rt, run, selection, to)
    found = selecting.places(rt, plan, selection).items()
    return selecting.summary({place: n for place, n in found if _may_go(place, to)})


def _may_go(place: Place, to: str) -> bool:
    stage, state, _ = place
    return stage != to and state != JobState.RUNNING


def _find(rt: Runtime, run: str, selection: Selection, to: str) -> RunPlan:
    plan = selecting.find_run(rt, run, selection)
    plan.stage(to)
    if selection.stage == to:
        raise UsageError(f"jobs of stage {to} cannot be moved to stage {to}")
    return plan


def _arrival(plan: RunPlan, stage: str, to: str) -> tuple[Document, dict[str, int]]:
    """What is set and what grows in a job that goes from one stage to another."""
    names = [known.name for known in plan.stages]
    # A stage is recorded once in each generation, and a job that goes back may have been through it.
    back = names.index(to) <= names.index(stage)
    return {"stage": to, "failures": 0, "deferrals": 0, "losses": 0}, {"generation": 1} if back else {}


def _move_parked(rt: Runtime, run: RunPlan, to: str, rows: Sequence[Document], actor: str) -> int:
    def plan(whole: Transition, fitting: list[Document]) -> None:
        groups: dict[tuple[str, str, str], list[Document]] = defaultdict(list)
        for row in fitting:
            groups[row["stage"], row["partition"], row["state"]].append(row)
        for (stage, partition, state), group in groups.items():
            arrived, inc = _arrival(run, stage, to)
            guard = {"state": state, "stage": stage, "message": None}
            whole.moves.append(JobMove(keys=[row["_id"] for row in group], guard=guard, set=arrived, inc=inc))
            _note(whole, run, (stage, to, partition), JobState(state), group, actor)

    return len(apply_fitting(rt, {row["_id"]: row for row in rows}, plan)[0])


def _note(
    whole: Transition, plan: RunPlan, way: tuple[str, str, str], state: JobState, rows: Sequence[Document], actor: str
) -> None:
    """Counters and event of jobs that go from one stage to another in a partition."""
    stage, to, partition = way
    whole.count((plan.run, stage, partition), state, None, len(rows))
    whole.count((plan.run, to, partition), None, state, len(rows))
    ids = [row["job"] for row in rows]
    said = {"from": stage, "to": to, "actor": actor}
    whole.events.append(transition.event(plan.run, to, "moved", jobs=ids, now=whole.now, **said))


def _move_pending(rt: Runtime, plan: RunPlan, to: str, rows: Sequence[Document], actor: str) -> int:
    """Take jobs out of messages that nobody has claimed; whoever else is in them goes on in a message of its own."""
    wanted: dict[str, list[Document]] = defaultdict(list)
    for row in rows:
        wanted[row["message"]].append(row)
    found = messages.among(rt.store, list(wanted), MessageState.OPEN)
    return sum(_move_out_of(rt, plan, to, some, wanted, actor) for some in _by_weight(found))


def _by_weight(found: Sequence[Document]) -> Iterator[list[Document]]:
    """Messages in groups, each with jobs for one transaction."""
    some: list[Document] = []
    for message in found:
        some.append(message)
        if sum(len(row["jobs"]) for row in some) >= JOBS_PAGE:
            yield some
            some = []
    if some:
        yield some


def _move_out_of(
    rt: Runtime,
    plan: RunPlan,
    to: str,
    sources: Sequence[Document],
    wanted: Mapping[str, Sequence[Document]],
    actor: str,
) -> int:
    left = {message["_id"]: message for message in sources}
    while left:
        keys = [job_key(plan.run, job) for message in left.values() for job in message["jobs"]]
        named = jobs.named(rt.store, keys)
        whole = Transition(now=rt.store.now(), withdraw=list(left))
        going: dict[tuple[str, str], list[Document]] = defaultdict(list)
        for message in left.values():
            mine = [row for row in wanted[message["_id"]] if named.get(row["_id"]) == message["_id"]]
            going[message["stage"], message["partition"]] += mine
            _keep_others(plan, whole, message, named, {row["_id"] for row in mine})
        for (stage, partition), group in going.items():
            _send(plan, whole, (stage, to, partition), group, actor)
        try:
            with rt.counting() as whole.worker:
                transition.apply(rt.store, whole)
        except NotFittingError as exc:
            # Claimed meanwhile: its jobs stay. Else one of its jobs was cancelled or moved: look again.
            left = {key: message for key, message in left.items() if key not in exc.messages}
            continue
        publish_or_leave(rt, whole.messages)
        return sum(len(group) for group in going.values())
    return 0


def _keep_others(
    plan: RunPlan, whole: Transition, message: Document, named: Mapping[str, str | None], mine: set[str]
) -> None:
    keys = {job: job_key(plan.run, job) for job in message["jobs"]}
    others = [job for job, key in keys.items() if named.get(key) == message["_id"] and key not in mine]
    stage, partition = message["stage"], message["partition"]
    for fresh in new_messages(plan, stage, partition, others, whole.now, released_by=message.get("released_by")):
        guard = {"message": message["_id"]}
        kept = [keys[job] for job in fresh["jobs"]]
        whole.moves.append(JobMove(keys=kept, guard=guard, set=enqueued_state(fresh["_id"])))
        whole.messages.append(fresh)
        said = {"message": fresh["_id"], "why": "others of its message were moved"}
        whole.events.append(transition.event(plan.run, stage, "enqueued", jobs=fresh["jobs"], now=whole.now, **said))


def _send(plan: RunPlan, whole: Transition, way: tuple[str, str, str], group: Sequence[Document], actor: str) -> None:
    stage, to, partition = way
    arrived, inc = _arrival(plan, stage, to)
    rows = {row["job"]: row for row in group}
    for fresh in new_messages(plan, to, partition, list(rows), whole.now):
        some = [rows[job] for job in fresh["jobs"]]
        guard = {"state": JobState.PENDING, "message": {"$in": sorted({row["message"] for row in some})}}
        sent = {**enqueued_state(fresh["_id"]), **arrived}
        whole.moves.append(JobMove(keys=[row["_id"] for row in some], guard=guard, set=sent, inc=inc))
        whole.messages.append(fresh)
    if group:
        _note(whole, plan, way, JobState.PENDING, group, actor)


def set_priority(
    rt: Runtime, run: str, selection: Selection, priority: int, *, actor: str = "", progress: Progress = silent
) -> int:
    """Set the priority of the jobs of a selection that are not at rest; returns how many this call changed.

    Jobs that wait are let go in order of priority, the highest first, equal ones in order of arrival. Where jobs wait
    in the broker, whose order is fixed, the run becomes an ordered one: from then on its jobs wait in the store.
    Raises NotFoundError (run, stage or job), UsageError, StoreError; then some are changed, and calling again changes
    the others.
    """
    plan = _find_for_priority(rt, run, selection, priority)
    in_broker = 0

    def change(rows: list[Document]) -> int:
        nonlocal in_broker
        others = [row for row in rows if row.get("priority", 0) != priority]
        in_broker += sum(row["state"] == JobState.PENDING for row in rows)
        return _set_priority(rt, plan, others, priority, actor)

    changed = selecting.change_all(rt, plan, selection, change, progress)
    if in_broker:
        throttles.order_run(rt, plan.run, reason="jobs were given a priority", actor=actor)
    return changed


def preview_priority(rt: Runtime, run: str, selection: Selection, priority: int) -> dict[str, Any]:
    """Which jobs would have that priority: `{"matched", "by_stage", "by_status", "by_partition"}`.

    Raises NotFoundError (run, stage or job), UsageError, StoreError.
    """
    plan = _find_for_priority(rt, run, selection, priority)
    return selecting.summary(selecting.places(rt, plan, selection))


def _find_for_priority(rt: Runtime, run: str, selection: Selection, priority: int) -> RunPlan:
    whole = isinstance(priority, int) and not isinstance(priority, bool)
    if not whole or not LOWEST_PRIORITY <= priority <= HIGHEST_PRIORITY:
        raise UsageError(f"a priority is a whole number from {LOWEST_PRIORITY} to {HIGHEST_PRIORITY}, not {priority!r}")
    return selecting.find_run(rt, run, selection)


def _set_priority(rt: Runtime, run: RunPlan, rows: Sequence[Document], priority: int, actor: str) -> int:
    def plan(whole: Transition, fitting: list[Document]) -> None:
        keys = [row["_id"] for row in fitting]
        guard = {"state": {"$in": list(UNFINISHED)}}
        whole.moves.append(JobMove(keys=keys, guard=guard, set={"priority": priority}))
        stages: dict[str, list[str]] = defaultdict(list)
        for row in fitting:
            stages[row["stage"]].append(row["job"])
        for stage, ids in stages.items():
            said = {"priority": priority, "actor": actor}
            whole.events.append(transition.event(run.run, stage, "priority", jobs=ids, now=whole.now, **said))

    return len(apply_fitting(rt, {row["_id"]: row for row in rows}, plan)[0])
