"""The worker's main process: which queues it consumes, when it pauses, what it does for lost children, how it leaves.

`Follow` is a bootstep of Celery's consumer: it starts again after every reconnect and, in between, makes the set of
consumed queues what it should be: all partitions of the worker's stages, or none while the store is away.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from celery import bootsteps
from celery.exceptions import TimeLimitExceeded
from celery.worker.consumer import Consumer
from celery.worker.control import control_command

from pipeline_app.domain.evidence import WORKER_LOST, End, worker_lost
from pipeline_app.domain.outcome import ErrorRecord
from pipeline_app.domain.partition import DEFAULT, queue_name
from pipeline_app.domain.pipeline import Pipeline
from pipeline_app.errors import StoreError
from pipeline_app.flow.announce import COMMAND
from pipeline_app.flow.forward import publish_or_leave
from pipeline_app.flow.give_back import give_back, take_open
from pipeline_app.flow.lifeline import Lifeline, Shared
from pipeline_app.runtime import Runtime, process_id
from pipeline_app.store import messages, workers
from pipeline_app.store.client import Document
from pipeline_app.transport.topology import IDLE_QUEUE, Queue, named_queue, parked_queue

logger = logging.getLogger(__name__)

#: How often the consumed queues are compared with what they should be.
FOLLOW_S = 1.0


class Selection:
    """Which queues `-Q` asks for: names of stages (`survey.load` brings all partitions), of partitions, or others."""

    def __init__(self, names: Iterable[str] | None, pipelines: Mapping[str, Pipeline]) -> None:
        stages = {queue_name(p.name, s.name, DEFAULT): (p.name, s.name) for p in pipelines.values() for s in p.stages}
        chosen = None if names is None else [name for name in names if name != IDLE_QUEUE]
        #: (pipeline, stage) whose partitions are all consumed.
        self.stages = {pair for name, pair in stages.items() if chosen is None or name in chosen}
        #: Queues that were named one by one and are partitions of a stage.
        self.exact = {n for n in chosen or () if n not in stages and any(n.startswith(f"{s}.") for s in stages)}
        #: Queues that are none of ours; Celery consumes them as it would without us.
        self.others = {name for name in chosen or () if name not in stages} - self.exact

    def wanted(self, partitions: Iterable[Document]) -> set[str]:
        """Names of the stage queues to consume, given the partitions that exist."""
        names = {queue_name(pipeline, stage, DEFAULT) for pipeline, stage in self.stages}
        names |= {row["_id"] for row in partitions if (row["pipeline"], row["stage"]) in self.stages}
        return names | self.exact


class Janitor:
    """Gives back messages of lost children, from a thread, so that the main process goes on serving the others."""

    def __init__(self, runtime: Callable[[], Runtime]) -> None:
        self._runtime = runtime
        #: Message, what became of its child (None if there was none), and that child's pid if it is known.
        self._todo: queue.Queue[tuple[str, BaseException | None, int | None]] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def lost(self, message: str, exc: BaseException, pid: int | None) -> None:
        """The child `pid` that ran this message was killed, or exceeded its time."""
        self._add(message, exc, pid)

    def revoked(self, message: str) -> None:
        """The message's Celery task was revoked: its jobs go on under another id."""
        self._add(message, None)

    def drain(self, seconds: float) -> None:
        """Wait until all is given back, at most that long."""
        deadline = time.monotonic() + seconds
        while self._todo.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.05)

    def _add(self, message: str, lost: BaseException | None, pid: int | None = None) -> None:
        self._todo.put((message, lost, pid))
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pipeline-janitor", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            message, lost, pid = self._todo.get()
            pause = 0.2
            while not self._give_back(message, lost, pid):
                time.sleep(pause)
                pause = min(pause * 2, 5.0)
            self._todo.task_done()

    def _give_back(self, message: str, lost: BaseException | None, pid: int | None) -> bool:
        rt = self._runtime()
        try:
            rows = messages.claimed(rt.store, _id=message, worker=rt.incarnation())
            # A child that was killed before its claim may leave the message to a brother who lives.
            rows = [row for row in rows if pid is None or process_id(row["process"]) == pid]
            if not rows and lost is None:
                taken = take_open(rt, message)
                rows = [taken] if taken else []
            for row in rows:
                error = None if lost is None else lost_child(rt, row, lost)
                # A child may die for others' doing; the time limit is for this message alone.
                overdue = isinstance(lost, TimeLimitExceeded)
                publish_or_leave(rt, give_back(rt, row, lost=error, its_own_doing=overdue))
        except StoreError as exc:
            logger.warning("giving back waits: message=%s: %s", message, exc)
            return False
        except Exception:
            # It stays claimed by this worker until that ends; retrying a bug for ever helps nobody.
            logger.exception("cannot give back: message=%s", message)
        return True


def lost_child(rt: Runtime, message: Document, exc: BaseException) -> ErrorRecord:
    """What is known of the end of the child that had claimed the message. Raises StoreError."""
    end = End.of_text(str(exc))
    text, kind = f"its process {end}", WORKER_LOST
    if isinstance(exc, TimeLimitExceeded):
        text, kind = f"its process was stopped at the time limit of {exc.args[0]} s", type(exc).__name__
    record = workers.by_ids(rt.store, [message["worker"]]).get(message["worker"], {})
    return worker_lost(
        text,
        type=kind,
        **end.as_dict(),
        pid=process_id(message["process"]),
        worker=message["worker"],
        host=socket.gethostname(),
        # Of the worker with all its children, as it was at its last sign of life.
        worker_rss_bytes=record.get("rss_bytes"),
        alone=False,
    )


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


class StageConsumer(Consumer):  # type: ignore[misc]  # Celery ships no types
    """Celery's consumer, without what does not fit, and keeping what it would drop."""

    class Blueprint(Consumer.Blueprint):  # type: ignore[misc]
        """Celery's steps without two of them.

        Delayed delivery warns of our exchange, and nothing waits in the broker. Gossip tells every worker of every
        other's heartbeats, which the store knows better; under gevent it kept workers from stopping.
        """

        default_steps: ClassVar[list[str]] = [
            step for step in Consumer.Blueprint.default_steps if not step.endswith((":DelayedDelivery", ":Gossip"))
        ]

    def on_decode_error(self, message: Any, exc: BaseException) -> None:
        """Celery acknowledges what it cannot decode; rejected, it goes to the parked queue."""
        logger.error("parked: a message that cannot be decoded: %s", exc)
        message.reject(requeue=False)


@control_command(name=COMMAND, args=[("version", int)])  # type: ignore[untyped-decorator]  # Celery ships no types
def hear(state: Any, version: int) -> dict[str, Any]:  # noqa: ARG001 - the signature is Celery's
    """What `announce` says to every worker: from here on its processes go by the flags of that version."""
    shared = Follow.process.shared
    shared.version = max(shared.version, version)
    return {"ok": shared.version}


class Follow(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """Consumes the queues that the worker should, as they come and go."""

    requires = ("celery.worker.consumer.tasks:Tasks",)
    #: Set by the composition root.
    process: WorkerProcess

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        queues = consumer.app.amqp.queues
        named = queues._consume_from
        process = self.process
        process.tune(consumer)
        process.selection = Selection(None if named is None else list(named), process.pipelines)
        if named is None:
            process.selection.others = {consumer.app.conf.task_default_queue}
        # "Nothing of ours yet": what is consumed is decided here, again and again.
        queues._consume_from = {name: queues[name] for name in process.selection.others}
        self._timer: Any = None

    def start(self, consumer: Any) -> None:
        """Declare the queues to begin with; Celery starts consuming them when its loop runs."""
        self.process.up(consumer)
        # Before anything is consumed: what is rejected while nobody declared its place would be dropped.
        parked_queue(self.process.runtime().settings.queue_type)(consumer.task_consumer.channel).declare()
        self._sync(consumer, started=False)
        self._timer = consumer.timer.call_repeatedly(FOLLOW_S, consumer.call_soon, (self._sync, consumer))

    def stop(self, consumer: Any) -> None:  # noqa: ARG002 - the signature is Celery's
        """Before a reconnect, and at the end."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def shutdown(self, consumer: Any) -> None:
        """Celery's name for the last stop."""
        self.stop(consumer)

    def _sync(self, consumer: Any, started: bool = True) -> None:
        lifeline = self.process.lifeline
        if consumer.task_consumer is None or lifeline is None:
            return
        wanted = self.process.selection.wanted(lifeline.partitions) if lifeline.healthy else set()
        queue_type = self.process.runtime().settings.queue_type
        have = {q.name for q in consumer.task_consumer.queues} - self.process.selection.others
        for name in sorted(wanted - have):
            self._add(consumer, named_queue(name, queue_type), started)
        for name in sorted(have - wanted):
            consumer.cancel_task_queue(name)

    def _add(self, consumer: Any, stage_queue: Queue, started: bool) -> None:
        queues = consumer.app.amqp.queues
        queues.add(stage_queue)
        if started:
            consumer.add_task_queue(stage_queue.name)
        else:
            # Only declared: before the loop runs, a delivery would find no callback and end the worker.
            consumer.task_consumer.add_queue(stage_queue)
        # What a reconnect begins with.
        queues._consume_from[stage_queue.name] = stage_queue
