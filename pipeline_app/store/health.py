"""What the MongoDB deployment is like, and whether our indexes are there. Only asked by `control/check/`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from pymongo import MongoClient
from pymongo.errors import PyMongoError

from pipeline_app.store.client import SELECT_TIMEOUT_S, Document, Store, translated
from pipeline_app.store.schema import INDEXES

#: Options of an index that make it another one.
_OPTIONS = ("partialFilterExpression", "expireAfterSeconds", "unique", "sparse")


@dataclass(frozen=True, kw_only=True)
class IndexFlaw:
    """An index that is not as `schema.INDEXES` has it."""

    collection: str
    index: str
    #: What is there instead; None if it is missing.
    instead: str | None


@dataclass(frozen=True, kw_only=True)
class Oplog:
    """The log from which members of a replica set catch up."""

    #: Members with data.
    members: int
    #: How full it is, 0 to 1: a window is only one when the oldest entries are being dropped.
    filled: float
    #: From its oldest entry to its newest.
    window: timedelta


def is_laid_out(store: Store) -> bool:
    """Whether anybody has used this database."""
    with translated(store):
        return store.db.schema.find_one({"_id": "layout"}) is not None


def index_flaws(store: Store) -> list[IndexFlaw]:
    """Indexes that are missing or different."""
    flaws = []
    for collection, wanted in INDEXES.items():
        with translated(store):
            there = store.db[collection].index_information()
        for model in wanted:
            name = str(model.document["name"])
            found = there.get(name)
            if found is None:
                flaws.append(IndexFlaw(collection=collection, index=name, instead=None))
            elif _shape(model.document) != _shape(found):
                flaws.append(IndexFlaw(collection=collection, index=name, instead=str(_shape(found))))
    return flaws


def _shape(index: Any) -> dict[str, Any]:
    keys = index["key"].items() if hasattr(index["key"], "items") else index["key"]
    return {"key": list(keys), **{name: index[name] for name in _OPTIONS if index.get(name) is not None}}


def oplog(store: Store) -> Oplog:
    """How far back the oplog goes. Raises StoreError, also if our user may not read it."""
    status = store.ask({"replSetGetStatus": 1})
    members = sum(row["stateStr"] in ("PRIMARY", "SECONDARY", "RECOVERING") for row in status["members"])
    with translated(store):
        log = store.other_database("local")["oplog.rs"]
        ends = [log.find_one(sort=[("$natural", order)]) for order in (1, -1)]
    size = store.ask({"collStats": "oplog.rs"}, database="local")
    first, last = (row["ts"].time if row else 0 for row in ends)
    return Oplog(members=members, filled=size["size"] / size["maxSize"], window=timedelta(seconds=last - first))


def snapshot_window_s(store: Store) -> float:
    """For how long the server keeps what was true: a verification may take that long."""
    name = "minSnapshotHistoryWindowInSeconds"
    return float(store.ask({"getParameter": 1, name: 1})[name])


def clocks(store: Store) -> dict[str, timedelta]:
    """How far the clock of each member that answers is ahead of this machine's; below a round trip it is nothing."""
    found = {}
    for host, port in store.members():
        offset = _clock(store.url_of(host, port))
        if offset is not None:
            found[f"{host}:{port}"] = offset
    return found


def _clock(url: str) -> timedelta | None:
    limit = int(SELECT_TIMEOUT_S * 1000)
    client: MongoClient[Document] = MongoClient(
        url, serverSelectionTimeoutMS=limit, connectTimeoutMS=limit, timeoutMS=limit
    )
    with client:
        try:
            client.admin.command("ping")
            before = datetime.now(UTC)
            hello = client.admin.command("hello")
            after = datetime.now(UTC)
        except PyMongoError:  # a member that is away has no clock
            return None
    offset: timedelta = hello["localTime"].replace(tzinfo=UTC) - (before + (after - before) / 2)
    return offset if abs(offset) > after - before else timedelta()
