"""The worker's main process: what it has besides Celery's own, how it registers, and how it leaves."""

from __future__ import annotations

import atexit
import logging
import os
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline_app.domain.partition import DEFAULT, queue_name
from pipeline_app.domain.pipeline import Pipeline
from pipeline_app.errors import StoreError
from pipeline_app.flow.forward import publish_or_leave
from pipeline_app.flow.give_back import give_back
from pipeline_app.runtime import Runtime
from pipeline_app.store import messages
from pipeline_app.store.client import Document
from pipeline_app.worker.janitor import Janitor
from pipeline_app.worker.lifeline import Lifeline, Shared
from pipeline_app.worker.selection import Selection

logger = logging.getLogger(__name__)


class WorkerProcess:
    """What the main process of a worker has besides Celery's own. Made before the pool forks."""

    def __init__(self, shared: Shared, pipelines: Mapping[str, Pipeline], runtime: Callable[[], Runtime]) -> None:
        self.shared = shared
        self.pipelines = pipelines
        self.runtime = runtime
        self.janitor = Janitor(runtime)
        self.lifeline: Lifeline | None = None
        self.selection = Selection(None, pipelines)
        #: Called once when the worker is up, and once before it leaves: the sweep.
        self.on_up: list[Callable[[], None]] = []
        self.on_leave: list[Callable[[], None]] = []
        #: Handlers at once in a pool of threads; None for other pools.
        self.slots: int | None = None
        self._pid = os.getpid()
        self._left = False

    def tune(self, consumer: Any) -> None:
        """Let the threads pool record one message while it handles the next; before its first task."""
        if type(consumer.pool).__module__ != "celery.concurrency.thread":
            return
        self.slots = consumer.pool.limit
        consumer.pool.executor = ThreadPoolExecutor(max_workers=max(consumer.initial_prefetch_count, self.slots))

    def up(self, consumer: Any) -> None:
        """Register, after the pool was forked and before anything is consumed."""
        if self.lifeline is not None:
            return
        rt = self.runtime()
        record = self._record(consumer)
        self.lifeline = Lifeline(rt.settings.mongodb_url, self.shared, list(self.pipelines), lambda: record)
        self.lifeline.start()
        atexit.register(self.leave)
        for start in self.on_up:
            start()

    def leave(self, **_: Any) -> None:
        """Give back what is still claimed and close the record. Once, in the main process, whatever ended it."""
        if self._left or self.lifeline is None or os.getpid() != self._pid:
            return
        self._left = True
        for stop in self.on_leave:
            stop()
        self.janitor.drain(5.0)
        rt = self.runtime()
        try:
            for row in messages.claimed(rt.store, worker=self.shared.incarnation):
                logger.info("giving back: message=%s", row["_id"])
                publish_or_leave(rt, give_back(rt, row, lost=None))
            self.lifeline.end(rt.store)
        except StoreError as exc:
            logger.warning("could not say goodbye, the lease will end: %s", exc)

    def _record(self, consumer: Any) -> Document:
        pool = type(consumer.pool).__module__.rpartition(".")[2]
        return {
            "worker": consumer.hostname,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "pool": {"thread": "threads"}.get(pool, pool),
            "concurrency": consumer.pool.num_processes if pool != "solo" else 1,
            "queues": sorted({queue_name(*pair, DEFAULT) for pair in self.selection.stages} | self.selection.exact),
            "stages": sorted(f"{pipeline}.{stage}" for pipeline, stage in self.selection.stages),
            "select": [],
            "skip": [],
            "definitions": sorted(pipeline.hash for pipeline in self.pipelines.values()),
            "state": "running",
            "ended_at": None,
        }
