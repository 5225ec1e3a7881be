"""A process that has imported the application once, and forks a process for each job that is run alone.

`alone_process.py` starts it for a worker's process and asks it for births. A fork of it is safe where one of the worker
is not: it has one thread, no connection, no lock that anybody holds. It ends with its worker, or when nobody has asked
for long; what it forked ends with it.

A birth is one packet with four descriptors: the new process's channel (see `alone_child.py`), its line, its standard
output and error. The process says its pid on the line, the nursery says how it ended, and until the worker's end of the
line is closed the pid belongs to nobody else: it is reaped only then.
"""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline_app.domain.pipeline import load_pipeline
from pipeline_app.flow.alone_child import serve
from pipeline_app.store.encoding import from_bytes

#: What it says once it has imported the application: that it may be asked, or that its forks would not be safe.
READY, UNFIT = b"+", b"-"
#: It ends when it has had nothing to do for this long.
IDLE_S = 60.0
#: How often it looks whether its worker is still there. (The end of the control socket says so at once, unless what a
#: handler started holds it open.)
LOOK_S = 1.0
#: No packet is longer: the application's search path, or the path of a folder.
PACKET = 1 << 18
#: Bytes of a pid or of an exit code on the line.
NUMBER = 8


def number(value: int) -> bytes:
    """A pid or an exit code as it is said on the line."""
    return value.to_bytes(NUMBER, "little", signed=True)


def main() -> None:
    """Import the application, then fork when asked to."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    control.setblocking(True)  # a worker with gevent makes all its sockets otherwise
    _import(from_bytes(control.recv(PACKET)))
    if threading.active_count() > 1:
        control.send(UNFIT)
        return
    gc.freeze()  # collecting what was imported would copy its pages into every fork
    control.send(READY)
    _Nursery(control).run()


def _import(application: Mapping[str, Any]) -> None:
    sys.path[:] = application["sys_path"]
    for path in application["pipelines"]:
        # What is wrong with it the job's own process says: there it is evidence.
        with contextlib.suppress(Exception):
            load_pipeline(path, Path(application["root"]))


class _Nursery:
    """Births, and what became of them."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        #: The line of each process that is not reaped.
        self._lines: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ, self._birth)
        self._woken, wake = os.pipe()
        self._wake = wake
        self._worker = os.getppid()
        for end in (self._woken, wake):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._selector.register(self._woken, selectors.EVENT_READ, self._ends)

    def run(self) -> None:
        """Until the worker ends, or needs nobody for long."""
        idle_since = time.monotonic()
        # Not by a signal at the parent's end: Linux takes the end of the thread that started us for it.
        while os.getppid() == self._worker and time.monotonic() - idle_since < IDLE_S:
            for key, _ in self._selector.select(LOOK_S):
                key.data()
            if self._lines:
                idle_since = time.monotonic()
        self._end()

    def _birth(self) -> None:
        folder, fds, _, _ = socket.recv_fds(self._control, PACKET, 4)
        if not folder:
            self._end()
        channel, line = (socket.socket(fileno=fd) for fd in fds[:2])
        try:
            pid = os.fork()
        except OSError as exc:
            line.send(number(-(exc.errno or 1)))
            pid = -1
        if pid == 0:
            self._live(os.fsdecode(folder), channel, line, fds[2:])
        channel.close()
        for fd in fds[2:]:
            os.close(fd)
        if pid < 0:
            line.close()
            return
        self._lines[pid] = line
        self._selector.register(line, selectors.EVENT_READ, lambda: self._reap(pid))

    def _end(self) -> None:
        for pid in self._lines:
            _end_group(pid)
        os._exit(0)

    def _live(self, folder: str, channel: socket.socket, line: socket.socket, outputs: list[int]) -> None:
        """In the new process: become one that only the worker knows, and run the job."""
        try:
            # A handler that signals its process group must not reach the worker.
            os.setsid()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._forget()
            for fd, own in zip(outputs, (1, 2), strict=True):
                os.dup2(fd, own)
                os.close(fd)
            os.chdir(folder)
            line.send(number(os.getpid()))
            line.close()
            serve(channel)
        finally:
            os._exit(1)

    def _forget(self) -> None:
        self._selector.close()
        self._control.close()
        os.close(self._woken)
        os.close(self._wake)
        for line in self._lines.values():
            line.close()

    def _ends(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._woken, 4096)
        for pid, line in self._lines.items():
            # Not reaped: its pid must stay its own for as long as the worker may send it a signal.
            end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if end is not None:
                code = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
                with contextlib.suppress(OSError):  # said before, or nobody listens
                    line.send(number(code), socket.MSG_DONTWAIT)

    def _reap(self, pid: int) -> None:
        """The worker has closed the line: it knows enough, or has ended."""
        line = self._lines.pop(pid)
        self._selector.unregister(line)
        line.close()
        # If it has ended, what it started and left is its own business, or the worker has ended that.
        if os.waitpid(pid, os.WNOHANG) == (0, 0):
            _end_group(pid)
            os.waitpid(pid, 0)


def _end_group(pid: int) -> None:
    """End a process that is not reaped, and what it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
