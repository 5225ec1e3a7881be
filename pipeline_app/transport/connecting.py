"""Connections to a broker that may have several addresses, as the nodes of a cluster have: `amqp://a/;amqp://b/`.

Used by everything of ours that connects by itself; a worker's consumer is connected by Celery, which reads the same
list.
"""

from __future__ import annotations

from typing import Any

from kombu import Connection
from kombu.exceptions import KombuError

from pipeline_app.errors import BrokerError, QueueRefusedError, UsageError
from pipeline_app.settings import redact

#: An address that accepts nothing within this is passed over.
CONNECT_TIMEOUT_S = 3.0

#: List of addresses -> the one of them that answered last.
_answered: dict[str, str] = {}


def addresses(url: str) -> list[str]:
    """The addresses in an AMQP_URL; that of the embedded broker is one, whatever it looks like."""
    if url.startswith("mongodb"):
        return [url]
    return [address for part in url.split(";") if (address := part.strip())]


def connect(url: str, **options: Any) -> Connection:
    """An open connection to the first address that answers; `options` are the transport's.

    The one that answered last is asked first: a node that is off costs CONNECT_TIMEOUT_S, and should cost it once.

    Raises BrokerError; UsageError if the URL names no address, or one that is no broker's.
    """
    first = _answered.get(url)
    problem: BaseException | None = None
    try:
        for address in sorted(addresses(url), key=lambda address: address != first):
            connection = _connection(address, options)
            try:
                # Once: kombu's own connect() would wait two seconds, and try the same address again.
                connection.ensure_connection(max_retries=0, reraise_as_library_errors=False)
            except client_errors(connection) as exc:
                connection.collect(socket_timeout=1)
                problem = exc
                continue
            _answered[url] = address
            return connection
        if problem is None:
            raise UsageError("AMQP_URL names no address")
        raise broker_error(redact(url), problem) from problem
    finally:
        # It leads to this frame: kept in it, the two would be garbage that only the collector finds.
        del problem


def _connection(address: str, options: dict[str, Any]) -> Connection:
    """A connection that is not open yet. Raises UsageError."""
    try:
        connection = Connection(address, connect_timeout=CONNECT_TIMEOUT_S, heartbeat=0, transport_options=options)
        client_errors(connection)
    except (KeyError, ValueError) as exc:
        # What kombu says of a URL that it cannot read may hold a piece of the password.
        known = redact(str(exc)) if isinstance(exc, KeyError) else "it cannot be read"
        raise UsageError(f"AMQP_URL is not a broker's URL: {known}") from None
    return connection


def client_errors(connection: Connection | None) -> tuple[type[BaseException], ...]:
    """What the broker's client raises because of the broker; everything else is a bug."""
    known: tuple[type[BaseException], ...] = (OSError, KombuError)
    return known if connection is None else (*known, *connection.connection_errors, *connection.channel_errors)


def broker_error(address: str, exc: BaseException) -> BrokerError:
    """What happened at the broker, in words that say what to do."""
    text = redact(str(exc)) or type(exc).__name__
    if getattr(exc, "reply_code", None) == 406:
        return QueueRefusedError(
            f"RabbitMQ at {address} has a queue that was declared otherwise: {text}",
            hint="set queue_type to what it is, or delete the queue: the sweep publishes its messages again",
        )
    return BrokerError(
        f"RabbitMQ at {address} does not answer: {text}",
        hint="check AMQP_URL, or start local services with: pipeline-app up",
    )
