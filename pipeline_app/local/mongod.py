"""A real mongod as a one-node replica set in `.pipeline/mongod/`. Called by services.py.

It is the store and, where there is no RabbitMQ, the broker as well (kombu's `mongodb` transport, in a database of its
own). A replica set names its members by address, so a node that comes back on another port has to be told its new name.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import stat
import threading
from functools import partial
from pathlib import Path
from typing import Any

from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

from pipeline_app.errors import StoreError
from pipeline_app.local import files, processes
from pipeline_app.local.processes import ProcessRecord, RunningService

NAME = "mongod"
PROCESSES: tuple[str, ...] = (NAME,)
REPLICA_SET = "rs0"
STORE_DATABASE = "pipeline_app"
BROKER_DATABASE = "pipeline_broker"
#: kombu's name for it.
BROADCASTS = "messages.broadcast"

#: Usually ready in 1 s. A node that comes back on another port first looks for itself at the old one, where a server
#: that accepts connections and stays silent costs it 30 s.
READY_S = 60.0
STOP_GRACE_S = 20.0

#: MongoDB's code of this error.
NOT_YET_INITIALIZED = 94


def store_url(port: int) -> str:
    """Address for the store. Clients find the primary by the set's name, so they wait while it restarts."""
    return f"mongodb://127.0.0.1:{port}/{STORE_DATABASE}?replicaSet={REPLICA_SET}"


def broker_url(port: int) -> str:
    """Address for kombu's `mongodb` transport.

    Its messages are hints that may be lost or doubled, so no write of it waits for the journal (twice as fast), and an
    operation fails within seconds when mongod is away.
    """
    return (
        f"mongodb://127.0.0.1:{port}/{BROKER_DATABASE}"
        f"?replicaSet={REPLICA_SET}&w=1&serverSelectionTimeoutMS=5000&connectTimeoutMS=5000"
    )


def find_binary(state_dir: Path) -> Path:
    """The mongod on PATH, else the one in the wheel of the `local` extra.

    Raises StoreError if there is none.
    """
    if on_path := shutil.which(NAME):
        return Path(on_path)
    # Only looked up, never imported: a full `fiftyone` may be installed, and importing that takes seconds.
    package = importlib.util.find_spec("fiftyone")
    for folder in (package and package.submodule_search_locations) or ():
        binary = Path(folder) / "db" / "bin" / NAME
        if binary.is_file():
            return _runnable(binary, state_dir)
    raise StoreError("there is no mongod on this machine", hint="pip install 'pipeline-app[local]' brings one")


def start(state_dir: Path, cancelled: threading.Event) -> RunningService:
    """Start mongod with the data that are there, and wait until it takes writes.

    Leaves no process behind if that fails. Raises StoreError with the reason from its log.
    """
    home = state_dir / NAME
    (home / "data").mkdir(parents=True, exist_ok=True)
    binary = find_binary(state_dir)
    port = processes.free_port(files.read_json(home / "port.json").get("port"))
    files.write_json(home / "port.json", {"port": port})
    record = processes.start(NAME, _command(binary, home, port), state_dir=state_dir, env=os.environ)
    try:
        _wait_ready(port, record, cancelled)
    except BaseException:
        processes.stop([record], grace_s=5.0)
        raise
    return RunningService(port=port, processes=(record,))


def stop(state_dir: Path, service: RunningService) -> None:  # noqa: ARG001 - services.py calls all services alike
    """End it cleanly; its data stay."""
    processes.stop(service.processes, grace_s=STOP_GRACE_S)


def answers(port: int) -> bool:
    """Whether a writable primary answers there within two seconds."""
    try:
        with _connect(port) as client:
            return bool(client.admin.command("hello").get("isWritablePrimary"))
    except PyMongoError:
        return False


def make_broker(port: int) -> None:
    """Make the collection that kombu's transport makes at its first connection.

    Two workers that do so at once disturb each other: one of them gets an error and waits two seconds.

    Raises StoreError if mongod has gone away meanwhile.
    """
    try:
        with _connect(port) as client:
            database = client[BROKER_DATABASE]
            if BROADCASTS not in database.list_collection_names():
                database.create_collection(BROADCASTS, capped=True, size=100_000)
    except PyMongoError as exc:
        raise StoreError(f"mongod on 127.0.0.1:{port} went away: {exc}") from exc


def _command(binary: Path, home: Path, port: int) -> list[str | Path]:
    return [
        binary,
        *("--dbpath", home / "data"),
        *("--bind_ip", "127.0.0.1", "--port", str(port), "--nounixsocket"),
        *("--replSet", REPLICA_SET, "--oplogSize", "1024"),
        *("--wiredTigerCacheSizeGB", "0.5"),
        *("--quiet", "--setParameter", "diagnosticDataCollectionEnabled=false"),
    ]


def _runnable(binary: Path, state_dir: Path) -> Path:
    """The wheel's binary with its run bit: set in place, or on a copy where the wheel belongs to somebody else."""
    if os.access(binary, os.X_OK):
        return binary
    try:
        binary.chmod(binary.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    except OSError:
        return _copy(binary, state_dir / NAME / "bin" / NAME)
    return binary


def _copy(binary: Path, target: Path) -> Path:
    def version(path: Path) -> tuple[int, int]:
        return path.stat().st_size, path.stat().st_mtime_ns

    if not (target.is_file() and version(target) == version(binary)):
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(".tmp")
        shutil.copy2(binary, unfinished)
        unfinished.chmod(0o755)
        os.replace(unfinished, target)
    return target


def _connect(port: int) -> MongoClient[dict[str, Any]]:
    return MongoClient(
        "127.0.0.1",
        port,
        directConnection=True,
        serverSelectionTimeoutMS=2000,
        connectTimeoutMS=2000,
        socketTimeoutMS=5000,
    )


def _wait_ready(port: int, record: ProcessRecord, cancelled: threading.Event) -> None:
    wait = partial(processes.wait_until, record=record, timeout_s=READY_S, cancelled=cancelled)
    if problem := wait(lambda: processes.listens(port)):
        raise _failed(problem, record)
    with _connect(port) as client:
        if problem := wait(lambda: _make_primary(client, port, record)):
            raise _failed(problem, record)


def _make_primary(client: MongoClient[dict[str, Any]], port: int, record: ProcessRecord) -> bool:
    """One step towards a writable primary; whether it is one."""
    try:
        if client.admin.command("serverStatus")["pid"] != record.pid:
            return False  # somebody else's server got the port first: ours is about to end
        if client.admin.command("hello").get("isWritablePrimary"):
            return True
        _name_member(client, f"127.0.0.1:{port}")
    except PyMongoError:  # not that far yet
        pass
    return False


def _name_member(client: MongoClient[dict[str, Any]], address: str) -> None:
    """Make the replica set at the first start; later tell it its address if that is a new one."""
    try:
        config = client.admin.command("replSetGetConfig")["config"]
    except OperationFailure as exc:
        if exc.code != NOT_YET_INITIALIZED:
            raise
        client.admin.command("replSetInitiate", {"_id": REPLICA_SET, "members": [{"_id": 0, "host": address}]})
        return
    if config["members"][0]["host"] != address:
        config["members"][0]["host"] = address
        config["version"] += 1
        client.admin.command("replSetReconfig", config, force=True)


def _failed(what: str, record: ProcessRecord) -> StoreError:
    log = processes.tail(record.log, lines=200, width=10_000)
    hint = f"the whole log: {record.log}"
    if "error while loading shared libraries" in log:
        hint = "install the library that it names (Debian, Ubuntu: apt-get install libcurl4 libssl3)"
    return StoreError(f"{what}:\n{_reasons(log) or 'its log is empty'}", hint=hint)


def _reasons(log: str) -> str:
    """The errors in mongod's log, which come before many lines about its end; without any, its last lines."""
    lines = log.splitlines()
    errors = [error for line in lines if (error := _error_in(line))]
    return "\n".join(line[:400] for line in (errors or lines)[-10:])


def _error_in(line: str) -> str | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    if entry.get("s") not in {"E", "F"}:
        return None
    details = entry.get("attr", {})
    if isinstance(message := details.get("message"), dict):  # of the storage engine
        details = message.get("msg", message)
    return f"{entry['msg'].strip()}: {details}"
