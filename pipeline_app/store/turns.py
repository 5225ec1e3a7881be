"""`turns`: whose turn it is among the jobs of a run that have the same order key. One document for each such key.

    _id, run     of the key in its run
    holder       the job that was given the turn last
    version      another one whenever it is given, or jobs that may have had it came to wait for it
    joined       another one whenever only jobs came to wait for it that never had it; not there before the first
    due          since when somebody should look at it: jobs came to wait

and in `job_states`

    order_key    for all its life
    queues_for   the turn, while it waits for that (state `waiting`, reason `order`)
    has_turn     from when it is given the turn until that is passed on

Two promises rest on how these are written:

- One at a time: a job is given the turn only if the document is as it was (its `version`) when the job before was seen
  to be at rest. Whoever lets a job at rest go on again makes it wait like any other, and so makes another version.
  New jobs change nothing about that, and make none: seeded page after page, they would outdate every look. Only
  that nobody waits is outdated by them (`joined`), and their page and a pass that meet on the document come one after
  the other.
- Nothing is stuck: whoever makes a job wait makes its turn due in the same transaction, and it is due until a look
  that found that version found somebody having the turn. And a job at rest that still has its turn is in an index.

The looks are a duty of the pacing (`control/duties/ordering.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from bson import ObjectId
from pymongo import DeleteOne, UpdateOne

from pipeline_app.domain.states import AT_REST
from pipeline_app.store.client import Document, Session, Store, translated


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A turn that is passed on."""

    turn: str
    #: As they were when it was looked at.
    version: ObjectId
    joined: ObjectId | None
    #: `_id` of the job that gets it; None if no job waits: then the document goes, unless others joined.
    holder: str | None


def due(store: Store, limit: int) -> list[Document]:
    """Turns that jobs came to wait for, those that are due longest first."""
    with translated(store):
        return list(store.db.turns.find({"due": {"$exists": True}}).sort("due", 1).limit(limit))


def by_ids(store: Store, ids: Collection[str], session: Session | None = None) -> dict[str, Document]:
    """Those of `ids` that are there."""
    with translated(store):
        return {row["_id"]: row for row in store.db.turns.find({"_id": {"$in": list(ids)}}, session=session)}


def settle(store: Store, versions: Mapping[str, ObjectId]) -> None:
    """These need no look any more, if they are still as they were: a job has each of them."""
    updates = [UpdateOne({"_id": turn, "version": seen}, {"$unset": {"due": ""}}) for turn, seen in versions.items()]
    if updates:
        with translated(store):
            store.fast.turns.bulk_write(updates, ordered=False)


def over(store: Store, limit: int) -> list[Document]:
    """Jobs at rest that have their turn still: `run`, `order_key`; of each state if there are many."""
    fields = {"run": 1, "order_key": 1}
    states: list[object] = [{"$in": sorted(AT_REST)}]
    rows: list[Document] = []
    with translated(store):
        for state in states:
            rows += store.db.job_states.find({"has_turn": True, "state": state}, fields).limit(limit)
            if len(rows) == limit and len(states) == 1:
                # Those of one state may have to wait for something, and must not be in the way of the others.
                states += sorted(AT_REST)
    return rows


def holders(store: Store, keys: Collection[str], session: Session | None = None) -> dict[str, Document]:
    """Those of `keys` that are there, of jobs that were given a turn; as far as it matters for that."""
    fields = {"job": 1, "stage": 1, "state": 1, "message": 1, "has_turn": 1}
    with translated(store):
        found = store.db.job_states.find({"_id": {"$in": list(keys)}}, fields, session=session)
        return {row["_id"]: row for row in found}


def first(store: Store, turns: Collection[str]) -> dict[str, Document]:
    """Turn -> the job that waits for it and comes first, without its payload.

    Costs as much as there are turns, however many jobs wait: grouped so, the index jumps from turn to turn.
    """
    steps: list[Document] = [
        {"$match": {"queues_for": {"$in": list(turns)}}},
        {"$sort": {"queues_for": 1, "seq": 1, "_id": 1}},
        {"$group": {"_id": "$queues_for", "first": {"$first": "$$ROOT"}}},
        {"$project": {"first.payload": 0}},
    ]
    with translated(store):
        return {row["_id"]: row["first"] for row in store.db.job_states.aggregate(steps)}


def count_before(store: Store, row: Document, most: int) -> int:
    """How many jobs wait for the same turn and come before this one; at most `most` are counted."""
    before = [{"seq": {"$lt": row["seq"]}}, {"seq": row["seq"], "_id": {"$lt": row["_id"]}}]
    with translated(store):
        return store.db.job_states.count_documents({"queues_for": row["queues_for"], "$or": before}, limit=most)


def not_queued(store: Store, keys: Sequence[str], batch: str) -> list[Document]:
    """`_id`, `run`, `order_key` of those jobs of a seed batch that are to wait for their turn and do not yet."""
    query = {"_id": {"$in": list(keys)}, "batch": batch, "reason": "order", "queues_for": None}
    with translated(store):
        return list(store.db.job_states.find(query, {"run": 1, "order_key": 1}))


# Parts of a transition


def wake(store: Store, session: Session, ids: Collection[str], new: Collection[str], now: datetime) -> None:
    """Jobs come to wait for these turns in this very transaction; for those only in `new`, jobs that never had it."""
    # In one order: of two who wake the same ones at the same time, one waits for the other at the first.
    updates = [_wake(turn, now, back=turn in ids) for turn in sorted({*ids, *new})]
    if updates:
        store.db.turns.bulk_write(updates, ordered=False, session=session)


def _wake(turn: str, now: datetime, *, back: bool) -> UpdateOne:
    change: Document = {"version": ObjectId()} if back else {"joined": ObjectId()}
    made: Document = {"run": turn.partition("/")[0], "holder": None, **({} if back else {"version": ObjectId()})}
    return UpdateOne({"_id": turn}, {"$min": {"due": now}, "$set": change, "$setOnInsert": made}, upsert=True)


def carry_out(store: Store, session: Session, passes: Sequence[Pass]) -> frozenset[str]:
    """Pass turns on; returns those that are not as they were, in which case the transaction must not be committed.

    If that cannot be told, all of them.
    """
    if not passes:
        return frozenset()
    result = store.db.turns.bulk_write(
        [_update(one) for one in sorted(passes, key=lambda one: one.turn)], ordered=False, session=session
    )
    if result.matched_count + result.deleted_count == len(passes):
        return frozenset()
    # Ask outside the transaction, where our own updates do not show.
    found = {row["_id"]: row for row in store.db.turns.find({"_id": {"$in": [one.turn for one in passes]}})}
    changed = frozenset(one.turn for one in passes if not _is_as_it_was(one, found.get(one.turn)))
    # What changed may show on one side only: to the transaction, or to us.
    return changed or frozenset(one.turn for one in passes)


def _is_as_it_was(one: Pass, row: Document | None) -> bool:
    return row is not None and all(row.get(name) == value for name, value in _as_it_was(one).items())


def _as_it_was(one: Pass) -> Document:
    same: Document = {"_id": one.turn, "version": one.version}
    # That a job comes first is true whoever joined since; that nobody waits is not.
    return same | {"joined": one.joined} if one.holder is None else same


def _update(one: Pass) -> UpdateOne | DeleteOne:
    if one.holder is None:
        return DeleteOne(_as_it_was(one))
    return UpdateOne(_as_it_was(one), {"$set": {"holder": one.holder, "version": ObjectId()}, "$unset": {"due": ""}})
