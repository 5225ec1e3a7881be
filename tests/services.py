"""Real services for tests: one RabbitMQ node and one mongod for all test workers, started once, stopped by the last.

A test worker has a virtual host of its own, a test a database of its own.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline_app.local import rabbitmq, services


@dataclass(frozen=True, kw_only=True)
class TestServices:
    """Addresses for one test worker."""

    __test__ = False

    #: A virtual host that only this test worker uses.
    amqp_url: str
    #: Without a database: `database_url` adds one.
    mongodb_url: str
    folder: Path

    def database_url(self) -> str:
        """A database that nobody has used."""
        base, _, options = self.mongodb_url.partition("?")
        return f"{base.rsplit('/', 1)[0]}/t_{uuid.uuid4().hex[:12]}?{options}"

    def rabbitmqctl(self, *arguments: str) -> str:
        """What rabbitmqctl says of the node."""
        return rabbitmq.ctl(self.folder / ".pipeline", *arguments)

    def new_vhost(self) -> str:
        """The URL of a fresh virtual host."""
        return _add_vhost(self.folder, self.amqp_url.rsplit("/", 1)[0])


@contextmanager
def shared_services(folder: Path) -> Iterator[TestServices]:
    """The services in `folder`, shared with every other process that asks for the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    here = os.getcwd()
    with _counted(folder) as first, _inside(folder):
        found = services.up(broker="rabbitmq") if first else None
        urls = json.loads((folder / ".pipeline" / "services.json").read_text())
        assert found is None or found.amqp_url == urls["amqp_url"]
    try:
        yield TestServices(
            amqp_url=_add_vhost(folder, urls["amqp_url"]), mongodb_url=urls["mongodb_url"], folder=folder
        )
    finally:
        os.chdir(here)
        with _uncounted(folder) as last, _inside(folder):
            if last:
                services.down()


def _add_vhost(folder: Path, url: str) -> str:
    name = f"t_{uuid.uuid4().hex[:8]}"
    state_dir = folder / ".pipeline"
    rabbitmq.ctl(state_dir, "add_vhost", name)
    rabbitmq.ctl(state_dir, "set_permissions", "-p", name, "guest", ".*", ".*", ".*")
    return f"{url.rstrip('/')}/{name}"


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """The project's folder is the current one; no test runs in this process meanwhile."""
    here = os.getcwd()
    (folder / "celeryconfig.py").touch()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


@contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder / "users"


@contextmanager
def _counted(folder: Path) -> Iterator[bool]:
    """One more user; true for the first."""
    with _locked(folder) as users:
        number = int(users.read_text()) if users.exists() else 0
        yield number == 0
        users.write_text(str(number + 1))


@contextmanager
def _uncounted(folder: Path) -> Iterator[bool]:
    """One user less; true for the last."""
    with _locked(folder) as users:
        number = int(users.read_text()) - 1
        users.write_text(str(number))
        yield number == 0
