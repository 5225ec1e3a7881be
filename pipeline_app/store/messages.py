"""`messages`: the outbox. One document for each published chunk; its `_id` is the message id and the Celery task id."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta

from bson import ObjectId

from pipeline_app.domain.states import MessageState
from pipeline_app.store.client import Document, Session, Store, translated

#: An unpublished message is published by the sweep after this.
UNPUBLISHED_AFTER_S = 5.0
#: A published message that is still open is looked at after this; the time doubles with every publish.
FORGOTTEN_AFTER_S = 60.0
#: Stage of messages that carry results to the user's own Celery tasks; no stage can be called that.
THEN = "(then)"


def new_id() -> str:
    """An id for a message or a batch: 24 hex digits that grow with time, so that indexes grow at their end."""
    return str(ObjectId())


def document(
    *, run: str, pipeline: str, stage: str, partition: str, queue: str, jobs: Sequence[str], now: datetime
) -> Document:
    """A message that is open and not published yet."""
    return {
        "_id": new_id(),
        "run": run,
        "pipeline": pipeline,
        "stage": stage,
        "partition": partition,
        "queue": queue,
        "jobs": list(jobs),
        "state": MessageState.OPEN,
        "created_at": now,
        "published_at": None,
        "publishes": 0,
        "check_at": now + timedelta(seconds=UNPUBLISHED_AFTER_S),
    }


def claim(
    store: Store, ids: Sequence[str], *, worker: str, process: str, token: str, doubtful: Collection[str] = ()
) -> list[Document]:
    """Claim those of `ids` that are open; asking again with the same token gives the same answer.

    `worker` is the incarnation whose lease covers the claim, `process` the one that will run it. `doubtful` are tokens
    that some of them were to be claimed with when the answer got lost: those are given, too.

    Raises StoreError, after which some may be claimed.
    """
    with translated(store):
        store.db.messages.update_many(
            {"_id": {"$in": list(ids)}, "state": MessageState.OPEN},
            {
                "$set": {
                    "state": MessageState.CLAIMED,
                    "worker": worker,
                    "process": process,
                    "token": token,
                    "claimed_at": store.now(),
                }
            },
        )
        mine = {"_id": {"$in": list(ids)}, "state": MessageState.CLAIMED, "token": {"$in": [token, *doubtful]}}
        return list(store.db.messages.find(mine))


def closed_by(store: Store, ids: Sequence[str], token: str) -> set[str]:
    """Those of `ids` that were recorded under `token`: a record whose outcome was unknown did happen."""
    with translated(store):
        query = {"_id": {"$in": list(ids)}, "state": MessageState.CLOSED, "token": token, "given_back": False}
        return {row["_id"] for row in store.db.messages.find(query, {"_id": 1})}


def note_published(store: Store, ids: Sequence[str]) -> None:
    """Note that hints are in the broker. May be lost: then the sweep publishes once more, which is harmless."""
    now = store.now()
    with translated(store):
        store.fast.messages.update_many(
            {"_id": {"$in": list(ids)}, "state": MessageState.OPEN},
            [
                {
                    "$set": {
                        "published_at": now,
                        "publishes": {"$add": ["$publishes", 1]},
                        "check_at": {
                            "$add": [now, {"$multiply": [FORGOTTEN_AFTER_S * 1000, {"$pow": [2, "$publishes"]}]}]
                        },
                    }
                }
            ],
        )


def close_delivered(store: Store, ids: Sequence[str]) -> None:
    """Close messages that are done once the broker has them: results for the user's own tasks."""
    with translated(store):
        store.db.messages.update_many(
            {"_id": {"$in": list(ids)}, "state": MessageState.OPEN},
            {"$set": {"state": MessageState.CLOSED, "closed_at": store.now()}},
        )


def unpublished(store: Store, queues: Sequence[str], limit: int) -> list[Document]:
    """Open messages that nobody published in time."""
    query = {
        "state": MessageState.OPEN,
        "queue": {"$in": list(queues)},
        "published_at": None,
        "check_at": {"$lt": store.now()},
    }
    with translated(store):
        return list(store.db.messages.find(query).limit(limit))


def forgotten(store: Store, queue: str, published_before: datetime, limit: int) -> list[Document]:
    """Open messages of a queue that were published before that and whose time to be looked at has come."""
    query = {
        "state": MessageState.OPEN,
        "queue": queue,
        "published_at": {"$type": "date", "$lt": published_before},
        "check_at": {"$lt": store.now()},
    }
    with translated(store):
        return list(store.db.messages.find(query).sort("published_at", 1).limit(limit))


def oldest_published(store: Store, queue: str) -> datetime | None:
    """When the oldest open message of a queue was published; None if there is none."""
    query = {"state": MessageState.OPEN, "queue": queue, "published_at": {"$type": "date"}}
    with translated(store):
        row = store.db.messages.find_one(query, {"published_at": 1}, sort=[("published_at", 1)])
    return row["published_at"] if row else None


def claimed(store: Store, **match: object) -> list[Document]:
    """What workers hold now: bounded by the slots of the cluster."""
    with translated(store):
        return list(store.db.messages.find({"state": MessageState.CLAIMED, "worker": {"$exists": True}, **match}))


def open_counts(store: Store, queues: Collection[str], most: int) -> dict[str, int]:
    """How many open messages each of these queues has, counted up to `most`; queues without any are left out."""
    few = [{"$match": {"state": MessageState.OPEN}}, {"$limit": most}, {"$project": {"_id": 1}}]
    steps: list[Document] = [
        {"$match": {"_id": {"$in": list(queues)}}},
        # A few index entries for each queue, however many messages there are.
        {"$lookup": {"from": "messages", "localField": "_id", "foreignField": "queue", "pipeline": few, "as": "found"}},
        {"$project": {"open": {"$size": "$found"}}},
        {"$match": {"open": {"$gt": 0}}},
    ]
    with translated(store):
        return {row["_id"]: row["open"] for row in store.db.partitions.aggregate(steps)}


def released(store: Store, keeper: str) -> list[Document]:
    """What a hold or a throttle let go and nobody has claimed yet: run, stage, partition, jobs, created_at."""
    query = {"released_by": keeper, "state": MessageState.OPEN}
    fields = {"run": 1, "stage": 1, "partition": 1, "jobs": 1, "created_at": 1}
    with translated(store):
        return list(store.db.messages.find(query, fields))


def among(store: Store, ids: Sequence[str], *states: str) -> list[Document]:
    """Those of `ids` that are in one of these states."""
    with translated(store):
        return list(store.db.messages.find({"_id": {"$in": list(ids)}, "state": {"$in": list(states)}}))


def mark_cancelled(store: Store, ids: Sequence[str]) -> None:
    """Note that jobs of these were cancelled: a handler that runs for none but such is stopped after its grace."""
    query = {"_id": {"$in": list(ids)}, "state": {"$in": [MessageState.OPEN, MessageState.CLAIMED]}}
    with translated(store):
        store.db.messages.update_many(query, {"$set": {"cancelled_at": store.now()}})


def get(store: Store, message: str) -> Document | None:
    """The message, if it is still kept."""
    with translated(store):
        return store.db.messages.find_one({"_id": message})


def states(store: Store, ids: Sequence[str], session: Session | None = None) -> dict[str, str]:
    """State of each of `ids` that is still kept."""
    with translated(store):
        rows = store.db.messages.find({"_id": {"$in": list(ids)}}, {"state": 1}, session=session)
        return {row["_id"]: row["state"] for row in rows}


def drafts(store: Store, batch: str, limit: int) -> list[Document]:
    """Some messages of a seed batch that are not open yet."""
    with translated(store):
        return list(store.db.messages.find({"batch": batch, "state": MessageState.DRAFT}).limit(limit))


def open_drafts(store: Store, ids: Sequence[str]) -> None:
    """The batch is closed: these of its messages may go."""
    with translated(store):
        store.db.messages.update_many(
            {"_id": {"$in": list(ids)}, "state": MessageState.DRAFT},
            {
                "$set": {
                    "state": MessageState.OPEN,
                    "check_at": store.now() + timedelta(seconds=UNPUBLISHED_AFTER_S),
                }
            },
        )


def close_open(store: Store, run: str, queues: Sequence[str]) -> int:
    """Close the open messages of a run that was cancelled; their hints will find nothing."""
    with translated(store):
        return store.db.messages.update_many(
            {"state": MessageState.OPEN, "queue": {"$in": list(queues)}, "run": run},
            {"$set": {"state": MessageState.CLOSED, "closed_at": store.now()}},
        ).modified_count


def close_deserted(store: Store, ids: Sequence[str]) -> None:
    """Close those of `ids` that are open: no job names them any more, and their hints will find nothing."""
    with translated(store):
        store.db.messages.update_many(
            {"_id": {"$in": list(ids)}, "state": MessageState.OPEN},
            {"$set": {"state": MessageState.CLOSED, "closed_at": store.now()}},
        )


def delete(store: Store, ids: Sequence[str]) -> None:
    """Remove drafts of a batch that is taken back."""
    with translated(store):
        store.db.messages.delete_many({"_id": {"$in": list(ids)}, "state": MessageState.DRAFT})


def postpone(store: Store, ids: Sequence[str], seconds: float) -> None:
    """Look at these again only after a while: they cannot be published as they are."""
    with translated(store):
        store.fast.messages.update_many(
            {"_id": {"$in": list(ids)}}, {"$set": {"check_at": store.now() + timedelta(seconds=seconds)}}
        )
