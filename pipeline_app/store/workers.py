"""`workers`: one record for each incarnation of a worker, and its lease; `leases`: who leads the sweep.

Leases end by MongoDB's own clock (`$$NOW`), so that the clocks of the machines don't matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from pymongo import ReturnDocument

from pipeline_app.store.client import Document, Store, translated

#: Seconds that a worker is believed alive after its last sign of life.
LEASE_S = 10.0
#: Seconds between two signs of life.
RENEW_S = 2.0
#: How a worker is asked to stop: what it runs may end; or it gives everything back at once.
WARM, NOW = "warm", "now"
#: The signal that what stops jobs has changed: a hold, a pause, a throttle, a cancelled run.
FLAGS = "flags"

_UNTIL = {"$add": ["$$NOW", int(LEASE_S * 1000)]}


def register(store: Store, worker: str, record: Document) -> None:
    """Write the record of a new incarnation; its lease begins."""
    with translated(store):
        store.db.workers.update_one(
            {"_id": worker},
            [{"$set": {**record, "started_at": "$$NOW", "heartbeat_at": "$$NOW", "lease_until": _UNTIL}}],
            upsert=True,
        )


def renew(store: Store, worker: str, fields: Document) -> bool:
    """Extend the lease; False if it was taken away: then the worker needs a new incarnation."""
    with translated(store):
        result = store.db.workers.update_one(
            {"_id": worker, "ended_at": None},
            [{"$set": {**fields, "heartbeat_at": "$$NOW", "lease_until": _UNTIL}}],
        )
        return result.matched_count == 1


def end(store: Store, worker: str, state: str) -> bool:
    """Close the record: `stopped` by the worker itself, `stale` by the sweep. False if it was closed before."""
    with translated(store):
        result = store.db.workers.update_one(
            {"_id": worker, "ended_at": None}, [{"$set": {"state": state, "ended_at": "$$NOW", "lease_until": "$$NOW"}}]
        )
        return result.matched_count == 1


def end_stale(store: Store, worker: str) -> bool:
    """Close the record of a worker whose lease has ended, unless it came back in between."""
    with translated(store):
        result = store.db.workers.update_one(
            {"_id": worker, "ended_at": None, "$expr": {"$lt": ["$lease_until", "$$NOW"]}},
            [{"$set": {"state": "stale", "ended_at": "$$NOW"}}],
        )
        return result.matched_count == 1


def request_stop(store: Store, workers: Sequence[str], how: str) -> None:
    """Ask these workers to stop, WARM or NOW; what was asked NOW is not taken back. Those that have ended stay so."""
    open_ones = {"_id": {"$in": list(workers)}, "ended_at": None, "stop": {"$ne": NOW}}
    with translated(store):
        store.db.workers.update_many(
            open_ones, [{"$set": {"state": "stop_requested", "stop": how, "stop_requested_at": "$$NOW"}}]
        )


def stop_wanted(store: Store, worker: str) -> str | None:
    """How that worker was asked to stop; None if it was not."""
    with translated(store):
        row = store.db.workers.find_one({"_id": worker}, {"stop": 1})
    return None if row is None else row.get("stop")


def expired(store: Store) -> list[Document]:
    """Workers that are not ended and whose lease has run out."""
    with translated(store):
        return list(store.db.workers.find({"ended_at": None, "$expr": {"$lt": ["$lease_until", "$$NOW"]}}))


def alive(store: Store) -> list[Document]:
    """Workers with a lease."""
    with translated(store):
        return list(store.db.workers.find({"ended_at": None, "$expr": {"$gte": ["$lease_until", "$$NOW"]}}))


def by_ids(store: Store, ids: Iterable[str]) -> dict[str, Document]:
    """`_id` -> record, of workers that may have ended."""
    with translated(store):
        return {row["_id"]: row for row in store.db.workers.find({"_id": {"$in": list(ids)}})}


def listing(store: Store, since: datetime) -> list[Document]:
    """Workers that run, and those that ended after `since`; oldest first."""
    query: Document = {"$or": [{"ended_at": None}, {"ended_at": {"$gte": since}}]}
    with translated(store):
        return list(store.db.workers.find(query).sort("started_at", 1))


def lead(store: Store, name: str, holder: str, seconds: float) -> bool:
    """Take or keep the lease `name`; False while another holds it.

    Holders are named as their connections are: what the one before was doing when its lease ended is ended first, for
    it may have been killed in a transaction, and that holds what whoever leads next has to write.
    """
    ended: Document = {"_id": name, "$expr": {"$lt": ["$until", "$$NOW"]}}
    take = [{"$set": {"holder": holder, "until": {"$add": ["$$NOW", int(seconds * 1000)]}}}]
    with translated(store):
        if store.db.leases.update_one({"_id": name, "holder": holder}, take).matched_count:
            return True
        # It is another's, or there is none yet: then make one that has ended.
        store.db.leases.update_one(
            {"_id": name}, {"$setOnInsert": {"holder": None, "until": datetime(1970, 1, 1, tzinfo=UTC)}}, upsert=True
        )
        before = store.db.leases.find_one(ended)
        if before is None:
            return False
        if before["holder"] is not None:
            store.end_transactions(before["holder"])
        # Not if it came back in between, or somebody else was faster.
        return store.db.leases.update_one({**ended, "holder": before["holder"]}, take).matched_count == 1


def give_up_lead(store: Store, name: str, holder: str) -> None:
    """Let another lead at once."""
    with translated(store):
        store.db.leases.delete_one({"_id": name, "holder": holder})


def bump(store: Store, signal: str) -> int:
    """Announce that something that every worker keeps in memory has changed; returns its new version."""
    with translated(store):
        row = store.db.signals.find_one_and_update(
            {"_id": signal}, {"$inc": {"version": 1}}, upsert=True, return_document=ReturnDocument.AFTER
        )
    assert row is not None
    return int(row["version"])


def version(store: Store, signal: str) -> int:
    """The version of what `bump` announces."""
    with translated(store):
        row = store.db.signals.find_one({"_id": signal})
    return int(row["version"]) if row else 0
