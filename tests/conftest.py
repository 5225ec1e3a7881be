"""Fixtures that every kind of test shares. Services start when the first test asks for them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.project import Project
from tests.services import TestServices, shared_services

# A shell that starts us in the background has SIGINT ignored, and so would every process that tests send a Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[TestServices]:
    """RabbitMQ and MongoDB, shared by all test workers of this run."""
    base = tmp_path_factory.getbasetemp()
    is_worker = hasattr(request.config, "workerinput")
    with shared_services((base.parent if is_worker else base) / "services") as found:
        yield found


@pytest.fixture
def project(tmp_path: Path, services: TestServices) -> Iterator[Project]:
    """A project of a user's own, with a database of its own."""
    made = Project(tmp_path, services)
    yield made
    made.close()
