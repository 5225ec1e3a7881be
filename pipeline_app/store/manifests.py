"""`run_manifests`: a run's definition and its flags; `seed_batches`: the jobs that were added in one go."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from pymongo.errors import DuplicateKeyError

from pipeline_app.domain.partition import ORDER_PARTITIONS
from pipeline_app.errors import NotFoundError, RunExistsError
from pipeline_app.store.client import Document, Store, translated


def create(
    store: Store,
    run: str,
    *,
    pipeline: str,
    definition: Document,
    hash: str,
    then: Sequence[Document],
    bound: int | None = None,
    order_partitions: int = ORDER_PARTITIONS,
) -> Document:
    """Make a run. Raises RunExistsError."""
    manifest = {
        "_id": run,
        "pipeline": pipeline,
        "definition": definition,
        "hash": hash,
        "then": list(then),
        "bound": bound,
        "order_partitions": order_partitions,
        "created_at": store.now(),
        "cancelled_at": None,
        "cancel_done": False,
        "awaits_definition": None,
    }
    with translated(store):
        try:
            store.db.run_manifests.insert_one(manifest)
        except DuplicateKeyError as exc:
            raise RunExistsError(f"there is a run {run!r} already", hint="pipeline-app run list shows them") from exc
    return manifest


def find(store: Store, run: str) -> Document | None:
    """The manifest of a run."""
    with translated(store):
        return store.db.run_manifests.find_one({"_id": run})


def get(store: Store, run: str) -> Document:
    """The manifest of a run; `last` is the newest. Raises NotFoundError."""
    if run == "last":
        with translated(store):
            manifest = store.db.run_manifests.find_one(sort=[("created_at", -1), ("_id", -1)])
        if manifest is None:
            raise NotFoundError("there are no runs yet", hint="make one: pipeline-app run init RUN --pipeline NAME")
        return manifest
    manifest = find(store, run)
    if manifest is None:
        raise NotFoundError(f"there is no run {run!r}", hint="pipeline-app run list shows the runs")
    return manifest


def listing(store: Store, limit: int) -> list[Document]:
    """The newest runs, oldest of them first."""
    with translated(store):
        return list(store.db.run_manifests.find().sort([("created_at", -1), ("_id", -1)]).limit(limit))[::-1]


def cancelled(store: Store) -> set[str]:
    """Runs with the cancel flag whose jobs are not all moved yet, or were moved lately."""
    with translated(store):
        rows = store.db.run_manifests.find({"cancelled_at": {"$ne": None}}, {"_id": 1})
        return {row["_id"] for row in rows}


def matching(store: Store, query: Document) -> list[Document]:
    """Manifests by their flags; for the sweep."""
    with translated(store):
        return list(store.db.run_manifests.find(query))


def update(store: Store, run: str, change: Document, **guard: Any) -> bool:
    """Set fields of a manifest if `guard` holds."""
    with translated(store):
        return store.db.run_manifests.update_one({"_id": run, **guard}, {"$set": change}).matched_count == 1


# Seed batches


def open_batch(store: Store, batch: str, *, run: str, whole: bool, process: str, lease_s: float) -> None:
    """Begin a batch of the seeder `process`; `whole` ones show nothing of themselves before they are closed."""
    row = {
        "_id": batch,
        "run": run,
        "state": "open",
        "whole": whole,
        "process": process,
        "jobs": 0,
        "created_at": store.now(),
        "closed_at": None,
    }
    with translated(store):
        store.db.seed_batches.insert_one(row)
    renew_batch(store, batch, jobs=0, lease_s=lease_s)


def renew_batch(store: Store, batch: str, *, jobs: int, lease_s: float) -> None:
    """The seeder lives; `jobs` are in by now."""
    change = {"jobs": jobs, "lease_until": {"$add": ["$$NOW", int(lease_s * 1000)]}}
    # Also while it closes, which may take long: nobody else need do it meanwhile.
    query = {"_id": batch, "state": {"$in": ["open", "interrupted", "closing"]}}
    with translated(store):
        store.db.seed_batches.update_one(query, [{"$set": change}])


def note_keyed(store: Store, batch: str) -> None:
    """Jobs with an order key come into it."""
    with translated(store):
        store.db.seed_batches.update_one({"_id": batch}, {"$set": {"keyed": True}})


def is_keyed(store: Store, batch: str) -> bool:
    """Whether it is a whole batch with jobs that have an order key. (Those of a stream queue up as they come.)"""
    query = {"_id": batch, "keyed": True, "whole": True}
    with translated(store):
        return store.db.seed_batches.find_one(query, {"_id": 1}) is not None


def note_waiting(store: Store, batch: str, since: datetime | None) -> None:
    """Since when the seeder waits for room under the run's bound; None if it does not. To be seen by people."""
    change = {"$unset": {"waits_since": ""}} if since is None else {"$set": {"waits_since": since}}
    with translated(store):
        store.fast.seed_batches.update_one({"_id": batch}, change)


def set_batch(store: Store, batch: str, state: str, *, expected: Sequence[str], **fields: Any) -> bool:
    """Move a batch on; False if it is in none of the `expected` states."""
    change = {"state": state, **fields}
    if state == "closed":
        change["closed_at"] = store.now()
    with translated(store):
        query = {"_id": batch, "state": {"$in": list(expected)}}
        return store.db.seed_batches.update_one(query, {"$set": change}).matched_count == 1


def batches(store: Store, run: str, *states: str) -> list[Document]:
    """A run's batches in these states, oldest first; all of them without any."""
    query: Document = {"run": run}
    if states:
        query["state"] = {"$in": list(states)}
    with translated(store):
        return list(store.db.seed_batches.find(query).sort("created_at", 1))


def batches_in(store: Store, *states: str) -> list[Document]:
    """Batches of all runs in these states."""
    with translated(store):
        return list(store.db.seed_batches.find({"state": {"$in": list(states)}}))


def abandoned_batches(store: Store, *states: str) -> list[Document]:
    """Batches in these states whose seeder's lease has ended by MongoDB's clock."""
    query = {"state": {"$in": list(states)}, "$expr": {"$lt": ["$lease_until", "$$NOW"]}}
    with translated(store):
        return list(store.db.seed_batches.find(query))


def delete_batch(store: Store, batch: str) -> None:
    """Forget a batch that was taken back."""
    with translated(store):
        store.db.seed_batches.delete_one({"_id": batch})
