"""MongoDB as the framework needs it: laid out once, a replica set, leases by its own clock, nothing locked for long."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pymongo import MongoClient

from pipeline_app.application import prepare
from pipeline_app.control.duties import sweep
from pipeline_app.errors import RefusedError, StoreError, UsageError
from pipeline_app.local import mongod, processes
from pipeline_app.runtime import Runtime
from pipeline_app.store import schema, workers
from pipeline_app.store.client import ContendedError, Document, Session, Store, translated
from tests.integration.helpers import backdate, in_threads
from tests.integration.proxy import MongoProxy, When
from tests.project import REPOSITORY, Project


@pytest.fixture
def rt(project: Project) -> Runtime:
    made = project.runtime()
    prepare(made)
    return made


def indexes(store: Store) -> dict[str, Document]:
    return {name: dict(store.db[name].index_information()) for name in store.db.list_collection_names()}


def test_laying_out_again_changes_nothing(rt: Runtime) -> None:
    """Given a store that is laid out, when it is done again, then collections and indexes are the same."""
    before = indexes(rt.store)

    schema.ensure(rt.store)

    assert indexes(rt.store) == before
    assert set(before) == {*schema.INDEXES, "schema"}
    assert {"run_state", "due"} <= before["job_states"].keys()


def test_several_processes_lay_out_at_once(project: Project) -> None:
    """Given an empty store, when four come first at the same time, then it is laid out and none of them fails."""
    stores = [project.runtime().store for _ in range(4)]

    in_threads(*[lambda store=store: schema.ensure(store) for store in stores])

    assert set(indexes(stores[0])) == {*schema.INDEXES, "schema"}


def test_data_of_newer_code_is_refused(rt: Runtime) -> None:
    """Given data that newer code laid out, when this code comes, then it refuses and says what to do."""
    rt.store.db.schema.update_one({"_id": "layout"}, {"$set": {"version": schema.VERSION + 1}})

    with pytest.raises(RefusedError, match=f"layout {schema.VERSION + 1}, this code knows {schema.VERSION}") as refused:
        schema.ensure(rt.store)

    assert refused.value.hint == "update pipeline-app here, too"


@pytest.fixture
def standalone(tmp_path: Path) -> Iterator[str]:
    """A mongod without a replica set."""
    data = tmp_path / "standalone"
    data.mkdir()
    port = processes.free_port(None)
    process = subprocess.Popen(
        [mongod.find_binary(tmp_path), "--dbpath", data, "--port", str(port), "--bind_ip", "127.0.0.1",
         "--nounixsocket", "--quiet"],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"mongodb://127.0.0.1:{port}/pipeline_app"
    try:
        with MongoClient[Document](url, serverSelectionTimeoutMS=20_000) as client:
            client.admin.command("ping")
        yield url
    finally:
        process.terminate()
        process.wait(30)


def test_a_standalone_server_is_refused(standalone: str, project: Project) -> None:
    """Given a mongod that is no replica set, when it is to be the store, then the command that mends it is named."""
    rt = project.runtime(mongodb_url=standalone)

    with pytest.raises(UsageError, match="standalone server") as refused:
        prepare(rt)

    assert "--replSet" in str(refused.value.hint)
    assert "rs.initiate()" in str(refused.value.hint)


def test_a_store_that_does_not_answer(project: Project) -> None:
    """Given nobody listens at the address, then that is said within seconds, and without the password."""
    port = processes.free_port(None)
    rt = project.runtime(mongodb_url=f"mongodb://user:very-secret@127.0.0.1:{port}/x")
    begin = time.monotonic()

    with pytest.raises(
        StoreError, match=rf"MongoDB at mongodb://user:\*\*\*@127.0.0.1:{port}/x does not answer"
    ) as away:
        prepare(rt)

    assert time.monotonic() - begin < 6
    assert "very-secret" not in f"{away.value}{away.value.hint}{away.value.__cause__}"


class FastClock(Store):
    """A store as a machine sees it whose clock is an hour ahead."""

    def now(self) -> datetime:
        return super().now() + timedelta(hours=1)


def test_leases_end_by_the_clock_of_the_store(project: Project, rt: Runtime) -> None:
    """Given a machine whose clock is wrong, when it holds a lease, then that ends by MongoDB's clock."""
    wrong = FastClock(project.mongodb_url)
    workers.register(wrong, "w", {"ended_at": None})

    alive, alive_too, expired = workers.alive(rt.store), workers.alive(wrong), workers.expired(wrong)
    server_now = rt.store.db.command("hello")["localTime"].replace(tzinfo=UTC)
    assert workers.lead(rt.store, "sweep", "a", 10)
    assert not workers.lead(wrong, "sweep", "b", 10)
    assert not workers.end_stale(wrong, "w")
    wrong.close()

    assert [row["_id"] for row in alive] == ["w"]
    assert (alive_too, expired) == (alive, [])
    assert timedelta() < alive[0]["lease_until"] - server_now <= timedelta(seconds=workers.LEASE_S)


def test_a_lease_that_ended_is_not_renewed_behind_the_back_of_the_sweep(rt: Runtime) -> None:
    """Given a worker whose lease ran out, when the sweep closed its record, then it cannot renew; before, it can."""
    workers.register(rt.store, "w", {"ended_at": None})
    backdate(rt, "workers", 60, "lease_until")
    assert [row["_id"] for row in workers.expired(rt.store)] == ["w"]

    assert workers.renew(rt.store, "w", {})  # it was only slow
    assert not workers.end_stale(rt.store, "w")
    assert [row["_id"] for row in workers.alive(rt.store)] == ["w"]

    backdate(rt, "workers", 60, "lease_until")
    assert workers.end_stale(rt.store, "w")
    assert not workers.renew(rt.store, "w", {})
    assert not workers.end_stale(rt.store, "w")
    assert (workers.alive(rt.store), workers.expired(rt.store)) == ([], [])


def test_one_leads_at_a_time(rt: Runtime) -> None:
    """Given two that want to lead, then one does and keeps it; the other follows when its lease ends or is given up."""
    assert workers.lead(rt.store, "sweep", "a", 10)
    assert not workers.lead(rt.store, "sweep", "b", 10)
    assert workers.lead(rt.store, "sweep", "a", 10)

    backdate(rt, "leases", 60, "until")
    assert workers.lead(rt.store, "sweep", "b", 10)
    assert not workers.lead(rt.store, "sweep", "a", 10)

    workers.give_up_lead(rt.store, "sweep", "a")  # it does not lead: nothing happens
    assert not workers.lead(rt.store, "sweep", "a", 10)
    workers.give_up_lead(rt.store, "sweep", "b")
    assert workers.lead(rt.store, "sweep", "a", 10)


def test_many_want_to_lead_at_once(rt: Runtime) -> None:
    """Given nobody leads, when eight ask at the same time, then exactly one does."""
    leaders: list[str] = []

    def ask(name: str) -> None:
        if workers.lead(rt.store, "sweep", name, 10):
            leaders.append(name)

    in_threads(*[lambda name=name: ask(name) for name in "abcdefgh"])

    assert len(leaders) == 1
    assert workers.lead(rt.store, "sweep", leaders[0], 10)


HOLDS_A_DOCUMENT = """
import sys
from pipeline_app.store.client import Store

store = Store(sys.argv[1], process=sys.argv[2])
with store.session() as session:
    session.start_transaction()
    store.db.job_states.update_one({"_id": "r/1"}, {"$set": {"n": 1}}, session=session)
    print("locked", flush=True)
    sys.stdin.read()
"""


def die_in_a_transaction(url: str, name: str) -> None:
    """A process of that name is killed in a transaction that has changed the job `r/1`."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS_A_DOCUMENT, url, name],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as victim:
        assert victim.stdout is not None
        assert victim.stdout.readline() == "locked\n"
        os.kill(victim.pid, signal.SIGKILL)


@pytest.fixture
def victim(project: Project, rt: Runtime) -> str:
    """The name of a process that was killed and has locked the job `r/1`; others ask this MongoDB at the same time."""
    name = f"victim.{uuid.uuid4().hex[:8]}"
    rt.store.db.job_states.insert_one({"_id": "r/1", "n": 0})
    die_in_a_transaction(project.mongodb_url, name)
    return name


def write(store: Store) -> None:
    """Change that job, in a transaction that soon gives up."""
    store.transaction(
        lambda session: store.db.job_states.update_one({"_id": "r/1"}, {"$inc": {"n": 10}}, session=session),
        patience_s=5,
    )
    assert store.db.job_states.find_one() == {"_id": "r/1", "n": 10}


def test_documents_that_a_killed_process_had_locked_are_freed(rt: Runtime, victim: str) -> None:
    """Given a process that was killed in its transaction, when that is ended, then its documents can be written."""
    assert rt.store.end_transactions("somebody else") == 0
    assert rt.store.end_transactions(victim) == 1

    write(rt.store)


def test_documents_that_a_killed_leader_had_locked_are_freed(rt: Runtime, victim: str) -> None:
    """Given a leader that was killed in a transaction, when another takes over, then its documents can be written."""
    assert workers.lead(rt.store, "sweep", victim, 10)
    assert not workers.lead(rt.store, "sweep", "b", 10)
    with pytest.raises(ContendedError):
        write(rt.store)

    backdate(rt, "leases", 60, "until")
    assert workers.lead(rt.store, "sweep", "b", 10)

    write(rt.store)


def test_documents_that_a_killed_worker_had_locked_are_freed(rt: Runtime, victim: str) -> None:
    """Given a worker whose main process was killed in a transaction, when its lease ends, then they can be written."""
    workers.register(rt.store, "w", {"process": victim, "ended_at": None})
    backdate(rt, "workers", 60, "lease_until")

    sweep.end_leases(rt)

    write(rt.store)


def test_a_transaction_that_could_not_be_ended_is_ended_by_the_next(
    project: Project, rt: Runtime, mongo_proxy: MongoProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given work that failed, and a store that went away before it heard of that, then nothing is locked later."""
    rt.store.db.job_states.insert_one({"_id": "r/1", "n": 0})
    monkeypatch.setattr("pipeline_app.store.client.CALL_TIMEOUT_S", 3.0)
    store = Store(mongo_proxy.address(project.mongodb_url))

    def work(session: Session) -> None:
        store.db.job_states.update_one({"_id": "r/1"}, {"$inc": {"n": 1}}, session=session)
        raise LookupError

    def lose(when: When, command: Document) -> bool:
        if "abortTransaction" in command:
            mongo_proxy.cut()
        return "abortTransaction" in command

    mongo_proxy.hook = lose
    with pytest.raises(LookupError):
        store.transaction(work)
    mongo_proxy.hook = lambda when, command: False
    mongo_proxy.restore()

    write(store)
    store.close()


def test_a_connection_that_was_opened_in_an_election(project: Project, rt: Runtime, mongo_proxy: MongoProxy) -> None:
    """Given a server that was no primary yet when we connected, then it is away, and is not once it is one."""
    rt.store.db.job_states.insert_one({"_id": "r/1", "n": 0})
    mongo_proxy.is_electing = True
    store = Store(mongo_proxy.address(project.mongodb_url))
    with pytest.raises(StoreError, match="in an election"):
        write(store)
    mongo_proxy.is_electing = False

    write(store)
    store.close()


def test_a_look_at_much_may_take_long(project: Project, rt: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a question that takes longer than a call may, then it fails, unless it is allowed to take its time."""
    monkeypatch.setattr("pipeline_app.store.client.CALL_TIMEOUT_S", 0.5)
    store = Store(project.mongodb_url)
    rt.store.db.job_states.insert_one({"_id": "r/1"})

    def look() -> list[Document]:
        with translated(store):
            return list(store.db.job_states.find({"$where": "sleep(1500) || true"}))

    with pytest.raises(StoreError):
        look()
    with store.unhurried():
        assert look() == [{"_id": "r/1"}]
    store.close()
