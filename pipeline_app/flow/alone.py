"""Run one job's handler in a process of its own, which may die without taking anything with it.

Called by handle for suspects: jobs whose process died after their handler had started, so that nobody knows which job
of a chunk, or of a whole worker, it was. Alone, the one whose process dies again is found with evidence, and the others
go on. It is no fork of the worker: forks of a process with threads or greenlets hang (see `alone_process.py`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from types import TracebackType
from typing import Any

import psutil

from pipeline_app import settings
from pipeline_app.domain import evidence
from pipeline_app.domain.job import Job
from pipeline_app.domain.outcome import ErrorRecord
from pipeline_app.domain.pipeline import Stage
from pipeline_app.domain.states import DeadKind
from pipeline_app.errors import RateLimited
from pipeline_app.flow import alone_process
from pipeline_app.flow.alone_child import BEGUN, is_whole
from pipeline_app.flow.claim import Work
from pipeline_app.flow.deadline import time_limit_error
from pipeline_app.runtime import Runtime
from pipeline_app.store.client import Document
from pipeline_app.store.encoding import encoded, from_bytes, to_bytes

logger = logging.getLogger(__name__)

#: How often the process's memory is looked at.
SAMPLE_S = 0.1

_CRASH = b"Fatal Python error"
_PIECE = 1 << 20


class FailedAloneError(Exception):
    """The handler raised something, in its process; here it is data."""

    def __init__(self, error: ErrorRecord, kind: DeadKind | None) -> None:
        super().__init__(error.message)
        self.error = error
        #: The kind of dead letter that it makes of the job; None if another attempt may mend it.
        self.kind = kind


class RateLimitedAloneError(RateLimited):
    """The handler raised RateLimited, in its process."""

    def __init__(self, error: ErrorRecord, **limits: Any) -> None:
        super().__init__(**limits)
        self.error = error


class LostAloneError(Exception):
    """The process ended while the handler ran."""

    def __init__(self, error: ErrorRecord) -> None:
        super().__init__(error.message)
        self.error = error


class _OverdueError(Exception):
    """The handler runs longer than it may."""


def run(rt: Runtime, work: Work, stage: Stage, job: Job) -> Any:
    """The encoded output of the job's handler, as `execute` gives it. What the handler spent is added to `job.spent`.

    Raises FailedAloneError and RateLimitedAloneError for what the handler raised; LostAloneError; OSError if no process
    can be started. Whatever else is raised in this thread meanwhile ends the process, too.
    """
    application = _application(rt)
    request = to_bytes({**application, **_request(rt, work, stage, job)})
    try:
        with _Child(application) as child:
            said = child.ask(request, stage.time_limit_s)
    except _OverdueError:
        assert stage.time_limit_s is not None
        raise FailedAloneError(time_limit_error(stage.time_limit_s), None) from None
    if not (said.startswith(BEGUN) and is_whole(memoryview(said)[1:])):
        raise _lost(rt, job, child, said)
    answer = from_bytes(said[1:])
    for unit, amount in answer["spent"].items():
        job.spend(amount, unit)
    if "error" not in answer:
        return encoded(answer["output"])
    error = ErrorRecord(**answer["error"])
    if "limits" in answer:
        raise RateLimitedAloneError(error, **answer["limits"])
    raise FailedAloneError(error, None if answer["kind"] is None else DeadKind(answer["kind"]))


def _application(rt: Runtime) -> Document:
    """What has to be imported, and from where."""
    root = str(settings.project_root())
    return {
        "root": root,
        # Celery's own command takes the project's folder off its path again once it has found the app there.
        "sys_path": [root, *(path for path in sys.path if isinstance(path, str))],
        "pipelines": list(rt.settings.pipelines),
    }


def _request(rt: Runtime, work: Work, stage: Stage, job: Job) -> Document:
    return {
        "log_level": logging.getLogger().getEffectiveLevel(),
        "broker": _broker(rt),
        "pipeline": work.plan.pipeline,
        "handler": stage.handler.path,
        "soft_time_limit_s": stage.soft_time_limit_s,
        "message": work.message,
        "input": work.inputs[job.id],
        "job": {
            "id": job.id,
            "run": job.run,
            "stage": job.stage,
            "tags": dict(job.tags),
            "attempt": job.attempt,
            "key": job.key,
        },
    }


def _broker(rt: Runtime) -> Document:
    """Celery's settings of the broker, for handlers that send tasks of their own; celeryconfig.py says the rest."""
    options = rt.app.conf.broker_transport_options or {}
    plain = {name: value for name, value in options.items() if isinstance(value, (bool, int, float, str))}
    return {"url": rt.settings.amqp_url, "options": plain}


def _lost(rt: Runtime, job: Job, child: _Child, said: bytes) -> Exception:
    """What to raise for a process that ended without an answer; before its handler began that is no loss."""
    end = evidence.End.of_code(child.code)
    begun = said.startswith(BEGUN)
    last_words = said.removeprefix(BEGUN)
    error = evidence.worker_lost(
        f"its process {end}" if begun else f"its process {end} before the handler began",
        traceback=last_words.decode(errors="replace") if last_words.startswith(_CRASH) else "",
        **end.as_dict(),
        pid=child.process.pid,
        worker=rt.incarnation(),
        host=socket.gethostname(),
        rss_bytes=child.rss_bytes,
        peak_rss_bytes=child.peak_rss_bytes,
        alone=True,
    )
    logger.warning("a job alone: %s: job=%s stage=%s run=%s", error.message, job.id, job.stage, job.run)
    return LostAloneError(error) if begun else FailedAloneError(error, None)


class _Child:
    """The process and our end of its channel. It is gone when the block is left, however that is."""

    def __init__(self, application: Document) -> None:
        self.process, self._channel = alone_process.start(application)
        self._memory = psutil.Process(self.process.pid)
        self.answered = False
        #: How it ended, as subprocess has it; known when the block is left.
        self.code = 0
        #: Resident memory when it was looked at last, and at most.
        self.rss_bytes = self.peak_rss_bytes = 0
        self._began_at: float | None = None

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        # Having answered it ends by itself; the handler's threads cannot delay it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # It leads a group of its own: what its handler started ends with it, unless it answered.
            if self.answered:
                self.process.kill()
            else:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.code = self.process.wait()
        self.process.close()
        self._channel.close()

    def ask(self, request: bytes, time_limit_s: float | None) -> bytes:
        """All that the child says after it was given the request: its answer, or what came before its end.

        Raises _OverdueError if there is neither so long after its handler began; its start does not count.
        """
        said = bytearray()
        try:
            self._channel.sendall(request)
            self._channel.settimeout(SAMPLE_S)
            while not is_whole(memoryview(said)[1:]):
                ended = self.process.poll() is not None
                self._sample()
                self._check_time(said, time_limit_s)
                try:
                    piece = self._channel.recv(_PIECE)
                except TimeoutError:
                    if ended:  # what the handler forked holds the channel open
                        break
                    continue
                if not piece:
                    break
                said += piece
        except ConnectionError:  # it ended without having read all
            pass
        self.answered = is_whole(memoryview(said)[1:])
        while not self.answered:
            # A handler that closes files that are not its own may close the channel; it is not lost for that yet.
            try:
                self.process.wait(SAMPLE_S)
                break
            except subprocess.TimeoutExpired:
                self._sample()
                self._check_time(said, time_limit_s)
        return bytes(said)

    def _check_time(self, said: bytes | bytearray, time_limit_s: float | None) -> None:
        if self._began_at is None and said.startswith(BEGUN):
            self._began_at = time.monotonic()
        if self._began_at is None or time_limit_s is None:
            return
        if time.monotonic() - self._began_at > time_limit_s:
            raise _OverdueError

    def _sample(self) -> None:
        try:
            self.rss_bytes = self._memory.memory_info().rss or self.rss_bytes
        except psutil.Error:  # it has ended
            return
        self.peak_rss_bytes = max(self.peak_rss_bytes, self.rss_bytes)
