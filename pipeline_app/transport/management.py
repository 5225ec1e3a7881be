"""RabbitMQ's management API, where it is enabled: what AMQP cannot tell, such as the policies that apply to a queue."""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urlsplit

from pipeline_app.errors import BrokerError, UsageError
from pipeline_app.settings import redact
from pipeline_app.transport import tls
from pipeline_app.transport.connecting import addresses

ANSWER_TIMEOUT_S = 5.0
#: Where the API listens unless it was told otherwise, without and with TLS.
PORT, TLS_PORT = 15672, 15671
#: What is asked of a queue; everything would be kilobytes of each.
QUEUE_FIELDS = ("name", "type", "arguments", "policy", "operator_policy", "effective_policy_definition")


class Management:
    """The management API of the broker at `amqp_url`, at `url` if it is given, else where it usually is.

    Over TLS the options of the `amqps://` address with the same host are its options, too: the authorities to believe,
    our own certificate, the broker's name. Elsewhere those of the first such address, but for the name.
    """

    def __init__(self, amqp_url: str, url: str | None = None) -> None:
        own = [urlsplit(address) for address in addresses(amqp_url)]
        #: Host -> options of its address.
        self._tls = {
            address.hostname or "localhost": tls.options_in(address.geturl())
            for address in own
            if address.scheme == "amqps"
        }
        self._user = _user(own[0]) if own else ("guest", "guest")
        self._vhost = unquote(own[0].path[1:]) or "/" if own else "/"
        self._places = [urlsplit(url)] if url else [_usual(address) for address in own]
        if url and self._places[0].username:
            self._user = _user(self._places[0])

    @property
    def address(self) -> str:
        """Where it is asked, without passwords."""
        return ", ".join(redact(place.geturl()) for place in self._places)

    def queues(self) -> list[dict[str, Any]]:
        """Every queue of our virtual host: QUEUE_FIELDS. Raises BrokerError."""
        found = self._get(f"/api/queues/{quote(self._vhost, safe='')}?columns={','.join(QUEUE_FIELDS)}")
        return [dict(row) for row in found]

    def _get(self, path: str) -> Sequence[Any]:
        problem: Exception | None = None
        for place in self._places:
            try:
                return self._get_at(place, path)
            except (OSError, http.client.HTTPException, ValueError, UsageError) as exc:
                problem = exc
        raise BrokerError(
            f"RabbitMQ's management API at {self.address} does not answer: {problem or 'no address'}",
            hint="enable it with: rabbitmq-plugins enable rabbitmq_management, or set PIPELINE_MANAGEMENT_URL",
        )

    def _get_at(self, place: SplitResult, path: str) -> Sequence[Any]:
        host, secure = place.hostname or "localhost", place.scheme == "https"
        port = place.port or (http.client.HTTPS_PORT if secure else http.client.HTTP_PORT)
        connection = http.client.HTTPConnection(host, port, timeout=ANSWER_TIMEOUT_S)
        secret = base64.b64encode(":".join(self._user).encode()).decode()
        try:
            if secure:
                connection.connect()
                connection.sock = tls.wrap(connection.sock, self._options(host), host)
            connection.request("GET", place.path.rstrip("/") + path, headers={"Authorization": f"Basic {secret}"})
            answer = connection.getresponse()
            if answer.status != http.client.OK:
                raise ValueError(f"{answer.status} {answer.reason} (the user needs the tag monitoring)")
            found: Sequence[Any] = json.loads(answer.read())
            return found
        finally:
            connection.close()

    def _options(self, host: str) -> Mapping[str, str]:
        if host in self._tls:
            return self._tls[host]
        first = next(iter(self._tls.values()), {})
        return {name: value for name, value in first.items() if name != tls.NAME}


def _user(address: SplitResult) -> tuple[str, str]:
    return unquote(address.username or "guest"), unquote(address.password or "guest")


def _usual(address: SplitResult) -> SplitResult:
    secure = address.scheme == "amqps"
    host = f"[{address.hostname}]" if ":" in (address.hostname or "") else address.hostname or "localhost"
    return urlsplit(f"{'https' if secure else 'http'}://{host}:{TLS_PORT if secure else PORT}")
