"""`job_states`: where each job stands. It changes only in a transition; here are the questions and the documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from pipeline_app.domain.job import job_key
from pipeline_app.domain.selection import Selection
from pipeline_app.domain.states import JobState
from pipeline_app.store.client import Document, Session, Store, translated

#: What claiming needs to know of a job; its payload is read only where the stage takes it.
CLAIM_FIELDS = {
    "job": 1,
    "tags": 1,
    "message": 1,
    "input": 1,
    "generation": 1,
    "failures": 1,
    "deferrals": 1,
    "losses": 1,
    "expires_at": 1,
    "operation": 1,
    "payload": 1,
}

#: Fields that only a job in the store's keeping has; whoever moves it on takes them away.
PARKED_FIELDS = ("due_at", "reason", "waits_for", "queues_for")

#: Jobs that one step of a walk looks at, at most.
WALK = 5000


def document(
    *,
    run: str,
    job_id: str,
    batch: str,
    tags: dict[str, str],
    partition: str,
    stage: str,
    payload: Any,
    now: datetime,
    expires_at: datetime | None,
    seq: int,
    priority: int = 0,
    order_key: str | None = None,
) -> Document:
    """A new job, in no state yet: whoever seeds it says whether it is pending or waiting."""
    row: Document = {
        "_id": job_key(run, job_id),
        "run": run,
        "job": job_id,
        "batch": batch,
        "tags": tags,
        "partition": partition,
        "stage": stage,
        "message": None,
        "input": None,
        "generation": 0,
        "failures": 0,
        "deferrals": 0,
        "losses": 0,
        # Together the order in which jobs that wait in the store are let go.
        "priority": priority,
        "seq": seq,
        "payload": payload,
        "created_at": now,
        "updated_at": now,
    }
    if expires_at is not None:
        row["expires_at"] = expires_at
    if order_key is not None:
        row["order_key"] = order_key
    return row


def for_claim(store: Store, keys: Sequence[str]) -> dict[str, Document]:
    """The jobs with these `_id`s, as far as running them needs it."""
    with translated(store):
        return {row["_id"]: row for row in store.db.job_states.find({"_id": {"$in": list(keys)}}, CLAIM_FIELDS)}


def named(store: Store, keys: Sequence[str]) -> dict[str, str | None]:
    """`_id` of each of these jobs -> the message that it names."""
    with translated(store):
        rows = store.db.job_states.find({"_id": {"$in": list(keys)}}, {"message": 1})
        return {row["_id"]: row["message"] for row in rows}


def get(store: Store, run: str, job_id: str) -> Document | None:
    """The whole job."""
    with translated(store):
        return store.db.job_states.find_one({"_id": job_key(run, job_id)})


def existing(store: Store, keys: Sequence[str]) -> dict[str, str]:
    """Those of `keys` that are in the store, and the seed batch of each."""
    with translated(store):
        rows = store.db.job_states.find({"_id": {"$in": list(keys)}}, {"batch": 1})
        return {row["_id"]: row["batch"] for row in rows}


def due(store: Store, now: datetime, limit: int, skip_batches: Sequence[str] = ()) -> list[Document]:
    """Jobs whose time has come, longest due first."""
    query: Document = {"due_at": {"$lte": now}}
    if skip_batches:
        query["batch"] = {"$nin": list(skip_batches)}
    with translated(store):
        return list(store.db.job_states.find(query, {"payload": 0}).sort("due_at", 1).limit(limit))


def keepers(store: Store) -> list[str]:
    """Ids of the holds, pauses and throttles that jobs wait for."""
    with translated(store):
        # Asked so, the index jumps from one to the next; "exists" would read every job that waits.
        return list(store.db.job_states.distinct("waits_for", {"waits_for": {"$gt": ""}}))


def kept_by(
    store: Store,
    keeper: str,
    limit: int,
    *,
    not_in: Sequence[tuple[str, str, str]] = (),
    skip_batches: Sequence[str] = (),
) -> list[Document]:
    """Jobs that wait for that, in the order in which they are let go; none of those (run, stage, partition)."""
    query: Document = {"waits_for": keeper}
    if not_in:
        query["$nor"] = [{"run": run, "stage": stage, "partition": partition} for run, stage, partition in not_in]
    if skip_batches:
        query["batch"] = {"$nin": list(skip_batches)}
    with translated(store):
        found = store.db.job_states.find(query, {"payload": 0})
        return list(found.sort([("priority", -1), ("seq", 1)]).limit(limit))


def count_before(store: Store, row: Document) -> int:
    """How many jobs that wait for the same are let go before this one."""
    earlier = [
        {"priority": {"$gt": row["priority"]}},
        {"priority": row["priority"], "seq": {"$lt": row["seq"]}},
    ]
    with translated(store):
        return store.db.job_states.count_documents({"waits_for": row["waits_for"], "$or": earlier})


def count_kept_by(store: Store, keepers: Sequence[str]) -> dict[str, int]:
    """How many jobs wait for each."""
    stages: list[Document] = [
        {"$match": {"waits_for": {"$in": list(keepers)}}},
        {"$group": {"_id": "$waits_for", "n": {"$sum": 1}}},
    ]
    with translated(store):
        found = {row["_id"]: row["n"] for row in store.db.job_states.aggregate(stages)}
    return {keeper: found.get(keeper, 0) for keeper in keepers}


def waiting_for_definition(
    store: Store, run: str, stages: Sequence[str], before: datetime, limit: int
) -> list[Document]:
    """Jobs of a run that came to wait in these stages, before that, for a worker with its definition."""
    query = {
        "run": run,
        "state": JobState.WAITING,
        "stage": {"$in": list(stages)},
        "reason": "definition",
        "updated_at": {"$lt": before},
    }
    with translated(store):
        return list(store.db.job_states.find(query, {"payload": 0}).limit(limit))


def in_state(
    store: Store, run: str, states: Sequence[str], limit: int, skip_batches: Sequence[str] = ()
) -> list[Document]:
    """Some jobs of a run in one of these stored states."""
    query: Document = {"run": run, "state": {"$in": list(states)}}
    if skip_batches:
        query["batch"] = {"$nin": list(skip_batches)}
    with translated(store):
        return list(store.db.job_states.find(query, {"payload": 0}).limit(limit))


def chosen(selection: Selection, run: str) -> Document:
    """The query for a selection."""
    query: Document = {"run": run}
    if selection.job_ids:
        query["_id"] = {"$in": [job_key(run, job_id) for job_id in selection.job_ids]}
    if selection.states:
        query["state"] = {"$in": list(selection.states)}
    for name, value in (("stage", selection.stage), ("partition", selection.partition), ("group", selection.group)):
        if value is not None:
            query[{"group": "error_group"}.get(name, name)] = value
    # Tags may have dots and dollars in their names: no path can name those.
    conditions = [
        {"$eq": [{"$getField": {"field": {"$literal": key}, "input": "$tags"}}, {"$literal": value}]}
        for key, value in selection.selector.items()
    ]
    if conditions:
        query["$expr"] = {"$and": conditions}
    changed: Document = {}
    if selection.since is not None:
        changed["$gte"] = selection.since
    if selection.until is not None:
        changed["$lt"] = selection.until
    if changed:
        query["updated_at"] = changed
    return query



def walk(
    store: Store,
    run: str,
    selection: Selection,
    *,
    state: JobState,
    stage: str,
    after: str,
    limit: int,
    not_by: str | None = None,
) -> tuple[list[Document], str | None]:
    """Some jobs of a selection in one state and stage, behind the `_id` `after`, without payloads; and how far it came.

    That is an `_id`, or None at the end. Few jobs are looked at however few of them match, so that it answers in time
    in a run of any size. `not_by` leaves out jobs that this operation replayed last.
    """
    place: Document = {"run": run, "state": state, "stage": stage}
    query = chosen(replace(selection, states=(state,), stage=stage), run)
    if not_by is not None:
        query["operation"] = {"$ne": not_by}
    with translated(store):
        if selection.job_ids:
            found = store.db.job_states.find({"$and": [query, {"_id": {"$gt": after}}]}, {"payload": 0})
            rows = list(found.sort("_id", 1).limit(limit))
            return rows, rows[-1]["_id"] if len(rows) == limit else None
        ahead = store.db.job_states.find({**place, "_id": {"$gt": after}}, {"_id": 1}).hint("run_state").sort("_id", 1)
        edge = next((row["_id"] for row in ahead.skip(WALK - 1).limit(1)), None)
        bounds = {"$gt": after} if edge is None else {"$gt": after, "$lte": edge}
        found = store.db.job_states.find({**query, "_id": bounds}, {"payload": 0}).hint("run_state").sort("_id", 1)
        rows = list(found.limit(limit))
    return rows, rows[-1]["_id"] if len(rows) == limit else edge


def payloads(store: Store, keys: Sequence[str]) -> dict[str, Any]:
    """`_id` -> payload."""
    with translated(store):
        rows = store.db.job_states.find({"_id": {"$in": list(keys)}}, {"payload": 1})
        return {row["_id"]: row.get("payload") for row in rows}


def count_selected(store: Store, run: str, selection: Selection) -> dict[tuple[str, str, str], int]:
    """(stage, stored state, partition) -> jobs of a selection; looks at each."""
    stages: list[Document] = [
        {"$match": chosen(selection, run)},
        {"$group": {"_id": {"stage": "$stage", "state": "$state", "partition": "$partition"}, "n": {"$sum": 1}}},
    ]
    with translated(store):
        rows = store.db.job_states.aggregate(stages)
        return {(row["_id"]["stage"], row["_id"]["state"], row["_id"]["partition"]): row["n"] for row in rows}


def stream(
    store: Store,
    run: str,
    *,
    state: str | None = None,
    stage: str | None = None,
    after: str | None = None,
    page: int = 1000,
    session: Session | None = None,
) -> Iterator[list[Document]]:
    """Jobs of a run in the order of their ids, in pages; constant memory."""
    query: Document = {"run": run}
    if state is not None:
        query["state"] = state
    if stage is not None:
        query["stage"] = stage
    last = after
    while True:
        bounds = {"_id": {"$gt": last}} if last is not None else {}
        with translated(store):
            found = store.db.job_states.find({**query, **bounds}, {"payload": 0}, session=session)
            rows = list(found.sort("_id", 1).limit(page))
        if rows:
            yield rows
        if len(rows) < page:
            return
        last = rows[-1]["_id"]


def dead_letters(
    store: Store, run: str, *, stage: str | None, job_id: str | None, group: str | None, limit: int
) -> list[Document]:
    """The last `limit` dead-lettered jobs of a run, the longest dead first."""
    query: Document = {"run": run, "state": JobState.DEAD_LETTERED}
    if stage is not None:
        query["stage"] = stage
    if group is not None:
        query["error_group"] = group
    if job_id is not None:
        query["_id"] = job_key(run, job_id)
    with translated(store):
        rows = store.db.job_states.find(query, {"payload": 0}).sort([("updated_at", -1), ("_id", -1)]).limit(limit)
        return list(rows)[::-1]


def failure_groups(store: Store, run: str, *, stage: str | None, limit: int) -> list[Document]:
    """Jobs that are dead or wait for a retry, by stage and failure group, the largest group first; looks at each.

    `sample` is the job that failed last, a dead one if there is one.
    """
    dead = {"$eq": ["$state", JobState.DEAD_LETTERED]}
    # Documents are compared field by field, in this order.
    sample = {"dead": dead, "at": "$updated_at", "job": "$job", "kind": "$reason"}
    match: Document = {"run": run, "state": {"$in": [JobState.DEAD_LETTERED, JobState.RETRY_WAITING]}}
    match["error_group"] = {"$type": "string"}
    if stage is not None:
        match["stage"] = stage
    stages: list[Document] = [
        {"$match": match},
        {
            "$group": {
                "_id": {"stage": "$stage", "group": "$error_group"},
                "count": {"$sum": 1},
                "dead_lettered": {"$sum": {"$cond": [dead, 1, 0]}},
                "first_at": {"$min": "$updated_at"},
                "last_at": {"$max": "$updated_at"},
                "sample": {"$max": sample},
            }
        },
        {"$sort": {"count": -1, "last_at": -1, "_id": 1}},
        {"$limit": limit},
    ]
    with translated(store):
        return list(store.db.job_states.aggregate(stages))



def delete(store: Store, keys: Sequence[str], batch: str) -> None:
    """Remove jobs of a batch that is taken back."""
    with translated(store):
        store.db.job_states.delete_many({"_id": {"$in": list(keys)}, "batch": batch})
