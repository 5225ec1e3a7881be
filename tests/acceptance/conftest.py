"""pytest-celery's fixtures with our nodes: containers where a Docker daemon answers, processes elsewhere.

`PIPELINE_TEST_NODES=process` (or `docker`) chooses by hand. A test asks for `celery_setup` and `node_project`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from pytest_celery import CeleryTestBackend, CeleryTestBroker, CeleryTestWorker

from tests import containers
from tests.nodes import Database, ProcessWorker, Setup, VirtualHost, WorkerProcess, project_of
from tests.project import Project
from tests.services import TestServices

MODE = os.environ.get("PIPELINE_TEST_NODES") or ("docker" if containers.docker_answers() else "process")


def pytest_report_header() -> str:
    return f"nodes of the acceptance tests: {MODE}"


@pytest.fixture
def celery_setup_cls() -> type[Setup]:
    """Broker, store and worker."""
    return Setup


@pytest.fixture
def node_project(
    tmp_path: Path, celery_broker: CeleryTestBroker, celery_backend: CeleryTestBackend
) -> Iterator[Project]:
    """A project whose broker and store are the nodes."""
    broker, store = (node.config()["host_url"] for node in (celery_broker, celery_backend))
    made = project_of(tmp_path, broker=broker, store=store)
    yield made
    made.close()


if MODE == "docker":
    from tests.containers import (  # noqa: F401 - fixtures
        celery_backend,
        celery_broker,
        celery_worker,
        default_rabbitmq_broker_cls,
        mongo_image,
        store_container,
        worker_container,
        worker_environment,
        worker_image,
        worker_volumes,
    )

else:

    @pytest.fixture
    def celery_broker(services: TestServices) -> Iterator[CeleryTestBroker]:
        """A virtual host."""
        node = CeleryTestBroker(VirtualHost(services))
        yield node
        node.teardown()

    @pytest.fixture
    def celery_backend(services: TestServices) -> Iterator[CeleryTestBackend]:
        """A database."""
        node = CeleryTestBackend(Database(services))
        yield node
        node.teardown()

    @pytest.fixture
    def celery_worker(node_project: Project, celery_setup_app: Celery) -> Iterator[CeleryTestWorker]:
        """A worker of the project."""
        node = ProcessWorker(WorkerProcess(node_project), celery_setup_app)
        yield node
        node.teardown()
