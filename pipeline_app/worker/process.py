"""The worker's main process: what it has besides Celery's own, how it registers, and how it leaves."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline_app.domain.pipeline import Pipeline
from pipeline_app.errors import StoreError
from pipeline_app.flow.forward import publish_or_leave
from pipeline_app.flow.give_back import give_back
from pipeline_app.runtime import VERSION, Runtime
from pipeline_app.settings import WORKER_LOG
from pipeline_app.store import messages
from pipeline_app.store.client import Document
from pipeline_app.worker.backlog import THREADS, Backlog, backlog_of
from pipeline_app.worker.ending import end_pool
from pipeline_app.worker.janitor import Janitor
from pipeline_app.worker.lifeline import Lifeline, Shared
from pipeline_app.worker.selection import Selection
from pipeline_app.worker.stopping import Stopping

logger = logging.getLogger(__name__)

PREFORK = "celery.concurrency.prefork"
#: A duty of the sweep that is under way when the worker leaves has this long to end.
LEADER_PATIENCE_S = 2.0


class WorkerProcess:
    """What the main process of a worker has besides Celery's own. Made before the pool forks."""

    def __init__(self, shared: Shared, pipelines: Mapping[str, Pipeline], runtime: Callable[[], Runtime]) -> None:
        self.shared = shared
        self.pipelines = pipelines
        self.runtime = runtime
        self.janitor = Janitor(runtime, shared)
        self.stopping = Stopping(shared, self.leave_now)
        self.lifeline: Lifeline | None = None
        self.selection = Selection(None, pipelines)
        self.backlog = Backlog()
        #: Called once when the worker is up, and once before it leaves: the sweep.
        self.on_up: list[Callable[[], None]] = []
        self.on_leave: list[Callable[[], None]] = []
        #: Handlers at once in a pool of threads; None for other pools.
        self.slots: int | None = None
        self._consumer: Any = None
        self._pid = os.getpid()
        self._leaving = threading.Lock()
        self._left = False
        #: Whether everything was given back.
        self._said_goodbye = False
        self._frozen = False

    def before_fork(self, **_: Any) -> None:
        """Keep the collector of garbage off all that is there before the first child is forked.

        It writes into every object that it looks at, in a child or, before each fork, in this process: the pages that
        they share would become copies, 17 MiB for each process.
        """
        if not self._frozen:
            gc.collect()
            gc.freeze()
            self._frozen = True

    def tune(self, consumer: Any) -> None:
        """Bring the pool to what stages need, before its first task."""
        self._consumer = consumer
        pool = consumer.pool
        if type(pool).__module__ == THREADS:
            # More threads than slots: they record one message while they handle the next.
            self.slots = pool.limit
            threads = max(consumer.initial_prefetch_count, self.slots)
            pool.executor = ThreadPoolExecutor(max_workers=threads)
            self.backlog = backlog_of(consumer, lambda: threads)
        else:
            self.backlog = backlog_of(consumer, lambda: int(pool.num_processes))

    def slots_of(self, consumer: Any) -> int:
        """Handlers that may run at once."""
        return self.slots or int(consumer.pool.num_processes)

    def up(self, consumer: Any) -> None:
        """Register, after the pool was forked and before anything is consumed."""
        if self.lifeline is not None:
            return
        rt = self.runtime()
        record = self._record(consumer)
        self.lifeline = Lifeline(rt.settings.mongodb_url, self.shared, list(self.pipelines), lambda: record)
        self.lifeline.start()
        self.stopping.watch(consumer)
        atexit.register(self.leave)
        for start in self.on_up:
            start()

    def leave(self, **_: Any) -> None:
        """Give back what is still claimed and close the record. Once, in the main process, whatever ended it."""
        if self.lifeline is None or os.getpid() != self._pid:
            return
        # Who comes second waits for the first: the process may end once this has returned.
        with self._leaving:
            if self._left:
                return
            self._left = True
            self.shared.stop()
            stops = [threading.Thread(target=stop, daemon=True) for stop in self.on_leave]
            for thread in stops:
                thread.start()
            self.janitor.drain(5.0)
            self._said_goodbye = self._give_back(self.lifeline)
            for thread in stops:
                thread.join(LEADER_PATIENCE_S)

    def leave_now(self) -> bool:
        """The same although handlers run, which is no loss of theirs. Whether everything was given back."""
        self.janitor.close()
        if type(self._consumer.pool).__module__ == PREFORK:
            end_pool(self._consumer.pool)
        self.leave()
        return self._said_goodbye

    def _give_back(self, lifeline: Lifeline) -> bool:
        rt = self.runtime()
        fresh: list[Document] = []
        whole = True
        try:
            for row in messages.claimed(rt.store, worker=self.shared.incarnation):
                logger.info("giving back: message=%s", row["_id"])
                try:
                    fresh.extend(give_back(rt, row, lost=None))
                except StoreError:
                    raise
                except Exception:
                    # Our own bug, or data that somebody changed: no reason not to end, nor for the others to wait.
                    # Where the worker is not there any more, the sweep tries again.
                    logger.exception("cannot give back: message=%s", row["_id"])
                    whole = False
            publish_or_leave(rt, fresh)
            lifeline.end(rt.store)
        except StoreError as exc:
            logger.warning("could not say goodbye, the lease will end: %s", exc)
            return False
        return whole

    def _record(self, consumer: Any) -> Document:
        pool = type(consumer.pool).__module__.rpartition(".")[2]
        select, skip = self.selection.selectors.written()
        return {
            "worker": consumer.hostname,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": self.runtime().process,
            "pool": {"thread": "threads"}.get(pool, pool),
            "concurrency": consumer.pool.num_processes if pool != "solo" else 1,
            "queues": sorted(self.selection.named),
            # Of Celery's tasks that are no stages: whoever stops this worker leaves them without one.
            "other_queues": sorted(self.selection.others),
            "stages": sorted(f"{pipeline}.{stage}" for pipeline, stage in self.selection.stages),
            "select": select,
            "skip": skip,
            "log": os.environ.get(WORKER_LOG) or consumer.controller.logfile,
            "version": VERSION,
            "definitions": sorted(pipeline.hash for pipeline in self.pipelines.values()),
            "state": "running",
            "ended_at": None,
        }
