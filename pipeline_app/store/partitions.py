"""`partitions`: which queues there are. Written before the first message of a new one, followed by every worker."""

from __future__ import annotations

from collections.abc import Sequence

from bson import Binary
from pymongo import UpdateOne

from pipeline_app.store.client import Document, Store, translated


def ensure(store: Store, rows: Sequence[Document]) -> None:
    """Note partitions `{_id: queue, pipeline, stage, partition, tags}`; those that are known stay as they are."""
    if not rows:
        return
    with translated(store):
        store.db.partitions.bulk_write(
            [UpdateOne({"_id": row["_id"]}, {"$setOnInsert": row}, upsert=True) for row in rows], ordered=False
        )


def of_pipelines(store: Store, pipelines: Sequence[str]) -> list[Document]:
    """The partitions of these pipelines."""
    with translated(store):
        return list(store.db.partitions.find({"pipeline": {"$in": list(pipelines)}}).sort("_id", 1))


def queues(store: Store) -> list[str]:
    """Every queue that any pipeline has."""
    with translated(store):
        return [row["_id"] for row in store.db.partitions.find({}, {"_id": 1})]


def park(store: Store, *, queue: str, body: bytes, headers: Document, reason: str) -> None:
    """Keep a message that is not ours to understand, so that taking it off the queue loses nothing."""
    with translated(store):
        store.db.parked_messages.insert_one(
            {"queue": queue, "body": Binary(body), "headers": headers, "reason": reason, "at": store.now()}
        )


def count_parked(store: Store) -> int:
    """How many messages are parked."""
    with translated(store):
        return store.db.parked_messages.count_documents({})
