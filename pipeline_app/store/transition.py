"""The one transaction that moves jobs. Seeding, recording, enqueueing, giving back and cancelling all end here.

A transition is a plan as data: which messages are closed (by whose token), which jobs move (guarded by the message
they name), and what is written down about it. It happens whole or not at all, and a plan that does not fit what is
stored is refused with the messages and jobs that did not fit, so that its maker can leave those out and ask again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from bson import ObjectId
from pymongo import UpdateMany, UpdateOne
from pymongo.errors import BulkWriteError

from pipeline_app.domain.states import AT_REST, JobState, MessageState
from pipeline_app.store import turns
from pipeline_app.store.client import TRANSACTION_PATIENCE_S, Document, Session, Store
from pipeline_app.store.turns import Pass

#: Counters of a seed batch are named by it, so that they can be taken back with it.
SEED_PREFIX = "seed:"

#: (run, stage, partition)
Place = tuple[str, str, str]


@dataclass(frozen=True, kw_only=True)
class JobMove:
    """Jobs that change in the same way."""

    #: `_id`s of job_states.
    keys: Sequence[str]
    #: What must be true of each, or the plan is refused: the message it names, or its state.
    guard: Document
    set: Document
    unset: Sequence[str] = ()
    inc: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Step:
    """How far a recorded operation is once the plan was carried out."""

    operation: str
    #: What must be true of its document, or the plan is refused.
    guard: Document
    set: Document
    inc: dict[str, int] = field(default_factory=dict)


@dataclass(kw_only=True)
class Transition:
    """A plan."""

    now: datetime
    #: Names the counter documents: transactions that use one name at the same time would wait for each other.
    worker: str = ""
    #: (message, token): claimed by the token, to be closed.
    close: list[tuple[str, str]] = field(default_factory=list)
    #: They are closed without a record: the token's holder must not take that for its own.
    given_back: bool = False
    #: Messages that nobody has claimed, to be closed: all their jobs go on in others.
    withdraw: list[str] = field(default_factory=list)
    new_jobs: list[Document] = field(default_factory=list)
    moves: list[JobMove] = field(default_factory=list)
    messages: list[Document] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    attempts: list[Document] = field(default_factory=list)
    events: list[Document] = field(default_factory=list)
    counts: dict[Place, dict[str, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))
    #: Fields to set in manifests: a flag that must not be seen before what it stands for.
    manifest_flags: dict[str, Document] = field(default_factory=dict)
    #: The plan is a step of this operation, and happens only once.
    step: Step | None = None
    #: Turns that jobs of `new_jobs` and `moves` come to wait for.
    wake: set[str] = field(default_factory=set)
    #: The same, of jobs that never had them: who is the next of those that wait stays so.
    join: set[str] = field(default_factory=set)
    #: Turns that jobs of `moves` are given, or that nobody waits for any more.
    passes: list[Pass] = field(default_factory=list)
    #: `_id`s of jobs at rest that had them.
    turns_over: list[str] = field(default_factory=list)

    def count(self, place: Place, old: JobState | None, new: JobState | None, number: int) -> None:
        """`number` jobs at `place` leave state `old` and enter `new`."""
        if old is not None:
            self.counts[place][f"states.{old}"] -= number
        if new is not None:
            self.counts[place][f"states.{new}"] += number

    def merge(self, other: Transition) -> None:
        """Make `other`'s plan part of this one."""
        for name in ("close", "withdraw", "new_jobs", "moves", "messages", "outputs", "attempts", "events"):
            getattr(self, name).extend(getattr(other, name))
        for place, deltas in other.counts.items():
            for key, number in deltas.items():
                self.counts[place][key] += number
        self.manifest_flags.update(other.manifest_flags)
        self.wake |= other.wake
        self.join |= other.join


class NotFittingError(Exception):
    """What is stored is not what the plan took for granted; nothing of it was done."""

    def __init__(
        self,
        *,
        messages: frozenset[str] = frozenset(),
        jobs: frozenset[str] = frozenset(),
        turns: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(f"{len(messages)} messages, {len(jobs)} jobs and {len(turns)} turns moved on")
        #: Messages that are not claimed by the plan's token, or, of those to be withdrawn, not open.
        self.messages = messages
        #: `_id`s of jobs whose guard failed.
        self.jobs = jobs
        #: Turns that were looked at, woken or passed on by others.
        self.turns = turns


class OperationMovedOnError(Exception):
    """The operation whose step this was is not where the plan took it for; nothing of the plan was done."""


class DuplicateKeyFoundError(Exception):
    """A new document has an `_id` that is there already; nothing of the plan was done."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key} is there already")
        self.key = key


def apply(store: Store, plan: Transition, *, patience_s: float = TRANSACTION_PATIENCE_S) -> None:
    """Carry the plan out, durably, whole or not at all.

    Raises NotFittingError; OperationMovedOnError; DuplicateKeyFoundError; ContendedError, if others write on the same
    documents for `patience_s`; StoreError, after which it may have happened: asking again is refused if it has.
    """
    store.transaction(lambda session: _apply(store, session, plan), patience_s=patience_s)


def _apply(store: Store, session: Session, plan: Transition) -> None:
    # The messages come first: a worker that lost its claim finds out before it writes anything.
    _close(store, session, plan)
    _withdraw(store, session, plan)
    _go_on(store, session, plan)
    _take_turns(store, session, plan)
    _move(store, session, plan)
    for name, documents in (
        ("job_states", plan.new_jobs),
        # Where messages are closed, the new ones travelled with that.
        ("messages", [] if plan.close else plan.messages),
        ("job_outputs", plan.outputs),
        ("job_attempts", plan.attempts),
        ("pipeline_events", plan.events),
    ):
        if documents:
            try:
                store.db[name].insert_many(documents, ordered=True, session=session)
            except BulkWriteError as exc:
                raise _duplicate(exc) or exc from exc
    for run, flags in plan.manifest_flags.items():
        store.db.run_manifests.update_one({"_id": run}, {"$set": flags}, session=session)
    _count(store, session, plan)


def _duplicate(exc: BulkWriteError) -> DuplicateKeyFoundError | None:
    errors = [error for error in exc.details.get("writeErrors", []) if error.get("code") == 11000]
    return DuplicateKeyFoundError(str(errors[0]["keyValue"]["_id"])) if errors else None


def _close(store: Store, session: Session, plan: Transition) -> None:
    if not plan.close:
        return
    change = {"$set": {"state": MessageState.CLOSED, "closed_at": plan.now, "given_back": plan.given_back}}
    closing = [
        UpdateOne({"_id": message, "token": token, "state": MessageState.CLAIMED}, change)
        for message, token in plan.close
    ]
    # As upserts they need no round trip of their own.
    opening = [UpdateOne({"_id": row["_id"]}, {"$setOnInsert": row}, upsert=True) for row in plan.messages]
    result = store.db.messages.bulk_write([*closing, *opening], ordered=False, session=session)
    if result.modified_count == len(plan.close):
        made = set(result.upserted_ids or ())
        if len(made) < len(opening):
            there = [row["_id"] for number, row in enumerate(plan.messages, len(closing)) if number not in made]
            raise DuplicateKeyFoundError(there[0])
        return
    # Ask outside the transaction, where our own updates do not show.
    rows = store.db.messages.find(
        {"_id": {"$in": [message for message, _ in plan.close]}, "state": MessageState.CLAIMED}, {"token": 1}
    )
    claimed = {(row["_id"], row.get("token")) for row in rows}
    raise NotFittingError(messages=frozenset(pair[0] for pair in plan.close if pair not in claimed))


def _withdraw(store: Store, session: Session, plan: Transition) -> None:
    if not plan.withdraw:
        return
    open_ones = {"_id": {"$in": plan.withdraw}, "state": MessageState.OPEN}
    change = {"$set": {"state": MessageState.CLOSED, "closed_at": plan.now}}
    # A claim at the same time meets this write: one of the two comes first, and the other finds that out.
    result = store.db.messages.update_many(open_ones, change, session=session)
    if result.modified_count == len(plan.withdraw):
        return
    # Ask outside the transaction, where our own updates do not show.
    found = {row["_id"] for row in store.db.messages.find(open_ones, {"_id": 1})}
    raise NotFittingError(messages=frozenset(plan.withdraw) - found)


def _go_on(store: Store, session: Session, plan: Transition) -> None:
    if plan.step is None:
        return
    step = plan.step
    change: Document = {"$set": step.set}
    if step.inc:
        change["$inc"] = step.inc
    result = store.db.operations.update_one({"_id": step.operation, **step.guard}, change, session=session)
    if result.matched_count == 0:
        raise OperationMovedOnError(step.operation)


def _take_turns(store: Store, session: Session, plan: Transition) -> None:
    turns.wake(store, session, plan.wake, plan.join, plan.now)
    moved_on = turns.carry_out(store, session, plan.passes)
    if moved_on:
        raise NotFittingError(turns=moved_on)
    if plan.turns_over:
        # Apart from the moves: to pass a turn on is nothing that happens to the job that had it.
        over = {"_id": {"$in": plan.turns_over}, "state": {"$in": sorted(AT_REST)}}
        store.db.job_states.update_many(over, {"$unset": {"has_turn": ""}}, session=session)


def _move(store: Store, session: Session, plan: Transition) -> None:
    if not plan.moves:
        return
    result = store.db.job_states.bulk_write(
        [UpdateMany({"_id": {"$in": list(move.keys)}, **move.guard}, _change(move, plan.now)) for move in plan.moves],
        ordered=False,
        session=session,
    )
    if result.matched_count == sum(len(move.keys) for move in plan.moves):
        return
    # Ask outside the transaction, where our own updates do not show.
    unfit: set[str] = set()
    for move in plan.moves:
        query = {"_id": {"$in": list(move.keys)}, **move.guard}
        unfit |= set(move.keys) - {row["_id"] for row in store.db.job_states.find(query, {"_id": 1})}
    raise NotFittingError(jobs=frozenset(unfit))


def _change(move: JobMove, now: datetime) -> Document:
    change: Document = {"$set": {**move.set, "updated_at": now}}
    if move.unset:
        change["$unset"] = dict.fromkeys(move.unset, "")
    if move.inc:
        change["$inc"] = move.inc
    return change


def _count(store: Store, session: Session, plan: Transition) -> None:
    # Counters with a time may be folded when they are old; a seed batch that is open keeps its own.
    foldable = {} if plan.worker.startswith(SEED_PREFIX) else {"$set": {"at": plan.now}}
    updates = [
        UpdateOne(
            {"_id": f"{run}|{stage}|{partition}|{plan.worker}"},
            {
                "$inc": {key: number for key, number in deltas.items() if number},
                "$setOnInsert": {"run": run, "stage": stage, "partition": partition, "worker": plan.worker},
                **foldable,
            },
            upsert=True,
        )
        for (run, stage, partition), deltas in plan.counts.items()
        if any(deltas.values())
    ]
    if updates:
        store.db.run_counters.bulk_write(updates, ordered=False, session=session)


def event(run: str, stage: str, name: str, *, jobs: Sequence[str], now: datetime, **more: Any) -> Document:
    """The document of one event: one for each message and step, with its jobs' ids."""
    return {"_id": ObjectId(), "run": run, "stage": stage, "event": name, "jobs": list(jobs), "at": now, **more}
