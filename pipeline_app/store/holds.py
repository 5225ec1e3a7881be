"""`target_holds`: what is closed. Holds (`h-...`) close a target, pauses (`p-...`) a run, stage or partition.

One document for each target, made again when it is closed again. A hold is `active`, then `probing` (a few jobs are
let go to see whether the target is open), then `ended`; it is in force until it has ended. A pause is active or ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from pymongo import ReturnDocument

from pipeline_app.domain.target import Target
from pipeline_app.store.client import Document, Store, translated

HOLD, PAUSE = "h-", "p-"

ACTIVE, PROBING, ENDED = "active", "probing", "ended"
IN_FORCE = [ACTIVE, PROBING]

#: A probe that fails closes the target for twice as long as before, up to this; longer if the target says so.
LONGEST_BACKOFF_S = 300.0


def close(
    store: Store,
    prefix: str,
    target: Target,
    *,
    until: datetime | None,
    reason: str,
    actor: str,
    by_handler: bool = False,
) -> Document:
    """Close a target; returns the document. Told again, an operator's word replaces what was said before.

    A handler's word (`by_handler`) only ever closes for longer. If it is one of the first probes that says so, it
    closes for at least twice as long as the last time.
    """
    state = {"$ifNull": ["$state", ENDED]}
    is_open, is_probed = {"$eq": [state, ENDED]}, {"$eq": [state, PROBING]}
    given_s = _seconds_until(until)
    # Once a round of probes went well, what it was closed for before says nothing any more.
    longer_s = {
        "$cond": [
            {"$ifNull": ["$probe.goes_well", False]},
            given_s,
            {"$max": [given_s, {"$min": [{"$multiply": [2, _CLOSED_S]}, LONGEST_BACKOFF_S]}]},
        ]
    }
    after_longer = {"$add": ["$$NOW", {"$toLong": {"$multiply": [1000, longer_s]}}]}
    fresh: Document = {
        **target.as_dict(),
        "kind": "hold" if prefix == HOLD else "pause",
        "state": ACTIVE,
        "until": until,
        "closed_s": given_s,
        "reason": {"$literal": reason},
        "actor": {"$literal": actor},
        "origin": "handler" if by_handler else "operator",
        "created_at": {"$cond": [is_open, "$$NOW", "$created_at"]},
        "ended_at": None,
        "probe": None,
        "closings": {"$add": [{"$ifNull": ["$closings", 0]}, {"$cond": [{"$eq": [state, ACTIVE]}, 0, 1]}]},
    }
    fresh |= {name: {"$literal": fresh[name]} for name in ("run", "stage", "partition", "selector")}
    if by_handler:
        # A target that an operator closed stays the operator's; one without an end has no end to move.
        fresh["until"] = {
            "$switch": {
                "branches": [
                    {"case": is_open, "then": until},
                    {"case": is_probed, "then": after_longer},
                    {"case": {"$eq": ["$until", None]}, "then": None},
                ],
                "default": {"$max": ["$until", until]},
            }
        }
        fresh["closed_s"] = {
            "$switch": {
                "branches": [{"case": is_open, "then": given_s}, {"case": is_probed, "then": longer_s}],
                "default": {"$max": [_CLOSED_S, given_s]},
            }
        }
        for name in ("reason", "actor", "origin"):
            fresh[name] = {"$cond": [is_open, fresh[name], f"${name}"]}
    with translated(store):
        found = store.db.target_holds.find_one_and_update(
            {"_id": target.digest(prefix)}, [{"$set": fresh}], upsert=True, return_document=ReturnDocument.AFTER
        )
    assert found is not None  # an upsert always has a document
    return found


_CLOSED_S = {"$ifNull": ["$closed_s", 1.0]}


def pass_of(row: Document) -> str:
    """What messages say that a hold lets go. Closed again, it does not let them pass any more."""
    return f"{row['_id']}/{row['closings']}"


def _seconds_until(until: datetime | None) -> Any:
    """How long that closes it; a hold without an end has no length, and begins with a minute when a probe fails."""
    if until is None:
        return 60.0
    return {"$max": [0.1, {"$divide": [{"$subtract": [until, "$$NOW"]}, 1000]}]}


def in_force(store: Store) -> list[Document]:
    """All that is closed, without what only its release needs."""
    with translated(store):
        return list(store.db.target_holds.find({"state": {"$in": IN_FORCE}}, {"probe": 0}))


def concerning(store: Store, run: str, pipeline: str) -> list[Document]:
    """Holds and pauses in force that can apply to jobs of a run, the oldest first; at most a hundred."""
    ours = {"$gte": f"{pipeline}.", "$lt": f"{pipeline}/"}  # "/" is the character after "."
    query = {"state": {"$in": IN_FORCE}, "run": {"$in": [None, run]}, "$or": [{"stage": None}, {"stage": ours}]}
    with translated(store):
        return list(store.db.target_holds.find(query, {"probe": 0}).sort("created_at", 1).limit(100))


def get(store: Store, hold: str) -> Document | None:
    """A hold or pause."""
    with translated(store):
        return store.db.target_holds.find_one({"_id": hold})


def listing(store: Store, *, kind: str, run: str | None, ended: bool) -> list[Document]:
    """Holds or pauses, oldest first: those in force, or all that are kept; of a run or of all."""
    query: Document = {"kind": kind}
    if not ended:
        query["state"] = {"$in": IN_FORCE}
    if run is not None:
        query["run"] = {"$in": [None, run]}
    with translated(store):
        return list(store.db.target_holds.find(query).sort("created_at", 1))


def over(store: Store) -> list[Document]:
    """Holds whose time has passed."""
    query = {"state": ACTIVE, "until": {"$type": "date"}, "$expr": {"$lte": ["$until", "$$NOW"]}}
    with translated(store):
        return list(store.db.target_holds.find(query))


def probed(store: Store) -> list[Document]:
    """Holds that are being probed."""
    with translated(store):
        return list(store.db.target_holds.find({"state": PROBING}))


def still_in_force(store: Store, ids: Sequence[str]) -> set[str]:
    """Those of `ids` that keep their jobs."""
    query = {"_id": {"$in": list(ids)}, "state": {"$in": IN_FORCE}}
    with translated(store):
        return {row["_id"] for row in store.db.target_holds.find(query, {"_id": 1})}


def begin_probing(store: Store, hold: str) -> bool:
    """From active to probing; False if it is not active any more."""
    return _change(store, hold, ACTIVE, {"state": PROBING, "probe": None})


def note_probe(store: Store, hold: str, before: Document | None, probe: Document) -> bool:
    """What was let go to probe the target; False if somebody else went on meanwhile."""
    with translated(store):
        result = store.db.target_holds.update_one(
            {"_id": hold, "state": PROBING, "probe": before}, {"$set": {"probe": probe}}
        )
        return result.matched_count == 1


def close_again(store: Store, hold: str) -> bool:
    """A probe failed: closed for twice as long as the last time. False if it is not being probed any more."""
    longer_s = {"$max": [_CLOSED_S, {"$min": [{"$multiply": [2, _CLOSED_S]}, LONGEST_BACKOFF_S]}]}
    change: Document = {
        "state": ACTIVE,
        "closed_s": longer_s,
        "until": {"$add": ["$$NOW", {"$toLong": {"$multiply": [1000, longer_s]}}]},
        "closings": {"$add": ["$closings", 1]},
        "probe": None,
    }
    with translated(store):
        return store.db.target_holds.update_one({"_id": hold, "state": PROBING}, [{"$set": change}]).matched_count == 1


def end(store: Store, hold: str, *, expected: Sequence[str] = (ACTIVE, PROBING)) -> bool:
    """It is over: jobs that it kept are let go. False if it was over before."""
    with translated(store):
        result = store.db.target_holds.update_one(
            {"_id": hold, "state": {"$in": list(expected)}},
            {"$set": {"state": ENDED, "ended_at": store.now(), "probe": None}},
        )
        return result.matched_count == 1


def _change(store: Store, hold: str, expected: str, change: Document) -> bool:
    with translated(store):
        return store.db.target_holds.update_one({"_id": hold, "state": expected}, {"$set": change}).matched_count == 1
