"""Fixtures of the integration tests: services whose connection can be cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from pipeline_app.flow.consume import Flow
from pipeline_app.runtime import Runtime
from tests.integration.proxy import MongoProxy, Proxy
from tests.project import Project
from tests.services import TestServices


@pytest.fixture
def mongo_proxy(services: TestServices) -> Iterator[MongoProxy]:
    """A proxy before MongoDB."""
    made = MongoProxy(services.mongodb_url)
    yield made
    made.close()


@pytest.fixture
def amqp_proxy(services: TestServices) -> Iterator[Proxy]:
    """A proxy before RabbitMQ."""
    made = Proxy(services.amqp_url)
    yield made
    made.close()


@pytest.fixture
def new_flow(project: Project) -> Iterator[Callable[[Runtime], Flow]]:
    """Makes a process's flow, whose notes are written before the connections end."""
    made: list[Flow] = []

    def make(rt: Runtime) -> Flow:
        made.append(Flow(rt, lambda: False))
        return made[-1]

    yield make
    for flow in made:
        flow.notes.flush()
