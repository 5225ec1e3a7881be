"""Bring back what accounting found amiss: `run verify --repair`.

Every repair is one small transaction that is refused if what it takes for granted is not so any more. So it may be made
while the run goes on, again, and by two at once. What was found is not trusted: every job is looked at anew.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial

from pipeline_app.control.accounts import flaws, hints
from pipeline_app.control.accounts.flaws import Flaw, Mend
from pipeline_app.control.changes.fitting import apply_fitting
from pipeline_app.control.changes.release import enqueue_parked
from pipeline_app.control.seed.rows import queue_up
from pipeline_app.domain.job import turn_id
from pipeline_app.domain.plan import RunPlan
from pipeline_app.domain.states import JobState
from pipeline_app.errors import BrokerError
from pipeline_app.flow.enqueue import enqueued_state, new_messages, queued_state
from pipeline_app.flow.forward import publish_or_leave
from pipeline_app.runtime import Runtime
from pipeline_app.store import accounts, jobs, transition
from pipeline_app.store.client import Document
from pipeline_app.store.transition import JobMove, Transition

#: A job may have more than one flaw; one is mended after the other.
FLAWS_OF_A_JOB = 3

Progress = Callable[[int], None]
#: Adds to a plan what mends these jobs.
Planner = Callable[[RunPlan, Transition, Sequence[Flaw]], None]


@dataclass(kw_only=True)
class Todo:
    """What a look found that can be mended."""

    #: How often the run's counts had been corrected when it looked.
    corrections: int = 0
    #: What mends jobs -> how many.
    jobs: Counter[Mend] = field(default_factory=Counter)
    #: Stage -> counter -> what must be added to it.
    counts: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    #: Stage -> `advanced` or `seeded` -> what must be added to the event log.
    events: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    #: Queue -> messages, where they are to be published.
    unpublished: dict[str, int] = field(default_factory=dict)
    gone: dict[str, int] = field(default_factory=dict)

    def planned(self) -> dict[str, int]:
        """What a repair would do: the values of `Mend` -> how many."""
        done = Counter(self.jobs)
        done[Mend.COUNT] = sum(map(len, self.counts.values()))
        done[Mend.LOG] = sum(map(len, self.events.values()))
        done[Mend.PUBLISH] = sum(self.unpublished.values()) + sum(self.gone.values())
        return written(done)


def written(done: Counter[Mend]) -> dict[str, int]:
    """In the order of `Mend`, without zeros."""
    return {str(mend): done[mend] for mend in Mend if done[mend]}


@dataclass(kw_only=True)
class Repaired:
    """What a repair did."""

    problems: int = 0
    done: Counter[Mend] = field(default_factory=Counter)


def repair(rt: Runtime, plan: RunPlan, todo: Todo, progress: Progress) -> Repaired:
    """Mend what a look found.

    Args:
        progress: called with the number of jobs mended so far.

    Raises StoreError; BrokerError, after everything that needs no broker is done. Calling again is harmless.
    """
    repaired = Repaired()
    _correct(rt, plan, todo, repaired)
    if todo.jobs:
        for page in accounts.job_pages(rt.store, plan.run):
            _mend_page(rt, plan, page, repaired)
            progress(repaired.problems)
    _publish(rt, plan, todo, repaired)
    return repaired


def _correct(rt: Runtime, plan: RunPlan, todo: Todo, repaired: Repaired) -> None:
    counts, lines = sum(map(len, todo.counts.values())), sum(map(len, todo.events.values()))
    if not counts and not lines:
        return
    now = rt.store.now()
    documents = [
        transition.event(plan.run, stage, "repaired", jobs=[], now=now, **differences)
        for stage, differences in todo.events.items()
        if differences
    ]
    if accounts.correct(rt.store, plan.run, seen=todo.corrections, counts=todo.counts, events=documents):
        repaired.problems += counts + lines
        repaired.done[Mend.COUNT] += counts
        repaired.done[Mend.LOG] += lines


def _publish(rt: Runtime, plan: RunPlan, todo: Todo, repaired: Repaired) -> None:
    try:
        if todo.unpublished:
            repaired.done[Mend.PUBLISH] += hints.publish_late(rt, plan)
            repaired.problems += len(todo.unpublished)
        for queue in todo.gone:
            repaired.done[Mend.PUBLISH] += hints.publish_again(rt, queue)
            repaired.problems += 1
    except BrokerError as exc:
        so_far = f"{repaired.problems} problems were repaired; for the others call it again when the broker answers"
        raise BrokerError(exc.message, hint=so_far) from exc


def _mend_page(rt: Runtime, plan: RunPlan, page: list[Document], repaired: Repaired) -> None:
    mended: set[str] = set()
    for _ in range(FLAWS_OF_A_JOB):
        # Asked afterwards: a batch is there before its jobs are.
        flags = accounts.flags(rt.store, plan.run)
        rows = [row for row in page if row["batch"] not in flags.leaving]
        found = [flaw for flaw in flaws.look(rt, plan, rows, flags).flaws if flaw.mend is not None]
        if not found:
            break
        for mend, mender in _MENDERS.items():
            group = [flaw for flaw in found if flaw.mend is mend]
            done = mender(rt, plan, group) if group else []
            repaired.done[mend] += len(done)
            mended.update(done)
        page = accounts.jobs_again(rt.store, [flaw.row["_id"] for flaw in found])
    repaired.problems += len(mended)


def _enqueue(rt: Runtime, plan: RunPlan, found: Sequence[Flaw]) -> list[str]:
    """Jobs that are parked go the way of all that are let go; those whose message is dead get another."""
    parked = [flaw.row for flaw in found if flaw.row["state"] != JobState.PENDING]
    keys = {(row["stage"], row["job"]): row["_id"] for row in parked}
    made = enqueue_parked(rt, parked, "repair") if parked else []
    pending = [flaw for flaw in found if flaw.row["state"] == JobState.PENDING]
    done = _carry_out(rt, plan, pending, _plan_enqueue) if pending else []
    return [keys[message["stage"], job] for message in made for job in message["jobs"]] + done


def _carry_out(rt: Runtime, plan: RunPlan, found: Sequence[Flaw], planner: Planner) -> list[str]:
    """Mend these jobs in one transaction, without those that moved on meanwhile; the `_id`s of those that were."""
    flaws = {flaw.row["_id"]: flaw for flaw in found}
    mended, made = apply_fitting(rt, flaws, lambda whole, fitting: planner(plan, whole, fitting))
    publish_or_leave(rt, made)
    return [flaw.row["_id"] for flaw in mended]


def _plan_enqueue(plan: RunPlan, whole: Transition, found: Sequence[Flaw]) -> None:
    for flaw, message in _in_messages(plan, whole, found):
        row = flaw.row
        guard = {"state": JobState.PENDING, "message": row["message"], "stage": row["stage"]}
        whole.moves.append(JobMove(keys=[row["_id"]], guard=guard, set=enqueued_state(message)))


def _plan_replay(plan: RunPlan, whole: Transition, found: Sequence[Flaw]) -> None:
    for flaw, message in _in_messages(plan, whole, [flaw for flaw in found if "order_key" not in flaw.row]):
        _again(plan, whole, flaw, enqueued_state(message))
    # Those that go in order wait for their turn once more.
    queued = [flaw for flaw in found if "order_key" in flaw.row]
    for flaw in queued:
        turn = turn_id(plan.run, flaw.row["order_key"])
        whole.wake.add(turn)
        _again(plan, whole, flaw, queued_state(turn))
    _note(plan, whole, queued, "repaired", what="it waits for its turn in the last stage once more")


def _again(plan: RunPlan, whole: Transition, flaw: Flaw, goes: Document) -> None:
    row = flaw.row
    fresh = {"input": flaw.input, "failures": 0, "deferrals": 0, "losses": 0}
    whole.moves.append(
        JobMove(
            keys=[row["_id"]],
            guard={
                "state": JobState.TERMINAL,
                "message": None,
                "input": row["input"],
                "generation": row["generation"],
            },
            set={**goes, **fresh},
            unset=[name for name in (*jobs.PARKED_FIELDS, "operation", "has_turn") if name not in goes],
            inc={"generation": 1},
        )
    )
    whole.count((plan.run, row["stage"], row["partition"]), JobState.TERMINAL, goes["state"], 1)


def _plan_queue(plan: RunPlan, whole: Transition, found: Sequence[Flaw]) -> None:
    whole.moves, whole.wake = queue_up([flaw.row for flaw in found])
    _note(plan, whole, found, "repaired", what="it waits for its turn")


def _in_messages(plan: RunPlan, whole: Transition, found: Sequence[Flaw]) -> Iterator[tuple[Flaw, str]]:
    """Give jobs messages in full chunks; each job and its message."""
    groups: dict[tuple[str, str], dict[str, Flaw]] = defaultdict(dict)
    for flaw in found:
        groups[flaw.row["stage"], flaw.row["partition"]][flaw.row["job"]] = flaw
    for (stage, partition), group in groups.items():
        for message in new_messages(plan, stage, partition, list(group), whole.now):
            whole.messages.append(message)
            named = {"message": message["_id"], "why": "repair"}
            whole.events.append(_event(plan, stage, "enqueued", message["jobs"], whole.now, **named))
            yield from ((group[job], message["_id"]) for job in message["jobs"])


def _plan_cancel(plan: RunPlan, whole: Transition, found: Sequence[Flaw]) -> None:
    for flaw in found:
        row = flaw.row
        guard = {"state": row["state"], "message": row["message"], "stage": row["stage"]}
        state = {"state": JobState.CANCELLED, "message": None}
        whole.moves.append(JobMove(keys=[row["_id"]], guard=guard, set=state, unset=jobs.PARKED_FIELDS))
        place = (plan.run, row["stage"], row["partition"])
        whole.count(place, JobState(row["state"]), JobState.CANCELLED, 1)
    _note(plan, whole, found, "cancelled")


def _plan_detach(plan: RunPlan, whole: Transition, found: Sequence[Flaw]) -> None:
    for flaw in found:
        guard = {"state": flaw.row["state"], "message": flaw.row["message"]}
        whole.moves.append(JobMove(keys=[flaw.row["_id"]], guard=guard, set={"message": None}))
    _note(plan, whole, found, "repaired", what="it names no message any more")


def _plan_due(plan: RunPlan, whole: Transition, found: Sequence[Flaw]) -> None:
    guard = {"state": JobState.RETRY_WAITING, "message": None, "due_at": None}
    keys = [flaw.row["_id"] for flaw in found]
    whole.moves.append(JobMove(keys=keys, guard=guard, set={"due_at": whole.now}))
    _note(plan, whole, found, "repaired", what="it is due now")


def _note(plan: RunPlan, whole: Transition, found: Sequence[Flaw], name: str, **more: str) -> None:
    stages: dict[str, list[str]] = defaultdict(list)
    for flaw in found:
        stages[flaw.row["stage"]].append(flaw.row["job"])
    whole.events.extend(_event(plan, stage, name, ids, whole.now, **more) for stage, ids in stages.items())


def _event(plan: RunPlan, stage: str, name: str, ids: Sequence[str], now: datetime, **more: str) -> Document:
    return transition.event(plan.run, stage, name, jobs=ids, now=now, **more)


#: In this order; a job has one of them at a time.
_MENDERS: dict[Mend, Callable[[Runtime, RunPlan, Sequence[Flaw]], list[str]]] = {
    Mend.DETACH: partial(_carry_out, planner=_plan_detach),
    Mend.CANCEL: partial(_carry_out, planner=_plan_cancel),
    Mend.DUE: partial(_carry_out, planner=_plan_due),
    Mend.QUEUE: partial(_carry_out, planner=_plan_queue),
    Mend.REPLAY: partial(_carry_out, planner=_plan_replay),
    Mend.ENQUEUE: _enqueue,
}
