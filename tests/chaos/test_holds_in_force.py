"""A hold that is set while many workers run: how soon nothing that it matches starts any more."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tests.project import Project, eventually

JOBS = int(os.environ.get("CHAOS_HOLD_JOBS", "800"))
WORKERS, THREADS = 8, 2

# A chunk lasts two seconds and has jobs of both providers: it is under way when the hold comes.
STAGES = """
import time
from pathlib import Path

from pipeline_app import Job, Pipeline, Stage


def call(n: int, job: Job) -> int:
    with Path("starts.log").open("a") as log:
        log.write(f"{time.monotonic()} {job.tags['provider']} {job.id}\\n")
    time.sleep(0.2)
    return n


demo = Pipeline("demo", stages=[Stage(call, chunk=10)], partition_by=["kind"])
"""

pytestmark = pytest.mark.timeout(600)


def starts(project: Project, provider: str) -> list[float]:
    """When handlers started for jobs of that provider; `time.monotonic()` is one clock for all processes."""
    log = project.folder / "starts.log"
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return sorted(float(at) for at, tag, _ in lines if tag == provider)


def test_nothing_starts_a_second_after_a_hold_was_set(project: Project) -> None:
    """Given eight workers in the middle of their chunks, when a provider is put on hold, then no job of it starts later
    than a second after the command returned, the others go on, and all of them end once the hold is cleared.
    """
    project.write("stages.py", STAGES)
    project.seed(
        "r", [{"job_id": str(n), "payload": n, "tags": {"kind": "k", "provider": "pq"[n % 2]}} for n in range(JOBS)]
    )
    with ExitStack() as stack:
        with ThreadPoolExecutor(WORKERS) as starting:
            entering = [
                starting.submit(stack.enter_context, project.worker(concurrency=THREADS)) for _ in range(WORKERS)
            ]
        running = [entered.result() for entered in entering]
        eventually(lambda: len(starts(project, "p")) >= JOBS / 8, timeout=120)

        made = project.json("hold", "set", "--selector", "provider=p", "--reason", "the provider says so")
        returned_at = time.monotonic()
        eventually(lambda: len(starts(project, "q")) == JOBS / 2, timeout=120)

        last, others = starts(project, "p")[-1], starts(project, "q")[-1]
        print(f"\n{len(running)} workers, the last start was {last - returned_at:+.3f} s after `hold set` returned")
        assert last <= returned_at + 1.0
        # The workers were busy with other jobs for long enough to have started one.
        assert others >= returned_at + 2.0
        held = JOBS // 2 - len(starts(project, "p"))
        assert held > 0
        eventually(lambda: project.json("run", "status", "r")["states"]["held"] == held)
        holds = project.json("hold", "list")
        assert [(hold["hold"], hold["state"], hold["held_jobs"]) for hold in holds] == [(made["hold"], "active", held)]

        project.json("hold", "clear", "--selector", "provider=p")
        project.json("run", "wait", "r", "--strict", "--timeout", "300", timeout=330)
    found = project.json("run", "verify", "r")
    assert found["ok"], found
    assert found["states"]["terminal"] == JOBS
    assert len(starts(project, "p")) == len(starts(project, "q")) == JOBS / 2
