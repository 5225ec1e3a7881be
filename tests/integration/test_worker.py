"""Real workers: children that die, workers that stop, queues that come later, a store that is away."""

from __future__ import annotations

import os
import signal
import subprocess
from collections import Counter

import pytest

from pipeline_app.application import prepare
from pipeline_app.control.results import results
from pipeline_app.control.seed import seeding
from pipeline_app.control.serving import serving
from pipeline_app.control.sight.status import status
from pipeline_app.domain.states import DeadKind
from pipeline_app.runtime import Runtime
from pipeline_app.store import messages
from pipeline_app.transport.depth import depths
from tests.integration.helpers import attempts, backdate, job, outcomes, prove
from tests.integration.proxy import MongoProxy
from tests.integration.test_job_lines import TAGS
from tests.integration.worker_run import STAGES, add, held, items, make_run, wait
from tests.project import Project, eventually


@pytest.fixture
def rt(project: Project) -> Runtime:
    made = project.runtime()
    prepare(made)
    return made


def test_a_child_that_is_killed_by_its_handler(project: Project, rt: Runtime) -> None:
    """Given a job that kills the child that runs it, then the others of its chunk go on, and it is buried."""
    make_run(project, rt, *items("a", "b"), *items("killer", kill=True), *items("c", "d"), chunk=5)

    with project.worker(pool="prefork") as worker:
        wait(rt)

    prove(rt, terminal=4, dead_lettered=1)
    assert job(rt, "killer")["reason"] == DeadKind.WORKER_LOST
    lost = attempts(rt, job="killer")
    assert outcomes(lost) == ["lost", "lost"]
    assert {row["error"]["type"] for row in lost} == {"WorkerLost"}
    assert outcomes(attempts(rt, job="a", stage="first")) == ["lost", "ok"]
    assert worker.process.returncode == 0


def test_a_worker_that_is_killed(project: Project, rt: Runtime) -> None:
    """Given a worker that is killed with all its processes, when its lease has ended, then another takes over."""
    make_run(project, rt, *items("a", "b", "c", wait_for="go"), chunk=2)
    with project.worker("-Q", "demo.first", pool="prefork", concurrency=2) as worker:
        eventually(lambda: len(held(rt)) == 2)
        worker.kill()
    assert len(held(rt)) == 2
    project.write("go", "")
    with project.worker():
        backdate(rt, "workers", 60, "lease_until", pid=worker.process.pid)
        wait(rt)

    prove(rt, terminal=3)
    assert Counter(outcomes(attempts(rt, stage="first"))) == {"lost": 3, "ok": 3}
    assert {row["state"] for row in rt.store.db.workers.find()} == {"stale", "stopped"}


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_that_stood_still(project: Project, rt: Runtime, pool: str) -> None:
    """Given a worker that stands still for longer than its lease, then what it was at is done by another.

    When it goes on, its outcome is refused and overwrites nothing, and it works under a lease of its own again.
    """
    project.amqp_url = project.services.new_vhost()
    rt = project.runtime()
    make_run(project, rt, *items("a", wait_for="go"))
    with project.worker("-Q", "demo.first", pool=pool, concurrency=1) as zombie:
        eventually(lambda: held(rt))
        (claim,) = held(rt)
        add(rt, {"job_id": "b", "payload": {"n": 1}, "tags": {"kind": "b"}})
        eventually(lambda: depths(project.amqp_url, ["demo.first.kind__b"])["demo.first.kind__b"].ready == 0)
        os.killpg(zombie.process.pid, signal.SIGSTOP)
        try:
            with project.worker("-Q", "demo.first") as other:
                other.wait_for(lambda: f"taking back: message={claim['_id']}" in other.text)
                eventually(lambda: job(rt, "a")["message"] in {row["_id"] for row in held(rt)})
                os.killpg(zombie.process.pid, signal.SIGCONT)
                project.write("go", "")
                wait(rt, stage="first")
                eventually(lambda: attempts(rt, outcome="refused"))
        finally:
            os.killpg(zombie.process.pid, signal.SIGCONT)
        add(rt, *items("c"))
        wait(rt, stage="first")

    assert sorted(outcomes(attempts(rt, job="a"))) == ["lost", "ok", "refused"]
    # One output, and not the zombie's.
    assert [row["_id"] for row in rt.store.db.job_outputs.find({"_id": {"$regex": "^r/a/first/"}})] == [
        f"r/a/{job(rt, 'a')['input']}"
    ]
    assert claim["_id"] not in job(rt, "a")["input"]
    # What it had reserved it claimed under its new lease, like all that came later.
    mine = {row["_id"]: row["state"] for row in rt.store.db.workers.find({"pid": zombie.process.pid})}
    assert mine == {claim["worker"]: "stale", **dict.fromkeys(mine.keys() - {claim["worker"]}, "stopped")}
    for name in ("b", "c"):
        (attempt,) = attempts(rt, job=name)
        assert attempt["outcome"] == "ok"
        assert attempt["worker"] in mine.keys() - {claim["worker"]}
    prove(rt, pending=3)


def test_a_child_that_died_without_a_word(project: Project, rt: Runtime) -> None:
    """Given a claim of a child that is not there any more, then its worker gives it back, however often that fails."""
    make_run(project, rt, *items("a"))
    with project.worker("-Q", "demo.second", pool="prefork", concurrency=1) as worker:
        (record,) = rt.store.db.workers.find()
        gone = subprocess.Popen(["true"])
        gone.wait()
        message = job(rt, "a")["message"]
        process = f"{record['host']}.{gone.pid}.gone"
        assert messages.claim(rt.store, [message], worker=record["_id"], process=process, token="t")
        # What it has to know to give it back is not there for a while.
        manifest = rt.store.db.run_manifests.find_one_and_delete({"_id": "r"})
        worker.wait_for(lambda: "cannot give back" in worker.text, 60)
        rt.store.db.run_manifests.insert_one(manifest)
        eventually(lambda: held(rt) == [])

    assert outcomes(attempts(rt)) == ["lost"]
    assert job(rt, "a")["message"] != message
    assert job(rt, "a")["losses"] == 1
    prove(rt, pending=1)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_store_that_refuses_what_became_of_a_message(project: Project, rt: Runtime, pool: str) -> None:
    """Given a store that takes neither the record nor the loss, then a worker that lives gives back once it does."""
    make_run(project, rt, *items("a"))
    rt.store.db.command("collMod", "job_attempts", validator={"none": {"$exists": True}})

    with project.worker("-Q", "demo.first", pool=pool, concurrency=1) as worker:
        worker.wait_for(lambda: "cannot give back" in worker.text, 60)
        (claim,) = held(rt)
        rt.store.db.command("collMod", "job_attempts", validator={})
        wait(rt, stage="first")

        assert held(rt) == []
        assert worker.process.poll() is None
    (lost, ok) = attempts(rt)
    assert (lost["outcome"], lost["error"]["type"]) == ("lost", "pymongo.errors.BulkWriteError")
    assert lost["_id"].endswith(claim["_id"])
    assert "Document failed validation" in lost["error"]["traceback"]
    assert lost["error"]["frame"]
    assert ok["outcome"] == "ok"
    prove(rt, pending=1)


def test_a_worker_that_cannot_give_back_ends(project: Project, rt: Runtime) -> None:
    """Given a store that takes nothing of a message, when its worker stops, then it ends, and others take it back."""
    make_run(project, rt, *items("a"))
    rt.store.db.command("collMod", "pipeline_events", validator={"none": {"$exists": True}})
    with project.worker("-Q", "demo.first", pool="threads", concurrency=1) as worker:
        worker.wait_for(lambda: "cannot give back, trying again" in worker.text, 60)
        assert worker.stop() == 0, worker.text[-4000:]
    assert len(held(rt)) == 1
    (record,) = rt.store.db.workers.find()
    assert record["state"] == "stopped"

    rt.store.db.command("collMod", "pipeline_events", validator={})
    with project.worker("-Q", "demo.first"):
        wait(rt, stage="first")

    assert outcomes(attempts(rt)) == ["lost", "ok"]
    prove(rt, pending=1)


def test_a_stage_alone_with_a_partition_that_comes_later(project: Project, rt: Runtime) -> None:
    """Given `-Q demo.first`, then that worker takes every partition of the stage, also a later one, and no other."""
    project.amqp_url = project.services.new_vhost()
    rt = project.runtime()
    make_run(project, rt, *items("a"))
    with project.worker("-Q", "demo.first"):
        wait(rt, stage="first")

        add(rt, {"job_id": "later", "payload": {}, "tags": {"kind": "later"}})
        add(rt, {"job_id": "none", "payload": {}, "tags": {}})
        wait(rt, stage="first")

        eventually(lambda: looks(project, "first") == [(0, 1)] * 3)
        eventually(lambda: looks(project, "second") == [(1, 0)] * 3)
    prove(rt, pending=3)


def looks(project: Project, stage: str) -> list[tuple[int, int | None]]:
    """Messages and consumers of a stage's three queues."""
    found = depths(project.amqp_url, [f"demo.{stage}{part}" for part in ("", ".kind__a", ".kind__later")])
    return [(depth.ready, depth.consumers) for depth in found.values()]


def test_odd_tags_through_a_worker(project: Project, rt: Runtime) -> None:
    """Given targets of every kind, then a worker finds the queue of each, and their jobs go through."""
    project.write("stages.py", STAGES.replace("CHUNK", "1").replace(', partition_by=["kind"]', ""))
    project.json("run", "init", "r", "--pipeline", "demo")
    seeding.seed(rt, "r", [{"job_id": f"t{n}", "payload": {"n": n}, "tags": tags} for n, tags in enumerate(TAGS)])

    with project.worker():
        wait(rt)
        queues = [part.queue for stage in status(rt, "r").stages for part in stage.partitions]
        # They are more than it consumes at once.
        assert serving(rt, queues) == dict.fromkeys(queues, 1)

    assert len(set(queues)) == 2 * len(TAGS)
    prove(rt, terminal=len(TAGS))
    assert {row["job_id"]: row["result"] for row in results(rt, "r")} == {f"t{n}": {"n": n} for n in range(len(TAGS))}


def test_a_worker_pauses_while_the_store_is_away(project: Project, rt: Runtime, mongo_proxy: MongoProxy) -> None:
    """Given a worker whose store goes away, then it takes nothing, keeps what it has, and goes on when it is back."""
    make_run(project, rt, *items("a", wait_for="go"))
    queue = "demo.first.kind__a"
    env = {"MONGODB_URL": mongo_proxy.address(project.mongodb_url)}
    with project.worker("-Q", "demo.first", concurrency=1, env=env) as worker:
        eventually(project.calls)
        mongo_proxy.cut()
        worker.wait_for(lambda: "nothing is consumed: the store is away" in worker.text)
        add(rt, *items("b"))
        project.write("go", "")  # the handler ends now; its outcome has to wait
        worker.wait_for((project.folder / "ended-a").exists)
        eventually(lambda: depths(project.amqp_url, [queue])[queue].ready == 1)

        mongo_proxy.restore()
        wait(rt, stage="first")

    assert [line.split()[1] for line in project.calls()] == ["a", "b"]
    assert outcomes(attempts(rt)) == ["ok", "ok"]
    prove(rt, pending=2)


def test_a_worker_starts_before_the_store(project: Project, rt: Runtime, mongo_proxy: MongoProxy) -> None:
    """Given a store that is away when a worker starts, then that waits, and works when it is there."""
    make_run(project, rt, *items("a"))
    mongo_proxy.cut()
    with project.worker("-Q", "demo.first", env={"MONGODB_URL": mongo_proxy.address(project.mongodb_url)}) as worker:
        assert "waiting for the store" in worker.text
        assert project.calls() == []
        mongo_proxy.restore()
        wait(rt, stage="first")
    assert worker.process.returncode == 0
    prove(rt, pending=1)
