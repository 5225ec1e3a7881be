"""Nodes for pytest-celery that are processes of this machine: a virtual host, a database, a worker.

pytest-celery asks little of the "container" that it wraps a node around: name, logs, ready, kill, restart. Used by the
acceptance tests where no Docker answers; where one does, `tests/containers.py` gives them containers.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import celery
import psutil
from pytest_celery import CeleryTestSetup, CeleryTestWorker

from tests.project import Project
from tests.services import TestServices

#: A worker has started or stopped within this, also on a machine that has much to do.
PATIENCE_S = 60.0


class Local:
    """What pytest-celery's nodes use of a container."""

    status = "running"

    def __init__(self, name: str) -> None:
        self.name = name
        self.id = uuid.uuid4().hex

    def ready(self) -> bool:
        """Whether it serves."""
        return True

    def logs(self) -> str:
        """What it has printed."""
        return ""

    def reload(self) -> None:
        """A container's attributes are read anew; here they always are."""

    def teardown(self) -> None:
        """Remove it."""


class VirtualHost(Local):
    """A fresh virtual host of the tests' RabbitMQ: nobody has used this broker before."""

    def __init__(self, services: TestServices) -> None:
        super().__init__("rabbitmq")
        self._services = services
        self.url = services.new_vhost()

    @property
    def celeryconfig(self) -> dict[str, Any]:
        """For the setup's app and for workers."""
        return {"url": self.url, "host_url": self.url}

    def restart(self, timeout: float | None = None) -> None:
        """End every client's connection, as a broker's restart does."""
        vhost = self.url.rpartition("/")[2]
        for line in self._services.rabbitmqctl("list_connections", "pid", "vhost").splitlines():
            pid, _, of = line.partition("\t")
            if of == vhost:
                self._services.rabbitmqctl("close_connection", pid, "restart")

    def teardown(self) -> None:
        """Remove it with all that is in it."""
        self._services.rabbitmqctl("delete_vhost", self.url.rpartition("/")[2])


class Database(Local):
    """A fresh database of the tests' MongoDB; whoever uses it removes it."""

    def __init__(self, services: TestServices) -> None:
        super().__init__("mongodb")
        self.url = services.database_url()

    @property
    def celeryconfig(self) -> dict[str, Any]:
        """It is the store; results are not kept in it."""
        return {"url": self.url, "host_url": self.url}


class WorkerProcess(Local):
    """`celery -A pipeline_app worker` in a project's folder."""

    def __init__(self, project: Project, pool: str = "prefork", concurrency: int = 2) -> None:
        super().__init__("worker")
        self._project = project
        self._log = project.folder / "node.log"
        self._command = [
            *(
                sys.executable,
                "-m",
                "celery",
                "-A",
                "pipeline_app",
                "worker",
                "-n",
                f"{self.worker_name()}@{self.id[:12]}",
            ),
            *("-P", pool, "-c", str(concurrency), "-l", self.log_level(), "--without-mingle"),
        ]
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        before = len(self.logs())
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                self._command, cwd=self._project.folder, env=self._project.env, stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + PATIENCE_S
        while " ready." not in self.logs()[before:]:
            assert process.poll() is None, self.logs()[-4000:]
            assert time.monotonic() < deadline, self.logs()[-4000:]
            time.sleep(0.05)
        return process

    @property
    def status(self) -> str:  # type: ignore[override]  # as Docker names them
        """`running` or `exited`."""
        return "running" if self.process.poll() is None else "exited"

    def ready(self) -> bool:
        """Whether it consumes."""
        return self.status == "running"

    def logs(self) -> str:
        """Its whole log, of all its lives."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def kill(self, signal: str | int = "SIGKILL") -> None:
        """Send it a signal and wait for its end."""
        self.process.send_signal(_number(signal))
        self.process.wait(PATIENCE_S)

    def restart(self, timeout: float | None = None) -> None:
        """End it if it runs, and start it again."""
        if self.ready():
            self.kill("SIGTERM")
        self.process = self._start()

    def teardown(self) -> None:
        """End it."""
        if self.ready():
            try:
                self.kill("SIGTERM")
            except subprocess.TimeoutExpired:
                self.kill()

    @staticmethod
    def version() -> str:
        """Of Celery."""
        return str(celery.__version__)

    @staticmethod
    def log_level() -> str:
        """As on the command line."""
        return "INFO"

    @staticmethod
    def worker_name() -> str:
        """Before the @ of its name."""
        return "node"

    @staticmethod
    def worker_queue() -> str:
        """For tasks that are not stages."""
        return "celery"


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


def project_of(folder: Path, *, broker: str, store: str) -> Project:
    """A project whose services are those nodes, as they are reached from here."""
    made = Project(folder, TestServices(amqp_url=broker, mongodb_url=store, folder=folder))
    made.mongodb_url = store
    return made


def _number(name: str | int) -> int:
    return signal.Signals[name].value if isinstance(name, str) else name
