"""Handlers that run longer than RabbitMQ lets a message be un-acknowledged."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline_app.application import prepare
from pipeline_app.local import rabbitmq
from pipeline_app.transport.depth import depths
from tests.integration.helpers import attempts, outcomes, prove
from tests.integration.worker_run import add, items, make_run, wait
from tests.project import Project, eventually

QUEUE = "demo.first.kind__a"
#: RabbitMQ's consumer_timeout, of a node of our own.
TIMEOUT_S = 5.0
ENV = {"PIPELINE_ACKNOWLEDGE_AFTER_S": "1"}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A node that closes the channel of who keeps a message for TIMEOUT_S: its folder and address."""
    state_dir = tmp_path_factory.mktemp("impatient") / ".pipeline"
    (state_dir / "logs").mkdir(parents=True)
    service = rabbitmq.start(state_dir, threading.Event())
    try:
        for name, value_s in (("consumer_timeout", TIMEOUT_S), ("channel_tick_interval", 0.5)):
            rabbitmq.ctl(state_dir, "eval", f"application:set_env(rabbit, {name}, {value_s * 1000:.0f}).")
        yield state_dir, rabbitmq.url(service.port)
    finally:
        rabbitmq.stop(state_dir, service)


@pytest.fixture
def impatient(node: tuple[Path, str]) -> str:
    """A virtual host of its own on that node."""
    state_dir, url = node
    name = uuid.uuid4().hex
    rabbitmq.ctl(state_dir, "add_vhost", name)
    rabbitmq.ctl(state_dir, "set_permissions", "-p", name, "guest", ".*", ".*", ".*")
    return f"{url.rstrip('/')}/{name}"


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_handler_longer_than_the_consumer_timeout(project: Project, impatient: str, pool: str) -> None:
    """Given a handler that runs for three times the consumer timeout, then it runs once, on one connection.

    Nothing is reserved behind it meanwhile; what comes is taken as soon as it has ended.
    """
    project.amqp_url = impatient
    rt = project.runtime()
    prepare(rt)
    make_run(project, rt, *items("long", wait_for="go"))
    with project.worker("-Q", "demo.first", pool=pool, concurrency=1, env=ENV) as worker:
        eventually(project.calls)
        began = time.monotonic()
        add(rt, *items("behind"))
        worker.wait_for(lambda: "acknowledged while its handler runs" in worker.text)
        # It was reserved before every slot was known to be busy for long, and has gone back.
        eventually(lambda: look(project) == (1, 0))

        eventually(lambda: time.monotonic() - began > 3 * TIMEOUT_S)  # the broker's patience, three times
        assert look(project) == (1, 0)
        project.write("go", "")
        wait(rt, stage="first")
        ended = [(project.folder / f"ended-{name}").stat().st_mtime for name in ("long", "behind")]
        assert worker.stop() == 0

    assert ended[1] - ended[0] < 2.0
    assert [line.split()[1] for line in project.calls()] == ["long", "behind"]
    assert outcomes(attempts(rt)) == ["ok", "ok"]
    assert "Connection to broker lost" not in worker.text
    assert "Couldn't ack" not in worker.text
    prove(rt, pending=2)


def look(project: Project) -> tuple[int, int | None]:
    """Messages and consumers of the queue."""
    depth = depths(project.amqp_url, [QUEUE])[QUEUE]
    return depth.ready, depth.consumers


def test_what_is_reserved_for_long_goes_back(project: Project, impatient: str) -> None:
    """Given one slot for many messages, then what waits for it for long goes back, and comes again; each runs once."""
    project.amqp_url = impatient
    rt = project.runtime()
    prepare(rt)
    make_run(project, rt)
    project.write("stages.py", project.folder.joinpath("stages.py").read_text().replace(*SLOWLY))
    names = [f"{kind}{n}" for kind in "bcdefg" for n in range(3)]
    for name in names:
        add(rt, {"job_id": name, "payload": {}, "tags": {"kind": name[0]}})
    with project.worker("-Q", "demo.first", pool="threads", concurrency=1, env=ENV) as worker:
        wait(rt, stage="first")
        assert worker.stop() == 0

    assert "waited for too long" in worker.text
    assert sorted(line.split()[1] for line in project.calls()) == names
    assert "Connection to broker lost" not in worker.text
    prove(rt, pending=len(names))


#: Every handler takes a while; still several of them end within the time after which messages go back.
SLOWLY = ("while item.wait_for", "time.sleep(0.4)\n    while item.wait_for")
