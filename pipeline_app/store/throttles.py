"""`throttles`: what all workers together may do to a target, and how much of it is taken.

One document for each throttle has the limits and what is used of them, so that whoever asks is answered by one atomic
update (`admit`), by MongoDB's clock. A rate is kept as the time of the next free slot (the generic cell rate
algorithm, ITU-T I.371): no tokens are counted, and nothing has to refill them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pymongo import ReturnDocument

from pipeline_app.domain.target import Target
from pipeline_app.store.client import Document, Store, translated

PREFIX = "t-"
#: Fields that say what a throttle allows; the others say what is used of it.
LIMITS = ("rate_per_s", "burst", "concurrency", "budget", "ordered")

#: Intervals of a burst that are not made up for after a pause: the slot itself, and half an interval (see `admit`).
NOT_MADE_UP = 1.5


class GoneError(Exception):
    """The throttle was taken away: there is nothing to wait for."""


@dataclass(frozen=True, kw_only=True)
class Grant:
    """Leave to run some jobs: the first not before `start`, each of the others `interval_s` after the one before."""

    #: Seconds since 1970 by MongoDB's clock.
    start: float
    interval_s: float


def set_limits(store: Store, target: Target, limits: Mapping[str, Any], *, reason: str, actor: str) -> Document:
    """Make a throttle, or give one that is there other limits; what is used stays as it is. Returns the document."""
    throttle = target.digest(PREFIX)
    now = store.now().timestamp() * 1000
    # A slot that was far away under the old rate is not further away than the new rate has it.
    rate = limits.get("rate_per_s")
    soonest = now + (1000 / rate if rate else 0)
    used = {"next_at": now, "backlog": False, "locks": [], "spent": 0.0, "period": 0, "grant": None}
    change = {**target.as_dict(), **dict.fromkeys(LIMITS), **limits, "reason": reason, "actor": actor}
    with translated(store):
        store.db.throttles.update_one(
            {"_id": throttle}, {"$setOnInsert": {**change, **used, "created_at": store.now()}}, upsert=True
        )
        store.db.throttles.update_one({"_id": throttle}, {"$set": change, "$min": {"next_at": soonest}})
        found = store.db.throttles.find_one({"_id": throttle})
    assert found is not None
    return found


def all_of(store: Store, run: str | None = None) -> list[Document]:
    """The throttles, oldest first; with `run` those that can apply to its jobs."""
    query = {} if run is None else {"run": {"$in": [None, run]}}
    with translated(store):
        return list(store.db.throttles.find(query).sort("created_at", 1))


def get(store: Store, throttle: str) -> Document | None:
    """A throttle."""
    with translated(store):
        return store.db.throttles.find_one({"_id": throttle})


def in_use(store: Store, waited_for: Sequence[str]) -> list[Document]:
    """Throttles that jobs wait for in the store, and those that say so still."""
    with translated(store):
        return list(store.db.throttles.find({"$or": [{"_id": {"$in": list(waited_for)}}, {"backlog": True}]}))


def forget_burst(store: Store, ids: Sequence[str]) -> None:
    """From now on one slot after the other: a target that was closed has saved up nothing."""
    with translated(store):
        now = store.now().timestamp() * 1000
        store.db.throttles.update_many({"_id": {"$in": list(ids)}}, {"$max": {"next_at": now}})


def existing(store: Store, ids: Sequence[str]) -> set[str]:
    """Those of `ids` that are there."""
    with translated(store):
        return {row["_id"] for row in store.db.throttles.find({"_id": {"$in": list(ids)}}, {"_id": 1})}


def delete(store: Store, throttle: str) -> bool:
    """Take a throttle away; jobs that wait for it are let go. False if it is gone already."""
    with translated(store):
        return store.db.throttles.delete_one({"_id": throttle}).deleted_count == 1


def set_backlog(store: Store, throttle: str, backlog: bool) -> None:
    """Whether jobs wait for it in the store: while they do, jobs that come later go behind them."""
    with translated(store):
        store.db.throttles.update_one({"_id": throttle}, {"$set": {"backlog": backlog}})


def admit(
    store: Store, throttle: str, *, number: int, message: str, token: str, patience_s: float, released: bool
) -> Grant | None:
    """Ask for leave to run `number` jobs of a message; None if they have to wait in the store.

    Args:
        token: of the claim; it tells this answer from others'.
        patience_s: a first slot further away than this is refused.
        released: the throttle itself let these jobs go: they do not stand behind those that wait.

    Leave under a bound on concurrency is a lock in the message's name, once for all of its jobs (they run one after the
    other); `unlock` gives it back, and `unlock_ended` those of messages that nobody runs any more.

    Raises GoneError, StoreError.
    """
    now = {"$toDouble": {"$toLong": "$$NOW"}}
    interval = {"$divide": [1000.0, {"$ifNull": ["$rate_per_s", float("inf")]}]}
    # What may be made up for is half an interval less than the burst: a target that counts in sliding windows would
    # otherwise be met at the very edge of rate and burst, where a millisecond's jitter decides.
    ahead = {"$max": [0, {"$multiply": [{"$subtract": ["$burst", NOT_MADE_UP]}, interval]}]}
    earliest = {"$max": ["$next_at", {"$subtract": [now, ahead]}]}
    has_lock = {"$in": [message, "$locks.message"]}
    period, spent = _budget(now)
    may = {
        "$and": [
            True if released else {"$not": [{"$or": ["$backlog", {"$ifNull": ["$ordered", False]}]}]},
            {"$lte": [earliest, {"$add": [now, patience_s * 1000.0]}]},
            {"$or": [has_lock, {"$lt": [{"$size": "$locks"}, {"$ifNull": ["$concurrency", float("inf")]}]}]},
            {"$lt": [spent, {"$ifNull": ["$budget.amount", float("inf")]}]},
        ]
    }
    lock = {"message": message, "token": token, "at": "$$NOW"}
    wants_lock = {"$and": [may, {"$ne": [{"$ifNull": ["$concurrency", None]}, None]}, {"$not": [has_lock]}]}
    change = {
        "next_at": {"$cond": [may, {"$add": [earliest, {"$multiply": [number, interval]}]}, "$next_at"]},
        "locks": {"$cond": [wants_lock, {"$concatArrays": ["$locks", [lock]]}, "$locks"]},
        "backlog": {"$cond": [may, "$backlog", True]},
        "grant": {"token": token, "start": {"$cond": [may, earliest, None]}, "at": now, "interval": interval},
        "spent": spent,
        "period": period,
    }
    with translated(store):
        found = store.db.throttles.find_one_and_update(
            {"_id": throttle}, [{"$set": change}], return_document=ReturnDocument.AFTER
        )
    if found is None:
        raise GoneError(throttle)
    grant = found["grant"]
    if grant["start"] is None:
        return None
    return Grant(start=grant["start"] / 1000, interval_s=grant["interval"] / 1000)


def _budget(now: Document) -> tuple[Document, Document]:
    """The number of the current period, and what is spent in it."""
    length = {"$multiply": [1000.0, {"$ifNull": ["$budget.period_s", 1e12]}]}
    since = {"$subtract": [now, {"$toDouble": {"$toLong": "$created_at"}}]}
    period = {"$floor": {"$divide": [since, length]}}
    return period, {"$cond": [{"$eq": ["$period", period]}, "$spent", 0.0]}


def spend(store: Store, throttle: str, amount: float) -> None:
    """Note what handlers reported, in the period that it is now."""
    period, spent = _budget({"$toDouble": {"$toLong": "$$NOW"}})
    change = {"spent": {"$add": [spent, amount]}, "period": period}
    with translated(store):
        store.db.throttles.update_one({"_id": throttle}, [{"$set": change}])


def unlock(store: Store, throttle: str, message: str) -> None:
    """The message's jobs run no more."""
    with translated(store):
        store.db.throttles.update_one({"_id": throttle}, {"$pull": {"locks": {"message": message}}})


def unlock_ended(store: Store, row: Document, held: Mapping[str, str]) -> int:
    """Take away locks whose message is not claimed under the lock's token any more; returns how many.

    `held` is message -> token of what is claimed, read after `row`. So no lock outlives the lease of its worker.
    """
    stale = [lock for lock in row["locks"] if held.get(lock["message"]) != lock["token"]]
    for lock in stale:
        with translated(store):
            store.db.throttles.update_one(
                {"_id": row["_id"]}, {"$pull": {"locks": {"message": lock["message"], "token": lock["token"]}}}
            )
    return len(stale)


def next_slot(row: Document, now: datetime) -> float:
    """When the next slot of a throttle with a rate is, in seconds since 1970, as `admit` would have it."""
    ahead_s: float = max(0.0, row["burst"] - NOT_MADE_UP) / row["rate_per_s"]
    return max(float(row["next_at"]) / 1000, now.timestamp() - ahead_s)


def spent_now(row: Document, now: datetime) -> tuple[float, datetime] | None:
    """What is spent of a budget in the period of `now`, and when that ends; None without a budget."""
    budget = row["budget"]
    if budget is None:
        return None
    length = budget["period_s"]
    created = row["created_at"].timestamp()
    period = (now.timestamp() - created) // length
    spent = row["spent"] if row["period"] == period else 0.0
    return spent, datetime.fromtimestamp(created + (period + 1) * length, UTC)
