"""Publishing: nothing is believed sent before the broker said so, and what cannot be sent now is the sweep's."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from kombu import Connection, Queue

from pipeline_app import Pipeline, Stage
from pipeline_app.application import prepare
from pipeline_app.control import runs
from pipeline_app.control.duties import sweep
from pipeline_app.control.seed import seeding
from pipeline_app.domain.job import idempotency_key
from pipeline_app.domain.partition import queue_name
from pipeline_app.errors import BrokerError
from pipeline_app.runtime import Runtime
from pipeline_app.store import messages
from pipeline_app.transport.depth import depths
from pipeline_app.transport.publisher import Envelope
from pipeline_app.transport.topology import named_queue
from tests.integration.helpers import NewFlow, backdate, begin, hints, in_broker, lines, pipeline, prove, pump
from tests.integration.proxy import Proxy
from tests.project import Project, eventually


def double(n: int) -> int:
    return n * 2


def after(n: int) -> dict[str, int]:
    return {"n": n}


def queue_of(chosen: Pipeline, stage: str) -> str:
    return queue_name(chosen.name, stage, "default")


def delete_queue(project: Project, name: str) -> None:
    with Connection(project.amqp_url) as connection:
        connection.default_channel.queue_delete(name)


def ready(project: Project, name: str) -> int:
    return depths(project.amqp_url, [name])[name].ready


def envelopes(name: str, number: int) -> list[Envelope]:
    queue = named_queue(name, "quorum")
    return [Envelope(queue=queue, task="t", id=f"{name}-{n}", args=[n], shown="(shown)") for n in range(number)]


def some_queue() -> str:
    return f"q{uuid.uuid4().hex[:10]}.first"


def test_more_messages_than_may_be_in_flight(project: Project) -> None:
    """Given more messages than wait for confirms at once, when they are published, then all are in the queue."""
    rt, name = project.runtime(), some_queue()

    rt.publisher.publish(envelopes(name, 1200))

    assert ready(project, name) == 1200
    assert [args for (args,) in in_broker(rt, name)] == list(range(1200))


def test_what_a_message_shows_of_itself(project: Project) -> None:
    """Given a published hint, then it is persistent, has its id as the task's, and shows no payload anywhere."""
    chosen = pipeline(double, after)
    rt = project.runtime(chosen)
    begin(rt, chosen, [{"job_id": "a", "payload": 4711}])
    with Connection(project.amqp_url) as connection:
        channel: Any = connection.default_channel
        found = channel.basic_get(queue_of(chosen, "double"), no_ack=True)

    args, _, embed = json.loads(found.body)
    (row,) = rt.store.db.messages.find()
    assert found.properties["delivery_mode"] == 2
    assert found.properties["correlation_id"] == found.headers["id"] == row["_id"]
    assert found.headers["argsrepr"] == "(run='r', jobs=1)"
    assert args == [{"v": 1, "run": "r", "stage": "double", "partition": "default", "message": row["_id"]}]
    assert [task["task"] for task in embed["chain"]] == [f"{chosen.name}.after"]
    assert "4711" not in f"{found.body!r}{found.headers}{found.properties}"


def test_a_queue_that_was_deleted_is_made_again(project: Project) -> None:
    """Given a queue that this process has declared, when it is deleted, then the next message is in a new one."""
    rt, name = project.runtime(), some_queue()
    rt.publisher.publish(envelopes(name, 1))
    delete_queue(project, name)

    rt.publisher.publish(envelopes(name, 3))

    assert ready(project, name) == 3


def refuses(rt: Runtime, name: str) -> bool:
    try:
        rt.publisher.publish(envelopes(name, 10))
    except BrokerError as exc:
        return "refused a message" in exc.message
    return False


@contextmanager
def full(project: Project, rt: Runtime, name: str) -> Iterator[None]:
    """The queue is full, and refuses more."""
    vhost = project.amqp_url.rsplit("/", 1)[1]
    limits = json.dumps({"max-length": 1, "overflow": "reject-publish"})
    project.services.rabbitmqctl("set_policy", "-p", vhost, "full", f"^{name}$", limits, "--apply-to", "queues")
    try:
        eventually(lambda: refuses(rt, name))  # it takes a few more than its limit
        yield
    finally:
        project.services.rabbitmqctl("clear_policy", "-p", vhost, "full")


def test_a_full_queue_refuses(project: Project, new_flow: NewFlow) -> None:
    """Given a queue that takes no more, when hints are published, then they are kept until there is room."""
    chosen = pipeline(Stage(double, chunk=4), after)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(4))
    name = queue_of(chosen, "after")

    def unpublished() -> int:
        return rt.store.db.messages.count_documents({"stage": "after", "published_at": None})

    def publish_the_rest() -> bool:
        sweep.publish_unpublished(rt)
        return unpublished() == 0

    with full(project, rt, name):
        flow = new_flow(rt)
        assert flow.run(hints(rt)[0]) == "4 advance"
        flow.notes.flush()
        backdate(rt, "messages", 60, "check_at")
        sweep.publish_unpublished(rt)
        assert unpublished() == 4
    in_broker(rt, name)
    eventually(publish_the_rest)  # the queue hears of the end of its limit a little later
    pump(rt)

    prove(rt, terminal=4)


def test_one_queue_that_refuses_does_not_keep_others_waiting(project: Project) -> None:
    """Given unpublished messages of several queues, one of which the broker refuses, then the others are published."""
    chosen = pipeline(double, partition_by=["kind"])
    rt = project.runtime(chosen)
    begin(rt, chosen, [{"job_id": f"j{n}", "payload": n, "tags": {"kind": str(n)}} for n in range(6)])
    names = [queue_name(chosen.name, "double", f"kind__{n}") for n in range(6)]
    in_broker(rt, *names)
    delete_queue(project, names[2])
    with Connection(project.amqp_url) as connection:
        Queue(names[2], durable=True)(connection.default_channel).declare()
    # As if the seeder had been killed before it published.
    rt.store.db.messages.update_many({}, {"$set": {"published_at": None}})
    backdate(rt, "messages", 3600, "check_at")
    left = project.runtime(chosen)

    def rest() -> list[str]:
        sweep.publish_unpublished(left)
        return list(rt.store.db.messages.distinct("queue", {"published_at": None}))

    eventually(lambda: rest() == [names[2]])


def test_a_queue_that_was_declared_otherwise(project: Project, new_flow: NewFlow) -> None:
    """Given a queue of the same name and another kind, then the error says so, and the jobs go on when it is gone."""
    chosen = pipeline(double, after)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(1))
    name = queue_of(chosen, "after")
    with Connection(project.amqp_url) as connection:
        Queue(name, durable=True)(connection.default_channel).declare()

    assert new_flow(rt).run(hints(rt)[0]) == "1 advance"  # the record stands, whatever the broker says
    with pytest.raises(BrokerError, match="declared otherwise") as refused:
        rt.publisher.publish(envelopes(name, 1))

    assert "set queue_type to what it is, or delete the queue" in str(refused.value.hint)
    delete_queue(project, name)
    backdate(rt, "messages", 60, "check_at")
    sweep.publish_unpublished(rt)
    pump(rt)
    prove(rt, terminal=1)


def test_a_broker_that_is_not_there(project: Project, new_flow: NewFlow) -> None:
    """Given a broker that is away after the record, then the message is kept, and published by the sweep when due."""
    chosen = pipeline(double, after)
    rt = project.runtime(chosen)
    cut_off = project.runtime(chosen, amqp_url="amqp://guest:very-secret@127.0.0.1:1/x")
    begin(rt, chosen, lines(1))

    assert new_flow(cut_off).run(hints(rt)[0]) == "1 advance"

    (left,) = hints(rt)
    assert left.stage == "after"
    with pytest.raises(BrokerError, match="does not answer") as away:
        cut_off.publisher.ping()
    assert "very-secret" not in str(away.value)
    sweep.publish_unpublished(rt)
    assert ready(project, queue_of(chosen, "after")) == 0, "its own process may still be at it"
    backdate(rt, "messages", messages.UNPUBLISHED_AFTER_S, "check_at")
    sweep.publish_unpublished(rt)
    assert ready(project, queue_of(chosen, "after")) == 1
    sweep.publish_unpublished(rt)
    assert ready(project, queue_of(chosen, "after")) == 1, "it was noted"
    pump(rt)
    prove(rt, terminal=1)


def test_a_connection_that_died_unnoticed(project: Project, amqp_proxy: Proxy) -> None:
    """Given a publisher whose idle connection was cut, when it publishes, then it connects again by itself."""
    rt, name = project.runtime(amqp_url=amqp_proxy.address(project.amqp_url)), some_queue()
    rt.publisher.publish(envelopes(name, 1))
    amqp_proxy.cut()
    with pytest.raises(BrokerError):
        rt.publisher.publish(envelopes(name, 1))
    amqp_proxy.restore()
    rt.publisher.publish(envelopes(name, 1))
    amqp_proxy.cut()
    amqp_proxy.restore()

    rt.publisher.publish(envelopes(name, 1))

    assert ready(project, name) == 3


def test_a_broker_that_is_silent(project: Project, amqp_proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a broker that takes bytes and answers nothing, then publishing ends in time, as an error."""
    rt, name = project.runtime(amqp_url=amqp_proxy.address(project.amqp_url)), some_queue()
    rt.publisher.publish(envelopes(name, 1))
    amqp_proxy.freeze()
    monkeypatch.setattr("pipeline_app.transport.publisher.ANSWER_TIMEOUT_S", 1.0)
    monkeypatch.setattr("pipeline_app.transport.connecting.CONNECT_TIMEOUT_S", 1.0)
    begun = time.monotonic()

    with pytest.raises(BrokerError, match="does not answer"):
        rt.publisher.publish(envelopes(name, 1))

    assert time.monotonic() - begun < 8
    monkeypatch.undo()
    amqp_proxy.restore()
    rt.publisher.publish(envelopes(name, 1))
    assert ready(project, name) >= 2


def own_task(rt: Runtime, queue: str) -> dict[str, Any]:
    """The signature of a task of the user's own that nobody runs."""
    rt.app.amqp.queues.add(Queue(queue, routing_key=queue))
    return {"task": "notify", "args": [], "kwargs": {}, "options": {"queue": queue}}


def test_results_for_a_queue_that_was_declared_otherwise(project: Project, new_flow: NewFlow) -> None:
    """Given a task of the user's own whose queue the broker refuses, then our jobs are done and the sweep goes on."""
    theirs = some_queue()
    chosen = pipeline(double)
    rt = project.runtime(chosen)
    with Connection(project.amqp_url) as connection:
        Queue(theirs, durable=True, max_length=7)(connection.default_channel).declare()
    prepare(rt)
    runs.create_run(rt, "r", chosen, then=own_task(rt, theirs))
    seeding.seed(rt, "r", lines(1))

    assert new_flow(rt).run(hints(rt)[0]) == "1 advance"
    backdate(rt, "messages", 20, "check_at")
    sweep.publish_unpublished(rt)

    prove(rt, terminal=1)
    assert rt.store.db.messages.count_documents({"stage": messages.THEN, "state": "open"}) == 1
    delete_queue(project, theirs)
    sweep.publish_unpublished(rt)
    ((rows,),) = in_broker(rt, theirs)
    assert [(row["job_id"], row["result"]) for row in rows] == [("j0", 0)]


def test_results_are_called_for_again_under_the_same_key(project: Project) -> None:
    """Given results whose delivery was not noted, when they are sent again, then id and keys are the same."""
    theirs = some_queue()
    chosen = pipeline(Stage(double, chunk=2))
    rt = project.runtime(chosen)
    prepare(rt)
    runs.create_run(rt, "r", chosen, then=own_task(rt, theirs))
    seeding.seed(rt, "r", lines(2))
    pump(rt)
    (row,) = rt.store.db.messages.find({"stage": messages.THEN})
    assert row["state"] == "closed"
    ((first,),) = in_broker(rt, theirs)

    rt.store.db.messages.update_one({"_id": row["_id"]}, {"$set": {"state": "open"}})
    backdate(rt, "messages", 60, "check_at")
    sweep.publish_unpublished(rt)

    ((again,),) = in_broker(rt, theirs)
    assert again == first
    assert [(found["job_id"], found["result"]) for found in first] == [("j0", 0), ("j1", 2)]
    assert [found["key"] for found in first] == [idempotency_key("r", f"j{n}", messages.THEN, 0) for n in range(2)]
