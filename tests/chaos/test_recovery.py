"""How soon work goes on elsewhere when its worker is killed; and a broker that restarts makes nothing run again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.driver.services import Services, own_services
from tests.project import Project, eventually
from tests.worker import Worker

JOBS = 8

STAGES = """
import os
import time
from pathlib import Path

from pipeline_app import Job, Pipeline, Stage


def long(seconds: float, job: Job) -> str:
    with Path("starts.log").open("a") as log:
        log.write(f"{job.id} {os.environ['CHAOS_WORKER']}\\n")
    time.sleep(seconds)
    return job.id


demo = Pipeline("demo", stages=[Stage(long)], partition_by=["kind"])
"""

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Services]:
    with own_services(tmp_path / "services") as made:
        yield made


@pytest.fixture
def long_jobs(project: Project) -> Project:
    project.write("stages.py", STAGES)
    return project


def starts(project: Project, worker: str | None = None) -> list[str]:
    """Jobs whose handler started, on that worker."""
    log = project.folder / "starts.log"
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return [job for job, name in lines if worker in (None, name)]


def worker(project: Project, name: str, pool: str) -> Worker:
    made = Worker(project, (), pool, JOBS, env={"CHAOS_WORKER": name})
    made.wait_ready(90)
    return made


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_jobs_of_a_killed_worker_run_again_soon(long_jobs: Project, pool: str) -> None:
    """Given a worker that runs eight jobs of half a minute, and another one, when it is killed, then all eight are
    running again on the other within 15 s.
    """
    first = worker(long_jobs, "first", pool)
    second = None
    try:
        long_jobs.seed("r", [{"job_id": str(n), "payload": 30, "tags": {"kind": "k"}} for n in range(JOBS)])
        eventually(lambda: len(starts(long_jobs, "first")) == JOBS, timeout=60)
        second = worker(long_jobs, "second", pool)

        first.kill()
        killed_at = time.monotonic()
        eventually(lambda: len(starts(long_jobs, "second")) == JOBS, timeout=60)
        took_s = time.monotonic() - killed_at
    finally:
        for one in filter(None, (first, second)):
            if one.process.poll() is None:
                one.kill()
            one.stop()

    print(f"\n{pool}: all {JOBS} were running again after {took_s:.1f} s")
    assert Counter(starts(long_jobs)) == {str(n): 2 for n in range(JOBS)}
    assert took_s <= 15.0


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_restart_of_the_broker_runs_nothing_again(tmp_path: Path, own: Services, how: str) -> None:
    """Given handlers that run in two pools, when RabbitMQ goes away and comes back, then each job ran once."""
    (tmp_path / "project").mkdir()
    project = Project(tmp_path / "project", own.addresses)
    project.write("stages.py", STAGES)
    running = [worker(project, pool, pool) for pool in ("prefork", "threads")]
    try:
        project.seed("r", [{"job_id": str(n), "payload": 20, "tags": {"kind": "ab"[n % 2]}} for n in range(2 * JOBS)])
        eventually(lambda: len(starts(project)) == 2 * JOBS, timeout=60)

        with getattr(own.broker, how)():
            time.sleep(1.0)  # the outage itself
        project.json("run", "wait", "r", "--strict", "--timeout", "120", timeout=150)
    finally:
        for one in running:
            one.stop()
        found = project.json("run", "verify", "r")
        project.close()

    assert found["ok"], found
    assert Counter(starts(project)) == {str(n): 1 for n in range(2 * JOBS)}
