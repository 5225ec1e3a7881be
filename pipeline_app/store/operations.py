"""`operations`: what people set going and the workers carry out step by step. Replays (`r-...`) are the only kind.

A replay is `running`, `paused` or `halted` (it stopped by itself), and ends as `done` or `cancelled`. Its steps are
part of the transactions that move its jobs (`transition.Step`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline_app.errors import NotFoundError
from pipeline_app.store.client import Document, Store, translated

REPLAY = "r-"

RUNNING, PAUSED, HALTED, DONE, CANCELLED = "running", "paused", "halted", "done", "cancelled"


def create(store: Store, row: Document) -> None:
    """Record a new operation."""
    with translated(store):
        store.db.operations.insert_one(row)


def get(store: Store, operation: str) -> Document:
    """The operation. Raises NotFoundError."""
    with translated(store):
        row = store.db.operations.find_one({"_id": operation})
    if row is None:
        raise NotFoundError(f"there is no replay {operation!r}", hint="pipeline-app replay list shows them")
    return row


def running(store: Store) -> list[Document]:
    """Those that are to go on, oldest first."""
    with translated(store):
        return list(store.db.operations.find({"state": RUNNING}).sort([("created_at", 1), ("_id", 1)]))


def listing(store: Store, run: str | None) -> list[Document]:
    """All operations, or those of a run, oldest first."""
    query = {} if run is None else {"run": run}
    with translated(store):
        return list(store.db.operations.find(query).sort([("created_at", 1), ("_id", 1)]))


def change(store: Store, operation: str, expected: Sequence[str], **fields: Any) -> bool:
    """Set fields of an operation; False if it is in none of the `expected` states any more."""
    query = {"_id": operation, "state": {"$in": list(expected)}}
    with translated(store):
        return store.db.operations.update_one(query, {"$set": fields}).matched_count == 1
