"""Confirmed publishing: many messages in flight, and none believed sent before the broker said so.

One publisher for each process, shared by its threads. Who calls: forward (after a record), seeding and the sweep.
Celery's own publishing waits for each confirm by itself (0.9 ms); here a whole chunk's hints share the wait.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from celery import Celery, signals
from kombu import Connection, Queue
from kombu.serialization import dumps

from pipeline_app.errors import BrokerError, QueueRefusedError
from pipeline_app.settings import redact
from pipeline_app.transport.connecting import broker_error, client_errors, connect
from pipeline_app.transport.topology import parked_queue

#: The broker answers within this, or the connection is given up.
ANSWER_TIMEOUT_S = 10.0
#: After a second failed connection in a row nobody tries again for this long, each time twice as long, at most
#: LONGEST_PAUSE_S: whoever publishes meanwhile hears at once that it is away.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 3.0
#: Messages that wait for their confirm at the same time.
IN_FLIGHT = 500


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """One Celery message."""

    queue: Queue
    #: Name of the Celery task.
    task: str
    #: Its id.
    id: str
    args: Sequence[Any]
    #: Signatures of the tasks after it, the next one last, as Celery's protocol has them.
    chain: Sequence[dict[str, Any]] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    #: What logs and Flower show of the arguments.
    shown: str = ""


class Publisher:
    """Publishes to the broker at `url` with confirms; on kombu's MongoDB transport, without them."""

    def __init__(self, app: Celery, url: str, queue_type: str) -> None:
        self.address = redact(url)
        self._app = app
        self._url = url
        self._queue_type = queue_type
        self._confirms = not url.startswith("mongodb")
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._channel: Any = None
        self._declared: set[str] = set()
        self._unconfirmed: dict[int, Envelope] = {}
        self._returned: list[str] = []
        self._next_tag = 1
        #: The last attempt to connect, if it failed; how long the one after the next waits, and the next until when.
        self._away: BrokerError | None = None
        self._pause = 0.0
        self._not_before = 0.0

    def publish(self, envelopes: Sequence[Envelope]) -> None:
        """Publish all and return when the broker has taken responsibility for every one.

        Raises BrokerError; then any of them may be in the broker, and publishing again is harmless.
        """
        if not envelopes:
            return
        with self._lock:
            fresh = self._channel is None
            try:
                self._publish(envelopes)
            except BrokerError:
                # An idle connection may have died unnoticed: that is worth one new connection, but only one.
                if fresh:
                    raise
                self._publish(envelopes)

    def call(self, signature: dict[str, Any], *args: Any, task_id: str, chain: Sequence[dict[str, Any]]) -> None:
        """Send a task of the user's own as Celery would route it, with `args` before the signature's own.

        Raises BrokerError.
        """
        try:
            self._app.signature(signature).apply_async(args, task_id=task_id, chain=list(chain) or None)
        except Exception as exc:
            if not isinstance(exc, client_errors(self._app.connection_for_write())):
                raise
            raise broker_error(self.address, exc) from exc

    def broadcast(self, command: str, arguments: dict[str, Any], *, answers: int, timeout_s: float) -> int:
        """Tell all workers by Celery's remote control; returns how many of `answers` came within the time.

        Raises BrokerError.
        """
        # A connection of its own, for the question as well as for answers: the app's pool, which Celery would ask by,
        # would be the first to hang on a broker that is gone.
        with connect(self._url, max_retries=0, **_time_limits()) as connection:
            mailbox = self._app.control.mailbox(connection)
            mailbox.producer_pool = None
            try:
                found = mailbox._broadcast(
                    command, arguments, reply=answers > 0, timeout=timeout_s, limit=answers or None
                )
            except Exception as exc:
                if not isinstance(exc, client_errors(connection)):
                    raise
                raise broker_error(self.address, exc) from exc
        return len(found or ())

    def ping(self) -> None:
        """Connect. Raises BrokerError within seconds if the broker does not answer."""
        with self._lock, self._guarded():
            self._not_before = 0.0
            self._ready()

    def close(self) -> None:
        """End the connection."""
        with self._lock:
            self._drop()

    def _publish(self, envelopes: Sequence[Envelope]) -> None:
        with self._guarded():
            channel = self._ready()
            for envelope in envelopes:
                self._declare(channel, envelope.queue)
            self._returned.clear()
            for envelope in envelopes:
                self._send(channel, envelope)
                if len(self._unconfirmed) >= IN_FLIGHT:
                    self._await_confirms(IN_FLIGHT // 2)
            self._await_confirms(0)
        if self._returned:
            # The queue was deleted behind our back: forget what we declared, so that the next call makes it again.
            self._drop()
            what = f"{len(self._returned)} messages ({self._returned[0]})"
            raise QueueRefusedError(f"RabbitMQ at {self.address} has no queue for {what}")

    def _send(self, channel: Any, envelope: Envelope) -> None:
        headers, properties, body, _ = self._app.amqp.as_task_v2(
            envelope.id,
            envelope.task,
            args=list(envelope.args),
            kwargs=envelope.kwargs,
            chain=list(envelope.chain) or None,
            argsrepr=envelope.shown or "(...)",
            kwargsrepr="{}",
            ignore_result=True,
        )
        exchange, key = envelope.queue.exchange.name, envelope.queue.routing_key
        announce = {"sender": envelope.task, "body": body, "exchange": exchange, "routing_key": key, "headers": headers}
        signals.before_task_publish.send(properties=properties, declare=[], retry_policy={}, **announce)
        content_type, encoding, payload = dumps(body, serializer="json")
        message = channel.prepare_message(
            payload,
            content_type=content_type,
            content_encoding=encoding,
            headers=headers,
            properties={**properties, "delivery_mode": 2},
            priority=0,
        )
        if self._confirms:
            self._unconfirmed[self._next_tag] = envelope
            self._next_tag += 1
        channel.basic_publish(message, exchange=exchange, routing_key=key, mandatory=True)
        signals.after_task_publish.send(**announce)

    def _await_confirms(self, left: int) -> None:
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while len(self._unconfirmed) > left:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError(f"no confirm within {ANSWER_TIMEOUT_S:.0f} s")
            assert self._connection is not None
            self._connection.drain_events(timeout=remaining)

    def _ready(self) -> Any:
        if self._channel is None:
            self._connection = self._connect()
            self._channel = self._connection.channel()
            parked_queue(self._queue_type)(self._channel).declare()
            if self._confirms:
                self._channel.confirm_select()
                self._channel.events["basic_ack"].add(self._on_ack)
                self._channel.events["basic_nack"].add(self._on_nack)
                self._channel.events["basic_return"].add(self._on_return)
        return self._channel

    def _connect(self) -> Connection:
        if self._away is not None and time.monotonic() < self._not_before:
            raise BrokerError(self._away.message, hint=self._away.hint)
        try:
            connection = connect(self._url, **(_time_limits() if self._confirms else {}))
        except BrokerError as exc:
            # Not the error itself: with its traceback it would keep what was to be published.
            self._away = BrokerError(exc.message, hint=exc.hint)
            self._not_before = time.monotonic() + self._pause
            self._pause = min(max(self._pause * 2, FIRST_PAUSE_S), LONGEST_PAUSE_S)
            raise
        self._away, self._pause = None, 0.0
        return connection

    def _declare(self, channel: Any, queue: Queue) -> None:
        if queue.name not in self._declared:
            queue(channel).declare()
            self._declared.add(queue.name)

    def _on_ack(self, tag: int, multiple: bool) -> None:
        self._settle(tag, multiple)

    def _on_nack(self, tag: int, multiple: bool) -> None:
        self._settle(tag, multiple)
        raise QueueRefusedError(f"RabbitMQ at {self.address} refused a message: its queue is full, or a node went down")

    def _settle(self, tag: int, multiple: bool) -> None:
        if not multiple:
            self._unconfirmed.pop(tag, None)
            return
        # Confirms come in order of tags, and the dictionary is in that order.
        for earlier in [t for t in self._unconfirmed if t <= tag]:
            del self._unconfirmed[earlier]

    def _on_return(self, exc: Exception, exchange: str, routing_key: str, message: Any) -> None:  # noqa: ARG002
        self._returned.append(routing_key)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """The seam: whatever the broker's client raises is a BrokerError, and the connection is not trusted again."""
        try:
            yield
        except Exception as exc:
            known = client_errors(self._connection)
            self._drop()
            if isinstance(exc, BrokerError) or not isinstance(exc, known):
                raise
            raise broker_error(self.address, exc) from exc

    def _drop(self) -> None:
        connection, self._connection, self._channel = self._connection, None, None
        self._declared.clear()
        self._unconfirmed.clear()
        self._next_tag = 1
        if connection is not None:
            # Not close(): that waits for an answer from a broker that may be gone.
            connection.collect(socket_timeout=1)


def _time_limits() -> dict[str, float]:
    """Options of a connection on which nothing waits for ever."""
    return {"read_timeout": ANSWER_TIMEOUT_S, "write_timeout": ANSWER_TIMEOUT_S}
