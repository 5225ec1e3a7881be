"""A project of a user's own in a temporary folder, and its commands and workers as real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from celery import Celery
from pymongo import MongoClient

from pipeline_app import Pipeline
from pipeline_app.application import make_celery
from pipeline_app.runtime import Runtime, build
from pipeline_app.settings import Settings
from tests.services import TestServices
from tests.worker import Worker

REPOSITORY = Path(__file__).parent.parent

CELERYCONFIG = 'pipelines = ["stages:demo"]\n'

STAGES = '''
import os
import signal
import time
from pathlib import Path

from pydantic import BaseModel

from pipeline_app import Job, PermanentError, Pipeline, Retry, Stage


class Item(BaseModel):
    n: int
    sleep_s: float = 0.0
    fail: int = 0
    permanent: bool = False
    kill: bool = False


def first(item: Item, job: Job) -> Item:
    with Path("calls.log").open("a") as log:
        log.write(f"{job.stage} {job.id} {job.attempt} {os.getpid()}\\n")
    time.sleep(item.sleep_s)
    if item.permanent:
        raise PermanentError("it says so")
    if job.attempt <= item.fail:
        raise ValueError(f"attempt {job.attempt} of {item.n}")
    if item.kill:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def second(item: Item) -> dict:
    return {"n": item.n, "square": item.n * item.n}


def third(row: dict) -> dict:
    return {**row, "done": True}


demo = Pipeline(
    "demo",
    stages=[
        Stage(first, chunk=5, retry=Retry(attempts=3, backoff="0.2s")),
        Stage(second, chunk=2),
        Stage(third, chunk=10),
    ],
    partition_by=["kind"],
)
'''


class Project:
    """A folder with a celeryconfig.py and stages, and addresses of a broker and a store."""

    def __init__(self, folder: Path, services: TestServices) -> None:
        self.folder = folder
        self.services = services
        self.amqp_url = services.amqp_url
        self.mongodb_url = services.database_url()
        self.write("celeryconfig.py", CELERYCONFIG)
        self.write("stages.py", STAGES)
        self._runtimes: list[Runtime] = []

    def write(self, name: str, text: str) -> Path:
        """Write a file of the project."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    @property
    def env(self) -> dict[str, str]:
        """Environment of the project's processes."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "AMQP_URL": self.amqp_url, "MONGODB_URL": self.mongodb_url, "PATH": path}

    def run(
        self, *command: str, input: str | None = None, env: Mapping[str, str] | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the project's folder, to its end."""
        return subprocess.run(
            command,
            cwd=self.folder,
            env={**self.env, **(env or {})},
            input=input,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def cli(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """`pipeline-app ARGUMENTS`."""
        return self.run("pipeline-app", *arguments, **options)

    def json(self, *arguments: str, code: int = 0, **options: Any) -> Any:
        """What `pipeline-app ARGUMENTS --json` prints, after checking its exit code."""
        done = self.cli(*arguments, "--json", **options)
        assert done.returncode == code, (done.args, done.returncode, done.stdout[-2000:], done.stderr[-4000:])
        return json.loads(done.stdout)

    def seed(self, run: str, jobs: list[dict[str, Any]], *, init: bool = True) -> None:
        """Make a run of the pipeline `demo` and add jobs to it."""
        if init:
            self.json("run", "init", run, "--pipeline", "demo")
        lines = "".join(json.dumps(job) + "\n" for job in jobs)
        self.json("run", "seed", run, "--jobs", "-", input=lines)

    @contextmanager
    def worker(
        self, *arguments: str, pool: str = "threads", concurrency: int = 2, env: Mapping[str, str] | None = None
    ) -> Iterator[Worker]:
        """A worker from when it consumes until it was told to stop."""
        worker = Worker(self, arguments, pool, concurrency, env)
        try:
            worker.wait_ready()
            yield worker
        finally:
            worker.stop()

    def runtime(self, *pipelines: Pipeline, **changed: Any) -> Runtime:
        """A runtime in this process, for tests that call the framework's functions; `changed` are settings."""
        settings = Settings(**{"amqp_url": self.amqp_url, "mongodb_url": self.mongodb_url, **changed})
        table = {pipeline.name: pipeline for pipeline in pipelines}
        app: Celery = make_celery(settings, table, lambda: None)  # type: ignore[arg-type, return-value]
        rt = build(settings, app, table)
        self._runtimes.append(rt)
        return rt

    def calls(self) -> list[str]:
        """Lines that the handlers of `stages.py` wrote: stage, job, attempt, pid."""
        log = self.folder / "calls.log"
        return log.read_text().splitlines() if log.exists() else []

    def close(self) -> None:
        """End what tests left open, and remove the database."""
        for rt in self._runtimes:
            rt.close()
        with MongoClient[dict[str, Any]](self.mongodb_url) as client:
            client.drop_database(client.get_default_database().name)


def eventually(condition: Callable[[], Any], timeout: float = 30) -> Any:
    """The first true answer of `condition`, asked again and again."""
    deadline = time.monotonic() + timeout
    while True:
        answer = condition()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not within {timeout} s: {condition}"
        time.sleep(0.05)
