"""Services of a test that let nobody in without TLS or a password, and users as docs/security.md makes them."""

from __future__ import annotations

import json
import os
import re
import shlex
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import trustme
from pymongo import MongoClient
from pymongo.errors import PyMongoError

from pipeline_app.local import files, mongod, processes, rabbitmq
from tests.project import REPOSITORY
from tests.services import TestServices

DOCUMENT = (REPOSITORY / "docs" / "security.md").read_text()

#: What the administrator of a mongod with passwords is called, and its password.
ADMIN, ADMIN_PASSWORD = "admin", "admin-secret"


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Files of an authority and of what it signed, for 127.0.0.1 and for a client."""

    authority: Path
    #: Certificate, its key, and both in one file as mongod wants them.
    certificate: Path
    key: Path
    both: Path


def make_keys(folder: Path, *names: str) -> Keys:
    """An authority of its own and a certificate for `names` that it signed."""
    folder.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA()
    leaf = authority.issue_cert(*names)
    keys = Keys(
        authority=folder / "ca.pem", certificate=folder / "cert.pem", key=folder / "key.pem", both=folder / "both.pem"
    )
    authority.cert_pem.write_to_path(keys.authority)
    leaf.cert_chain_pems[0].write_to_path(keys.certificate)
    leaf.private_key_pem.write_to_path(keys.key)
    leaf.private_key_and_cert_chain_pem.write_to_path(keys.both)
    return keys


@contextmanager
def tls_rabbitmq(folder: Path, keys: Keys, *, client_certificates: bool = False) -> Iterator[int]:
    """The port of a RabbitMQ node that speaks nothing but TLS (and asks its clients for certificates)."""
    state_dir = folder / ".pipeline"
    files.make_state_dir(state_dir)
    (state_dir / rabbitmq.NAME).mkdir()
    port = processes.free_port(None)
    verify = "verify_peer" if client_certificates else "verify_none"
    options = [
        f'{{cacertfile,"{keys.authority}"}}',
        f'{{certfile,"{keys.certificate}"}}',
        f'{{keyfile,"{keys.key}"}}',
        f"{{verify,{verify}}}",
        f"{{fail_if_no_peer_cert,{str(client_certificates).lower()}}}",
    ]
    (state_dir / rabbitmq.NAME / "advanced.config").write_text(
        f'[{{rabbit,[{{ssl_listeners,[{{"127.0.0.1",{port}}}]}},{{ssl_options,[{",".join(options)}]}}]}}].\n'
    )
    service = rabbitmq.start(state_dir, threading.Event())
    try:
        # It had to be there for the start to see that the node is ready.
        rabbitmq.ctl(state_dir, "eval", f"rabbit_networking:stop_tcp_listener({{{{127,0,0,1}},{service.port}}}).")
        yield port
    finally:
        rabbitmq.stop(state_dir, service)


@contextmanager
def tls_mongod(folder: Path, keys: Keys) -> Iterator[int]:
    """The port of a mongod that speaks nothing but TLS."""
    options = ["--tlsMode", "requireTLS", "--tlsCertificateKeyFile", keys.both, "--tlsCAFile", keys.authority]
    with _mongod(folder, [*options, "--tlsAllowConnectionsWithoutCertificates"]) as port:
        _make_primary(port, tls=True, tlsCAFile=str(keys.authority))
        yield port


@contextmanager
def guarded_mongod(folder: Path) -> Iterator[int]:
    """The port of a mongod that wants to know who is there; it knows only the administrator."""
    secret = folder / "replica-set.key"
    secret.write_text("bm90LXNlY3JldC1pbi1hLXRlc3Q=\n")
    secret.chmod(0o600)
    with _mongod(folder, ["--auth", "--keyFile", secret]) as port:
        _make_primary(port)
        with MongoClient[dict[str, Any]]("127.0.0.1", port, directConnection=True) as client:
            client.admin.command("createUser", ADMIN, pwd=ADMIN_PASSWORD, roles=["root"])
        yield port


@contextmanager
def _mongod(folder: Path, options: Sequence[str | Path]) -> Iterator[int]:
    state_dir = folder / ".pipeline"
    files.make_state_dir(state_dir)
    data = state_dir / "secured-data"
    data.mkdir()
    port = processes.free_port(None)
    command: list[str | Path] = [mongod.find_binary(state_dir), "--dbpath", data, "--bind_ip", "127.0.0.1"]
    command += ["--port", str(port), "--nounixsocket", "--replSet", mongod.REPLICA_SET, "--oplogSize", "128"]
    command += ["--wiredTigerCacheSizeGB", "0.25", "--quiet", *options]
    record = processes.start("secured-mongod", command, state_dir=state_dir, env=os.environ)
    try:
        yield port
    finally:
        processes.stop([record], grace_s=20.0)


def _make_primary(port: int, **options: Any) -> None:
    """Make it a replica set of one, and wait until it takes writes."""
    deadline = time.monotonic() + 60
    config = {"_id": mongod.REPLICA_SET, "members": [{"_id": 0, "host": f"127.0.0.1:{port}"}]}
    with MongoClient[dict[str, Any]](
        "127.0.0.1", port, directConnection=True, serverSelectionTimeoutMS=60_000, **options
    ) as client:
        client.admin.command("replSetInitiate", config)
        while True:
            try:
                if client.admin.command("hello").get("isWritablePrimary"):
                    return
            except PyMongoError:  # not that far yet
                pass
            assert time.monotonic() < deadline, "mongod did not become a primary"
            time.sleep(0.05)


def fenced(language: str) -> Iterator[str]:
    """Code blocks of the document."""
    return (block[1] for block in re.finditer(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE))


def make_rabbitmq_user(services: TestServices, password: str) -> str:
    """Run the document's commands for RabbitMQ; the new user's address."""
    vhost = user = f"p{os.urandom(4).hex()}"
    commands = [line for block in fenced("sh") for line in block.splitlines() if line.startswith("rabbitmqctl ")]
    assert [shlex.split(command)[1] for command in commands] == ["add_vhost", "add_user", "set_permissions"]
    for command in commands:
        words = [vhost if word == "pipeline" else word.replace("survey", "demo") for word in shlex.split(command)[1:]]
        # It would ask for the password.
        services.rabbitmqctl(*words, *([password] if words[0] == "add_user" else []))
    return f"amqp://{user}:{quote(password, safe='')}@127.0.0.1:{urlsplit(services.amqp_url).port}/{vhost}"


def make_mongodb_user(port: int, password: str) -> str:
    """Make the document's role and a user who has nothing else; the user's address."""
    (block,) = fenced("js")
    role, _ = json.JSONDecoder().raw_decode(block.partition("db.createRole(")[2])
    name = role.pop("role")
    with admin(port) as client:
        client.pipeline_app.command("createRole", name, **role)
        client.pipeline_app.command("createUser", "pipeline", pwd=password, roles=[name])
    return f"mongodb://pipeline:{quote(password, safe='')}@127.0.0.1:{port}/pipeline_app?replicaSet=rs0"


def admin(port: int) -> MongoClient[dict[str, Any]]:
    return MongoClient(f"mongodb://{ADMIN}:{ADMIN_PASSWORD}@127.0.0.1:{port}/admin?directConnection=true")
