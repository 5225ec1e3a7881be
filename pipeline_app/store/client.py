"""The connection, the one seam where pymongo's errors become ours, and transactions.

Every call has a time limit. Writes that anything depends on are majority and journaled; `Store.fast` is for notes that
may be lost (a hint was published, a progress mark).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import pymongo
from bson.codec_options import CodecOptions
from pymongo import MongoClient
from pymongo.client_session import ClientSession
from pymongo.database import Database
from pymongo.errors import (
    BulkWriteError,
    ConfigurationError,
    ConnectionFailure,
    ExecutionTimeout,
    InvalidURI,
    NetworkTimeout,
    OperationFailure,
    PyMongoError,
    WriteConcernError,
)
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

from pipeline_app.errors import StoreError, UsageError
from pipeline_app.settings import redact

Document = dict[str, Any]
Session = ClientSession
T = TypeVar("T")

#: Every operation ends within this, answered or not.
CALL_TIMEOUT_S = 10.0
#: Looks at all of a large run may take as long.
LOOK_TIMEOUT_S = 3600.0
#: The first contact ends within this: nobody waits longer to hear that there is no store.
SELECT_TIMEOUT_S = 3.0
#: A transaction that keeps meeting others is given up after this, and its caller decides. The transaction of a process
#: that was killed stands for a minute before MongoDB ends it; `end_transactions` ends it at once.
TRANSACTION_PATIENCE_S = 90.0
#: Begins the names of our connections; the process's own name follows.
APP_NAME = "pipeline_app"

_DURABLE = WriteConcern("majority", j=True)


class ContendedError(StoreError):
    """Others write on the same documents all the time; nothing was done."""


_SAFE_CODECS: CodecOptions[Document] = CodecOptions(tz_aware=True, tzinfo=UTC)
#: Codes of the server that mean "not you": not authorised, not authenticated.
_REFUSED_CODES = {13, 18}
#: Code of the server for a snapshot that it does not keep any more.
_TOO_OLD_CODE = 239
#: Code of the server for a transaction that somebody else ended: `end_transactions`, or an administrator.
_INTERRUPTED_CODE = 11601
#: Codes of the server that mean "not now": stepping down, shutting down, out of time.
_AWAY_CODES = {6, 7, 43, 50, 89, 91, 189, 262, 9001, 10058, 10107, 11600, 11601, 11602, 13435, 13436}


class Store:
    """A database of a replica set, as one process sees it. Not to be carried over a fork."""

    def __init__(self, url: str, *, process: str = "") -> None:
        self.address = redact(url)
        self._url = url
        try:
            self._client: MongoClient[Document] = MongoClient(
                url,
                appname=f"{APP_NAME} {process}".strip(),
                serverSelectionTimeoutMS=int(SELECT_TIMEOUT_S * 1000),
                connectTimeoutMS=int(SELECT_TIMEOUT_S * 1000),
                timeoutMS=int(CALL_TIMEOUT_S * 1000),
                maxPoolSize=200,
                retryWrites=True,
                tz_aware=True,
            )
            database = self._client.get_default_database("pipeline_app")
        except (InvalidURI, ConfigurationError, ValueError, OSError) as exc:  # OSError: a file of TLS
            raise UsageError(f"MONGODB_URL is not a MongoDB URL: {redact(str(exc))}") from exc
        #: Majority and journaled.
        self.db: Database[Document] = database.with_options(codec_options=_SAFE_CODECS, write_concern=_DURABLE)
        #: Acknowledged by the primary only.
        self.fast: Database[Document] = self.db.with_options(write_concern=WriteConcern(1))
        self._offset = timedelta()
        #: Sessions whose last transaction failed, and may still be open at the server: pymongo does not say.
        self._failed: deque[Session] = deque()

    def now(self) -> datetime:
        """The time by MongoDB's clock, as measured at `synchronise`; to the millisecond."""
        now = datetime.now(UTC) + self._offset
        return now.replace(microsecond=now.microsecond // 1000 * 1000)

    def synchronise(self) -> None:
        """Measure how far this machine's clock is from MongoDB's, and refuse a server without transactions.

        Raises StoreError; UsageError for a standalone server.
        """
        with translated(self), pymongo.timeout(SELECT_TIMEOUT_S):
            before = datetime.now(UTC)
            hello = self._client.admin.command("hello")
            after = datetime.now(UTC)
        if "setName" not in hello and hello.get("msg") != "isdbgrid":
            raise UsageError(
                f"MongoDB at {self.address} is a standalone server: a record is a transaction, and needs a replica set",
                hint="start mongod with --replSet rs0 and run: mongosh --eval 'rs.initiate()'",
            )
        offset = hello["localTime"].replace(tzinfo=UTC) - (before + (after - before) / 2)
        # Below a round trip the difference means nothing.
        self._offset = offset if abs(offset) > (after - before) else timedelta()

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A session for transactions.

        One whose transaction failed comes first. If we were cut off in that one, it holds its documents for a minute,
        against us too; the next one in the same session ends it, even if it reaches the server only later.
        """
        try:
            session = self._failed.popleft()
        except IndexError:
            session = self._client.start_session()
        try:
            yield session
        except BaseException:
            self._failed.append(session)
            raise
        session.end_session()

    @contextmanager
    def snapshot(self) -> Iterator[Session]:
        """A session whose reads all see the store as it was at one instant, for at most five minutes."""
        with translated(self), self._client.start_session(snapshot=True) as session:
            yield session

    def unhurried(self) -> AbstractContextManager[None]:
        """Calls in here may take LOOK_TIMEOUT_S, all together: full counts of large runs."""
        return self.limited(LOOK_TIMEOUT_S)

    @contextmanager
    def limited(self, seconds: float) -> Iterator[None]:
        """Calls in here end within that time, all together; what takes longer is a StoreError."""
        with pymongo.timeout(seconds):
            yield

    def transaction(self, work: Callable[[Session], T], *, patience_s: float = TRANSACTION_PATIENCE_S) -> T:
        """Run `work` as one transaction and commit it; it may be run several times.

        After a commit whose outcome is unknown `work` is run again: it must find out by itself that it was committed
        (the message is closed by its own token).

        Raises StoreError when the store does not answer; ContendedError when others write on the same documents for
        `patience_s`.
        """
        deadline = time.monotonic() + patience_s
        with translated(self):
            while True:
                try:
                    with (
                        self.session() as session,
                        session.start_transaction(read_concern=ReadConcern("snapshot"), write_concern=_DURABLE),
                    ):
                        result = work(session)
                        _commit(session)
                    return result
                except PyMongoError as exc:
                    if not _is_conflict(exc):
                        raise
                    if time.monotonic() > deadline:
                        raise ContendedError(f"a transaction met others for {patience_s:g} s") from exc
                    # Two records met on one document: one of them won, so there is progress; step aside briefly.
                    time.sleep(0.002)

    def end_transactions(self, process: str) -> int:
        """End the transactions that a process left open when it was killed; returns how many.

        They hold their documents for a minute otherwise. Harmless if the process lives: it runs them again. Needs no
        privilege beyond the sessions of our own user.
        """
        query: list[Document] = [
            {"$currentOp": {"idleSessions": True}},
            {"$match": {"appName": f"{APP_NAME} {process}", "transaction": {"$exists": True}}},
        ]
        with translated(self):
            found = [row["lsid"]["id"] for row in self._client.admin.aggregate(query)]
            if found:
                self._client.admin.command("killSessions", [{"id": session} for session in found])
        return len(found)

    def ask(self, command: Document, *, database: str = "admin") -> Document:
        """The server's answer to an administrative command. Raises StoreError, also if our user may not ask."""
        with translated(self):
            return self._client[database].command(command)

    def other_database(self, name: str) -> Database[Document]:
        """A database that is not ours, to be read."""
        return self._client[name]

    def members(self) -> list[tuple[str, int]]:
        """Addresses of the members of the replica set, as far as they are known by now."""
        return sorted((host, port or 27017) for host, port in self._client.nodes)

    def url_of(self, host: str, port: int) -> str:
        """The URL of one member alone, with our user and options."""
        scheme, _, rest = self._url.partition("://")
        authority, slash, path = rest.partition("/")
        path, _, query = path.partition("?")
        user, at, _ = authority.rpartition("@")
        others = ("replicaset=", "directconnection=")
        options = [part for part in query.split("&") if part and not part.lower().startswith(others)]
        if scheme == "mongodb+srv":
            options = ["tls=true", *options]
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return f"mongodb://{user}{at}{place}{slash or '/'}{path}?{'&'.join([*options, 'directConnection=true'])}"

    def reconnect(self) -> None:
        """Let every call have a new connection.

        pymongo asks a server once for each connection what it can do. One that is opened while the server is neither
        primary nor secondary, in the middle of an election, has no sessions for as long as it lasts, and nothing public
        ends it.
        """
        for server in list(self._client._topology._servers.values()):
            server.pool.reset_without_pause()

    def close(self) -> None:
        """End the connections."""
        self._client.close()


def _commit(session: Session) -> None:
    """Commit, and ask again while the outcome is unknown: committing twice is one commit."""
    for attempt in range(3):
        try:
            session.commit_transaction()
            return
        except PyMongoError as exc:
            if not exc.has_error_label("UnknownTransactionCommitResult") or attempt == 2:
                raise


def _is_conflict(exc: PyMongoError) -> bool:
    if isinstance(exc, ConnectionFailure):
        return False
    if isinstance(exc, OperationFailure) and exc.code == _INTERRUPTED_CODE:
        # Of a commit that waited for the majority it says nothing: that may have happened.
        return not isinstance(exc, WriteConcernError)
    if isinstance(exc, BulkWriteError):
        errors = exc.details.get("writeErrors", [])
        return any(error.get("code") == 112 for error in errors) or exc.has_error_label("TransientTransactionError")
    return exc.has_error_label("TransientTransactionError")


@contextmanager
def translated(store: Store) -> Iterator[None]:
    """Where pymongo's errors end: the store being away is a StoreError, everything else is a bug and passes."""
    try:
        yield
    except PyMongoError as exc:
        if isinstance(exc, OperationFailure) and exc.code in _REFUSED_CODES:
            raise StoreError(
                f"MongoDB at {store.address} refuses us: {_brief(exc)}",
                hint="check the user and password in MONGODB_URL",
            ) from exc
        if isinstance(exc, OperationFailure) and exc.code == _TOO_OLD_CODE:
            raise StoreError(
                f"MongoDB at {store.address} keeps what was true only for a while, and this look took longer",
                hint="set its parameter minSnapshotHistoryWindowInSeconds (300 by default) to more",
            ) from exc
        if isinstance(exc, ConfigurationError) and "Sessions are not supported" in str(exc):
            store.reconnect()
            raise StoreError(f"MongoDB at {store.address} was in an election when we connected to it") from exc
        if is_away(exc):
            raise StoreError(
                f"MongoDB at {store.address} does not answer: {_brief(exc)}",
                hint="check MONGODB_URL, or start local services with: pipeline-app up",
            ) from exc
        raise


def is_away(exc: BaseException) -> bool:
    """Whether the error says that the store cannot be reached or cannot write now."""
    if isinstance(exc, (ConnectionFailure, NetworkTimeout, ExecutionTimeout)):
        return True
    if isinstance(exc, OperationFailure):
        return exc.code in _AWAY_CODES or exc.has_error_label("UnknownTransactionCommitResult")
    return isinstance(exc, PyMongoError) and exc.timeout


def _brief(exc: BaseException) -> str:
    """The first clause of a driver's message: the rest is a topology dump."""
    return redact(str(exc).split(", Timeout:")[0].split(" (configured timeouts")[0])[:200]
