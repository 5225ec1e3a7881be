"""`pipeline_events`: one for each message and step, with the jobs it concerned; the event log is append-only."""

from __future__ import annotations

from bson import ObjectId

from pipeline_app.store.client import Document, Store, translated


def of_run(
    store: Store, run: str, *, job_id: str | None = None, stage: str | None = None, limit: int = 100
) -> list[Document]:
    """The last `limit` events of a run (or of one of its jobs), oldest first."""
    query: Document = {"run": run}
    if job_id is not None:
        query["jobs"] = job_id
    if stage is not None:
        query["stage"] = stage
    with translated(store):
        return list(store.db.pipeline_events.find(query).sort("_id", -1).limit(limit))[::-1]


def since(store: Store, run: str, after: ObjectId | None, limit: int) -> list[Document]:
    """Events after that one, oldest first."""
    query: Document = {"run": run}
    if after is not None:
        query["_id"] = {"$gt": after}
    with translated(store):
        return list(store.db.pipeline_events.find(query).sort("_id", 1).limit(limit))


def of_batch(store: Store, batch: str, after: ObjectId | None = None) -> Document | None:
    """The first event of a seed batch, or the first after that one; None if there is none. They have all its jobs."""
    query: Document = {"batch": batch}
    if after is not None:
        query["_id"] = {"$gt": after}
    with translated(store):
        return store.db.pipeline_events.find_one(query, sort=[("_id", 1)])


def delete(store: Store, event: ObjectId) -> None:
    """Remove an event of a batch that is taken back."""
    with translated(store):
        store.db.pipeline_events.delete_one({"_id": event})
