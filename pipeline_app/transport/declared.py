"""Whether queues and exchanges that are there were declared as we declare them. Only asked by `control/check/`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kombu import Connection, Exchange

from pipeline_app.errors import BrokerError
from pipeline_app.settings import redact
from pipeline_app.transport.connecting import broker_error, client_errors, connect
from pipeline_app.transport.publisher import ANSWER_TIMEOUT_S
from pipeline_app.transport.topology import (
    EXCHANGE,
    PARKED_EXCHANGE,
    Queue,
    idle_queue,
    named_queue,
    parked_queue,
)

#: RabbitMQ's code for what is not there.
_NOT_FOUND = 404
#: And for what is there, with other arguments.
_OTHERWISE = 406


def declared_otherwise(url: str, queue_type: str, names: Sequence[str]) -> dict[str, str]:
    """Our queues of these names and our exchanges that are otherwise -> what RabbitMQ says; makes nothing.

    Raises BrokerError.
    """
    queues = [*(named_queue(name, queue_type) for name in names), idle_queue(queue_type), parked_queue(queue_type)]
    with connect(url) as connection:
        try:
            connection.connection.sock.settimeout(ANSWER_TIMEOUT_S)
            return dict(_differing(connection, [EXCHANGE, PARKED_EXCHANGE, *queues]))
        except client_errors(connection) as exc:
            raise broker_error(redact(url), exc) from exc


def server_version(url: str) -> str | None:
    """RabbitMQ's version; None if the broker does not say. Raises BrokerError."""
    with connect(url) as connection:
        properties: dict[str, Any] = getattr(connection.connection, "server_properties", {})
        found = properties.get("version")
        return found.decode() if isinstance(found, bytes) else found


def _differing(connection: Connection, entities: Sequence[Exchange | Queue]) -> Iterator[tuple[str, str]]:
    for entity in entities:
        # First whether it is there: a question must not make it.
        refusal = _refusal(connection, entity, passive=True) or _refusal(connection, entity, passive=False)
        if refusal is None or refusal[0] == _NOT_FOUND:
            continue
        if refusal[0] != _OTHERWISE:
            raise BrokerError(f"RabbitMQ does not let us look at {entity.name}: {refusal[1]}")
        yield entity.name, refusal[1]


def _refusal(connection: Connection, entity: Exchange | Queue, *, passive: bool) -> tuple[int, str] | None:
    """Code and text with which RabbitMQ refuses a declaration, None if it does not."""
    channel = connection.channel()
    try:
        bound = entity(channel)
        if isinstance(entity, Exchange):
            bound.declare(passive=passive)
        else:
            bound.queue_declare(passive=passive)
    except connection.channel_errors as exc:  # it closes the channel over a refusal
        return int(getattr(exc, "reply_code", 0) or 0), str(getattr(exc, "reply_text", exc))
    channel.close()
    return None
