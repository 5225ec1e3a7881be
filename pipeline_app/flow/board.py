"""What the children of a worker's pool tell their main process without being asked: memory that they share.

A child that is stuck in code that lets no other thread run cannot end itself when its handler's time is over, and tells
nobody anything any more. So each writes down, before a handler starts, which one that is and until when it may run; the
main process reads that (`worker/overtime.py`). Each also counts the jobs that it has run (`worker/recycle.py`).

Made before the pool is forked. A row has one writer: the child that has its number in the pool, or the main process.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray

from billiard.process import current_process

#: Rows of the board; children beyond are not seen.
ROWS = 1024


class _Row(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_int),
        ("position", ctypes.c_int),
        ("message", ctypes.c_char * 32),
        ("until", ctypes.c_double),
        ("jobs", ctypes.c_longlong),
    )


@dataclass(frozen=True)
class Overdue:
    """A handler in a child that runs although its time is over."""

    pid: int
    message: str
    #: Which of the message's jobs it runs for.
    position: int
    #: When its time was over, by the machine's monotonic clock.
    since: float


class Board:
    """The memory, and this process's row of it."""

    def __init__(self) -> None:
        self._rows = RawArray(_Row, ROWS)
        self._main = os.getpid()
        self._lock = threading.Lock()

    @property
    def jobs(self) -> int:
        """How many jobs' handlers the worker has run, in all its processes."""
        return sum(row.jobs for row in self._rows)

    def count(self, jobs: int) -> None:
        """So many more handlers have run in this process."""
        row = self._own()
        if row is not None:
            with self._lock:
                row.jobs += jobs

    def begins(self, message: str, position: int, seconds: float) -> None:
        """A child's handler starts, and may run for so long."""
        row = self._own()
        if row is None or os.getpid() == self._main:
            return  # the main process looks after its own handlers
        row.until = 0.0
        row.pid, row.position, row.message = os.getpid(), position, message.encode()
        # Last: what the main process finds with it belongs to it.
        row.until = time.monotonic() + seconds

    def ends(self) -> None:
        """The handler has ended, or its process deals with it by itself."""
        row = self._own()
        if row is not None:
            row.until = 0.0

    def overdue(self) -> list[Overdue]:
        """Handlers in children that run although their time is over."""
        now = time.monotonic()
        found = []
        for row in self._rows:
            until = row.until
            if 0.0 < until < now:
                one = Overdue(row.pid, row.message.decode(), row.position, until)
                if row.until == until:  # else it went on while we read
                    found.append(one)
        return found

    def clear(self, one: Overdue) -> None:
        """That child was ended, and tells nothing any more."""
        for row in self._rows:
            if (row.pid, row.until) == (one.pid, one.since):
                row.until = 0.0

    def _own(self) -> _Row | None:
        number = 0 if os.getpid() == self._main else getattr(current_process(), "index", ROWS) + 1
        return self._rows[number] if number < ROWS else None
