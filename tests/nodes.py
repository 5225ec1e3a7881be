"""Nodes for pytest-celery that are processes of this machine: a virtual host, a database, workers.

pytest-celery asks little of the "container" that it wraps a node around: name, logs, ready, kill, restart. Used by the
acceptance tests where no Docker answers; where one does, `tests/containers.py` gives them containers.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from celery import Celery
from pytest_celery import CeleryTestSetup, CeleryTestWorker

from tests.project import Project
from tests.services import TestServices
from tests.worker import Worker

#: Starts a worker of a project: arguments of the command line, pool, concurrency.
StartWorker = Callable[["NodeProject", tuple[str, ...], str, int], CeleryTestWorker]


class Local:
    """What pytest-celery's nodes use of a container."""

    status = "running"

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self.id = uuid.uuid4().hex
        self.url = url

    @property
    def celeryconfig(self) -> dict[str, Any]:
        """Its address for workers, and for us."""
        return {"url": self.url, "host_url": self.url}

    def ready(self) -> bool:
        """Whether it serves."""
        return True

    def logs(self) -> str:
        """What it has printed."""
        return ""

    def reload(self) -> None:
        """A container's attributes are read anew; here they always are."""

    def teardown(self) -> None:
        """It stays for the next test, or is removed by whoever used it."""


class VirtualHost(Local):
    """The virtual host that only this process of tests uses."""

    def __init__(self, services: TestServices) -> None:
        super().__init__("rabbitmq", services.amqp_url)
        self._services = services

    def restart(self, timeout: float | None = None) -> None:
        """End every client's connection, as a broker's restart does."""
        vhost = self.url.rpartition("/")[2]
        for line in self._services.rabbitmqctl("list_connections", "pid", "vhost").splitlines():
            pid, _, of = line.partition("\t")
            if of == vhost:
                self._services.rabbitmqctl("close_connection", pid, "restart")


class Database(Local):
    """A fresh database of the tests' MongoDB."""

    def __init__(self, services: TestServices) -> None:
        super().__init__("mongodb", services.database_url())


class ProcessWorker(CeleryTestWorker):  # type: ignore[misc]  # pytest-celery's types do not reach us
    """A worker node whose processes are looked at from here."""

    def get_running_processes_info(
        self, columns: list[str] | None = None, filters: Mapping[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Its main process first, then its children."""
        first = psutil.Process(self.container.process.pid)
        rows = [process.as_dict(columns) for process in (first, *first.children(recursive=True))]
        return [row for row in rows if all(row.get(key) == value for key, value in (filters or {}).items())]


class Setup(CeleryTestSetup):  # type: ignore[misc]  # pytest-celery's types do not reach us
    """Broker, store and worker. The store is pytest-celery's "backend", and keeps no results of Celery."""

    @classmethod
    def config(cls, celery_worker_cluster_config: dict[str, Any]) -> dict[str, Any]:
        """For the app with which tests send tasks of their own."""
        return {"broker_url": celery_worker_cluster_config["celery_broker_cluster_config"]["host_urls"][0]}


class NodeProject(Project):
    """A project whose broker, store and workers are pytest-celery's nodes.

    `node()` is a worker wherever nodes are. `worker()` is a process of this machine, for tests of its pid, its exit
    code and what signals do to it.
    """

    def __init__(
        self, folder: Path, services: TestServices, *, broker: str, store: str, app: Celery, start_worker: StartWorker
    ) -> None:
        super().__init__(folder, services)
        self.amqp_url = broker
        self.mongodb_url = store
        self.app = app
        self._start_worker = start_worker

    @contextmanager
    def node(self, *arguments: str, pool: str = "threads", concurrency: int = 2) -> Iterator[CeleryTestWorker]:
        """A worker node from when it consumes until it was told to stop."""
        node = self._start_worker(self, arguments, pool, concurrency)
        try:
            yield node
        finally:
            node.teardown()


def start_process(project: NodeProject, arguments: tuple[str, ...], pool: str, concurrency: int) -> CeleryTestWorker:
    """A worker node that is a process."""
    worker = Worker(project, arguments, pool, concurrency)
    try:
        worker.wait_ready()
    except BaseException:
        worker.stop()
        raise
    return ProcessWorker(worker, project.app)
