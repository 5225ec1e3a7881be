"""TLS to RabbitMQ: what an `amqps://` address means, wherever kombu or Celery is given one.

kombu by itself checks that some authority signed the broker's certificate, but not whose certificate it is, and it does
not understand the options in the address of a RabbitMQ. Here the certificate is always checked, for the name of each
address that is tried. Registered with kombu by the package; kombu calls it for every new connection.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kombu.transport import TRANSPORT_ALIASES
from kombu.transport.pyamqp import SSLTransport

from pipeline_app.errors import UsageError

__all__ = ["TlsTransport", "register"]

#: Options in the query of an address, as kombu spells them there -> py-amqp's name.
FILES = {"ssl_ca_certs": "ca_certs", "ssl_certfile": "certfile", "ssl_keyfile": "keyfile"}
NAME = "ssl_server_hostname"


class TlsTransport(SSLTransport):  # type: ignore[misc]  # kombu ships no types
    """py-amqp over TLS, with the broker's name checked."""

    def establish_connection(self) -> Any:
        """Connect. Raises UsageError for options that are not ours to understand."""
        client = self.client
        given, host = client.ssl, client.hostname
        # Without a name there would be none to check.
        client.ssl = options(given if isinstance(given, Mapping) else {}, host or "localhost")
        try:
            return super().establish_connection()
        finally:
            # kombu writes into them, and a copy of this connection may go to another address with another name.
            client.ssl, client.hostname = given, host


def options(given: Mapping[str, Any], host: str) -> dict[str, str]:
    """What py-amqp is to do for an address with these options. Raises UsageError."""
    found: dict[str, str] = {"server_hostname": host}
    for name, value in given.items():
        if name == NAME:
            found["server_hostname"] = str(value)
        elif name in FILES:
            if not Path(value).is_file():
                raise UsageError(f"AMQP_URL names a file that is not there: {name}={value}")
            found[FILES[name]] = str(value)
        else:
            raise UsageError(
                f"AMQP_URL has an option that is not known: {name}",
                hint=f"known are {', '.join([*FILES, NAME])}; a certificate is always checked",
            )
    return found


def register() -> None:
    """Let kombu use this for `amqps://`."""
    TRANSPORT_ALIASES["amqps"] = f"{__name__}:{TlsTransport.__name__}"
