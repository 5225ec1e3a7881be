"""A TCP proxy before a real service: it cuts, freezes, or loses single answers, as networks do.

`Proxy` knows nothing of what it carries. `MongoProxy` reads the commands that go by, so that a test can act between two
of them: lose the answer to the third update, or kill the client right before its commit.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any, Literal
from urllib.parse import urlsplit

import bson

#: Commands that change something.
WRITES = frozenset({"insert", "update", "delete", "findAndModify", "commitTransaction"})

When = Literal["before", "after"]
#: Asked about each command before it is passed on, and again before its answer is; true ends the connection instead.
Hook = Callable[[When, dict[str, Any]], bool]


class Proxy:
    """Listens on a port of its own and carries everything to `url`'s host and port."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self._target = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._open = threading.Event()
        self._open.set()
        self._flows = threading.Event()
        self._flows.set()
        #: Everything that goes through is held up for as long.
        self.delay_s = 0.0
        threading.Thread(target=self._accept, daemon=True).start()

    def address(self, url: str) -> str:
        """`url` by way of this proxy."""
        parts = urlsplit(url)
        user = f"{parts.username}:{parts.password}@" if parts.username else ""
        return parts._replace(netloc=f"{user}127.0.0.1:{self.port}").geturl()

    def cut(self) -> None:
        """The service is gone: connections end, new ones are refused."""
        self._open.clear()
        self._drop_all()

    def restore(self) -> None:
        """The service is back, and as fast as ever."""
        self.delay_s = 0.0
        self._open.set()
        self._flows.set()

    def freeze(self) -> None:
        """The service is silent: connections stay, and nothing goes through them."""
        self._flows.clear()

    @property
    def is_away(self) -> bool:
        """Whether it is cut or frozen."""
        return not (self._open.is_set() and self._flows.is_set())

    def close(self) -> None:
        """End all."""
        self._flows.set()
        self._listener.close()
        self._drop_all()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if not self._open.is_set():
                _end(client)
                continue
            try:
                server = socket.create_connection(self._target)
            except OSError:
                _end(client)
                continue
            with self._lock:
                self._sockets |= {client, server}
            self._carry_both_ways(client, server)

    def _carry_both_ways(self, client: socket.socket, server: socket.socket) -> None:
        for source, sink in ((client, server), (server, client)):
            threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._hold_up()
                sink.sendall(data)
        self._drop(source, sink)

    def _hold_up(self) -> None:
        self._flows.wait()
        if self.delay_s:
            time.sleep(self.delay_s)

    def _drop(self, *sockets: socket.socket) -> None:
        with self._lock:
            self._sockets -= set(sockets)
        for one in sockets:
            _end(one)

    def _drop_all(self) -> None:
        with self._lock:
            sockets = list(self._sockets)
        self._drop(*sockets)


class MongoProxy(Proxy):
    """A proxy that reads MongoDB's commands."""

    def __init__(self, url: str) -> None:
        self.hook: Hook = lambda when, command: False
        #: Whether the server seems to be in an election to those who say hello: neither primary nor secondary.
        self.is_electing = False
        #: Names under which clients said hello.
        self.clients: set[str] = set()
        super().__init__(url)

    def address(self, url: str) -> str:
        """`url` by way of this proxy; the replica set's own address would lead around it."""
        return super().address(url).partition("?")[0] + "?directConnection=true"

    def lose_answers(self, name: str, collection: str | None = None, times: int = 1) -> None:
        """The next `times` commands of that name are carried out, and their client never hears of it."""
        left = [times]

        def hook(when: When, command: dict[str, Any]) -> bool:
            fits = name in command and collection in (None, command[name])
            if when == "before" or not fits or not left[0]:
                return False
            left[0] -= 1
            return True

        self.hook = hook

    def cut_in_transaction(self) -> None:
        """The next transaction writes, and the service is gone before the client hears of it: it stays open."""

        def hook(when: When, command: dict[str, Any]) -> bool:
            if when == "before" or "autocommit" not in command or WRITES.isdisjoint(command):
                return False
            self.hook = lambda when, command: False
            self.cut()
            return True

        self.hook = hook

    def _carry_both_ways(self, client: socket.socket, server: socket.socket) -> None:
        asked: dict[int, dict[str, Any]] = {}
        for arguments in ((client, server, asked, "before"), (server, client, asked, "after")):
            threading.Thread(target=self._carry_messages, args=arguments, daemon=True).start()

    def _carry_messages(
        self, source: socket.socket, sink: socket.socket, asked: dict[int, dict[str, Any]], when: When
    ) -> None:
        with contextlib.suppress(OSError):
            while message := _read_message(source):
                self._hold_up()
                request, answers = struct.unpack_from("<ii", message, 4)
                if when == "before":
                    command = asked[request] = _command(message)
                    self._note_client(command)
                else:
                    command = asked.pop(answers, {})
                if command and self.hook(when, command):
                    break
                if self.is_electing:
                    # As long as before, in OP_MSG and in OP_REPLY.
                    for says in (b"\x08isWritablePrimary\0", b"\x08ismaster\0"):
                        message = message.replace(says + b"\1", says + b"\0")
                sink.sendall(message)
        self._drop(source, sink)

    def _note_client(self, command: dict[str, Any]) -> None:
        name = command.get("client", {}).get("application", {}).get("name")
        if name is not None:
            self.clients.add(name)


def _read_message(source: socket.socket) -> bytes:
    head = read_exactly(source, 4)
    return head + read_exactly(source, struct.unpack("<i", head)[0] - 4) if head else b""


def read_exactly(source: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = source.recv(size - len(data))
        if not piece:
            return b""
        data += piece
    return bytes(data)


def _command(message: bytes) -> dict[str, Any]:
    """The command in an OP_MSG; of the first OP_QUERY that a driver may say hello with, nothing."""
    if struct.unpack_from("<i", message, 12)[0] != 2013:
        return {}
    length = struct.unpack_from("<i", message, 21)[0]
    return dict(bson.decode(message[21 : 21 + length]))


def _end(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
