"""What else a real worker finds in its queues: revoked messages, other people's, and a user's own tasks."""

from __future__ import annotations

import json
from typing import Any

import pytest
from kombu import Connection, Producer

from pipeline_app.application import prepare
from pipeline_app.control.sight.status import status
from pipeline_app.runtime import Runtime
from pipeline_app.store import messages
from pipeline_app.transport.depth import depths
from pipeline_app.transport.topology import EXCHANGE, PARKED_EXCHANGE
from tests.integration.helpers import attempts, job, outcomes, prove
from tests.integration.worker_run import STAGES, add, items, make_run, wait
from tests.project import Project, eventually


@pytest.fixture
def rt(project: Project) -> Runtime:
    made = project.runtime()
    prepare(made)
    return made


def foreign(project: Project, queue: str, body: bytes | str, **options: Any) -> None:
    """Put a message of somebody else's into one of our queues."""
    with Connection(project.amqp_url) as connection:
        producer = Producer(connection.default_channel)
        producer.publish(body, exchange=EXCHANGE, routing_key=queue, **options)


def as_task(name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """A Celery message of that task."""
    return {
        "body": json.dumps([args, kwargs, {}]),
        "content_type": "application/json",
        "content_encoding": "utf-8",
        "headers": {"task": name, "id": f"foreign-{name}-{len(args)}", "lang": "py"},
    }


def test_messages_that_are_none_of_ours(project: Project, rt: Runtime) -> None:
    """Given messages of every wrong kind in a queue of ours, then each is kept, and the worker lives on.

    The broker is new: nobody but the worker can have declared where they are kept.
    """
    rt.close()
    project.amqp_url = project.services.new_vhost()
    rt = project.runtime()
    project.write("stages.py", STAGES.replace("CHUNK", "1"))
    hint = {"v": 1, "run": "r", "stage": "first", "partition": "default", "message": "x"}
    with project.worker("-Q", "demo.first") as worker:
        json_text = {"content_type": "application/json", "content_encoding": "utf-8"}
        foreign(project, "demo.first", b"\xff\xfe no json", **json_text)
        foreign(project, "demo.first", '{"not": "celery"}', **json_text)
        foreign(project, "demo.first", b"pickled", content_type="application/x-python-serialize")
        foreign(project, "demo.first", **as_task("somebody.elses", 1))
        foreign(project, "demo.first", **as_task("demo.first"))
        foreign(project, "demo.first", **as_task("demo.first", 1, 2, more=3))
        foreign(project, "demo.first", **as_task("demo.first", {**hint, "v": 2}))
        foreign(project, "demo.first", **as_task("demo.first", {**hint, "message": 7}))
        foreign(project, "demo.first", **as_task("demo.first", hint))
        eventually(lambda: rt.store.db.parked_messages.count_documents({}) == 4)
        eventually(lambda: depths(project.amqp_url, [PARKED_EXCHANGE.name])[PARKED_EXCHANGE.name].ready == 4)
        eventually(lambda: depths(project.amqp_url, ["demo.first"])["demo.first"].ready == 0)

        project.json("run", "init", "r", "--pipeline", "demo")
        add(rt, *items("a"))
        wait(rt, stage="first")
        assert worker.process.poll() is None

    reasons = sorted(row["reason"] for row in rt.store.db.parked_messages.find())
    assert reasons == [
        "its version is 2, this worker knows 1",
        "message is missing",
        "the arguments are not those of a stage",
        "the arguments are not those of a stage",
    ]
    assert {row["queue"] for row in rt.store.db.parked_messages.find()} == {"demo.first"}
    assert any("parked" in warning for warning in status(rt, "r").warnings)
    prove(rt, pending=1)


def test_the_users_own_tasks_after_the_last_stage(project: Project, rt: Runtime) -> None:
    """Given a chain of a user's own tasks, then the first gets the results of each chunk, the next its result."""
    project.write("stages.py", STAGES.replace("CHUNK", "1"))
    made = project.run(
        "python", "-c",
        "from pipeline_app import chain, create_run\n"
        "from stages import count, demo, notify\n"
        "from pipeline_app.celery import app\n"
        "create_run('r', demo, then=chain(demo) | notify.s(log='told.log') | count.s())\n",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    add(rt, *items("a", "b", "c"), *[{**row, "tags": {}} for row in items("d", "e")])

    with project.worker("-Q", "demo.first,demo.second"), project.worker("-Q", "celery", concurrency=1):
        wait(rt)
        told = eventually(lambda: len(lines_of(project, "told.log")) == 5 and lines_of(project, "told.log"))
        eventually(lambda: sum(map(int, lines_of(project, "counts.log"))) == 5)

    rows = [line.split() for line in told]
    assert {(name, int(n)) for name, n, _ in rows} == {("a", 0), ("b", 1), ("c", 2), ("d", 0), ("e", 1)}
    assert len({key for _, _, key in rows}) == 5
    prove(rt, terminal=5)


def lines_of(project: Project, name: str) -> list[str]:
    path = project.folder / name
    return path.read_text().splitlines() if path.exists() else []


def test_a_message_that_was_revoked(project: Project, rt: Runtime) -> None:
    """Given a message that waits behind another, when it is revoked, then its jobs go on under another id."""
    make_run(project, rt, *items("a", wait_for="go"), *items("b", "c"))
    revoked = job(rt, "b")["message"]
    with project.worker("-Q", "demo.first", concurrency=1, pool="prefork") as worker:
        eventually(project.calls)
        rt.app.control.revoke(revoked)
        worker.wait_for(lambda: f"Tasks flagged as revoked: {revoked}" in worker.text)
        project.write("go", "")
        wait(rt, stage="first")

    assert messages.states(rt.store, [revoked]) == {revoked: "closed"}
    assert outcomes(attempts(rt)) == ["ok"] * 3
    assert [row["_id"] for row in attempts(rt, job="b") if revoked in row["_id"]] == []
    prove(rt, pending=3)
