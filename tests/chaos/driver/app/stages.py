"""The pipeline that chaos runs. Each job's payload says how it behaves; its trail names the executions behind it."""

from __future__ import annotations

import os
import time
from typing import Any

from witness import execution

from pipeline_app import Job, PermanentError, Pipeline, Retry, Stage

#: Messages of the run carry so many times as many jobs.
TIMES = int(os.environ.get("CHAOS_TIMES") or 1)

if os.environ.get("CHAOS_VARIANT"):
    from broken import VARIANTS

    VARIANTS[os.environ["CHAOS_VARIANT"]]()


def work(value: dict[str, Any], job: Job) -> dict[str, Any]:
    with execution(job, value) as name:
        time.sleep(value["pause_s"])
        if value["permanent_in"] == job.stage:
            raise PermanentError(f"{job.id} is not wanted")
        if job.attempt <= value["failures"].get(job.stage, 0):
            raise ValueError(f"attempt {job.attempt} of {job.id}")
    return {**value, "trail": [*value["trail"], name]}


def first(value: dict[str, Any], job: Job) -> dict[str, Any]:
    return work(value, job)


def second(value: dict[str, Any], job: Job) -> dict[str, Any]:
    return work(value, job)


def third(value: dict[str, Any], job: Job) -> dict[str, Any]:
    return work(value, job)


chaos = Pipeline(
    "chaos",
    stages=[
        Stage(first, chunk=3 * TIMES, retry=Retry(attempts=3, backoff="0.2s")),
        Stage(second, chunk=2 * TIMES, retry=Retry(attempts=3, backoff="0.2s")),
        Stage(third, chunk=5 * TIMES, retry=Retry(attempts=3, backoff="0.2s")),
    ],
    partition_by=["kind"],
)
