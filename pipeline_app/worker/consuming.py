"""The AMQP side of what a worker consumes: begins and ends consumers, and knows what they brought. For `follow.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from celery.worker import state as worker_state

from pipeline_app.transport.topology import Queue
from pipeline_app.worker.rotation import Reserved


def snapshot(requests: Any) -> tuple[Any, ...]:
    """The requests in one of Celery's sets, which threads of its pool change."""
    while True:
        try:
            return tuple(requests)
        except RuntimeError:  # it changed meanwhile
            continue


class Consuming:
    """The consumers of stages' queues on one connection."""

    def __init__(self, tasks: Any, *, is_counted: bool) -> None:
        #: Celery's consumer of all queues.
        self._tasks = tasks
        #: Whether each consumer has a prefetch of its own; else the broker counts for all of them together.
        self._is_counted = is_counted
        #: Queue -> tag of its consumer, and its prefetch.
        self._consumed: dict[str, tuple[str, int]] = {}
        #: Tags of consumers that ended and may have brought what is un-acknowledged.
        self._ended: set[str] = set()
        self._declared: set[str] = set()

    def reserved(self) -> Reserved:
        """What is consumed, and what is un-acknowledged of it."""
        held = Counter(
            request._message.delivery_info.get("consumer_tag")
            for request in snapshot(worker_state.reserved_requests)
            if not request.acknowledged
        )
        self._ended &= held.keys()
        return Reserved(
            consumed={queue: prefetch for queue, (_, prefetch) in self._consumed.items()},
            unacked={queue: held[tag] for queue, (tag, _) in self._consumed.items()},
            elsewhere=sum(held[tag] for tag in self._ended),
        )

    def declare(self, queue: Queue) -> None:
        """Let the queue be there, before anything is consumed from it."""
        queue(self._tasks.channel).declare()
        self._declared.add(queue.name)

    def begin(self, queue: Queue, prefetch: int) -> None:
        """Consume a queue."""
        if self._is_counted:
            self._tasks.channel.basic_qos(0, prefetch, False)
        # Declared once: it takes as many round trips as all the rest.
        queue.no_declare = queue.name in self._declared
        self._tasks.add_queue(queue)
        self._tasks.consume()
        self._declared.add(queue.name)
        self._consumed[queue.name] = (self._tasks._active_tags[queue.name], prefetch)

    def end(self, queues: Iterable[str]) -> None:
        """Consume these no more; what they brought stays."""
        for name in queues:
            self._tasks.cancel_by_queue(name)
            tag, _ = self._consumed.pop(name)
            self._ended.add(tag)
