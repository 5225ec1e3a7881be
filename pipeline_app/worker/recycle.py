"""Recycling: a worker stops warmly and begins anew in the same process id, with the same command line and log.

Handlers leak, and a handler that runs past its time limit in a pool of threads cannot be ended: a new process image
has neither. `celery worker` takes `--max-jobs`, `--max-age` and `--max-memory`; the step `Recycle` watches them. A slot
that is lost to a handler that does not end is given up here, too.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from celery import Celery, bootsteps
from celery.bin.base import CeleryOption
from celery.worker import state as worker_state

from pipeline_app.domain.recycling import LIMITS, LOOK_S, Limit
from pipeline_app.errors import StoreError, UsageError
from pipeline_app.flow import alone_process
from pipeline_app.flow.board import Board
from pipeline_app.store import workers
from pipeline_app.store.client import Store
from pipeline_app.worker.ending import end_children
from pipeline_app.worker.lifeline import memory_of_tree
from pipeline_app.worker.options import GROUP
from pipeline_app.worker.process import WorkerProcess
from pipeline_app.worker.stopping import How

logger = logging.getLogger(__name__)

#: A worker recycles up to this share of `--max-age` earlier: those that were started together do not all go at once.
EARLIER = 0.1


class Recycling:
    """How this worker's process begins anew. Made before the pool is forked."""

    def __init__(self, process: WorkerProcess, board: Board) -> None:
        self._process = process
        self._board = board
        self._main = os.getpid()
        self._command = command_again(sys.executable, sys.orig_argv, os.getcwd())
        self._environment = dict(os.environ)
        self._lock = threading.Lock()
        self._begun = False
        #: Messages whose handlers run although they were recorded.
        self._stuck: set[str] = set()
        # Registered before what a worker's end needs, and so called after that.
        atexit.register(self._at_exit)

    def start(self, *, max_jobs: int | None, max_age_s: float | None, max_memory: int | None) -> None:
        """Watch these limits, in a thread."""
        if max_jobs is None and max_age_s is None and max_memory is None:
            return
        age_s = None if max_age_s is None else max_age_s * (1 - EARLIER * random.random())  # noqa: S311
        born_at = time.monotonic()

        def reason() -> str | None:
            jobs = self._board.jobs
            if max_jobs is not None and jobs >= max_jobs:
                return f"it has run {jobs} jobs"
            if age_s is not None and time.monotonic() - born_at >= age_s:
                return f"it is {time.monotonic() - born_at:.0f} s old"
            # Not before it was of use: one that needs more from the start would do nothing else.
            if max_memory is not None and jobs and (now := memory_of_tree()) > max_memory:
                return f"it has {now / 1e6:,.0f} MB"
            return None

        threading.Thread(target=self._watch, args=(reason,), name="pipeline-recycle", daemon=True).start()

    def _watch(self, reason: Callable[[], str | None]) -> None:
        while not self._begun:
            time.sleep(LOOK_S)
            found = reason()
            if found is not None:
                self._begin(found)

    def _begin(self, reason: str) -> None:
        """Stop warmly, to begin anew, unless the worker stops already."""
        with self._lock:
            if self._begun or self._process.shared.stopping:
                return
            self._begun = True
        logger.warning("recycling, %s: worker=%s", reason, self._process.shared.incarnation)
        lifeline = self._process.lifeline
        if lifeline is not None:
            lifeline.each_second.append(self._heed)
        self._process.stopping.drain()

    def _heed(self, store: Store) -> None:
        """Whoever asks this worker by its record to stop asks for more than we do. Raises StoreError."""
        stopping = self._process.stopping
        if not stopping.is_asked and workers.stop_wanted(store, self._process.shared.incarnation) is not None:
            stopping.ask(How.WARM)

    def give_up_slot(self, message: str) -> None:
        """A handler runs past its time limit; what it ran for is recorded.

        A child of a pool ends, with what its handler started, and the pool makes another. A pool of another kind cannot
        end it: the worker recycles as soon as what else it runs has ended, or has had its time to.
        """
        if os.getpid() != self._main:
            end_children()
            os.kill(os.getpid(), signal.SIGKILL)
        with self._lock:
            first = not self._stuck
            self._stuck.add(message)
        if first:
            threading.Thread(target=self._abandon, name="pipeline-abandon", daemon=True).start()

    def _abandon(self) -> None:
        self._begin("a handler runs past its time limit")
        ends_at = time.monotonic() + self._patience_s()
        while self._runs() and time.monotonic() < ends_at:
            time.sleep(0.05)
        try:
            self._process.leave_now()
        except Exception:
            # A worker that neither works nor ends would be worse than a lease that has to end.
            logger.exception("leaving")
        end_children()
        self._end()

    def _patience_s(self) -> float:
        return float(self._process.runtime().app.conf.worker_soft_shutdown_timeout)

    def _runs(self) -> bool:
        """Whether handlers run that are not stuck."""
        try:
            return any(request.id not in self._stuck for request in tuple(worker_state.active_requests))
        except RuntimeError:  # it changed while we looked
            return True

    def _at_exit(self) -> None:
        """The worker has stopped, and all that belongs to its end was done."""
        if self._begun and os.getpid() == self._main:
            alone_process.end_nursery()
            self._end()

    def _end(self) -> None:
        """Begin anew, or end if somebody wants that."""
        # One of the two threads that may come here does it, and neither comes back.
        self._lock.acquire()
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            # Nobody may be there to read it.
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        # The signal last: it may come while the store is asked.
        if not self._begun or self._is_to_stop() or self._process.stopping.is_asked:
            os._exit(0)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        try:
            os.execve(sys.executable, self._command, self._environment)  # noqa: S606 - what we were started with
        finally:  # it came back: let whoever watches over us start another
            os._exit(1)

    def _is_to_stop(self) -> bool:
        rt = self._process.runtime()
        try:
            return workers.stop_wanted(rt.store, self._process.shared.incarnation) is not None
        except StoreError:
            return False


def command_again(python: str, argv: list[str], folder: str) -> list[str]:
    """The command line to begin anew with. `--workdir` was obeyed already, so it is where we are."""
    command = [python, *argv[1:]]
    for number, word in enumerate(command):
        if word == "--workdir" and number + 1 < len(command):
            command[number + 1] = folder
        elif word.startswith("--workdir="):
            command[number] = f"--workdir={folder}"
    return command


class Recycle(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """Celery's step that hands the options of the command line to `Recycling`."""

    requires = ("celery.worker.components:Pool",)
    #: Set by the composition root.
    recycling: Recycling

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._limits = {
            "max_jobs": options.get("max_jobs"),
            "max_age_s": options.get("max_age"),
            "max_memory": options.get("max_memory"),
        }

    def start(self, worker: Any) -> None:  # noqa: ARG002 - the signature is Celery's
        """The pool is there."""
        self.recycling.start(**self._limits)

    def stop(self, worker: Any) -> None:
        """Nothing is to be stopped."""


def add_recycling_options(app: Celery) -> None:
    """Let `celery worker` of this app take `--max-jobs`, `--max-age` and `--max-memory`."""

    def option(limit: Limit) -> Any:
        def callback(ctx: Any, param: Any, value: str | None) -> Any:
            try:
                return None if value is None else limit.read(value)
            except (UsageError, ValueError) as exc:
                param.type.fail(str(exc), param, ctx)

        return CeleryOption([limit.option], metavar=limit.metavar, help=limit.help, help_group=GROUP, callback=callback)

    app.user_options["worker"].update(map(option, LIMITS))
