"""Jobs that end the process that runs them: real workers find them, keep the evidence, and lose nothing else."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections import Counter
from pathlib import Path

import pytest

from pipeline_app.application import prepare
from pipeline_app.control import runs
from pipeline_app.control.sight.ledger import failures
from pipeline_app.domain.states import DeadKind
from pipeline_app.runtime import Runtime
from tests.integration.helpers import attempts, job, outcomes, prove
from tests.integration.test_alone import is_gone, suspect
from tests.integration.worker_run import add, held, items, make_run, wait
from tests.project import Project, eventually
from tests.worker import Worker

PATIENCE_S = 200.0


@pytest.fixture
def rt(project: Project) -> Runtime:
    made = project.runtime()
    prepare(made)
    return made


def calls(project: Project) -> Counter[str]:
    """Job -> how often the handler of the first stage ran."""
    return Counter(line.split()[1] for line in project.calls())


def run_to_the_end(project: Project, rt: Runtime, pool: str) -> list[Worker]:
    """Workers one after the other, as a supervisor starts them, until the run is complete."""
    started: list[Worker] = []
    while not started or started[-1].process.returncode != 0:
        assert len(started) < 3, "it takes worker after worker down"
        with project.worker(pool=pool, concurrency=2) as worker:
            started.append(worker)
            if len(started) == 1:
                rows = [*items(*(f"j{n}" for n in range(60))), *items("killer", kill=True)]
                add(rt, *rows, *items(*(f"k{n}" for n in range(39))))
            eventually(
                lambda worker=worker: runs.wait(rt, "r", timeout_s=0).is_past(None)
                or worker.process.poll() is not None,
                PATIENCE_S,
            )
    return started


@pytest.mark.timeout(2 * PATIENCE_S)
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_one_job_of_a_hundred_kills_its_process(project: Project, rt: Runtime, pool: str) -> None:
    """Given a chunk of a hundred of which one kills its process, then 99 end, and it is quarantined with evidence.

    No other job's handler runs more than twice, and a pool of threads goes down with it once.
    """
    make_run(project, rt, chunk=100)

    workers = run_to_the_end(project, rt, pool)

    assert len(workers) == {"prefork": 1, "threads": 2}[pool]
    prove(rt, terminal=99, dead_lettered=1)
    counted = calls(project)
    assert counted.pop("killer") == 2
    assert len(counted) == 99
    assert max(counted.values()) <= 2

    (letter,) = failures(rt, "r")
    assert (letter["job_id"], letter["kind"]) == ("killer", DeadKind.WORKER_LOST)
    first, last = attempts(rt, job="killer")
    assert outcomes([first, last]) == ["lost", "lost"]
    assert letter["error"]["evidence"] == last["error"]["evidence"]
    pids = [int(line.split()[3]) for line in project.calls() if line.split()[1] == "killer"]
    ran_by = {row["_id"]: row for row in rt.store.db.workers.find()}

    evidence = first["error"]["evidence"]
    assert evidence.pop("worker_rss_bytes") > 10 << 20
    dead = ran_by[evidence.pop("worker")]
    of_child = {"signal": 9, "signal_name": "SIGKILL", "exit_code": None} if pool == "prefork" else {}
    assert evidence == {**of_child, "pid": pids[0], "host": socket.gethostname(), "alone": False}
    assert dead["pid"] == workers[0].process.pid

    evidence = last["error"]["evidence"]
    assert 10 << 20 < evidence.pop("rss_bytes") <= evidence.pop("peak_rss_bytes")
    assert ran_by[evidence.pop("worker")]["pid"] == workers[-1].process.pid
    assert evidence == {
        "signal": 9, "signal_name": "SIGKILL", "exit_code": None,
        "pid": pids[1], "host": socket.gethostname(), "alone": True,
    }  # fmt: skip


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "solo"])
def test_a_suspect_in_every_pool(project: Project, rt: Runtime, pool: str) -> None:
    """Given suspects, when a worker of any pool runs them, then it outlives the one that kills its process."""
    make_run(project, rt, *items("a", "b"), *items("killer", kill=True), chunk=3)
    suspect(rt, "a", "b", "killer")

    with project.worker(pool=pool) as worker:
        wait(rt)
        assert worker.stop() == 0, worker.text[-4000:]

    prove(rt, terminal=2, dead_lettered=1)
    assert calls(project) == {"a": 1, "b": 1, "killer": 1}
    (lost,) = attempts(rt, job="killer")
    assert lost["error"]["evidence"]["signal"] == signal.SIGKILL
    assert len({line.split()[3] for line in project.calls()} | {str(worker.process.pid)}) == 4
    assert "our own error" not in worker.text


def test_a_suspect_that_exceeds_the_time_limit(project: Project, rt: Runtime) -> None:
    """Given a job alone that exceeds the hard time limit, then that was its own doing, and nothing of it goes on."""
    project.write("celeryconfig.py", 'pipelines = ["stages:demo"]\ntask_time_limit = 8\n')
    make_run(project, rt, *items("a", wait_for="never"), *items("b"))
    suspect(rt, "a")

    with project.worker(pool="prefork"):
        wait(rt)

    prove(rt, terminal=1, dead_lettered=1)
    assert job(rt, "a")["reason"] == DeadKind.WORKER_LOST
    (lost,) = attempts(rt, job="a")
    assert lost["error"]["type"] == "TimeLimitExceeded"
    assert "at the time limit of 8" in lost["error"]["message"]
    pid = next(int(line.split()[3]) for line in project.calls() if line.split()[1] == "a")
    eventually(lambda: is_gone(pid))


def running_suspect(project: Project, rt: Runtime) -> int:
    """The process that runs the only job alone, once it does."""
    (line,) = eventually(project.calls)
    eventually(lambda: held(rt))
    return int(line.split()[3])


@pytest.mark.parametrize(("pool", "number"), [("prefork", signal.SIGQUIT), ("prefork", signal.SIGKILL),
                                              ("threads", signal.SIGKILL)])  # fmt: skip
def test_a_worker_that_ends_takes_the_process_along(
    project: Project, rt: Runtime, pool: str, number: signal.Signals
) -> None:
    """Given a worker that runs a job alone, when it is stopped cold or killed, then that process is gone, too."""
    project.write("celeryconfig.py", 'pipelines = ["stages:demo"]\nworker_soft_shutdown_timeout = 0.5\n')
    make_run(project, rt, *items("a", wait_for="go"))
    suspect(rt, "a")
    with project.worker("-Q", "demo.first", pool=pool, concurrency=1) as worker:
        pid = running_suspect(project, rt)
        assert os.getsid(pid) == pid, "it is not in the worker's session"
        if number == signal.SIGKILL:
            worker.kill()
        else:
            worker.stop(number)
        eventually(lambda: is_gone(pid))

    if number == signal.SIGQUIT:
        assert held(rt) == []
        assert attempts(rt) == []


HOLDING = """
import ctypes
import os
from pathlib import Path

from pipeline_app import Pipeline, Stage


def first(number: int) -> int:
    with Path("calls.log").open("a") as log:
        log.write(f"first a 1 {os.getpid()}\\n")
    return ctypes.PyDLL(None).sleep(number)  # not one other thread runs meanwhile


demo = Pipeline("demo", stages=[Stage(first)])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process whose interpreter is blocked")
def test_a_killed_worker_takes_a_blocked_process_along(project: Project, rt: Runtime) -> None:
    """Given a handler that lets no other thread run, when its worker is killed, then its process is gone, too."""
    project.write("stages.py", HOLDING)
    project.json("run", "init", "r", "--pipeline", "demo")
    add(rt, {"job_id": "a", "payload": 120})
    suspect(rt, "a")
    with project.worker(concurrency=1) as worker:
        pid = running_suspect(project, rt)
        worker.kill()
        eventually(lambda: is_gone(pid))


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_that_is_told_to_stop_lets_it_end(project: Project, rt: Runtime, pool: str) -> None:
    """Given a worker that runs a job alone, when it is told to stop, then the job ends first and no process is left."""
    make_run(project, rt, *items("a", wait_for="go"))
    suspect(rt, "a")
    with project.worker("-Q", "demo.first", pool=pool, concurrency=1) as worker:
        pid = running_suspect(project, rt)
        worker.process.send_signal(signal.SIGTERM)
        worker.wait_for(lambda: "Warm shutdown" in worker.text)
        assert not is_gone(pid)
        project.write("go", "")
        assert worker.process.wait(30) == 0  # a second signal would give it back

    assert is_gone(pid)
    assert outcomes(attempts(rt)) == ["ok"]
    prove(rt, pending=1)


SENDING = """
from pathlib import Path

from celery import shared_task

from pipeline_app import Pipeline, Stage


@shared_task
def count(number):
    with Path("counts.log").open("a") as file:
        file.write(f"{number}\\n")


def first(number: int) -> int:
    count.delay(number)
    return number


demo = Pipeline("demo", stages=[Stage(first)])
"""


def test_a_suspect_sends_tasks_of_its_own(project: Project, rt: Runtime) -> None:
    """Given a handler that sends a Celery task, when it runs alone, then that goes where the worker's would."""
    project.write("celeryconfig.py", 'pipelines = ["stages:demo"]\ntask_default_queue = "mine"\n')
    project.write("stages.py", SENDING)
    project.json("run", "init", "r", "--pipeline", "demo")
    add(rt, {"job_id": "a", "payload": 17})
    suspect(rt, "a")

    with project.worker():
        wait(rt)
        counts: Path = project.folder / "counts.log"
        eventually(counts.exists)

    assert counts.read_text() == "17\n"
