"""Celery's consumer as stages need it: it follows the partitions that come, and pauses while the store is away.

`Follow` is a bootstep of Celery's consumer: it starts again after every reconnect and, in between, makes the set of
consumed queues what it should be: all partitions of the worker's stages, or none while the store is away.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from celery import bootsteps
from celery.worker.consumer import Consumer
from celery.worker.control import control_command

from pipeline_app.flow.announce import COMMAND
from pipeline_app.transport.topology import Queue, named_queue, parked_queue
from pipeline_app.worker.process import WorkerProcess
from pipeline_app.worker.selection import Selection

logger = logging.getLogger(__name__)

#: How often the consumed queues are compared with what they should be.
FOLLOW_S = 1.0


class StageConsumer(Consumer):  # type: ignore[misc]  # Celery ships no types
    """Celery's consumer, without what does not fit, and keeping what it would drop."""

    class Blueprint(Consumer.Blueprint):  # type: ignore[misc]
        """Celery's steps without two of them.

        Delayed delivery warns of our exchange, and nothing waits in the broker. Gossip tells every worker of every
        other's heartbeats, which the store knows better; under gevent it kept workers from stopping.
        """

        default_steps: ClassVar[list[str]] = [
            step for step in Consumer.Blueprint.default_steps if not step.endswith((":DelayedDelivery", ":Gossip"))
        ]

    def on_decode_error(self, message: Any, exc: BaseException) -> None:
        """Celery acknowledges what it cannot decode; rejected, it goes to the parked queue."""
        logger.error("parked: a message that cannot be decoded: %s", exc)
        message.reject(requeue=False)


@control_command(name=COMMAND, args=[("version", int)])  # type: ignore[untyped-decorator]  # Celery ships no types
def hear(state: Any, version: int) -> dict[str, Any]:  # noqa: ARG001 - the signature is Celery's
    """What `announce` says to every worker: from here on its processes go by the flags of that version."""
    shared = Follow.process.shared
    shared.version = max(shared.version, version)
    return {"ok": shared.version}


class Follow(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """Consumes the queues that the worker should, as they come and go."""

    requires = ("celery.worker.consumer.tasks:Tasks",)
    #: Set by the composition root.
    process: WorkerProcess

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        queues = consumer.app.amqp.queues
        named = queues._consume_from
        process = self.process
        process.tune(consumer)
        process.selection = Selection(None if named is None else list(named), process.pipelines)
        if named is None:
            process.selection.others = {consumer.app.conf.task_default_queue}
        # "Nothing of ours yet": what is consumed is decided here, again and again.
        queues._consume_from = {name: queues[name] for name in process.selection.others}
        self._timer: Any = None

    def start(self, consumer: Any) -> None:
        """Declare the queues to begin with; Celery starts consuming them when its loop runs."""
        self.process.up(consumer)
        # Before anything is consumed: what is rejected while nobody declared its place would be dropped.
        parked_queue(self.process.runtime().settings.queue_type)(consumer.task_consumer.channel).declare()
        self._sync(consumer, started=False)
        self._timer = consumer.timer.call_repeatedly(FOLLOW_S, consumer.call_soon, (self._sync, consumer))

    def stop(self, consumer: Any) -> None:  # noqa: ARG002 - the signature is Celery's
        """Before a reconnect, and at the end."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def shutdown(self, consumer: Any) -> None:
        """Celery's name for the last stop."""
        self.stop(consumer)

    def _sync(self, consumer: Any, started: bool = True) -> None:
        lifeline = self.process.lifeline
        if consumer.task_consumer is None or lifeline is None:
            return
        wanted = self.process.selection.wanted(lifeline.partitions) if lifeline.healthy else set()
        queue_type = self.process.runtime().settings.queue_type
        have = {q.name for q in consumer.task_consumer.queues} - self.process.selection.others
        for name in sorted(wanted - have):
            self._add(consumer, named_queue(name, queue_type), started)
        for name in sorted(have - wanted):
            consumer.cancel_task_queue(name)

    def _add(self, consumer: Any, stage_queue: Queue, started: bool) -> None:
        queues = consumer.app.amqp.queues
        queues.add(stage_queue)
        if started:
            consumer.add_task_queue(stage_queue.name)
        else:
            # Only declared: before the loop runs, a delivery would find no callback and end the worker.
            consumer.task_consumer.add_queue(stage_queue)
        # What a reconnect begins with.
        queues._consume_from[stage_queue.name] = stage_queue
