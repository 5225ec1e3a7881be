"""TLS to RabbitMQ: what an `amqps://` address means, wherever kombu or Celery is given one.

kombu by itself checks that some authority signed the broker's certificate, but not whose certificate it is, and it does
not understand the options in the address of a RabbitMQ. Here the certificate is always checked, for the name of each
address that is tried. Registered with kombu by the package; kombu calls it for every new connection. The management API
is spoken to by the same rules.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from kombu.transport import TRANSPORT_ALIASES
from kombu.transport.pyamqp import SSLTransport

from pipeline_app.errors import UsageError

__all__ = ["TlsTransport", "options_in", "register", "wrap"]

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


def options_in(address: str) -> dict[str, str]:
    """The options in the query of an `amqps://` address, as kombu reads them."""
    return {name: value for name, value in parse_qsl(urlsplit(address).query) if name.startswith("ssl_")}


def wrap(sock: socket.socket, given: Mapping[str, Any], host: str) -> ssl.SSLSocket:
    """TLS over a connection to this host by these options, as py-amqp does it for AMQP.

    Raises UsageError for options that are not ours to understand, UnicodeError for a name that is none, OSError.
    """
    found = options(given, host)
    # Before anything else: wrapping takes the socket over, and leaves it open if it cannot read the name.
    found["server_hostname"].encode("idna")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if "certfile" in found:
        context.load_cert_chain(found["certfile"], found.get("keyfile"))
    if "ca_certs" in found:
        context.load_verify_locations(found["ca_certs"])
    else:
        context.load_default_certs()
    return context.wrap_socket(sock, server_hostname=found["server_hostname"])


def register() -> None:
    """Let kombu use this for `amqps://`."""
    TRANSPORT_ALIASES["amqps"] = f"{__name__}:{TlsTransport.__name__}"
