"""The collections, their indexes and the version of their layout. Who calls: whoever makes a run, and every worker."""

from __future__ import annotations

from typing import Any

from pymongo import ASCENDING, DESCENDING, IndexModel
from pymongo.errors import CollectionInvalid, OperationFailure

from pipeline_app.domain.states import JobState, MessageState
from pipeline_app.errors import RefusedError
from pipeline_app.store.client import Store, translated

#: Layout of the documents. A change that older code cannot read raises it.
VERSION = 1

#: Code of the server's answer to making a collection that is there.
NAMESPACE_EXISTS = 48

#: How long a closed message is kept: after that a late duplicate finds nothing, and is dropped all the same.
CLOSED_MESSAGES_S = 24 * 3600
#: How long a hold that is over is kept, to be looked at.
ENDED_HOLDS_S = 7 * 24 * 3600
#: How long the record of a worker that ended is kept.
ENDED_WORKERS_S = 7 * 24 * 3600


def _index(*keys: str | tuple[str, int], **options: Any) -> IndexModel:
    return IndexModel([key if isinstance(key, tuple) else (key, ASCENDING) for key in keys], **options)


INDEXES: dict[str, list[IndexModel]] = {
    "run_manifests": [_index(("created_at", DESCENDING), name="newest")],
    "seed_batches": [_index("run", "created_at", name="run"), _index("state", name="state")],
    "job_states": [
        # Lists and sweeps of a run by state; counting by state for verify.
        _index("run", "state", "stage", "_id", name="run_state"),
        # What the sweep looks for: only jobs that wait for a time have due_at.
        _index("due_at", name="due", partialFilterExpression={"due_at": {"$exists": True}}),
        # Jobs that something keeps in the store, in the order in which it lets them go.
        _index(
            "waits_for",
            ("priority", DESCENDING),
            "seq",
            name="waits_for",
            partialFilterExpression={"waits_for": {"$exists": True}},
        ),
        # Jobs that wait for their turn, in order: who is the next of each is read without looking at the others.
        _index("queues_for", "seq", "_id", name="queue", partialFilterExpression={"queues_for": {"$exists": True}}),
        # Jobs whose turn it is: those at rest among them have to pass it on.
        _index("state", name="turn", partialFilterExpression={"has_turn": True}),
        # Dead letters in the order of their deaths; nothing else is in it.
        _index("run", "updated_at", "_id", name="dead", partialFilterExpression={"state": JobState.DEAD_LETTERED}),
    ],
    "messages": [
        # Unpublished and forgotten hints of a queue.
        _index("queue", "published_at", name="open", partialFilterExpression={"state": MessageState.OPEN}),
        # What workers hold now: as many as there are slots in the cluster, never as many as there are messages.
        _index("worker", name="claimed", partialFilterExpression={"state": MessageState.CLAIMED}),
        # What a hold or a throttle let go and no worker has claimed yet.
        _index("released_by", "state", name="released", partialFilterExpression={"released_by": {"$exists": True}}),
        _index("batch", name="draft", partialFilterExpression={"state": MessageState.DRAFT}),
        _index("closed_at", name="closed", expireAfterSeconds=CLOSED_MESSAGES_S),
    ],
    # Turns that have to be looked at.
    "turns": [_index("due", name="due", partialFilterExpression={"due": {"$exists": True}})],
    "job_outputs": [],
    "job_attempts": [
        # Successes are read by _id only; the failures are what people look for.
        _index("run", "stage", "outcome", "_id", name="failures", partialFilterExpression={"error": {"$exists": True}}),
    ],
    "pipeline_events": [
        _index("run", "jobs", name="run_job"),
        _index("run", "_id", name="run"),
        # What a seed batch added, a page of jobs in each; nothing else has a batch.
        _index("batch", "_id", name="batch", partialFilterExpression={"batch": {"$exists": True}}),
    ],
    "run_counters": [
        _index("run", name="run"),
        _index("at", name="idle", partialFilterExpression={"at": {"$exists": True}}),
        _index("worker", name="worker"),
    ],
    "workers": [
        _index("lease_until", name="lease"),
        _index("ended_at", name="ended", expireAfterSeconds=ENDED_WORKERS_S),
    ],
    "partitions": [_index("pipeline", "stage", name="stage")],
    "parked_messages": [_index("at", name="at")],
    "target_holds": [_index("state", name="state"), _index("ended_at", name="ended", expireAfterSeconds=ENDED_HOLDS_S)],
    "throttles": [],
    "operations": [_index("state", name="state"), _index("run", "created_at", name="run")],
    "leases": [],
    "signals": [],
}


def ensure(store: Store) -> None:
    """Make what is missing of collections and indexes; cheap when nothing is.

    Raises RefusedError if newer code laid the data out.
    """
    with translated(store):
        found = store.db.schema.find_one({"_id": "layout"}) or {}
        if found.get("version", VERSION) > VERSION:
            raise RefusedError(
                f"the data in {store.address} have layout {found['version']}, this code knows {VERSION}",
                hint="update pipeline-app here, too",
            )
        for name, indexes in INDEXES.items():
            if indexes:
                store.db[name].create_indexes(indexes)
        # A transaction should never be the first to touch a collection.
        existing = set(store.db.list_collection_names())
        for name in INDEXES.keys() - existing:
            _create(store, name)
        store.db.schema.update_one({"_id": "layout"}, {"$set": {"version": VERSION}}, upsert=True)


def _create(store: Store, name: str) -> None:
    try:
        store.db.create_collection(name)
    except CollectionInvalid:  # another process was faster
        pass
    except OperationFailure as exc:  # and here it was faster by less than a round trip
        if exc.code != NAMESPACE_EXISTS:
            raise
