"""Handlers that take longer than they may, in workers of every pool: they are stopped, and nothing else is lost."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline_app import Retry
from pipeline_app.application import prepare
from pipeline_app.control import runs
from pipeline_app.control.results import results
from pipeline_app.control.seed import seeding
from pipeline_app.domain.states import DeadKind
from pipeline_app.flow.consume import Flow
from pipeline_app.runtime import Runtime
from tests.integration.gate import Gate
from tests.integration.helpers import (
    as_row,
    attempts,
    begin,
    everything,
    hints,
    job,
    lines,
    outcomes,
    pipeline,
    prove,
)
from tests.integration.proxy import MongoProxy
from tests.integration.test_alone import suspect
from tests.project import Project, eventually
from tests.worker import Worker

POOLS = ["prefork", "threads", "gevent", "solo"]

STAGES = """
import os
import re
import subprocess
import time
from pathlib import Path

from celery.exceptions import SoftTimeLimitExceeded

from pipeline_app import Job, Pipeline, Retry, Stage


def first(doing: str, job: Job) -> str:
    with Path("calls.log").open("a") as log:
        log.write(f"{job.stage} {job.id} {job.attempt} {os.getpid()} {time.time()}\\n")
    if doing == "slow" and job.attempt == 1 or doing == "always":
        wait(60)
    elif doing == "catch":
        try:
            wait(60)
        except SoftTimeLimitExceeded:
            return "caught"
    elif doing == "some":
        wait(0.6)
    elif doing == "deaf" and job.attempt == 1:
        # No other thread of the process runs until this ends.
        re.match("(a+)+$", "a" * 40 + "b")
    elif doing == "waits" and job.attempt == 1:
        subprocess.run(["sleep", "61.5"])
    Path(f"ended-{job.id}").touch()
    return doing


def wait(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.02)


demo = Pipeline("demo", stages=[Stage(first, retry=Retry(attempts=2, backoff=0.1), OPTIONS)], partition_by=["kind"])
"""


@pytest.fixture
def rt(project: Project) -> Runtime:
    made = project.runtime()
    prepare(made)
    return made


def make_run(project: Project, rt: Runtime, *doings: str, options: str) -> None:
    """The run `r` of jobs that are called what they do."""
    project.write("stages.py", STAGES.replace("OPTIONS", options))
    project.json("run", "init", "r", "--pipeline", "demo")
    seeding.seed(rt, "r", [{"job_id": doing, "payload": doing.split("-")[0]} for doing in doings])


def wait(rt: Runtime, timeout_s: float = 60) -> None:
    now = runs.wait(rt, "r", timeout_s=timeout_s)
    assert now.is_past(None), now


def calls(project: Project) -> Counter[str]:
    """Job -> how often its handler was started."""
    return Counter(line.split()[1] for line in project.calls())


def errors(rt: Runtime, job_id: str) -> list[str | None]:
    """How the attempts of a job failed; None for those that did not."""
    return [row.get("error", {}).get("type", "").rpartition(".")[2] or None for row in attempts(rt, job=job_id)]


@pytest.mark.parametrize("pool", POOLS)
def test_the_soft_limit(project: Project, rt: Runtime, pool: str) -> None:
    """Given handlers beyond the soft limit, then it is raised in them; one may catch it, another's job is retried.

    The limit is for a job, not for the chunk, and what runs in time hears nothing of it.
    """
    options = "chunk=6, soft_time_limit=1"
    make_run(project, rt, "some-0", "some-1", "slow", "catch", "some-2", "some-3", options=options)

    with project.worker(pool=pool, concurrency=1) as worker:
        wait(rt)
        assert worker.stop() == 0, worker.text[-4000:]

    prove(rt, terminal=6)
    assert calls(project) == {"some-0": 1, "some-1": 1, "slow": 2, "catch": 1, "some-2": 1, "some-3": 1}
    assert errors(rt, "slow") == ["SoftTimeLimitExceeded", None]
    (first, _) = attempts(rt, job="slow")
    assert 0.9 < first["duration_s"] < 3
    assert "time.sleep(0.02)" in first["error"]["traceback"]
    assert {row["job_id"]: row["result"] for row in results(rt, "r")}["catch"] == "caught"
    assert len(rt.store.db.workers.distinct("_id")) == 1, "no slot was lost"


@pytest.mark.parametrize("pool", POOLS)
def test_the_hard_limit(project: Project, rt: Runtime, pool: str) -> None:
    """Given a handler that does not end, then its attempt has failed, and the other jobs of its chunk are through.

    Those before it are recorded, those after it go on in another message, and each of them ran once. A child of a pool
    is replaced; a worker of another pool begins anew under its process id.
    """
    make_run(project, rt, "fine-0", "fine-1", "slow", "fine-2", "fine-3", options='chunk=5, time_limit="1s"')

    with project.worker(pool=pool, concurrency=1) as worker:
        wait(rt)
        assert worker.stop() == 0, worker.text[-4000:]

    prove(rt, terminal=5)
    assert calls(project) == {"slow": 2, **{f"fine-{n}": 1 for n in range(4)}}
    assert errors(rt, "slow") == ["TimeLimitExceeded", None]
    late, again = attempts(rt, job="slow")
    assert (late["outcome"], late["attempt"], again["attempt"]) == ("failed", 1, 2)
    assert late["error"]["message"] == "it ran longer than its time limit of 1 s"
    assert "time.sleep(0.02)" in late["error"]["traceback"]
    assert 0.9 < late["duration_s"] < 3
    assert set(outcomes(attempts(rt, job={"$ne": "slow"}))) == {"ok"}
    assert_slot_was_given_up(project, rt, worker, pool)


def assert_slot_was_given_up(project: Project, rt: Runtime, worker: Worker, pool: str) -> None:
    incarnations = list(rt.store.db.workers.find().sort("started_at", 1))
    assert {row["pid"] for row in incarnations} == {worker.process.pid}
    assert [row["state"] for row in incarnations] == ["stopped"] * len(incarnations)
    assert len(incarnations) == (1 if pool == "prefork" else 2)
    pids = {line.split()[1]: int(line.split()[3]) for line in project.calls() if line.split()[2] == "1"}
    if pool == "prefork":
        assert pids["fine-3"] != pids["slow"], "another child"
    else:
        assert set(pids.values()) == {worker.process.pid}


def test_one_that_never_ends(project: Project, rt: Runtime) -> None:
    """Given a handler that is over its limit each time, then its job is dead-lettered when its attempts are used up."""
    make_run(project, rt, "always", "fine", options="chunk=2, time_limit=0.5")

    with project.worker(pool="prefork", concurrency=1):
        wait(rt)

    prove(rt, terminal=1, dead_lettered=1)
    assert job(rt, "always")["reason"] == DeadKind.EXHAUSTED
    assert (job(rt, "always")["failures"], job(rt, "always")["losses"]) == (2, 0)
    assert errors(rt, "always") == ["TimeLimitExceeded"] * 2


def test_a_handler_that_lets_nothing_else_run(project: Project, rt: Runtime) -> None:
    """Given a handler that keeps the interpreter to itself, then the main process ends its child, and says the same."""
    make_run(project, rt, "fine-0", "deaf", "fine-1", options="chunk=3, time_limit=1")

    with project.worker(pool="prefork", concurrency=1) as worker:
        wait(rt)
        assert worker.stop() == 0, worker.text[-4000:]

    prove(rt, terminal=3)
    # Only the child knew that the first had ended.
    assert calls(project) == {"fine-0": 2, "deaf": 2, "fine-1": 1}
    assert errors(rt, "deaf") == ["TimeLimitExceeded", None]
    assert "lost" not in outcomes(attempts(rt))
    assert "ending a child that is stuck in its handler" in worker.text


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_what_a_handler_waits_for_ends_with_it(project: Project, rt: Runtime, pool: str) -> None:
    """Given a handler that waits for a program, when its time is over, then the program is ended, too."""
    make_run(project, rt, "waits", options="time_limit=1")

    with project.worker(pool=pool, concurrency=1):
        eventually(lambda: sleepers(project))
        wait(rt)

    prove(rt, terminal=1)
    assert sleepers(project) == []


def sleepers(project: Project) -> list[str]:
    """Ids of the programs that handlers of this project wait for."""
    found = project.run("pgrep", "-f", "^sleep 61.5$").stdout.split()
    mine = []
    for pid in found:
        with contextlib.suppress(OSError):  # it has ended by now
            if Path(f"/proc/{pid}/cwd").samefile(project.folder):
                mine.append(pid)
    return mine


@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_the_others_in_its_worker(project: Project, rt: Runtime, pool: str) -> None:
    """Given handlers beside one that does not end, then they may end before the worker begins anew."""
    make_run(project, rt, "slow", *(f"some-{n}" for n in range(12)), options="time_limit=1.5")

    with project.worker(pool=pool, concurrency=4) as worker:
        wait(rt)
        assert worker.stop() == 0, worker.text[-4000:]

    prove(rt, terminal=13)
    assert calls(project) == {"slow": 2, **{f"some-{n}": 1 for n in range(12)}}
    assert set(outcomes(attempts(rt, job={"$ne": "slow"}))) == {"ok"}


@pytest.mark.parametrize("how", ["threads", "prefork"])
def test_others_that_take_too_long(project: Project, rt: Runtime, how: str) -> None:
    """Given a handler that takes long beside one that does not end, then it is given back, free, or may go on.

    A pool of threads begins anew when the soft shutdown timeout is over; a child of prefork concerns nobody else.
    """
    project.write("celeryconfig.py", 'pipelines = ["stages:demo"]\nworker_soft_shutdown_timeout = 0.5\n')
    project.write("stages.py", STAGES.replace("OPTIONS", "time_limit=5").replace("wait(0.6)", "wait(4)"))
    project.json("run", "init", "r", "--pipeline", "demo")
    seeding.seed(rt, "r", [{"job_id": "slow", "payload": "slow"}])

    with project.worker(pool=how, concurrency=2):
        eventually(lambda: calls(project)["slow"])
        worker_is_at_its_limit = 5 - 2.0
        eventually(lambda: age_of_call(project, "slow") > worker_is_at_its_limit)
        seeding.seed(rt, "r", [{"job_id": "some", "payload": "some"}])
        wait(rt)

    prove(rt, terminal=2)
    assert calls(project)["some"] == {"threads": 2, "prefork": 1}[how]
    assert errors(rt, "slow") == ["TimeLimitExceeded", None]
    assert outcomes(attempts(rt, job="some")) == ["ok"]
    assert (job(rt, "some")["losses"], job(rt, "some")["failures"]) == (0, 0)


def age_of_call(project: Project, job_id: str) -> float:
    return time.time() - max(float(line.split()[4]) for line in project.calls() if line.split()[1] == job_id)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_the_store_is_away_then(project: Project, rt: Runtime, mongo_proxy: MongoProxy, pool: str) -> None:
    """Given a store that is away when a handler's time is over, then that is recorded when it is back."""
    make_run(project, rt, "fine-0", "slow", "fine-1", options="chunk=3, time_limit=2")
    env = {"MONGODB_URL": mongo_proxy.address(project.mongodb_url)}

    with project.worker(pool=pool, concurrency=1, env=env) as worker:
        eventually(lambda: calls(project)["slow"])
        mongo_proxy.cut()
        worker.wait_for(lambda: "record waits" in worker.text or "settling waits" in worker.text)
        mongo_proxy.restore()
        wait(rt)

    prove(rt, terminal=3)
    assert errors(rt, "slow") == ["TimeLimitExceeded", None]
    assert calls(project) == {"fine-0": 1, "slow": 2, "fine-1": 1}


@pytest.mark.parametrize(
    ("limit", "error"), [("soft_time_limit", "SoftTimeLimitExceeded"), ("time_limit", "TimeLimitExceeded")]
)
def test_limits_of_a_job_alone(project: Project, rt: Runtime, limit: str, error: str) -> None:
    """Given a suspect, which runs in a process of its own, then the limits are the same, and no slot is lost."""
    make_run(project, rt, "slow", "fine", "catch", options=f"chunk=3, {limit}=1")
    suspect(rt, "slow", "fine", "catch")

    with project.worker(pool="threads", concurrency=1) as worker:
        wait(rt)
        assert worker.stop() == 0, worker.text[-4000:]

    assert errors(rt, "slow") == [error, None]
    assert calls(project)["fine"] == 1
    assert len(rt.store.db.workers.distinct("_id")) == 1
    if error == "SoftTimeLimitExceeded":
        prove(rt, terminal=3)
    else:
        prove(rt, terminal=2, dead_lettered=1)
    pids = {int(line.split()[3]) for line in project.calls() if line.split()[1] == "slow"}
    assert worker.process.pid not in pids


def test_a_handler_that_ends_too_late(project: Project, gate: Gate) -> None:
    """Given a handler that ends after its limit, then what was recorded on its behalf stands, and nothing is added."""
    chosen = pipeline(gate.stage(time_limit=0.3, chunk=2, retry=Retry(attempts=2, backoff="1h")), as_row)
    rt = project.runtime(chosen)
    given_up: list[str] = []
    flow = Flow(rt, lambda: False, give_up_slot=given_up.append)
    begin(rt, chosen, lines(2))
    (hint,) = hints(rt)

    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(flow.run, hint)
        eventually(lambda: given_up == [hint.message])
        then = {name: rows for name, rows in everything(rt).items() if name in RECORDED}
        gate.may_end.set()
        assert late.result(30) == "was over its time limit"

    flow.notes.flush()
    assert {name: rows for name, rows in everything(rt).items() if name in RECORDED} == then
    assert gate.calls == ["j0"]
    assert outcomes(attempts(rt)) == ["failed"]
    assert [row["jobs"] for row in rt.store.db.messages.find({"state": "open"})] == [["j1"]]
    assert then["job_outputs"] == []
    prove(rt, retry_waiting=1, pending=1)


RECORDED = ["job_states", "job_outputs", "job_attempts", "pipeline_events", "run_counters"]


def test_a_stop_while_a_handler_is_stuck(project: Project, rt: Runtime) -> None:
    """Given a worker that is told to stop and whose handler does not end, then it ends at the limit, and stays so."""
    make_run(project, rt, "slow", options="time_limit=2")

    with project.worker(pool="threads", concurrency=1) as worker:
        eventually(lambda: calls(project)["slow"])
        assert worker.stop() == 0, worker.text[-4000:]

    # Its retry is due so soon that the worker's own sweep may have released it before it ended.
    state = job(rt, "slow")["state"]
    assert state in {"retry_waiting", "pending"}
    prove(rt, **{state: 1})
    assert errors(rt, "slow") == ["TimeLimitExceeded"]
    (record,) = rt.store.db.workers.find()
    assert record["state"] == "stopped"
