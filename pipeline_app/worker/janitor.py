"""What the main process does for children that were lost and messages that were revoked: gives their claims back.

Mostly the pool says at once that a child was lost. Now and then the janitor also looks by itself for claims of children
that are not there any more: nothing that this worker has claimed waits for its end.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
from celery.exceptions import TimeLimitExceeded, WorkerLostError

from pipeline_app.domain.evidence import WORKER_LOST, End, worker_lost
from pipeline_app.domain.outcome import ErrorRecord
from pipeline_app.errors import StoreError
from pipeline_app.flow.forward import publish_or_leave
from pipeline_app.flow.give_back import give_back, take_open
from pipeline_app.flow.later import AGAIN_S, Later
from pipeline_app.runtime import Runtime, process_id
from pipeline_app.store import messages, workers
from pipeline_app.store.client import Document, Store
from pipeline_app.worker.lifeline import Shared

logger = logging.getLogger(__name__)

#: Pauses between two tries while the store is away.
FIRST_PAUSE_S, LAST_PAUSE_S = 0.2, 5.0
#: Claims of dead children are looked for this often; one that is seen twice was not reported.
LOOK_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """A message that is to be given back."""

    message: str
    #: What became of its child; None if there was none.
    lost: BaseException | None = None
    #: That child, if it is known.
    pid: int | None = None


class Janitor:
    """Gives back messages of lost children, from a thread, so that the main process goes on serving the others."""

    def __init__(self, runtime: Callable[[], Runtime], shared: Shared) -> None:
        self._runtime = runtime
        self._shared = shared
        self._todo: queue.Queue[Task] = queue.Queue()
        self._later = Later()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False
        #: Messages whose children were not there at the last look.
        self._suspects: set[str] = set()
        self._looked_at = time.monotonic()

    def lost(self, message: str, exc: BaseException, pid: int | None) -> None:
        """The child `pid` that ran this message was killed, or exceeded its time."""
        if self._shared.stopping and End.of_text(str(exc)).signal == signal.SIGTERM:
            # Whoever stops a worker may tell all of its processes: one that obeyed is no loss.
            self._add(Task(message=message, pid=pid))
        else:
            self._add(Task(message=message, lost=exc, pid=pid))

    def revoked(self, message: str) -> None:
        """The message's Celery task was revoked: its jobs go on under another id."""
        self._add(Task(message=message))

    def look(self, store: Store) -> None:
        """Find claims of children that died without a word. Called each second; looks less often. Raises StoreError."""
        if time.monotonic() - self._looked_at < LOOK_S:
            return
        self._looked_at = time.monotonic()
        own = self._runtime().process
        rows = messages.claimed(store, worker=self._shared.incarnation)
        dead = {row["_id"]: process_id(row["process"]) for row in rows if row["process"] != own and _is_dead(row)}
        for message in dead.keys() & self._suspects:
            self.lost(message, WorkerLostError("it is not there any more"), dead[message])
        self._suspects = set(dead)

    def drain(self, seconds: float) -> None:
        """Wait until all is given back, at most that long."""
        deadline = time.monotonic() + seconds
        while self._todo.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.05)

    def close(self) -> None:
        """The worker ends its children itself: from here on none of them is a loss."""
        self._closed = True

    def _add(self, task: Task) -> None:
        if self._closed:
            return
        self._todo.put(task)
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pipeline-janitor", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            task = self._todo.get()
            pause = FIRST_PAUSE_S
            while not self._closed and not self._give_back(task):
                time.sleep(pause)
                pause = min(pause * 2, LAST_PAUSE_S)
            self._todo.task_done()

    def _give_back(self, task: Task) -> bool:
        """False if the store is away."""
        try:
            self._give_back_claims(task)
        except StoreError as exc:
            logger.warning("giving back waits: message=%s: %s", task.message, exc)
            return False
        except Exception:
            logger.exception("cannot give back, trying again in %.0f s: message=%s", AGAIN_S, task.message)
            self._later.add(task.message, lambda: self._add(task))
        return True

    def _give_back_claims(self, task: Task) -> None:
        rt = self._runtime()
        rows = messages.claimed(rt.store, _id=task.message, worker=rt.incarnation())
        # A child that was killed before its claim may leave the message to a brother who lives.
        rows = [row for row in rows if task.pid is None or process_id(row["process"]) == task.pid]
        if not rows and task.lost is None and task.pid is None:
            taken = take_open(rt, task.message)
            rows = [taken] if taken else []
        for row in rows:
            error = None if task.lost is None else lost_child(rt, row, task.lost)
            # A child may die for others' doing; the time limit is for this message alone.
            overdue = isinstance(task.lost, TimeLimitExceeded)
            publish_or_leave(rt, give_back(rt, row, lost=error, its_own_doing=overdue))


def _is_dead(row: Document) -> bool:
    """Whether the child that has claimed the message is gone."""
    try:
        process = psutil.Process(process_id(row["process"]))
        return bool(process.ppid() != os.getpid() or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
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
