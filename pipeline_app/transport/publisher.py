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
from kombu.exceptions import KombuError, OperationalError
from kombu.serialization import dumps

from pipeline_app.errors import BrokerError
from pipeline_app.settings import redact
from pipeline_app.transport.topology import parked_queue

#: The broker answers within this, or the connection is given up.
ANSWER_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 3.0
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
            if not isinstance(exc, _client_errors(self._app.connection_for_write())):
                raise
            raise broker_error(self.address, exc) from exc

    def broadcast(self, command: str, arguments: dict[str, Any], *, answers: int, timeout_s: float) -> int:
        """Tell all workers by Celery's remote control; returns how many of `answers` came within the time.

        Raises BrokerError.
        """
        # A connection of its own: the app's pool would be the first to hang on a broker that is gone.
        options = {"max_retries": 0, "read_timeout": ANSWER_TIMEOUT_S, "write_timeout": ANSWER_TIMEOUT_S}
        with Connection(self._url, connect_timeout=CONNECT_TIMEOUT_S, transport_options=options) as connection:
            try:
                found = self._app.control.broadcast(
                    command,
                    arguments=arguments,
                    connection=connection,
                    reply=answers > 0,
                    limit=answers or None,
                    timeout=timeout_s,
                )
            except Exception as exc:
                if not isinstance(exc, _client_errors(connection)):
                    raise
                raise broker_error(self.address, exc) from exc
        return len(found or ())

    def ping(self) -> None:
        """Connect. Raises BrokerError within seconds if the broker does not answer."""
        with self._lock, self._guarded():
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
            raise BrokerError(f"the broker has no queue for {len(self._returned)} messages ({self._returned[0]})")

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
            connection = Connection(
                self._url,
                connect_timeout=CONNECT_TIMEOUT_S,
                heartbeat=0,
                transport_options={}
                if not self._confirms
                else {"read_timeout": ANSWER_TIMEOUT_S, "write_timeout": ANSWER_TIMEOUT_S, "max_retries": 0},
            )
            self._connection = connection
            connection.connect()
            self._channel = connection.channel()
            parked_queue(self._queue_type)(self._channel).declare()
            if self._confirms:
                self._channel.confirm_select()
                self._channel.events["basic_ack"].add(self._on_ack)
                self._channel.events["basic_nack"].add(self._on_nack)
                self._channel.events["basic_return"].add(self._on_return)
        return self._channel

    def _declare(self, channel: Any, queue: Queue) -> None:
        if queue.name not in self._declared:
            queue(channel).declare()
            self._declared.add(queue.name)

    def _on_ack(self, tag: int, multiple: bool) -> None:
        self._settle(tag, multiple)

    def _on_nack(self, tag: int, multiple: bool) -> None:
        self._settle(tag, multiple)
        raise OperationalError("the broker refused a message (queue full, or a node went down)")

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
            known = _client_errors(self._connection)
            self._drop()
            if not isinstance(exc, known):
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


def _client_errors(connection: Connection | None) -> tuple[type[BaseException], ...]:
    """What the broker's client raises because of the broker; everything else is a bug."""
    known: tuple[type[BaseException], ...] = (OSError, KombuError)
    return known if connection is None else (*known, *connection.connection_errors, *connection.channel_errors)


def broker_error(address: str, exc: BaseException) -> BrokerError:
    """What happened at the broker, in words that say what to do."""
    text = redact(str(exc)) or type(exc).__name__
    if getattr(exc, "reply_code", None) == 406:
        return BrokerError(
            f"RabbitMQ at {address} has a queue that was declared otherwise: {text}",
            hint="set queue_type to what it is, or delete the queue: the sweep publishes its messages again",
        )
    return BrokerError(
        f"RabbitMQ at {address} does not answer: {text}",
        hint="check AMQP_URL, or start local services with: pipeline-app up",
    )
