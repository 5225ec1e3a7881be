"""`check`: every check is shown a real mistake, and nothing where there is none."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection
from pymongo import MongoClient

from pipeline_app.application import prepare
from pipeline_app.control.check import configured, mongodb, work
from pipeline_app.control.check.checks import check
from pipeline_app.control.check.finding import Severity
from pipeline_app.local import mongod, processes
from pipeline_app.runtime import VERSION
from pipeline_app.store import manifests, partitions
from pipeline_app.transport.topology import PARKED_EXCHANGE
from tests.clusters import Node, replica_set
from tests.integration.checks import troubles, with_queue
from tests.integration.helpers import begin, double, lines, pipeline, register
from tests.project import Project, eventually

# Settings


def test_guest_on_another_machine(project: Project) -> None:
    """Given AMQP_URLs with and without a user of their own, then guest is an error where it is not on this machine."""
    addresses = "amqp://guest:guest@10.1.2.3:5672/;amqp://broker.example/;amqp://us:x@10.1.2.4/;amqp://127.0.0.1/"

    found = troubles(project.runtime(amqp_url=addresses), configured.guest)

    assert [row.severity for row in found] == [Severity.ERROR, Severity.ERROR]
    assert [row.what.split()[4] for row in found] == ["10.1.2.3", "broker.example"]
    assert troubles(project.runtime(), configured.guest) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ('result_backend = "redis://h"\nresult_expires = None\n', "for ever"),
        ('result_backend = "mongodb://h/x"\n', "emptied by celery beat only"),
        ('result_backend = "redis://h"\nresult_expires = 60\n', "no result backend fills up"),
        ("", "no result backend fills up"),
    ],
)
def test_a_result_backend_that_fills_up(project: Project, settings: str, words: str) -> None:
    """Given celeryconfig.py with a result backend, then one that nobody empties is named by the command."""
    project.write("celeryconfig.py", f'pipelines = ["stages:demo"]\n{settings}')

    found = project.json("check")["findings"]

    assert [words in row["what"] for row in found if row["check"] == "result_backend"] == [True]


def test_a_default_queue_on_one_node(project: Project) -> None:
    """Given several addresses, then a default queue that is on one of the nodes only is named."""
    several = f"{project.amqp_url};{project.amqp_url}"

    (found,) = troubles(project.runtime(amqp_url=several), configured.default_queue)

    assert "goes away with one node" in found.what
    assert troubles(project.runtime(), configured.default_queue) == []


# MongoDB


def test_indexes(project: Project) -> None:
    """Given a missing index and a different one, then both are errors; nothing is said of a database that is new."""
    rt = project.runtime()
    assert troubles(rt, mongodb.indexes) == []
    prepare(rt)
    assert troubles(rt, mongodb.indexes) == []
    rt.store.db.job_states.drop_index("due")
    rt.store.db.messages.drop_index("closed")
    rt.store.db.messages.create_index("closed_at", name="closed", expireAfterSeconds=60)

    missing, different = troubles(rt, mongodb.indexes)

    assert missing.severity is different.severity is Severity.ERROR
    assert missing.what == "index due of job_states is missing"
    assert different.what.startswith("index closed of messages is different: {'key': [('closed_at', 1)]")
    assert 'db.messages.dropIndex("closed")' in str(different.hint)
    rt.store.db.messages.drop_index("closed")
    prepare(rt)
    assert troubles(rt, mongodb.indexes) == []


def test_snapshot_window(project: Project) -> None:
    """Given a server that keeps what was true for a minute, then that is too short."""
    rt = project.runtime()
    name = "minSnapshotHistoryWindowInSeconds"
    rt.store.ask({"setParameter": 1, name: 60})
    try:
        (found,) = troubles(rt, mongodb.snapshot_window)
    finally:
        rt.store.ask({"setParameter": 1, name: 300})

    assert "keeps what was true for 60 s" in found.what
    assert troubles(rt, mongodb.snapshot_window) == []


def test_oplog(tmp_path: Path, project: Project) -> None:
    """Given a replica set whose oplog is full after moments, then members may not be away for long."""
    with replica_set(tmp_path / "set", members=2, oplog_mb=1) as members:
        rt = project.runtime(mongodb_url=members.url)
        assert troubles(rt, mongodb.oplog) == [], "it has not dropped anything"
        with MongoClient[dict[str, Any]](members.url) as client:
            for _ in range(40):
                client.x.y.insert_many([{"text": "x" * 100_000} for _ in range(10)])

            (found,) = eventually(lambda: troubles(rt, mongodb.oplog))

    assert re.fullmatch(r"the oplog goes back 0\.0 h: .*", found.what)


class Shifted:
    """A relay before mongod that makes its clock go ahead: it adds to `localTime` in whatever it answers."""

    def __init__(self, port: int, ahead: timedelta) -> None:
        self._target = ("127.0.0.1", port)
        self._ahead_ms = int(ahead / timedelta(milliseconds=1))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                for source, sink, change in ((client, server, bytes), (server, client, self._shift)):
                    threading.Thread(target=self._carry, args=(source, sink, change), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, change: Any) -> None:
        with source, sink, contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(change(data))

    def _shift(self, data: bytes) -> bytes:
        def later(found: re.Match[bytes]) -> bytes:
            return found[1] + struct.pack("<q", struct.unpack("<q", found[2])[0] + self._ahead_ms)

        return re.sub(rb"(\x09localTime\x00)(.{8})", later, data, flags=re.DOTALL)


def test_clocks(project: Project) -> None:
    """Given a MongoDB whose clock is ahead, then the difference is told; below a second there is nothing to tell."""
    parts = project.mongodb_url.split("/")
    relay = Shifted(int(parts[2].rpartition(":")[2]), timedelta(seconds=90))
    database = parts[3].partition("?")[0]
    try:
        rt = project.runtime(mongodb_url=f"mongodb://127.0.0.1:{relay.port}/{database}?directConnection=true")
        rt.store.synchronise()

        (found,) = troubles(rt, mongodb.clocks)
    finally:
        relay.close()

    assert re.fullmatch(r"the clock of 127.0.0.1:\d+ is (89|90)\.\d s ahead of this machine's", found.what)
    rt = project.runtime()
    rt.store.synchronise()
    assert troubles(rt, mongodb.clocks) == []


def test_a_standalone_server(tmp_path: Path, project: Project) -> None:
    """Given a mongod that is no replica set, then that is an error of its own, and what needs it is unknown."""
    (tmp_path / "data").mkdir()
    port = processes.free_port()
    command = [mongod.find_binary(tmp_path), "--dbpath", tmp_path / "data", "--port", str(port), "--nounixsocket"]
    node = Node(command, tmp_path / "log", project.env, port)
    node.start(lambda: processes.listens(port))
    try:
        found = project.json("check", env={"MONGODB_URL": f"mongodb://127.0.0.1:{port}/x"}, code=1)
    finally:
        node.kill()

    rows = {row["check"]: row for row in found["findings"]}
    assert rows["mongodb"]["severity"] == "error"
    assert "is a standalone server" in rows["mongodb"]["what"]
    assert "--replSet" in rows["mongodb"]["hint"]
    assert rows["indexes"] == {
        "check": "indexes", "severity": "unknown", "what": "MongoDB must answer first", "hint": None
    }  # fmt: skip


# Who works


def test_definitions(project: Project) -> None:
    """Given a worker with another definition of a pipeline, then it is named, and an error if there is no other."""
    chosen = pipeline(double)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(1))
    register(rt, "old", definitions=["of yesterday"])
    (found,) = troubles(rt, work.definitions)
    assert (found.severity, found.what.rpartition(" ")[2]) == (Severity.ERROR, "old")

    register(rt, "new", definitions=[chosen.hash])

    assert [row.severity for row in troubles(rt, work.definitions)] == [Severity.WARNING]
    manifests.update(rt.store, "r", {"awaits_definition": rt.store.now()})
    waits = troubles(rt, work.definitions)[-1]
    assert (waits.severity, waits.what.split(" wait")[0]) == (Severity.ERROR, "jobs of run r")


def test_versions(project: Project) -> None:
    """Given workers of this version and of others, then the others are named."""
    rt = project.runtime(pipeline(double))
    prepare(rt)
    register(rt, "new", version=VERSION)
    assert troubles(rt, work.versions) == []
    register(rt, "old", version="0.0.9")
    register(rt, "older")

    (found,) = troubles(rt, work.versions)

    assert found.what == f"this is version {VERSION}, and workers are of 0.0.9, unknown: old, older"


def test_queues_that_nobody_consumes(project: Project) -> None:
    """Given jobs and no worker, then their queue is named with the command that starts one."""
    rt = project.runtime(pipeline(double))
    name = with_queue(rt)

    (found,) = eventually(lambda: troubles(rt, work.unconsumed))

    assert found.what == f"nothing consumes {name}; messages ready there: 1"
    assert found.hint == f"start a worker: celery -A pipeline_app worker -Q {name}"


def test_parked_messages(project: Project) -> None:
    """Given messages that were put aside by a stage and by RabbitMQ, then both places are named."""
    rt = project.runtime(amqp_url=project.services.new_vhost())
    prepare(rt)
    assert troubles(rt, work.parked) == []
    partitions.park(rt.store, queue="q", body=b"?", headers={}, reason="not ours")
    rt.publisher.ping()  # declares the place
    with Connection(rt.settings.amqp_url) as connection, connection.Producer() as producer:
        producer.publish("?", exchange=PARKED_EXCHANGE.name)

    stored, rejected = eventually(lambda: found if len(found := troubles(rt, work.parked)) == 2 else None)

    assert "collection parked_messages" in stored.what
    assert f"queue {PARKED_EXCHANGE.name}: 1" in rejected.what


# All of it


def test_services_that_are_away(project: Project) -> None:
    """Given no RabbitMQ, then that is an error, what needs it is unknown, the rest is checked, and the answer is no."""
    project.runtime().store.db.drop_collection("x")
    found = project.json("check", env={"AMQP_URL": "amqp://u:s3cret@127.0.0.1:1/"}, code=1)

    rows = {row["check"]: row for row in found["findings"]}
    assert (found["ok"], rows["rabbitmq"]["severity"]) == (False, "error")
    assert rows["unconsumed"]["what"] == "RabbitMQ must answer first"
    assert rows["clocks"]["severity"] == "ok"
    assert "s3cret" not in str(found)


def test_the_embedded_broker(project: Project) -> None:
    """Given MongoDB as the broker, then only what makes sense there is checked."""
    rt = project.runtime(amqp_url=project.mongodb_url)

    names = {row.check for row in check(rt)}

    assert {"mongodb", "rabbitmq", "indexes", "versions"} <= names
    assert names.isdisjoint({"declarations", "consumer_timeout", "mirrored_queues", "unconsumed"})
