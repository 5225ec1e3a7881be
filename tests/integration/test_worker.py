"""Real workers: children that die, workers that stop, queues that come later, and messages that are none of ours."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from typing import Any

import pytest
from kombu import Connection, Producer

from pipeline_app.application import prepare
from pipeline_app.control import runs, seeding
from pipeline_app.control.results import results
from pipeline_app.control.status import Status, status
from pipeline_app.domain.states import DeadKind
from pipeline_app.runtime import Runtime
from pipeline_app.store import messages
from pipeline_app.transport.depth import depths
from pipeline_app.transport.topology import EXCHANGE, PARKED_EXCHANGE
from tests.integration.helpers import attempts, backdate, job, outcomes, prove
from tests.integration.proxy import MongoProxy
from tests.integration.test_seeding import TAGS
from tests.project import Project, eventually

STAGES = """
import os
import signal
import time
from pathlib import Path

from celery import shared_task
from pydantic import BaseModel

from pipeline_app import Job, Pipeline, Retry, Stage


class Item(BaseModel):
    n: int = 0
    sleep_s: float = 0.0
    kill: bool = False
    wait_for: str = ""


def first(item: Item, job: Job) -> Item:
    with Path("calls.log").open("a") as log:
        log.write(f"{job.stage} {job.id} {job.attempt} {os.getpid()}\\n")
    if item.kill:
        os.kill(os.getpid(), signal.SIGKILL)
    while item.wait_for and not Path(item.wait_for).exists():
        time.sleep(0.02)
    Path(f"ended-{job.id}").touch()
    return item


def second(item: Item) -> dict:
    return {"n": item.n}


@shared_task
def notify(rows, log):
    with Path(log).open("a") as file:
        for row in rows:
            file.write(f"{row['job_id']} {row['result']['n']} {row['key']}\\n")
    return len(rows)


@shared_task
def count(number):
    with Path("counts.log").open("a") as file:
        file.write(f"{number}\\n")


demo = Pipeline("demo", stages=[Stage(first, chunk=CHUNK, losses=2), Stage(second, chunk=5)], partition_by=["kind"])
"""


@pytest.fixture
def rt(project: Project) -> Runtime:
    made = project.runtime()
    prepare(made)
    return made


def make_run(project: Project, rt: Runtime, *rows: dict[str, Any], chunk: int = 1) -> None:
    """The run `r` of the pipeline in STAGES."""
    project.write("stages.py", STAGES.replace("CHUNK", str(chunk)))
    project.json("run", "init", "r", "--pipeline", "demo")
    add(rt, *rows)


def add(rt: Runtime, *rows: dict[str, Any]) -> None:
    seeding.seed(rt, "r", [{"tags": {"kind": "a"}, **row} for row in rows])


def items(*names: str, **payload: Any) -> list[dict[str, Any]]:
    return [{"job_id": name, "payload": {"n": n, **payload}} for n, name in enumerate(names)]


def wait(rt: Runtime, **options: Any) -> Status:
    now = runs.wait(rt, "r", timeout_s=60, **options)
    assert now.is_past(options.get("stage")), now
    return now


def held(rt: Runtime) -> list[Any]:
    return messages.claimed(rt.store)


def test_a_child_that_is_killed_by_its_handler(project: Project, rt: Runtime) -> None:
    """Given a job that kills the child that runs it, then the others of its chunk go on, and it is buried."""
    make_run(project, rt, *items("a", "b"), *items("killer", kill=True), *items("c", "d"), chunk=5)

    with project.worker(pool="prefork") as worker:
        wait(rt)

    prove(rt, terminal=4, dead_lettered=1)
    assert job(rt, "killer")["reason"] == DeadKind.WORKER_LOST
    lost = attempts(rt, job="killer")
    assert outcomes(lost) == ["lost", "lost"]
    assert {row["error"]["type"] for row in lost} == {"WorkerLostError"}
    assert outcomes(attempts(rt, job="a", stage="first")) == ["lost", "ok"]
    assert worker.process.returncode == 0


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_that_is_told_to_stop(project: Project, rt: Runtime, pool: str) -> None:
    """Given a worker that runs a handler and reserved more, when it is told to stop, then nothing is lost or waits.

    The handler ends and is recorded; what was reserved is in its queue again at once.
    """
    make_run(project, rt, *items("a", "b", "c", "d", wait_for="go"))
    with project.worker("-Q", "demo.first", pool=pool, concurrency=1) as worker:
        eventually(project.calls)
        eventually(lambda: held(rt))
        worker.process.send_signal(signal.SIGTERM)
        worker.wait_for(lambda: "Warm shutdown" in worker.text)
        project.write("go", "")
        assert worker.stop() == 0

    assert "Exception in thread" not in worker.text
    assert held(rt) == []
    (record,) = rt.store.db.workers.find()
    assert record["state"] == "stopped"
    done = status(rt, "r").stages[0].completed
    assert done >= 1
    ready = depths(project.amqp_url, ["demo.first.kind__a"])["demo.first.kind__a"].ready
    assert ready == 4 - done
    assert "lost" not in outcomes(attempts(rt))
    with project.worker(pool=pool):
        wait(rt)
    prove(rt, terminal=4)
    assert Counter(outcomes(attempts(rt))) == {"ok": 8}


def test_a_worker_that_is_told_to_stop_at_once(project: Project, rt: Runtime) -> None:
    """Given a worker whose handler does not end, when it is told to stop cold, then its message is given back, free."""
    project.write("celeryconfig.py", 'pipelines = ["stages:demo"]\nworker_soft_shutdown_timeout = 0.5\n')
    make_run(project, rt, *items("a", wait_for="go"))
    with project.worker("-Q", "demo.first", pool="prefork", concurrency=1) as worker:
        eventually(project.calls)
        eventually(lambda: held(rt))
        worker.stop(signal.SIGQUIT)

    assert held(rt) == []
    project.write("go", "")
    with project.worker():
        wait(rt)
    prove(rt, terminal=1)
    assert set(outcomes(attempts(rt))) <= {"ok", "refused"}


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


def test_a_stage_alone_with_a_partition_that_comes_later(project: Project, rt: Runtime) -> None:
    """Given `-Q demo.first`, then that worker takes every partition of the stage, also a later one, and no other."""
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
        eventually(lambda: {depth.consumers for depth in depths(project.amqp_url, queues).values()} == {1})

    assert len(set(queues)) == 2 * len(TAGS)
    prove(rt, terminal=len(TAGS))
    assert {row["job_id"]: row["result"] for row in results(rt, "r")} == {f"t{n}": {"n": n} for n in range(len(TAGS))}


def test_a_message_that_was_revoked(project: Project, rt: Runtime) -> None:
    """Given a message that waits behind another, when it is revoked, then its jobs go on under another id."""
    make_run(project, rt, *items("a", wait_for="go"), *items("b", "c"))
    revoked = job(rt, "b")["message"]
    with project.worker("-Q", "demo.first", concurrency=1, pool="prefork") as worker:
        eventually(project.calls)
        rt.app.control.revoke(revoked)
        worker.wait_for(lambda: f"Tasks flagged as revoked: {revoked}" in worker.text)
        project.write("go", "")
        wait(rt, stage="first")

    assert messages.states(rt.store, [revoked]) == {revoked: "closed"}
    assert outcomes(attempts(rt)) == ["ok"] * 3
    assert [row["_id"] for row in attempts(rt, job="b") if revoked in row["_id"]] == []
    prove(rt, pending=3)


def foreign(project: Project, queue: str, body: bytes | str, **options: Any) -> None:
    """Put a message of somebody else's into one of our queues."""
    with Connection(project.amqp_url) as connection:
        producer = Producer(connection.default_channel)
        producer.publish(body, exchange=EXCHANGE, routing_key=queue, **options)


def as_task(name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """A Celery message of that task."""
    return {
        "body": json.dumps([args, kwargs, {}]),
        "content_type": "application/json",
        "content_encoding": "utf-8",
        "headers": {"task": name, "id": f"foreign-{name}-{len(args)}", "lang": "py"},
    }


def test_messages_that_are_none_of_ours(project: Project, rt: Runtime) -> None:
    """Given messages of every wrong kind in a queue of ours, then each is kept, and the worker lives on.

    The broker is new: nobody but the worker can have declared where they are kept.
    """
    rt.close()
    project.amqp_url = project.services.new_vhost()
    rt = project.runtime()
    project.write("stages.py", STAGES.replace("CHUNK", "1"))
    hint = {"v": 1, "run": "r", "stage": "first", "partition": "default", "message": "x"}
    with project.worker("-Q", "demo.first") as worker:
        json_text = {"content_type": "application/json", "content_encoding": "utf-8"}
        foreign(project, "demo.first", b"\xff\xfe no json", **json_text)
        foreign(project, "demo.first", '{"not": "celery"}', **json_text)
        foreign(project, "demo.first", b"pickled", content_type="application/x-python-serialize")
        foreign(project, "demo.first", **as_task("somebody.elses", 1))
        foreign(project, "demo.first", **as_task("demo.first"))
        foreign(project, "demo.first", **as_task("demo.first", 1, 2, more=3))
        foreign(project, "demo.first", **as_task("demo.first", {**hint, "v": 2}))
        foreign(project, "demo.first", **as_task("demo.first", {**hint, "message": 7}))
        foreign(project, "demo.first", **as_task("demo.first", hint))
        eventually(lambda: rt.store.db.parked_messages.count_documents({}) == 4)
        eventually(lambda: depths(project.amqp_url, [PARKED_EXCHANGE.name])[PARKED_EXCHANGE.name].ready == 4)
        eventually(lambda: depths(project.amqp_url, ["demo.first"])["demo.first"].ready == 0)

        project.json("run", "init", "r", "--pipeline", "demo")
        add(rt, *items("a"))
        wait(rt, stage="first")
        assert worker.process.poll() is None

    reasons = sorted(row["reason"] for row in rt.store.db.parked_messages.find())
    assert reasons == [
        "its version is 2, this worker knows 1",
        "message is missing",
        "the arguments are not those of a stage",
        "the arguments are not those of a stage",
    ]
    assert {row["queue"] for row in rt.store.db.parked_messages.find()} == {"demo.first"}
    assert any("parked" in warning for warning in status(rt, "r").warnings)
    prove(rt, pending=1)


def test_the_users_own_tasks_after_the_last_stage(project: Project, rt: Runtime) -> None:
    """Given a chain of a user's own tasks, then the first gets the results of each chunk, the next its result."""
    project.write("stages.py", STAGES.replace("CHUNK", "1"))
    made = project.run(
        "python", "-c",
        "from pipeline_app import chain, create_run\n"
        "from stages import count, demo, notify\n"
        "from pipeline_app.celery import app\n"
        "create_run('r', demo, then=chain(demo) | notify.s(log='told.log') | count.s())\n",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    add(rt, *items("a", "b", "c"), *[{**row, "tags": {}} for row in items("d", "e")])

    with project.worker("-Q", "demo.first,demo.second"), project.worker("-Q", "celery", concurrency=1):
        wait(rt)
        told = eventually(lambda: len(lines_of(project, "told.log")) == 5 and lines_of(project, "told.log"))
        eventually(lambda: sum(map(int, lines_of(project, "counts.log"))) == 5)

    rows = [line.split() for line in told]
    assert {(name, int(n)) for name, n, _ in rows} == {("a", 0), ("b", 1), ("c", 2), ("d", 0), ("e", 1)}
    assert len({key for _, _, key in rows}) == 5
    prove(rt, terminal=5)


def lines_of(project: Project, name: str) -> list[str]:
    path = project.folder / name
    return path.read_text().splitlines() if path.exists() else []


def test_a_worker_pauses_while_the_store_is_away(project: Project, rt: Runtime, mongo_proxy: MongoProxy) -> None:
    """Given a worker whose store goes away, then it takes nothing, keeps what it has, and goes on when it is back."""
    make_run(project, rt, *items("a", wait_for="go"))
    queue = "demo.first.kind__a"
    env = {"MONGODB_URL": mongo_proxy.address(project.mongodb_url)}
    with project.worker("-Q", "demo.first", concurrency=1, env=env) as worker:
        eventually(project.calls)
        mongo_proxy.cut()
        worker.wait_for(lambda: f"Canceling queue {queue}" in worker.text)
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
    assert os.waitstatus_to_exitcode(worker.process.returncode) == 0
    prove(rt, pending=1)
