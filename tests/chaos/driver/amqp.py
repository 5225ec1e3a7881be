"""A proxy before RabbitMQ that writes down what a worker acknowledges and publishes, as the store is at that moment.

It stops each acknowledgement and each publish on its way, asks the store about the message, and lets it go on: what is
not durable then was acknowledged or forwarded too early, whatever is recorded later.
"""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pymongo import MongoClient
from pymongo.errors import PyMongoError
from pymongo.read_concern import ReadConcern

from tests.integration.proxy import Proxy, read_exactly

#: What is asked about a message.
FIELDS = {"_id": 0, "state": 1, "worker": 1, "publishes": 1, "claimed_at": 1}

METHOD, HEADER = 1, 2
BASIC = 60
PUBLISH, DELIVER, ACK, REJECT, NACK = 40, 60, 80, 90, 120
#: Properties of a message before its correlation id, in the order of their bits: how each is skipped.
_SHORT_STRING, _TABLE, _OCTET = "s", "t", "o"
_BEFORE_CORRELATION_ID = ((15, _SHORT_STRING), (14, _SHORT_STRING), (13, _TABLE), (12, _OCTET), (11, _OCTET))
_CORRELATION_ID = 10
#: Messages of ours are called so.
_OURS = re.compile(r"[0-9a-f]{24}")


class BrokerWitness:
    """Where all proxies of a run write, and whom they ask."""

    def __init__(self, path: Path, mongodb_url: str) -> None:
        self._client: MongoClient[dict[str, Any]] = MongoClient(
            mongodb_url, tz_aware=True, serverSelectionTimeoutMS=2000
        )
        majority = ReadConcern("majority")  # what is not durable does not count
        self._messages = self._client.get_default_database().get_collection("messages", read_concern=majority)
        self._file = path.open("a")
        self._lock = threading.Lock()

    def note(self, what: str, message: str, **more: Any) -> None:
        """What happens to this message now, and how the store has it. Nothing while the store is away."""
        try:
            row = self._messages.find_one({"_id": message}, FIELDS)
        except PyMongoError:
            return
        if row is not None and "claimed_at" in row:
            row["claimed_at"] = row["claimed_at"].timestamp()
        line = {"what": what, "message": message, "at": time.time(), "row": row, **more}
        with self._lock:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Nothing more is written."""
        self._client.close()
        with self._lock:
            self._file.close()


class AmqpProxy(Proxy):
    """A proxy that reads AMQP's frames."""

    def __init__(self, url: str, witness: BrokerWitness) -> None:
        self._witness = witness
        #: Names the worker behind it, one after the other.
        self.name_worker: Callable[[], str] = lambda: "nobody"
        super().__init__(url)

    def _carry_both_ways(self, client: socket.socket, server: socket.socket) -> None:
        connection = _Connection(self._witness, self.name_worker())
        for source, sink, see in ((client, server, connection.sent), (server, client, connection.received)):
            threading.Thread(target=self._carry_frames, args=(source, sink, see), daemon=True).start()

    def _carry_frames(
        self, source: socket.socket, sink: socket.socket, see: Callable[[int, int, bytes], None]
    ) -> None:
        try:
            while frame := _read_frame(source):
                self._hold_up()
                if frame[:4] != b"AMQP":
                    kind, channel = struct.unpack_from(">BH", frame)
                    see(kind, channel, frame[7:-1])
                sink.sendall(frame)
        except OSError:
            pass
        self._drop(source, sink)


class _Connection:
    """What goes through one connection of a worker."""

    def __init__(self, witness: BrokerWitness, worker: str) -> None:
        self._witness = witness
        self._worker = worker
        # The two directions are read by a thread each.
        self._lock = threading.Lock()
        #: Channels whose next header belongs to a publish.
        self._publishing: set[int] = set()
        #: Channel -> tag and whether it came before, of the delivery whose header comes next.
        self._delivering: dict[int, tuple[int, bool]] = {}
        #: (channel, tag) -> message, and whether it had been delivered before; not answered yet.
        self._open: dict[tuple[int, int], tuple[str, bool]] = {}
        #: Message -> deliveries that are not answered yet.
        self._copies: Counter[str] = Counter()

    def sent(self, kind: int, channel: int, payload: bytes) -> None:
        """A frame of the worker's."""
        if kind == HEADER and channel in self._publishing:
            self._publishing.discard(channel)
            message = _correlation_id(payload)
            if message is not None:
                self._witness.note("publish", message, worker=self._worker)
            return
        method = _basic_method(kind, payload)
        if method == PUBLISH:
            self._publishing.add(channel)
        elif method in (ACK, REJECT, NACK):
            tag = struct.unpack_from(">Q", payload, 4)[0]
            multiple = method != REJECT and bool(payload[12] & 1)
            self._answered(channel, tag, multiple, "ack" if method == ACK else "reject")

    def received(self, kind: int, channel: int, payload: bytes) -> None:
        """A frame for the worker."""
        if _basic_method(kind, payload) == DELIVER:
            at = 5 + payload[4]
            self._delivering[channel] = (struct.unpack_from(">Q", payload, at)[0], bool(payload[at + 8] & 1))
        elif kind == HEADER and channel in self._delivering:
            tag, again = self._delivering.pop(channel)
            message = _correlation_id(payload)
            if message is not None:
                with self._lock:
                    self._open[channel, tag] = (message, again)
                    self._copies[message] += 1

    def _answered(self, channel: int, tag: int, multiple: bool, how: str) -> None:
        with self._lock:
            keys = [key for key in self._open if key[0] == channel and (key[1] == tag or (multiple and key[1] < tag))]
            done = [self._open.pop(key) for key in keys]
            for message, _ in done:
                self._copies[message] -= 1
            left = [self._copies[message] for message, _ in done]
        for (message, again), copies in zip(done, left, strict=True):
            if how == "ack":
                self._witness.note("ack", message, worker=self._worker, again=again, copies=copies)


def _read_frame(source: socket.socket) -> bytes:
    head = read_exactly(source, 7)
    if not head:
        return b""
    if head[:4] == b"AMQP":
        return head + read_exactly(source, 1)
    return head + read_exactly(source, struct.unpack_from(">I", head, 3)[0] + 1)


def _basic_method(kind: int, payload: bytes) -> int | None:
    if kind != METHOD:
        return None
    group, method = struct.unpack_from(">HH", payload)
    return int(method) if group == BASIC else None


def _correlation_id(payload: bytes) -> str | None:
    """Of a content header, if it is the name of a message of ours."""
    flags = struct.unpack_from(">H", payload, 12)[0]
    at = 14
    for bit, kind in _BEFORE_CORRELATION_ID:
        if flags & 1 << bit:
            at += {_SHORT_STRING: 1 + payload[at], _OCTET: 1}.get(kind) or 4 + struct.unpack_from(">I", payload, at)[0]
    if not flags & 1 << _CORRELATION_ID:
        return None
    found = payload[at + 1 : at + 1 + payload[at]].decode(errors="replace")
    return found if _OURS.fullmatch(found) else None
