"""Fixtures of the integration tests: services whose connection can be cut, a process's flow, a handler that waits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeline_app.control.seed import paging
from pipeline_app.flow.consume import Flow
from pipeline_app.runtime import Runtime
from pipeline_app.store import accounts
from tests.integration.gate import Gate
from tests.integration.helpers import NewFlow
from tests.integration.nursery import Nursery
from tests.integration.ordered import Diary
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
def new_flow(project: Project) -> Iterator[NewFlow]:
    """Makes a process's flow, whose notes are written before the connections end."""
    made: list[Flow] = []

    def make(rt: Runtime) -> Flow:
        made.append(Flow(rt, lambda: False))
        return made[-1]

    yield make
    for flow in made:
        flow.notes.flush()


@pytest.fixture
def gate() -> Iterator[Gate]:
    """A handler that waits until the test lets it go on."""
    made = Gate()
    yield made
    made.may_end.set()


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeding adds two jobs at a time."""
    monkeypatch.setattr(paging, "PAGE", 2)


@pytest.fixture
def tiny_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accounting looks at a few jobs and attempts at a time."""
    monkeypatch.setattr(accounts, "PAGE", 3)
    monkeypatch.setattr(accounts, "LEDGER_PAGE", 2)


@pytest.fixture
def nursery(project: Project, mongo_proxy: MongoProxy) -> Iterator[Nursery]:
    """Lets children take steps of the protocol, and kills them at their writes."""
    made = Nursery(project, mongo_proxy)
    yield made
    made.close()


@pytest.fixture
def diary() -> Diary:
    """What handlers of a keyed pipeline write down."""
    return Diary()
