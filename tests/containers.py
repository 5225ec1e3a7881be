"""The same nodes as containers, where a Docker daemon answers: RabbitMQ, MongoDB, and a worker from our own Dockerfile.

The fixtures are pytest-docker-tools'; `tests/acceptance/conftest.py` takes them in or leaves them out.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import celery
import docker
import pytest
from celery import Celery
from docker.errors import DockerException
from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError
from pytest_celery import (
    CeleryTestBackend,
    CeleryTestBroker,
    CeleryTestContainer,
    CeleryTestWorker,
    CeleryWorkerContainer,
    RabbitMQContainer,
)
from pytest_docker_tools import build, container, fetch
from pytest_docker_tools.wrappers.container import wait_for_callable

from tests.nodes import NodeProject, StartWorker
from tests.project import REPOSITORY

#: Where the worker's container has the project.
PROJECT = "/project"
#: A worker consumes, or has stopped, within this.
START_S = STOP_S = 120
#: MongoDB's code of this error.
ALREADY_INITIALIZED = 23


def docker_answers() -> bool:
    """Whether there is a daemon."""
    place = urlsplit(os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock")
    try:
        # First by hand: Docker's client leaves a socket open when nobody is there.
        if place.scheme == "unix":
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(place.path)
        else:
            socket.create_connection((place.hostname or "", place.port or 2375), timeout=3).close()
        client = docker.from_env(timeout=3)
        try:
            return bool(client.ping())
        finally:
            client.close()
    except (DockerException, OSError):
        return False


class Broker(RabbitMQContainer):  # type: ignore[misc]  # pytest-celery's types do not reach us
    """The version that compose.yaml has."""

    @classmethod
    def image(cls) -> str:
        """Name of the image."""
        return "rabbitmq:3.13"


class Store(CeleryTestContainer):  # type: ignore[misc]  # pytest-celery's types do not reach us
    """A replica set of one node, which is asked directly: its own name for itself is good only inside."""

    @property
    def celeryconfig(self) -> dict[str, Any]:
        """As the worker's container reaches it, and as we do."""
        inside, outside = f"{self.attrs['Config']['Hostname']}:27017", f"127.0.0.1:{self._wait_port('27017/tcp')}"
        return {
            name: f"mongodb://{at}/pipeline_app?directConnection=true"
            for name, at in (("url", inside), ("host_url", outside))
        }

    @property
    def ready_prompt(self) -> str:
        """Logged when it listens."""
        return "Waiting for connections"

    def ready(self) -> bool:
        """Whether it takes writes; makes it a replica set."""
        if not super().ready():
            return False
        try:
            with MongoClient[dict[str, Any]](self.celeryconfig["host_url"], serverSelectionTimeoutMS=3000) as client:
                try:
                    client.admin.command("replSetInitiate")
                except OperationFailure as exc:
                    if exc.code != ALREADY_INITIALIZED:
                        raise
                return bool(client.admin.command("hello").get("isWritablePrimary"))
        except PyMongoError:  # not that far yet
            return False


class Worker(CeleryWorkerContainer):  # type: ignore[misc]  # pytest-celery's types do not reach us
    """A worker of the project in /project."""

    @classmethod
    def version(cls) -> str:
        """Of Celery: the image installs what the tests run with."""
        return str(celery.__version__)

    @classmethod
    def worker_name(cls) -> str:
        """Before the @ of its name."""
        return "node"


class ContainerWorker(CeleryTestWorker):  # type: ignore[misc]  # pytest-celery's types do not reach us
    """A worker node that a test started, and that is removed when the test is done with it."""

    def __init__(self, raw: Any, app: Celery) -> None:
        super().__init__(Worker(raw), app)
        # As Docker's client gave it: the wrapper removes nothing.
        self._raw = raw

    def get_running_processes_info(
        self,
        columns: list[str] | None = None,
        filters: Mapping[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """As Docker lists them, by its own titles."""
        top = self._raw.top()
        rows = [dict(zip(top["Titles"], row, strict=True)) for row in top["Processes"]]
        return [row for row in rows if all(row.get(key) == value for key, value in (filters or {}).items())]

    def teardown(self) -> None:
        """Tell it to stop and wait until it has, as `docker stop` does; remove it."""
        try:
            self._raw.stop(timeout=STOP_S)
        finally:
            self._raw.remove(force=True)


mongo_image = fetch(repository="mongo:7")
store_container = container(
    image="{mongo_image.id}",
    command=["mongod", "--replSet", "rs0", "--bind_ip_all"],
    ports={"27017/tcp": None},
    network="{default_pytest_celery_network.name}",
    wrapper_class=Store,
    timeout=120,
)
worker_image = build(path=str(REPOSITORY), tag="pipeline-app:tests")


@pytest.fixture
def default_rabbitmq_broker_cls() -> type[RabbitMQContainer]:
    """pytest-celery's own broker, in our version."""
    return Broker


@pytest.fixture
def celery_broker(celery_rabbitmq_broker: CeleryTestBroker) -> CeleryTestBroker:
    """RabbitMQ."""
    return celery_rabbitmq_broker


@pytest.fixture
def celery_backend(store_container: Store) -> Iterator[CeleryTestBackend]:
    """MongoDB."""
    node = CeleryTestBackend(store_container)
    yield node
    node.teardown()


@pytest.fixture
def start_worker(
    docker_client: Any,
    worker_image: Any,
    default_pytest_celery_network: Any,
    celery_worker_cluster_config: dict[str, Any],
) -> StartWorker:
    """Workers are containers, which reach the services by other addresses than we do."""
    broker, backend = (
        celery_worker_cluster_config[f"celery_{kind}_cluster_config"]["urls"][0] for kind in ("broker", "backend")
    )

    def start(project: NodeProject, arguments: tuple[str, ...], pool: str, concurrency: int) -> CeleryTestWorker:
        raw = docker_client.containers.run(
            image=worker_image.id,
            command=[
                *("celery", "-A", "pipeline_app", "worker", "-P", pool, "-c", str(concurrency)),
                *("-n", f"{Worker.worker_name()}@%h", "-l", Worker.log_level(), *arguments),
            ],
            environment={"AMQP_URL": broker, "MONGODB_URL": backend, "HOME": "/tmp"},
            volumes={str(project.folder): {"bind": PROJECT, "mode": "rw"}},
            working_dir=PROJECT,
            # What handlers write into the project's folder belongs to whoever runs the tests.
            user=f"{os.getuid()}:{os.getgid()}",
            network=default_pytest_celery_network.name,
            detach=True,
        )
        node = ContainerWorker(raw, project.app)
        try:
            wait_for_callable("Waiting for the worker to consume", node.ready, START_S)
        except BaseException:
            node.teardown()
            raise
        return node

    return start
