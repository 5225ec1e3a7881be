"""Starts the processes that jobs are run in alone. Called by `alone.py`.

They are forked by a nursery (`alone_nursery.py`), one for each process of a worker, in some milliseconds. Where that
cannot be (not Linux; an application that starts threads when it is imported, or ends its process) each of them is an
interpreter of its own, which costs the start of Python and the import of the application.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from pipeline_app.flow.alone_nursery import NUMBER, READY
from pipeline_app.store.client import Document
from pipeline_app.store.encoding import to_bytes

logger = logging.getLogger(__name__)

#: A machine that can start no process now is asked again for as long.
START_PATIENCE_S = 30.0
START_PAUSE_S = 0.5

_CHILD = "from pipeline_app.flow.alone_child import main; main()"
_NURSERY = "from pipeline_app.flow.alone_nursery import main; main()"


class Fresh(subprocess.Popen[bytes]):
    """A process that is an interpreter of its own."""

    def close(self) -> None:
        """Nothing is left to close once it was waited for."""


class Forked:
    """A process that the nursery forked. It is kept as a zombie until `close`, so that its pid is its own till then."""

    def __init__(self, pid: int, line: socket.socket) -> None:
        self.pid = pid
        #: As subprocess has it: negative for a signal.
        self.returncode: int | None = None
        self._line = line

    def poll(self) -> int | None:
        """How it ended; None while it lives."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """How it ended. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            self._line.settimeout(timeout)
            try:
                said = self._line.recv(NUMBER)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired("a job alone", timeout or 0) from None
            # A nursery that is gone has taken it along.
            self.returncode = int.from_bytes(said, "little", signed=True) if said else -signal.SIGKILL
        return self.returncode

    def kill(self) -> None:
        """End it, if it has not ended yet."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Let it go; it is ended if it has not ended yet."""
        self._line.close()



Process = Fresh | Forked


def start(application: Document) -> tuple[Process, socket.socket]:
    """A process and our end of its channel. `application` says what it will import: `sys_path`, `root`, `pipelines`.

    Raises OSError if this machine cannot start one for START_PATIENCE_S.
    """
    deadline = time.monotonic() + START_PATIENCE_S
    while True:
        try:
            return _start(application)
        except OSError as exc:
            # Out of memory or processes: that is not this job's doing.
            if time.monotonic() > deadline:
                raise
            logger.warning("cannot start a process for a job alone: %s", exc)
        time.sleep(START_PAUSE_S)


def end_nursery() -> None:
    """Let this process's nursery end, if there is one; the next start makes another."""
    with _lock:
        _forget()


atexit.register(end_nursery)


def _start(application: Document) -> tuple[Process, socket.socket]:
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            forked = _fork(application, theirs) if sys.platform == "linux" else None
            return forked or _fresh(theirs), ours
    except BaseException:
        ours.close()
        raise


def _fresh(channel: socket.socket) -> Fresh:
    return Fresh(
        [sys.executable, "-c", _CHILD, str(channel.fileno())],
        stdin=subprocess.DEVNULL,
        pass_fds=[channel.fileno()],
        # A handler that signals its process group must not reach the worker.
        start_new_session=True,
    )


class _Nursery:
    """The nursery of this process, and what it has imported."""

    def __init__(self, application: bytes) -> None:
        self.application = application
        #: A child of a pool must not ask its parent's.
        self.owner = os.getpid()
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self.process = subprocess.Popen(  # noqa: S603 - our own module
                    [sys.executable, "-c", _NURSERY, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
        except BaseException:
            self.control.close()
            raise
        self.is_fit = self._introduce()

    def _introduce(self) -> bool:
        try:
            self.control.send(self.application)
            return self.control.recv(1) == READY
        except ConnectionError:  # the application ended it
            return False

    def end(self) -> None:
        self.control.close()
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()


_lock = threading.Lock()
_nursery: _Nursery | None = None


def _fork(application: Document, channel: socket.socket) -> Forked | None:
    """A process that the nursery forked; None if it cannot fork for this application. Raises OSError."""
    introduced = to_bytes(application)
    with _lock:
        nursery = _ready(introduced)
        if not nursery.is_fit:
            return None
        try:
            return _birth(nursery, channel)
        except ConnectionError:  # it had ended: it had nothing to do, or somebody killed it
            _forget()
            nursery = _ready(introduced)
            return _birth(nursery, channel) if nursery.is_fit else None


def _ready(application: bytes) -> _Nursery:
    global _nursery
    if _nursery is None or _nursery.owner != os.getpid() or _nursery.application != application:
        _forget()
        _nursery = _Nursery(application)
    return _nursery


def _forget() -> None:
    global _nursery
    if _nursery is not None:
        _nursery.end()
        _nursery = None


def _birth(nursery: _Nursery, channel: socket.socket) -> Forked:
    line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        fds = [channel.fileno(), theirs.fileno(), 1, 2]
        try:
            socket.send_fds(nursery.control, [os.fsencode(os.getcwd())], fds)
        except BaseException:
            line.close()
            raise
    said = line.recv(NUMBER)
    pid = int.from_bytes(said, "little", signed=True)
    if pid > 0:
        return Forked(pid, line)
    line.close()
    if not said:
        raise ConnectionResetError("the nursery has ended")
    raise OSError(-pid, os.strerror(-pid))


