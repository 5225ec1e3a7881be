"""`check` of RabbitMQ: queues declared otherwise, limits that take messages away, and a node where all is well."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from kombu import Connection, Exchange, Queue

from pipeline_app import Stage
from pipeline_app.application import prepare
from pipeline_app.control.check import rabbitmq
from pipeline_app.control.check.checks import CHECKS, check
from pipeline_app.control.check.finding import Look, Severity, Subject, Trouble
from pipeline_app.local import processes
from pipeline_app.local.rabbitmq import consumer_timeout_s
from pipeline_app.runtime import Runtime
from pipeline_app.store import partitions
from pipeline_app.transport.topology import named_queue
from tests.clusters import RabbitCluster, rabbit_cluster
from tests.integration.checks import by_name, troubles, with_queue
from tests.integration.helpers import begin, double, lines, pipeline, register
from tests.project import Project, eventually
from tests.services import TestServices


def test_declarations(project: Project) -> None:
    """Given a queue of ours that somebody declared otherwise, then it is named, and nothing is made by asking."""
    rt = project.runtime(amqp_url=project.services.new_vhost())
    prepare(rt)
    partitions.ensure(rt.store, [{"_id": f"p.{name}", "pipeline": "p"} for name in ("other", "ours", "missing")])
    with Connection(rt.settings.amqp_url) as connection:
        Queue("p.other", durable=True)(connection.default_channel).declare()
        named_queue("p.ours", "quorum")(connection.default_channel).declare()

    (found,) = troubles(rt, rabbitmq.declarations)

    assert found.severity is Severity.ERROR
    assert found.what.startswith("p.other was declared otherwise: PRECONDITION_FAILED")
    vhost = rt.settings.amqp_url.rsplit("/", 1)[1]
    listed = project.services.rabbitmqctl("list_queues", "-p", vhost, "name", "--no-table-headers")
    assert sorted(listed.split()) == ["p.other", "p.ours"]


def test_an_exchange_of_another_kind(project: Project) -> None:
    """Given our exchange, declared as another kind by somebody, then it is named."""
    rt = project.runtime(amqp_url=project.services.new_vhost())
    prepare(rt)
    with Connection(rt.settings.amqp_url) as connection:
        Exchange("pipeline_app", "topic", durable=True)(connection.default_channel).declare()

    (found,) = troubles(rt, rabbitmq.declarations)

    assert found.what.startswith("pipeline_app was declared otherwise: PRECONDITION_FAILED")


def test_consumer_timeout(project: Project, services: TestServices, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the project's own RabbitMQ, then its consumer timeout is compared with when messages are acknowledged."""
    monkeypatch.chdir(services.folder)
    own = consumer_timeout_s(project.amqp_url)
    assert own == 1800, "RabbitMQ's default"
    assert consumer_timeout_s("amqp://elsewhere/") is None
    with_queue(project.runtime(pipeline(double)))

    (found,) = troubles(project.runtime(acknowledge_after_s=3600), rabbitmq.consumer_timeout, consumer_timeout=own)

    assert found.severity is Severity.ERROR
    assert "(1800 s) comes before messages are acknowledged, 3600 s after" in found.what
    assert troubles(project.runtime(), rabbitmq.consumer_timeout, consumer_timeout=own) == []
    (unknown,) = troubles(project.runtime(), rabbitmq.consumer_timeout)
    assert unknown.severity is Severity.UNKNOWN
    assert "rabbitmqctl eval" in str(unknown.hint)


@pytest.mark.parametrize(("limit", "words"), [("2h", "7200 s"), (None, "as long as it likes"), ("5m", None)])
def test_a_solo_worker_acknowledges_late(project: Project, limit: str | None, words: str | None) -> None:
    """Given a stage whose jobs may take longer than the consumer timeout, then a solo worker may not run it."""
    chosen = pipeline(Stage(double, time_limit=limit))
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(1))
    register(rt, "w1", pool="solo")

    found = troubles(rt, rabbitmq.consumer_timeout, consumer_timeout=1800)

    assert [words in row.what for row in found if words] == ([True] if words else [])
    assert len(found) == (1 if words else 0)


@pytest.fixture(scope="module")
def managed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitCluster]:
    """A RabbitMQ node with the management plugin."""
    folder = tmp_path_factory.mktemp("managed")
    with rabbit_cluster(folder, nodes=1, plugins=["rabbitmq_management"]) as node:
        yield node


@pytest.fixture
def own_url(managed: RabbitCluster) -> str:
    """A virtual host of the managed node."""
    name = f"v{uuid.uuid4().hex[:8]}"
    managed.ctl("add_vhost", name)
    managed.ctl("set_permissions", "-p", name, "guest", ".*", ".*", ".*")
    return f"{managed.url}{name}"


@contextmanager
def policy(rt: Runtime, node: RabbitCluster, definition: str) -> Iterator[None]:
    vhost = rt.settings.amqp_url.rpartition("/")[2]
    node.ctl("set_policy", "-p", vhost, "test", ".", definition, "--apply-to", "queues")
    try:
        yield
    finally:
        node.ctl("clear_policy", "-p", vhost, "test")


def at(project: Project, node: RabbitCluster, url: str, **changed: Any) -> Runtime:
    """A runtime at this address, with a queue that the management API knows of."""
    management = f"http://127.0.0.1:{node.management_port}"
    rt = project.runtime(pipeline(double), amqp_url=url, management_url=management, **changed)
    with_queue(rt)
    eventually(lambda: Subject(rt, lambda: None).policies())
    return rt


def soon(rt: Runtime, look: Look) -> Trouble:
    """The one thing that is found, once the management API has heard of the policy."""
    (found,) = eventually(lambda: troubles(rt, look))
    return found  # type: ignore[no-any-return]


def test_mirrored_queues(project: Project, managed: RabbitCluster, own_url: str) -> None:
    """Given classic queues under a policy that mirrors them, then they are named; quorum queues need none."""
    rt = at(project, managed, own_url, queue_type="classic")
    assert troubles(rt, rabbitmq.mirrored_queues) == []
    with policy(rt, managed, '{"ha-mode": "all"}'):
        found = soon(rt, rabbitmq.mirrored_queues)

    assert re.fullmatch(r"classic mirrored queues: p\w+\.double", found.what)


def test_dropping_policies(project: Project, managed: RabbitCluster, own_url: str) -> None:
    """Given policies that throw messages away, then they are named; a queue that refuses messages loses none."""
    rt = at(project, managed, own_url)
    with policy(rt, managed, '{"message-ttl": 60000}'):
        assert soon(rt, rabbitmq.dropping_policies).what.startswith("a policy with message-ttl takes messages out of")
    with policy(rt, managed, '{"max-length": 5}'):
        eventually(lambda: "max-length" in str(troubles(rt, rabbitmq.dropping_policies)))
    with policy(rt, managed, '{"max-length": 5, "overflow": "reject-publish"}'):
        eventually(lambda: "reject" in str(Subject(rt, lambda: None).policies()))
        assert troubles(rt, rabbitmq.dropping_policies) == []


def test_delivery_limit(project: Project, managed: RabbitCluster, own_url: str) -> None:
    """Given a policy by which quorum queues give up on a message, then it is named."""
    rt = at(project, managed, own_url)
    assert troubles(rt, rabbitmq.delivery_limit) == []
    with policy(rt, managed, '{"delivery-limit": 5}'):
        found = soon(rt, rabbitmq.delivery_limit)

    assert re.fullmatch(r"messages are parked after 5 deliveries: p\w+\.double", found.what)


@pytest.mark.parametrize(("version", "limited"), [("3.10.8", False), ("4.0.5", True), ("4.1.0-rc.1", True)])
def test_a_rabbitmq_with_a_limit_of_its_own(version: str, limited: bool) -> None:
    """Given a version, then it is known whether RabbitMQ gives up on messages though nobody told it to."""
    assert rabbitmq.gives_up_by_itself(version) is limited


def test_no_management_api(project: Project) -> None:
    """Given a RabbitMQ without its management API, then what only that can tell is unknown, with how to enable it."""
    nobody = f"http://127.0.0.1:{processes.free_port()}"
    rt = project.runtime(management_url=nobody)
    with_queue(project.runtime(pipeline(double)))

    found = check(rt)

    rows = [by_name(found, name) for name in ("mirrored_queues", "dropping_policies", "delivery_limit")]
    assert {row.severity for row in rows} == {Severity.UNKNOWN}
    assert "rabbitmq-plugins enable rabbitmq_management" in str(rows[0].hint)


def test_a_management_api_that_refuses_us(project: Project, managed: RabbitCluster, own_url: str) -> None:
    """Given a password that the API does not take, then that is said, and the password is not."""
    refused = f"http://guest:s3cret@127.0.0.1:{managed.management_port}"
    rt = project.runtime(amqp_url=own_url, management_url=refused)

    found = by_name(check(rt), "delivery_limit")

    assert found.severity is Severity.UNKNOWN
    assert "401 Unauthorized" in found.what
    assert "s3cret" not in str(found)


def test_all_is_well(project: Project, managed: RabbitCluster, own_url: str) -> None:
    """Given a worker that serves a run, then no check finds anything, and the command exits 0."""
    env = {"PIPELINE_MANAGEMENT_URL": f"http://127.0.0.1:{managed.management_port}"}
    project.amqp_url = own_url
    project.seed("r", [{"job_id": "a", "payload": {"n": 1}, "tags": {"kind": "x"}}])
    with project.worker(env=env):
        project.json("run", "wait", "r", "--timeout", "60", timeout=70)
        found = project.json("check", env=env)
        shown = project.cli("check", env=env)

    assert found["ok"] is True
    rows = {row["check"]: row["severity"] for row in found["findings"]}
    assert {name for name, severity in rows.items() if severity != "ok"} == {"consumer_timeout"}, found
    assert rows["consumer_timeout"] == "unknown", "the node is not this project's own"
    assert rows.keys() == {"mongodb", "rabbitmq", *(one.name for one in CHECKS)}
    assert shown.returncode == 0
    assert "consumer_timeout: rabbitmqctl eval" in shown.stdout
