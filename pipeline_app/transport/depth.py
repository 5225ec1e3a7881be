"""How many messages are ready in queues and who consumes them, asked by passive declares: needs no plugin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kombu import Connection

from pipeline_app.settings import redact
from pipeline_app.transport.connecting import broker_error, client_errors, connect
from pipeline_app.transport.publisher import ANSWER_TIMEOUT_S


@dataclass(frozen=True, kw_only=True)
class Depth:
    """A queue as the broker sees it."""

    #: Messages that wait for a consumer.
    ready: int
    #: Consumers; None where the broker cannot tell.
    consumers: int | None


def depths(url: str, queues: Sequence[str]) -> dict[str, Depth]:
    """Depth of each queue; one that is not there yet has none of anything.

    Raises BrokerError.
    """
    if not queues:
        return {}
    with connect(url) as connection:
        try:
            if connection.transport.driver_type == "mongodb":
                return _count(connection, queues)
            return _declare_passively(connection, queues)
        except client_errors(connection) as exc:
            raise broker_error(redact(url), exc) from exc


def _count(connection: Connection, queues: Sequence[str]) -> dict[str, Depth]:
    channel = connection.channel()
    try:
        return {name: Depth(ready=channel._size(name), consumers=None) for name in queues}
    finally:
        # kombu leaves its client, and the threads of that, to the garbage collector.
        channel.client.client.close()


def _declare_passively(connection: Connection, queues: Sequence[str]) -> dict[str, Depth]:
    found: dict[str, Depth] = {}
    channel: Any = connection.channel()
    # Bounded by the socket: an answer that does not come within it is an OSError.
    connection.connection.sock.settimeout(ANSWER_TIMEOUT_S)
    for name in queues:
        try:
            _, ready, consumers = channel.queue_declare(name, passive=True)
            found[name] = Depth(ready=ready, consumers=consumers)
        except connection.channel_errors:  # not there; the broker closes the channel over it
            found[name] = Depth(ready=0, consumers=0)
            channel = connection.channel()
    return found
