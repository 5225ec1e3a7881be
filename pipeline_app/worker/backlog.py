"""What a worker has reserved and not started yet, where it can be taken out again and given back.

Celery keeps it out of reach: threads in the queue of their executor, gevent in an event loop that blocks until a slot
is free, and so does not hear that the worker is to stop. So here requests are handed to such a pool one by one. The
prefork pool has a semaphore for the same purpose; its waiting list is used as it is.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from celery.exceptions import TaskRevokedError

THREADS, GEVENT = "celery.concurrency.thread", "celery.concurrency.gevent"


class Backlog:
    """Nothing waits: the solo pool runs what it gets at once, and on the embedded broker little is reserved."""

    def waiting(self) -> list[Any]:
        """Requests that are reserved and not started, first come first."""
        return []

    def take(self, request: Any) -> bool:  # noqa: ARG002 - what the others need
        """Take a request out; False if it was started meanwhile."""
        return False

    def clear(self) -> None:
        """Forget what waits: the connection that it came by is gone. Celery calls this."""


class SemaphoreBacklog(Backlog):
    """What waits for a child of a prefork pool. Used by the event loop only."""

    def __init__(self, semaphore: Any) -> None:
        #: (function, arguments, keywords): the request is the only argument.
        self._waiting: deque[tuple[Any, tuple[Any, ...], Any]] = semaphore._waiting

    def waiting(self) -> list[Any]:
        return [arguments[0] for _, arguments, _ in self._waiting]

    def take(self, request: Any) -> bool:
        for entry in self._waiting:
            if entry[1][0] is request:
                self._waiting.remove(entry)
                return True
        return False


class PoolBacklog(Backlog):
    """Hands requests to a pool of threads or greenlets, at most `limit` at once; the others wait here."""

    def __init__(self, pool: Any, limit: Callable[[], int]) -> None:
        self._pool = pool
        self._limit = limit
        self._lock = threading.Lock()
        self._waiting: deque[Any] = deque()
        self._running = 0

    def put(self, request: Any) -> None:
        """Celery's consumer calls this with every request that it has reserved."""
        with self._lock:
            if self._running >= self._limit():
                self._waiting.append(request)
                return
            self._running += 1
        if not self._start(request):
            self.done()

    def done(self) -> None:
        """A slot is free; called in whatever thread has found that out."""
        while True:
            with self._lock:
                if not self._waiting or self._running > self._limit():
                    self._running -= 1
                    return
                request = self._waiting.popleft()
            if self._start(request):
                return

    def waiting(self) -> list[Any]:
        with self._lock:
            return list(self._waiting)

    def take(self, request: Any) -> bool:
        with self._lock:
            if request not in self._waiting:
                return False
            self._waiting.remove(request)
            return True

    def clear(self) -> None:
        with self._lock:
            self._waiting.clear()

    def _start(self, request: Any) -> bool:
        try:
            request.execute_using_pool(self._pool)
        except TaskRevokedError:
            return False
        return True


def backlog_of(consumer: Any, limit: Callable[[], int]) -> Backlog:
    """The backlog of a worker's pool; from now on the pool is given at most `limit` requests at once.

    To be called before Celery's consumer has prepared its tasks: they remember where requests go.
    """
    pool, controller = consumer.pool, consumer.controller
    kind = type(pool).__module__
    if kind in (THREADS, GEVENT):
        made = PoolBacklog(pool, limit)
        _tell_ends(pool, made.done, greenlets=kind == GEVENT)
        consumer.on_task_request = made.put
        # Celery clears its semaphore when the connection is lost; here it has none.
        controller.semaphore = made
        return made
    if pool.uses_semaphore and controller.semaphore is not None:
        return SemaphoreBacklog(controller.semaphore)
    return Backlog()


def _tell_ends(pool: Any, done: Callable[[], None], *, greenlets: bool) -> None:
    """Call `done` at the end of everything that the pool runs."""
    apply = pool.on_apply

    def apply_and_tell(*arguments: Any, **options: Any) -> Any:
        result = apply(*arguments, **options)
        if greenlets:
            from gevent import spawn  # an extra; whoever uses its pool has it

            # Not in the hub, where a greenlet's end is told: nothing may wait there.
            result.link(lambda _: spawn(done))
        else:
            result.f.add_done_callback(lambda _: done())
        return result

    pool.on_apply = apply_and_tell
