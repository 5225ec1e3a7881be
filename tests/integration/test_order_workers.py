"""Order per key with real workers of two pools, one of which is killed in the middle."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

import pytest

from pipeline_app.control import runs
from pipeline_app.control.seed import seeding
from pipeline_app.runtime import Runtime
from tests.integration.helpers import prove
from tests.project import Project

KEYS, JOBS_OF_KEY = 50, 40

STAGES = """
import os
import time

from pipeline_app import Job, Pipeline, Stage

log = os.open("diary.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def note(what: str, job: Job) -> None:
    os.write(log, f"{what} {job.stage} {job.id} {time.time():.3f}\\n".encode())


def first(n: int, job: Job) -> int:
    note("start", job)
    time.sleep(0.002)
    note("end", job)
    return n


def second(n: int, job: Job) -> dict:
    note("start", job)
    time.sleep(0.002)
    note("end", job)
    return {"n": n}


demo = Pipeline("demo", stages=[Stage(first, chunk=5), Stage(second, chunk=5)], order_partitions=8)
"""


def rows() -> list[dict[str, Any]]:
    """Jobs of all keys, mixed."""
    return [
        {"job_id": f"{key}.{n}", "payload": n, "order_key": key}
        for n in range(JOBS_OF_KEY)
        for key in (f"k{number}" for number in range(KEYS))
    ]


class Line:
    """What a handler wrote."""

    def __init__(self, text: str) -> None:
        self.what, self.stage, job, at = text.split()
        self.key, _, number = job.partition(".")
        self.number = int(number)
        self.at = float(at)


def read(project: Project) -> dict[str, list[Line]]:
    """Key -> its lines, in the order in which they were written."""
    found: dict[str, list[Line]] = defaultdict(list)
    log = project.folder / "diary.log"
    for text in log.read_text().splitlines() if log.exists() else []:
        line = Line(text)
        found[line.key].append(line)
    return found


def assert_in_order(lines: list[Line]) -> list[float]:
    """One job of the key at a time, in order; how long each of them let the next wait.

    Of the worker that was killed, an execution has no end, or an end that was not recorded: then the same job runs
    again. Once the next has begun, it never does.
    """
    gaps: list[float] = []
    going, ended_at = 0, None
    for line in lines:
        if ended_at is not None and line.number == going + 1:
            assert (line.what, line.stage) == ("start", "first")
            gaps.append(line.at - ended_at)
            going, ended_at = line.number, None
        assert line.number == going, (line.key, line.number, going)
        if (line.what, line.stage) == ("end", "second"):
            ended_at = line.at
    assert (going, ended_at is None) == (JOBS_OF_KEY - 1, False), lines[0].key
    return gaps


def seeded(project: Project) -> Runtime:
    project.write("stages.py", STAGES)
    project.json("run", "init", "r", "--pipeline", "demo")
    rt = project.runtime()
    seeding.seed(rt, "r", rows())
    return rt


@pytest.mark.timeout(700)
def test_two_thousand_jobs_of_fifty_keys(project: Project) -> None:
    """Given two workers of which one is killed in the middle, then each key's jobs go one at a time, in order."""
    rt = seeded(project)

    with project.worker(pool="prefork") as doomed, project.worker(pool="threads"):
        doomed.wait_for(lambda: sum(map(len, read(project).values())) > KEYS * JOBS_OF_KEY, timeout=200)
        doomed.kill()
        assert runs.wait(rt, "r", timeout_s=400).is_past(None)

    gaps = [gap for lines in read(project).values() for gap in assert_in_order(lines)]
    print(f"from the end of a job to the start of the next: median {statistics.median(gaps):.3f} s")
    assert statistics.median(gaps) < 5.0
    prove(rt, terminal=KEYS * JOBS_OF_KEY)
