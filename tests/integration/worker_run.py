"""A pipeline for real workers, and runs of it."""

from __future__ import annotations

from typing import Any

from pipeline_app.control import runs
from pipeline_app.control.seed import seeding
from pipeline_app.control.sight.status import Status
from pipeline_app.runtime import Runtime
from pipeline_app.store import messages
from tests.project import Project

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
