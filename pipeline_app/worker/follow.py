"""Celery's consumer as stages need it: it follows the partitions that come, and takes no more than it can work on.

`Follow` is a bootstep of Celery's consumer: it starts again after every reconnect and, in between, makes the set of
consumed queues what it should be. That is all partitions of the worker's stages, or as many as it can hold messages of
(`rotation.py`); and none while the store is away, every slot is busy with a long handler, or the worker stops.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from celery import bootsteps
from celery.worker import state as worker_state
from celery.worker.consumer import Consumer
from celery.worker.control import control_command

from pipeline_app import settings
from pipeline_app.flow.announce import COMMAND
from pipeline_app.store import messages
from pipeline_app.store.client import Store
from pipeline_app.transport.topology import named_queue, parked_queue
from pipeline_app.worker.consuming import Consuming, snapshot
from pipeline_app.worker.early import Early
from pipeline_app.worker.intake import guard
from pipeline_app.worker.options import selection
from pipeline_app.worker.process import WorkerProcess
from pipeline_app.worker.rotation import Reserved, Rotation
from pipeline_app.worker.stopping import How

logger = logging.getLogger(__name__)

#: How often the consumed queues are compared with what they should be.
FOLLOW_S = 0.2
#: How often a close that pool threads disturbed is tried again.
CLOSE_TRIES = 10


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

    def create_task_handler(self, *args: Any, **options: Any) -> Callable[[Any], None]:
        """What is called with every message."""
        return guard(self, super().create_task_handler(*args, **options))

    def on_close(self) -> Any:
        """Celery's, before a reconnect: asked again if a thread of the pool changes one of its sets meanwhile."""
        for _ in range(CLOSE_TRIES):
            try:
                return super().on_close()
            except RuntimeError as exc:
                logger.info("closing once more: %s", exc)
        return super().on_close()

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


@control_command(name="shutdown")  # type: ignore[untyped-decorator]  # Celery ships no types
def shut_down(state: Any, **_: Any) -> dict[str, Any]:  # noqa: ARG001 - the signature is Celery's
    """`celery control shutdown`: as SIGTERM would, where Celery's own keeps what is reserved to the end."""
    Follow.process.stopping.ask(How.WARM)
    return {"ok": "stopping"}


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
        process.selection = selection(None if named is None else list(named), process.pipelines, options)
        if process.selection.everything:
            process.selection.others = {consumer.app.conf.task_default_queue}
        # What a connection begins with: nothing of ours, which is decided here, again and again.
        queues._consume_from = {name: queues[name] for name in process.selection.others}
        self._early = Early(settings.current().acknowledge_after_s)
        self._rotation = Rotation(consumer.initial_prefetch_count)
        self._consuming: Consuming | None = None
        #: Queues that may be consumed, if they are more than can be at once.
        self._tight: frozenset[str] = frozenset()
        #: Queue -> how much there is to do in it; None if nobody knows.
        self._work: Mapping[str, int] | None = None
        #: Why nothing is consumed; empty if something is.
        self._why_not = ""
        self._timer: Any = None

    def start(self, consumer: Any) -> None:
        """Look at once when Celery's loop runs, and again and again from then on."""
        process = self.process
        if process.lifeline is None:
            process.up(consumer)
            assert process.lifeline is not None
            process.lifeline.each_second += [self._early.ask, process.janitor.look, self._count_work]
        # What was not acknowledged on the connection before is delivered once more; acknowledging is an error now.
        for request in snapshot(worker_state.active_requests):
            request.acknowledged = True
        # Before anything is consumed: what is rejected while nobody declared its place would be dropped.
        parked_queue(process.runtime().settings.queue_type)(consumer.task_consumer.channel).declare()
        self._consuming = Consuming(consumer.task_consumer, is_counted=consumer.qos_global is False)
        queue_type = process.runtime().settings.queue_type
        for name in sorted(process.selection.wanted(process.lifeline.partitions)):
            self._consuming.declare(named_queue(name, queue_type))
        if consumer.hub is None:
            _drain_often(consumer.connection)
        # Not before the loop runs: a delivery would find no callback and end the worker.
        consumer.call_soon(self._sync, consumer)
        self._timer = consumer.timer.call_repeatedly(FOLLOW_S, consumer.call_soon, (self._sync, consumer))

    def stop(self, consumer: Any) -> None:  # noqa: ARG002 - the signature is Celery's
        """Before a reconnect, and at the end."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def shutdown(self, consumer: Any) -> None:
        """Celery's name for the last stop."""
        self.stop(consumer)

    def _sync(self, consumer: Any) -> None:
        process = self.process
        if consumer.task_consumer is None or self._consuming is None:
            return
        backlog = process.backlog
        is_full = self._early.look(snapshot(worker_state.active_requests)) >= process.slots_of(consumer)
        takes_nothing = is_full or process.shared.stopping
        # First the consumers: what goes back would come again.
        self._consume(consumer, takes_nothing)
        self._say(is_full)
        waiting = backlog.waiting()
        stale = self._early.stale(waiting)
        for request in waiting if takes_nothing else stale:
            if backlog.take(request):
                if not takes_nothing:
                    logger.info("waited for too long, going back to its queue: message=%s", request.id)
                worker_state.task_ready(request)
                request.reject(requeue=True)

    def _consume(self, consumer: Any, takes_nothing: bool) -> None:
        assert self._consuming is not None
        assert self.process.lifeline is not None
        self._consume_others(consumer, () if takes_nothing else self.process.selection.others)
        lifeline = self.process.lifeline
        queue_type = self.process.runtime().settings.queue_type
        wanted: set[str] = set()
        if lifeline.healthy and not takes_nothing:
            wanted = self.process.selection.wanted(lifeline.partitions)
        reserved = self._consuming.reserved()
        plan = self._plan(consumer, wanted, reserved)
        changed = [queue for queue, prefetch in reserved.consumed.items() if plan.get(queue) != prefetch]
        self._consuming.end(changed)
        for name, prefetch in plan.items():
            if name not in reserved.consumed or name in changed:
                self._consuming.begin(named_queue(name, queue_type), prefetch)

    def _plan(self, consumer: Any, wanted: set[str], reserved: Reserved) -> dict[str, int]:
        """Queue -> prefetch."""
        share = self._rotation.share
        if consumer.qos_global is not False or not share:
            # The broker counts for all queues together, or is not to count at all.
            return dict.fromkeys(sorted(wanted), share)
        self._tight = frozenset(wanted) if self._rotation.is_tight(len(wanted)) else frozenset()
        return self._rotation.plan(time.monotonic(), wanted, self._work, reserved)

    def _consume_others(self, consumer: Any, names: Iterable[str]) -> None:
        """Queues that are none of ours are all consumed, or none."""
        tasks, queues = consumer.task_consumer, consumer.app.amqp.queues
        for name in self.process.selection.others - set(names):
            tasks.cancel_by_queue(name)
        for name in names:
            if not tasks.consuming_from(name):
                if consumer.qos_global is False:
                    tasks.channel.basic_qos(0, self._rotation.share, False)
                tasks.add_queue(queues[name])
                tasks.consume()

    def _count_work(self, store: Store) -> None:
        """Called each second by the lifeline's thread. Raises StoreError."""
        queues = self._tight
        self._work = messages.open_counts(store, queues, self._rotation.share) if queues else None

    def _say(self, is_full: bool) -> None:
        assert self.process.lifeline is not None
        why_not = ""
        if self.process.shared.stopping:
            why_not = "the worker stops"
        elif not self.process.lifeline.healthy:
            why_not = "the store is away"
        elif is_full:
            why_not = f"every slot is busy for longer than {self._early.after_s:g} s"
        if why_not and why_not != self._why_not:
            logger.info("nothing is consumed: %s", why_not)
        elif self._why_not and not why_not:
            logger.info("consuming goes on")
        self._why_not = why_not


def _drain_often(connection: Any) -> None:
    """Celery's loop for greenlets, and for the embedded broker, waits two seconds for messages before it does more."""
    drain: Callable[..., Any] = connection.drain_events

    def drain_events(timeout: float | None = None, **options: Any) -> Any:
        # What is called between two looks does not tell the loop; kombu would connect anew, without any consumer.
        if not connection.connected:
            raise ConnectionResetError("the connection to the broker is gone")
        return drain(timeout=FOLLOW_S if timeout is None else min(timeout, FOLLOW_S), **options)

    connection.drain_events = drain_events
