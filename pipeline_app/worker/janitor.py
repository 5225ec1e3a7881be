"""What the main process does for children that were lost and messages that were revoked: gives their claims back."""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections.abc import Callable

from celery.exceptions import TimeLimitExceeded

from pipeline_app.domain.evidence import WORKER_LOST, End, worker_lost
from pipeline_app.domain.outcome import ErrorRecord
from pipeline_app.errors import StoreError
from pipeline_app.flow.forward import publish_or_leave
from pipeline_app.flow.give_back import give_back, take_open
from pipeline_app.runtime import Runtime, process_id
from pipeline_app.store import messages, workers
from pipeline_app.store.client import Document

logger = logging.getLogger(__name__)


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
