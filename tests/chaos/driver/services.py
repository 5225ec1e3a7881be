"""Services that only one chaos run uses, and may stop: a RabbitMQ node, and a replica set of one mongod or three."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline_app.local import processes, rabbitmq
from tests.clusters import ReplicaSet
from tests.services import TestServices

#: On a machine that is busy with chaos RabbitMQ takes its time.
CTL_S = 300.0


class Store:
    """A replica set."""

    def __init__(self, folder: Path, members: int) -> None:
        #: One fault at a time.
        self.lock = threading.Lock()
        self._set = ReplicaSet(folder, members=members, oplog_mb=512)
        try:
            self._set.start()
        except BaseException:
            self._set.close()
            raise

    @property
    def url(self) -> str:
        """Address for clients, of all members."""
        return self._set.url

    def step_down(self) -> None:
        """The primary hands over to another member."""
        self._set.step_down()

    @contextmanager
    def primary_killed(self) -> Iterator[None]:
        """The primary is gone without a word, for as long as this lasts."""
        primary = self._set.primary()
        primary.kill()
        try:
            yield
        finally:
            self._set.start_member(primary)
            self._set.primary()

    @contextmanager
    def killed(self) -> Iterator[None]:
        """All members are gone without a word, for as long as this lasts."""
        for member in self._set.members:
            member.kill()
        try:
            yield
        finally:
            for member in self._set.members:
                self._set.start_member(member)
            self._set.primary()

    def close(self) -> None:
        """End it."""
        self._set.close()


class Broker:
    """A RabbitMQ node."""

    def __init__(self, folder: Path) -> None:
        #: One fault at a time.
        self.lock = threading.Lock()
        self._state_dir = folder
        (folder / "logs").mkdir(parents=True)
        self.url = rabbitmq.url(self._start())

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Its application is stopped, in good order, for as long as this lasts."""
        self._ctl("stop_app")
        try:
            yield
        finally:
            self._ctl("start_app")

    @contextmanager
    def killed(self) -> Iterator[None]:
        """The node is gone without a word, for as long as this lasts."""
        self._end(grace_s=0)
        try:
            yield
        finally:
            self._start()

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Every queue is full: publishes are refused."""
        full = '{"max-length":1,"overflow":"reject-publish"}'
        self._ctl("set_policy", "--apply-to", "queues", "full", ".*", full)
        try:
            yield
        finally:
            self._ctl("clear_policy", "full")

    @contextmanager
    def blocking(self) -> Iterator[None]:
        """It is out of memory, as it believes: whoever publishes waits."""
        self._ctl("set_vm_memory_high_watermark", "0.000001")
        try:
            yield
        finally:
            self._ctl("set_vm_memory_high_watermark", "0.4")

    def close(self) -> None:
        """End it."""
        self._end(grace_s=10)

    def _start(self) -> int:
        return rabbitmq.start(self._state_dir, threading.Event()).port

    def _ctl(self, *arguments: str) -> None:
        rabbitmq.ctl(self._state_dir, *arguments, timeout_s=CTL_S)

    def _end(self, *, grace_s: float) -> None:
        for name in rabbitmq.PROCESSES:
            processes.stop_marked(self._state_dir, name, grace_s=grace_s)


class Services:
    """Both."""

    def __init__(self, folder: Path, *, members: int) -> None:
        self.folder = folder
        self.store = Store(folder / "store", members)
        try:
            self.broker = Broker(folder / ".pipeline")
        except BaseException:
            self.store.close()
            raise

    @property
    def addresses(self) -> TestServices:
        """As projects of tests are given them."""
        return TestServices(amqp_url=self.broker.url, mongodb_url=self.store.url, folder=self.folder)

    def close(self) -> None:
        """End both."""
        self.broker.close()
        self.store.close()


@contextmanager
def own_services(folder: Path, *, members: int = 1) -> Iterator[Services]:
    """Services in `folder`, until the end."""
    made = Services(folder, members=members)
    try:
        yield made
    finally:
        made.close()
