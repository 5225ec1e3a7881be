"""Workers that begin anew by number of jobs, age or memory, and pools that replace their children: nothing is lost."""

from __future__ import annotations

import re
import signal
from collections import Counter

import pytest

from pipeline_app.application import prepare
from pipeline_app.control import runs
from pipeline_app.control.seed import seeding
from pipeline_app.runtime import Runtime
from pipeline_app.store import workers
from pipeline_app.store.client import Document
from tests.integration.helpers import attempts, outcomes, prove
from tests.project import Project, eventually

POOLS = ["prefork", "threads", "gevent", "solo"]

STAGES = """
import os
import time
from pathlib import Path

from pipeline_app import Job, Pipeline, Stage

kept = []


def first(doing: dict, job: Job) -> dict:
    with Path("calls.log").open("a") as log:
        log.write(f"{job.stage} {job.id} {job.attempt} {os.getpid()}\\n")
    kept.append(bytearray(doing.get("leak", 0)))
    time.sleep(doing.get("sleep_s", 0.02))
    while "wait_for" in doing and not Path(doing["wait_for"]).exists():
        time.sleep(0.02)
    return {}


def second(doing: dict) -> dict:
    return doing


demo = Pipeline("demo", stages=[Stage(first, chunk=CHUNK), Stage(second, chunk=10)], partition_by=["kind"])
"""


@pytest.fixture
def rt(project: Project) -> Runtime:
    made = project.runtime()
    prepare(made)
    return made


def make_run(project: Project, rt: Runtime, jobs: int, *, chunk: int = 1, **payload: object) -> None:
    """The run `r` of so many jobs."""
    project.write("stages.py", STAGES.replace("CHUNK", str(chunk)))
    project.json("run", "init", "r", "--pipeline", "demo")
    seeding.seed(rt, "r", [{"job_id": f"j{n}", "payload": payload} for n in range(jobs)])


def wait(rt: Runtime, timeout_s: float = 90) -> None:
    now = runs.wait(rt, "r", timeout_s=timeout_s)
    assert now.is_past(None), now


def prove_each_ran_once(project: Project, rt: Runtime, jobs: int) -> None:
    prove(rt, terminal=jobs)
    assert Counter(line.split()[1] for line in project.calls()) == {f"j{n}": 1 for n in range(jobs)}
    assert Counter(outcomes(attempts(rt))) == {"ok": 2 * jobs}


def incarnations(rt: Runtime) -> list[Document]:
    return list(rt.store.db.workers.find().sort("started_at", 1))


def pids(project: Project) -> set[int]:
    return {int(line.split()[3]) for line in project.calls()}


def test_children_that_are_replaced_after_some_tasks(project: Project, rt: Runtime) -> None:
    """Given `--max-tasks-per-child`, when children are replaced all the time, then nothing is lost or runs twice."""
    make_run(project, rt, 24)

    with project.worker("--max-tasks-per-child", "4", pool="prefork") as worker:
        wait(rt)
        assert worker.stop() == 0, worker.text[-4000:]

    prove_each_ran_once(project, rt, 24)
    # A message of the first stage is a task, and so is one of the second.
    assert len(pids(project)) >= 6
    assert len(incarnations(rt)) == 1


def test_children_that_are_replaced_for_their_memory(project: Project, rt: Runtime) -> None:
    """Given `--max-memory-per-child` and a handler that leaks, then children are replaced and nothing is lost."""
    make_run(project, rt, 20, leak=60_000_000)

    with project.worker("--max-memory-per-child", "200000", pool="prefork") as worker:
        wait(rt)
        assert worker.stop() == 0, worker.text[-4000:]

    prove_each_ran_once(project, rt, 20)
    assert len(pids(project)) >= 5


@pytest.mark.parametrize("pool", POOLS)
def test_a_worker_that_begins_anew_after_some_jobs(project: Project, rt: Runtime, pool: str) -> None:
    """Given `--max-jobs`, when a worker of any pool has run so many, then it begins anew, and nothing is lost."""
    make_run(project, rt, 120, chunk=3, sleep_s=0.05)

    with project.worker("--max-jobs", "80", pool=pool) as worker:
        wait(rt)
        assert worker.stop() == 0, worker.text[-4000:]

    prove_each_ran_once(project, rt, 120)
    found = incarnations(rt)
    assert len(found) >= 2
    assert {(row["pid"], row["worker"]) for row in found} == {(worker.process.pid, found[0]["worker"])}
    assert {row["state"] for row in found} == {"stopped"}
    ran = [int(number) for number in re.findall(r"recycling, it has run (\d+) jobs", worker.text)]
    assert ran
    assert min(ran) >= 80
    assert worker.text.count(" ready.") == len(found), "the same log"


def test_a_worker_that_begins_anew_by_its_age(project: Project, rt: Runtime) -> None:
    """Given `--max-age`, then a worker begins anew when it is that old, and finds the queues that it followed."""
    make_run(project, rt, 8)
    arguments = ["--max-age", "6s", "-Q", "demo.first"]

    with project.worker(*arguments) as worker:
        eventually(lambda: len(incarnations(rt)) >= 2)
        seeding.seed(rt, "r", [{"job_id": "later", "payload": {}, "tags": {"kind": "new"}}])
        eventually(lambda: any("later" in line for line in project.calls()))
        assert worker.stop() == 0, worker.text[-4000:]

    first, second, *_ = incarnations(rt)
    age_s = (second["started_at"] - first["started_at"]).total_seconds()
    assert 5 < age_s < 20, "start and stop included"
    assert second["queues"] == first["queues"] == ["demo.first"]
    prove(rt, pending=9)


def test_a_worker_that_begins_anew_by_its_memory(project: Project, rt: Runtime) -> None:
    """Given `--max-memory` and a handler that leaks, then the worker begins anew before it takes all that there is."""
    make_run(project, rt, 24, leak=50_000_000, sleep_s=0.3)

    with project.worker("--max-memory", "400MB", pool="threads", concurrency=1) as worker:
        wait(rt)
        assert worker.stop() == 0, worker.text[-4000:]

    prove_each_ran_once(project, rt, 24)
    assert len(incarnations(rt)) >= 3
    assert "recycling, it has" in worker.text



@pytest.mark.parametrize("asked_by", ["signal", "record"])
def test_a_stop_while_it_recycles(project: Project, rt: Runtime, asked_by: str) -> None:
    """Given a worker that is to begin anew and waits for a handler, when it is told to stop, then it stops for good.

    That is the first time that somebody asks: the handler may end.
    """
    make_run(project, rt, 1, wait_for="go")

    with project.worker("--max-age", "6s", concurrency=1) as worker:
        eventually(project.calls)
        worker.wait_for(lambda: "recycling" in worker.text)
        if asked_by == "signal":
            worker.process.send_signal(signal.SIGTERM)
        else:
            workers.request_stop(rt.store, [incarnations(rt)[0]["_id"]], "warm")
        worker.wait_for(lambda: "Warm shutdown" in worker.text)
        project.write("go", "")
        assert worker.process.wait(30) == 0, worker.text[-4000:]

    assert [row["state"] for row in incarnations(rt)] == ["stopped"]
    assert outcomes(attempts(rt, stage="first")) == ["ok"]


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--max-jobs", "0", "not a number of jobs: '0'"),
        ("--max-jobs", "many", "not a number of jobs: 'many'"),
        ("--max-age", "soon", "not a duration: 'soon'"),
        ("--max-age", "10ms", "an age is at least 1 s"),
        ("--max-memory", "big", "not a size: 'big'"),
        ("--max-memory", "0MB", "not a size: '0MB'"),
    ],
)
def test_options_that_mean_nothing(project: Project, option: str, value: str, says: str) -> None:
    """Given an option that cannot be read, then the worker does not start, and says what is wrong."""
    done = project.run("celery", "-A", "pipeline_app", "worker", option, value)

    assert done.returncode == 2
    assert says in done.stderr
