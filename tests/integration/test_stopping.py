"""How workers stop: every pool, every signal. Nothing that a worker had waits for the end of its lease."""

from __future__ import annotations

import signal
import time

import pytest

from pipeline_app.application import prepare
from pipeline_app.runtime import Runtime
from pipeline_app.transport.depth import depths
from tests.integration.helpers import attempts, job, outcomes, prove
from tests.integration.worker_run import add, held, items, make_run, wait
from tests.project import Project, eventually
from tests.worker import Worker

POOLS = ["prefork", "threads", "gevent", "solo"]
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT]
QUEUES = [f"demo.first.kind__{kind}" for kind in "abc"]

#: Longer than any of these tests.
PATIENT = 'pipelines = ["stages:demo"]\nworker_soft_shutdown_timeout = 60\n'
#: What nobody waits for: a lease is 10 s.
SOON_S = 5.0


@pytest.fixture
def rt(project: Project) -> Runtime:
    project.amqp_url = project.services.new_vhost()  # what a test leaves in queues would be reserved by the next
    made = project.runtime()
    prepare(made)
    return made


def running_one(project: Project, rt: Runtime, worker: Worker) -> str:
    """The job whose handler runs, once the worker has one and has had the time to reserve the others."""
    eventually(project.calls)
    eventually(lambda: held(rt))
    if "solo" not in worker.process.args:
        eventually(lambda: ready(project) == 0)
    return str(project.calls()[0].split()[1])


def ready(project: Project) -> int:
    return sum(depth.ready for depth in depths(project.amqp_url, QUEUES).values())


def seed(project: Project, rt: Runtime) -> None:
    """Three jobs in three queues, whose handlers wait for the file `go`."""
    make_run(project, rt)
    for kind in "abc":
        add(rt, *({**row, "tags": {"kind": kind}} for row in items(kind, wait_for="go")))


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("pool", POOLS)
def test_the_first_signal(project: Project, rt: Runtime, pool: str, number: signal.Signals) -> None:
    """Given a handler that runs, and reserved messages, then these go back at once, and that ends and is recorded."""
    project.write("celeryconfig.py", PATIENT)
    seed(project, rt)
    with project.worker("-Q", "demo.first", pool=pool, concurrency=1) as worker:
        running = running_one(project, rt, worker)
        worker.process.send_signal(number)
        if pool != "solo":  # its handler runs where the messages come in
            eventually(lambda: ready(project) == 2)
        worker.wait_for(lambda: "shutdown" in worker.text)
        assert len(project.calls()) == 1
        project.write("go", "")
        assert worker.process.wait(30) == 0, worker.text[-4000:]

    assert [line.split()[1] for line in project.calls()] == [running]
    assert ready(project) == 2
    assert held(rt) == []
    assert outcomes(attempts(rt)) == ["ok"]
    (record,) = rt.store.db.workers.find()
    assert record["state"] == "stopped"
    assert "our own error" not in worker.text
    assert "Unrecoverable" not in worker.text
    prove(rt, pending=3)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("pool", POOLS)
def test_the_second_signal(project: Project, rt: Runtime, pool: str, number: signal.Signals) -> None:
    """Given a handler that does not end, then it is given back at once, which is no loss, and others can have it."""
    project.write("celeryconfig.py", PATIENT)
    seed(project, rt)
    with project.worker("-Q", "demo.first", pool=pool, concurrency=1) as worker:
        running = running_one(project, rt, worker)
        (claim,) = held(rt)
        worker.process.send_signal(number)
        worker.wait_for(lambda: "shutdown" in worker.text)

        began = time.monotonic()
        worker.process.send_signal(number)
        assert worker.process.wait(30) == 0, worker.text[-4000:]
        took_s = time.monotonic() - began

    assert took_s < SOON_S
    assert held(rt) == []
    assert job(rt, running)["message"] not in (None, claim["_id"])
    assert len(project.calls()) == 1
    assert attempts(rt) == []
    assert job(rt, running)["losses"] == 0
    (record,) = rt.store.db.workers.find()
    assert record["state"] == "stopped"
    # The broker has a hint for every open message: others can have all three.
    prove(rt, pending=3)


@pytest.mark.parametrize("pool", POOLS)
def test_the_soft_shutdown_is_bounded(project: Project, rt: Runtime, pool: str) -> None:
    """Given a handler that does not end, then SIGQUIT gives it its time, and gives it back after that."""
    project.write("celeryconfig.py", 'pipelines = ["stages:demo"]\nworker_soft_shutdown_timeout = 1.5\n')
    seed(project, rt)
    with project.worker("-Q", "demo.first", pool=pool, concurrency=1) as worker:
        running = running_one(project, rt, worker)
        began = time.monotonic()
        worker.process.send_signal(signal.SIGQUIT)
        assert worker.process.wait(30) == 0, worker.text[-4000:]
        took_s = time.monotonic() - began

    assert 1.5 <= took_s < 1.5 + SOON_S
    assert held(rt) == []
    assert job(rt, running)["losses"] == 0
    project.write("go", "")
    with project.worker(pool=pool):
        wait(rt)
    prove(rt, terminal=3)
    assert set(outcomes(attempts(rt))) == {"ok"}


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_chunk_is_left_in_the_middle(project: Project, rt: Runtime, pool: str) -> None:
    """Given a message of several jobs, when its worker stops, then the one that runs ends, and the rest go back."""
    make_run(project, rt, *items("a", "b", "c", wait_for="go"), chunk=3)
    with project.worker("-Q", "demo.first", pool=pool, concurrency=1) as worker:
        eventually(project.calls)
        worker.process.send_signal(signal.SIGTERM)
        worker.wait_for(lambda: "shutdown" in worker.text)
        project.write("go", "")
        assert worker.process.wait(30) == 0, worker.text[-4000:]

    assert [line.split()[1] for line in project.calls()] == ["a"]
    assert job(rt, "a")["stage"] == "second"
    assert job(rt, "b")["message"] == job(rt, "c")["message"]
    prove(rt, pending=3)
    with project.worker(pool=pool):
        wait(rt)
    prove(rt, terminal=3)
    assert set(outcomes(attempts(rt))) == {"ok"}
