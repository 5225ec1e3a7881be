"""Every pool takes a run with good, failing and poisonous jobs through all stages, and stops cleanly."""

from __future__ import annotations

import pytest

from pipeline_app.application import prepare
from pipeline_app.control import runs
from pipeline_app.control.results import results
from pipeline_app.control.seed import seeding
from pipeline_app.domain.states import DeadKind
from pipeline_app.runtime import Runtime, process_id
from pipeline_app.store import messages
from tests.integration.helpers import attempts, job, prove
from tests.project import Project

STAGES = """
import sys

from pipeline_app import Job, PermanentError, Pipeline, Retry, Stage


def first(doing: str, job: Job) -> str:
    if doing == "never":
        raise PermanentError("it says so")
    if job.attempt > 1 or doing == "fine":
        return doing
    if doing == "memory":
        raise MemoryError
    if doing == "exit":
        sys.exit(3)
    if doing == "interrupt":
        raise KeyboardInterrupt
    raise ValueError("once")


def second(doing: str) -> dict:
    return {"doing": doing}


demo = Pipeline(
    "demo",
    stages=[Stage(first, chunk=3, retry=Retry(attempts=2, backoff=0)), Stage(second, chunk=4)],
    partition_by=["kind"],
)
"""

DOINGS = ["fine", "once", "memory", "exit", "interrupt", "never"]


@pytest.fixture
def rt(project: Project) -> Runtime:
    made = project.runtime()
    prepare(made)
    return made


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "solo"])
def test_a_pool(project: Project, rt: Runtime, pool: str) -> None:
    """Given a run with jobs of every kind, when a worker of this pool runs it, then every job is accounted for."""
    project.write("stages.py", STAGES)
    project.json("run", "init", "r", "--pipeline", "demo")
    rows = [
        {"job_id": f"{doing}-{n}", "payload": doing, "tags": {"kind": "ab"[n % 2]}}
        for doing in DOINGS
        for n in range(5)
    ]
    seeding.seed(rt, "r", rows, whole=True)

    with project.worker(pool=pool, concurrency=2) as worker:
        now = runs.wait(rt, "r", timeout_s=60)
        assert now.is_past(None), now
        assert worker.stop() == 0, worker.text[-4000:]

    prove(rt, terminal=25, dead_lettered=5)
    assert job(rt, "never-0")["reason"] == DeadKind.PERMANENT
    assert {row["job_id"]: row["result"] for row in results(rt, "r")} == {
        row["job_id"]: {"doing": row["payload"]} for row in rows if row["payload"] != "never"
    }
    errors = {row["job"].split("-")[0]: row["error"]["type"] for row in attempts(rt, outcome="failed")}
    assert errors == {
        "once": "ValueError",
        "memory": "MemoryError",
        "exit": "SystemExit",
        "interrupt": "KeyboardInterrupt",
        "never": "pipeline_app.errors.PermanentError",
    }
    assert "lost" not in {row["outcome"] for row in attempts(rt)}
    (record,) = rt.store.db.workers.find()
    assert (record["pool"], record["state"]) == (pool, "stopped")
    assert process_id(record["process"]) == record["pid"]
    assert messages.claimed(rt.store) == []
    assert "Exception in thread" not in worker.text
    assert "our own error" not in worker.text
