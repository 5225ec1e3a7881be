"""Three stages that do nothing, as a pipeline of ours and as plain Celery tasks."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from celery import Celery
from kombu import Exchange, Queue

from pipeline_app import Pipeline, Stage

CHUNK = int(os.environ.get("BENCH_CHUNK", "1"))


def one(n: int) -> int:
    return n


def two(n: int) -> int:
    return n


def three(n: int) -> int:
    return n


noop = Pipeline("noop", stages=[Stage(one, chunk=CHUNK), Stage(two, chunk=CHUNK), Stage(three, chunk=CHUNK)])


class Stopwatch:
    """Notes in a file when the first of `number` tasks started and the last one ended."""

    def __init__(self) -> None:
        self.number = int(os.environ.get("BENCH_TASKS", "0"))
        self.done = 0
        self.first = 0.0

    def tick(self) -> None:
        self.done += 1
        if self.done == 1:
            self.first = time.time()
        if self.done == self.number:
            Path(os.environ["BENCH_RESULT"]).write_text(json.dumps({"seconds": time.time() - self.first}))


def raw_app() -> Celery:
    """Plain Celery with late acknowledgement, persistent messages, no confirms and no record of anything."""
    app = Celery("raw", broker=os.environ["AMQP_URL"], backend="disabled://")
    watch = Stopwatch()
    exchange = Exchange("raw", "direct", durable=True)
    arguments = {"x-queue-type": os.environ.get("PIPELINE_QUEUE_TYPE", "classic")}
    queues = [Queue(f"raw.{n}", exchange, routing_key=f"raw.{n}", queue_arguments=arguments) for n in range(3)]
    app.conf.update(
        task_acks_late=True,
        task_ignore_result=True,
        task_queues=queues,
        task_default_queue="raw.0",
        task_routes={f"raw.{n}": {"queue": queues[n]} for n in range(3)},
        task_create_missing_queues=False,
        worker_prefetch_multiplier=int(os.environ.get("BENCH_PREFETCH", "4")),
        broker_connection_retry_on_startup=True,
        worker_send_task_events=False,
    )

    def step(n: Any) -> Any:
        watch.tick()
        return n

    for number in range(3):
        app.task(name=f"raw.{number}")(step)
    return app


app = raw_app() if "AMQP_URL" in os.environ else None
