"""Handlers that may run at once in one process, where its pool itself is not the bound. Used by consume."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Whoever waits for a slot looks this often whether it is still worth waiting.
LOOK_S = 0.2


class Slots:
    """So many slots; without a number whoever comes has one."""

    def __init__(self, number: int | None) -> None:
        self._free = threading.Semaphore(number) if number else None

    @contextmanager
    def one(self, *, unless: Callable[[], bool]) -> Iterator[bool]:
        """A slot for as long as the block lasts. False if `unless` came true before there was one."""
        if self._free is None:
            yield not unless()
            return
        while not unless():
            if self._free.acquire(timeout=LOOK_S):
                break
        else:
            yield False
            return
        try:
            yield not unless()
        finally:
            self._free.release()
