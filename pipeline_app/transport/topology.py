"""Queues and exchanges, computed in one place only: RabbitMQ refuses a queue that is declared in two ways.

Every stage has a queue for each partition, all on one direct exchange. What a worker rejects goes through a fanout
exchange into one queue, where an operator finds it: nothing that arrives in our queues is dropped.
"""

from __future__ import annotations

from typing import Any

from kombu import Exchange, Queue

from pipeline_app.domain.partition import queue_name

__all__ = ["HintRouter", "Queue", "idle_queue", "named_queue", "parked_queue", "plain_queue", "stage_queue"]

EXCHANGE = Exchange("pipeline_app", "direct", durable=True)
PARKED_EXCHANGE = Exchange("pipeline_app.parked", "fanout", durable=True)

#: Where a worker that has nothing to consume yet is connected; nothing is ever published to it.
IDLE_QUEUE = "pipeline_app.idle"


def stage_queue(pipeline: str, stage: str, partition: str, queue_type: str) -> Queue:
    """The queue of a stage's partition."""
    return named_queue(queue_name(pipeline, stage, partition), queue_type)


def named_queue(name: str, queue_type: str) -> Queue:
    """The queue of that name, with the arguments that all of ours have."""
    return Queue(
        name,
        EXCHANGE,
        routing_key=name,
        durable=True,
        queue_arguments={"x-queue-type": queue_type, "x-dead-letter-exchange": PARKED_EXCHANGE.name},
    )


def parked_queue(queue_type: str) -> Queue:
    """Where rejected messages are kept."""
    return Queue(PARKED_EXCHANGE.name, PARKED_EXCHANGE, durable=True, queue_arguments={"x-queue-type": queue_type})


def idle_queue(queue_type: str) -> Queue:
    """A queue that exists for its kind only.

    A worker that knows a quorum queue turns global QoS off at its start; doing it later costs it the connection.
    """
    arguments = {"x-queue-type": queue_type}
    return Queue(IDLE_QUEUE, EXCHANGE, routing_key=IDLE_QUEUE, durable=True, queue_arguments=arguments)


def plain_queue(name: str, queue_type: str) -> Queue:
    """A queue as Celery makes it, for tasks that are not stages: other applications declare it, too, in their way."""
    return Queue(name, queue_arguments={"x-queue-type": queue_type} if queue_type == "quorum" else None)


class HintRouter:
    """A Celery router: sends a stage's task to the queue that its hint names by stage and partition."""

    def __init__(self, queue_type: str, tasks: dict[str, tuple[str, str]]) -> None:
        self._queue_type = queue_type
        #: Task name -> (pipeline, stage).
        self._tasks = tasks

    def __call__(
        self,
        name: str,
        args: Any,
        kwargs: Any,  # noqa: ARG002 - the signature is Celery's
        options: Any,  # noqa: ARG002
        task: Any = None,  # noqa: ARG002
        **more: Any,  # noqa: ARG002
    ) -> dict[str, Any] | None:
        """The queue for a message of a stage; None for tasks that are not stages."""
        known = self._tasks.get(name)
        if known is None:
            return None
        hint = args[0] if args and isinstance(args[0], dict) else {}
        queue = stage_queue(*known, str(hint.get("partition", "default")), self._queue_type)
        return {"queue": queue, "mandatory": True}
