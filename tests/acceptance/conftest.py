"""pytest-celery's fixtures with our nodes: containers where a Docker daemon answers, processes elsewhere.

`PIPELINE_TEST_NODES=process` (or `docker`) chooses by hand. Every test's `project` is on these nodes; one that has
them all, and a worker from its beginning, asks for `celery_setup`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from pytest_celery import CeleryTestBackend, CeleryTestBroker, CeleryTestWorker

from tests import containers
from tests.nodes import Database, NodeProject, Setup, StartWorker, VirtualHost, start_process
from tests.services import TestServices

MODE = os.environ.get("PIPELINE_TEST_NODES") or ("docker" if containers.docker_answers() else "process")
#: Time for a test with containers.
CONTAINERS_S = 900


def pytest_report_header() -> str:
    return f"nodes of the acceptance tests: {MODE}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first tests with containers fetch and build their images, each test starts its own."""
    for item in items:
        if MODE == "docker" and item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(CONTAINERS_S))


@pytest.fixture
def celery_setup_cls() -> type[Setup]:
    """Broker, store and worker."""
    return Setup


@pytest.fixture
def project(
    tmp_path: Path,
    services: TestServices,
    celery_broker: CeleryTestBroker,
    celery_backend: CeleryTestBackend,
    celery_setup_app: Celery,
    start_worker: StartWorker,
) -> Iterator[NodeProject]:
    """A project of a user's own, whose broker, store and workers are nodes."""
    broker, store = (node.config()["host_url"] for node in (celery_broker, celery_backend))
    made = NodeProject(tmp_path, services, broker=broker, store=store, app=celery_setup_app, start_worker=start_worker)
    yield made
    made.close()


@pytest.fixture
def celery_worker(project: NodeProject) -> Iterator[CeleryTestWorker]:
    """A worker of the project."""
    with project.node(pool="prefork") as node:
        yield node


if MODE == "docker":
    from tests.containers import (  # noqa: F401 - fixtures
        celery_backend,
        celery_broker,
        default_rabbitmq_broker_cls,
        mongo_image,
        start_worker,
        store_container,
        worker_image,
    )

else:

    @pytest.fixture
    def celery_broker(services: TestServices) -> CeleryTestBroker:
        """A virtual host."""
        return CeleryTestBroker(VirtualHost(services))

    @pytest.fixture
    def celery_backend(services: TestServices) -> CeleryTestBackend:
        """A database."""
        return CeleryTestBackend(Database(services))

    @pytest.fixture
    def start_worker() -> StartWorker:
        """Workers are processes."""
        return start_process
