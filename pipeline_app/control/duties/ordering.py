"""Order per key: who is the next of a key. A duty of the pacing, ten times a second.

Jobs of one key go through the whole pipeline one at a time, in the order in which they were added: each waits until the
one before is at rest (terminal, dead-lettered, cancelled), however long that is retried, held or delayed.

The look is at what is, not at what was done (`store/turns.py` says how): turns that somebody came to wait for, and jobs
at rest that have their turn still. Whoever brings a job to rest knows nothing of turns. A turn is passed on in one
transaction with the move of the job that gets it, guarded by the turn's version: two who lead at once give it once.
"""

from __future__ import annotations

import logging
import random
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pipeline_app.control.contained import contained
from pipeline_app.control.seed.rows import beginning
from pipeline_app.domain.job import job_key, turn_id
from pipeline_app.domain.plan import RunPlan
from pipeline_app.domain.states import AT_REST, JobState
from pipeline_app.flow.enqueue import enqueued_state, new_messages
from pipeline_app.flow.forward import publish_or_leave
from pipeline_app.runtime import Runtime
from pipeline_app.store import jobs, messages, transition, turns
from pipeline_app.store.client import ContendedError, Document
from pipeline_app.store.transition import JobMove, NotFittingError, Transition
from pipeline_app.store.turns import Pass

logger = logging.getLogger(__name__)

#: Turns that are looked at together.
PAGE = 500
#: It does not take longer than this at a time: other duties wait for it.
SPELL_S = 0.2
#: Fields of a job that waits for its turn; whoever is given it loses them.
QUEUED_FIELDS = (*jobs.PARKED_FIELDS, "starts_at")


def give_turns(rt: Runtime) -> None:
    """Pass on the turns of jobs that are at rest, and give those that nobody has."""
    deadline = time.monotonic() + SPELL_S
    while time.monotonic() < deadline:
        look = _look(rt)
        for run, free in look.free.items():
            with contained("giving turns", run):
                _pass_on(rt, run, free)
        if not look.is_full:
            return


@dataclass(kw_only=True)
class Look:
    """What is to be done, as it was at one look."""

    #: Run -> its turns that nobody has.
    free: dict[str, list[Free]] = field(default_factory=lambda: defaultdict(list))
    #: There may be more.
    is_full: bool = False


@dataclass(frozen=True, kw_only=True)
class Free:
    """A turn that can be passed on."""

    turn: str
    #: As it was; None if there is no such turn: it is made, for the next look, as a job says that it has it.
    given: Document | None
    #: `_id`s of jobs at rest that have it.
    over: Sequence[str] = ()


def _look(rt: Runtime) -> Look:
    look = Look()
    over: dict[str, list[str]] = defaultdict(list)
    rested = turns.over(rt.store, PAGE)
    for row in rested:
        over[turn_id(row["run"], row["order_key"])].append(row["_id"])
    due = turns.due(rt.store, PAGE)
    ids = over.keys() | {row["_id"] for row in due}
    if not ids:
        return look
    # In this order: whatever changes about a turn from here on makes another version of it.
    found = turns.by_ids(rt.store, ids)
    holders = turns.holders(rt.store, [row["holder"] for row in found.values() if row["holder"] is not None])
    running = _still_running(rt)
    settled: dict[str, Any] = {}
    for turn in sorted(ids):
        run = turn.partition("/")[0]
        given = found.get(turn)
        holder = None if given is None else holders.get(given["holder"])
        if given is None or holder is None:
            look.free[run].append(Free(turn=turn, given=given, over=over[turn]))
        elif _has_it(holder):
            settled[turn] = given["version"]
        elif not _runs_on(holder, running):
            # The holder also if it was not at rest yet when those were asked for.
            had = sorted({*over[turn], holder["_id"]})
            look.free[run].append(Free(turn=turn, given=given, over=had))
    turns.settle(rt.store, settled)
    look.is_full = len(rested) >= PAGE or len(due) == PAGE
    return look


def _has_it(holder: Document) -> bool:
    return bool(holder.get("has_turn")) and holder["state"] not in AT_REST


def _still_running(rt: Runtime) -> Mapping[str, set[str]]:
    """`_id` -> messages that are handled still and that the job was cancelled in: nobody may go before they ended."""
    found: dict[str, set[str]] = defaultdict(set)
    for message in messages.claimed(rt.store, cancelled_at={"$exists": True}):
        for job_id in message["jobs"]:
            found[job_key(message["run"], job_id)].add(message["_id"])
    return found


def _runs_on(holder: Document, running: Mapping[str, set[str]]) -> bool:
    return bool(running.get(holder["_id"], set()) - {holder["message"]})


def _pass_on(rt: Runtime, run: str, free: Sequence[Free]) -> None:
    """Give each of these turns to the job that waits for it first; of a cancelled run, to none."""
    first = {} if rt.memory.is_cancelled(run) else turns.first(rt.store, [one.turn for one in free])
    plan = rt.memory.need_plan(run) if first else None
    left = {one.turn: one for one in free}
    while left:
        whole = Transition(now=rt.store.now())
        for one in left.values():
            if one.given is None:
                # It may be there by now, and given to one of those who had it: then they have it still.
                whole.wake.add(one.turn)
                continue
            whole.turns_over.extend(one.over)
            holder = first[one.turn]["_id"] if one.turn in first else None
            was = {"version": one.given["version"], "joined": one.given.get("joined")}
            whole.passes.append(Pass(turn=one.turn, holder=holder, **was))
        chosen = [first[turn] for turn, one in left.items() if turn in first and one.given is not None]
        if plan is not None:
            _let_go(rt, plan, whole, chosen)
        try:
            with rt.counting() as whole.worker:
                transition.apply(rt.store, whole, patience_s=SPELL_S)
        except ContendedError:
            # Pages of several seeders are always on some of so many turns. Not always on the same fewer ones.
            left = dict(random.sample(sorted(left.items()), len(left) // 2))
            continue
        except NotFittingError as exc:
            # Somebody came to wait meanwhile, or the job was cancelled: the next look sees that.
            moved_on = exc.turns | {turn for turn, row in first.items() if row["_id"] in exc.jobs}
            left = {turn: one for turn, one in left.items() if turn not in moved_on}
            continue
        publish_or_leave(rt, whole.messages)
        return


def _let_go(rt: Runtime, plan: RunPlan, whole: Transition, rows: Sequence[Document]) -> None:
    """These jobs leave their queues: into messages, or to where their own time or what is closed keeps them."""
    places: dict[tuple[str, str], list[tuple[Document, Document]]] = defaultdict(list)
    for row in rows:
        begins = beginning(rt, plan, row, row.get("starts_at"), whole.now)
        places[row["stage"], row["partition"]].append((row, begins))
    for (stage, partition), group in places.items():
        going = {row["job"]: row for row, begins in group if begins["state"] == JobState.PENDING}
        for message in new_messages(plan, stage, partition, list(going), whole.now):
            whole.messages.append(message)
            keys = [going[job]["_id"] for job in message["jobs"]]
            whole.moves.append(_move(keys, stage, enqueued_state(message["_id"])))
            about: dict[str, Any] = {"jobs": message["jobs"], "now": whole.now, "message": message["_id"]}
            whole.events.append(transition.event(plan.run, stage, "enqueued", why="order", **about))
        place = (plan.run, stage, partition)
        whole.count(place, JobState.WAITING, JobState.PENDING, len(going))
        for begins, kept in _alike([pair for pair in group if pair[0]["job"] not in going]):
            whole.moves.append(_move([row["_id"] for row in kept], stage, begins))
            whole.count(place, JobState.WAITING, JobState(begins["state"]), len(kept))


def _alike(pairs: Sequence[tuple[Document, Document]]) -> list[tuple[Document, list[Document]]]:
    """Jobs that begin in the same way, together."""
    groups: dict[tuple[str, str | None, datetime | None], tuple[Document, list[Document]]] = {}
    for row, begins in pairs:
        key = (begins["reason"], begins.get("waits_for"), begins.get("due_at"))
        groups.setdefault(key, (begins, []))[1].append(row)
    return list(groups.values())


def _move(keys: Sequence[str], stage: str, change: Document) -> JobMove:
    return JobMove(
        keys=keys,
        guard={"state": JobState.WAITING, "stage": stage, "queues_for": {"$exists": True}},
        set={**change, "has_turn": True},
        unset=[name for name in QUEUED_FIELDS if name not in change],
    )
