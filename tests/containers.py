"""The same nodes as containers, where a Docker daemon answers: RabbitMQ, MongoDB, and a worker from our own Dockerfile.

The fixtures are pytest-docker-tools'; `tests/acceptance/conftest.py` takes them in or leaves them out.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

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
from pytest_docker_tools import build, container, fetch, fxtr

from tests.project import REPOSITORY, Project

#: Where the worker's container has the project.
PROJECT = "/project"
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
    def command(cls, *args: str, **kwargs: Any) -> list[str]:
        """What the container runs."""
        name = f"{cls.worker_name()}@%h"
        return ["celery", "-A", "pipeline_app", "worker", "-n", name, "-c", "2", "-l", cls.log_level(), *args]

    @classmethod
    def worker_name(cls) -> str:
        """Before the @ of its name."""
        return "node"


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
worker_container = container(
    image="{worker_image.id}",
    command=Worker.command(),
    environment=fxtr("worker_environment"),
    volumes=fxtr("worker_volumes"),
    working_dir=PROJECT,
    # What handlers write into the project's folder belongs to whoever runs the tests.
    user=f"{os.getuid()}:{os.getgid()}",
    network="{default_pytest_celery_network.name}",
    wrapper_class=Worker,
    timeout=120,
)


@pytest.fixture
def default_rabbitmq_broker_cls() -> type[RabbitMQContainer]:
    """pytest-celery's own broker, in our version."""
    return Broker


@pytest.fixture
def worker_environment(celery_worker_cluster_config: dict[str, Any]) -> dict[str, str]:
    """Addresses as they are inside."""
    return {
        "AMQP_URL": celery_worker_cluster_config["celery_broker_cluster_config"]["urls"][0],
        "MONGODB_URL": celery_worker_cluster_config["celery_backend_cluster_config"]["urls"][0],
        "HOME": "/tmp",
    }


@pytest.fixture
def worker_volumes(node_project: Project) -> dict[str, dict[str, str]]:
    """The project's folder, with what is in it."""
    return {str(node_project.folder): {"bind": PROJECT, "mode": "rw"}}


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
def celery_worker(worker_container: Worker, celery_setup_app: Celery) -> Iterator[CeleryTestWorker]:
    """A worker of the project."""
    node = CeleryTestWorker(worker_container, celery_setup_app)
    yield node
    node.teardown()
