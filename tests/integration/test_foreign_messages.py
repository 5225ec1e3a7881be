"""Messages that others put into our queues: each is parked or dropped, none is unpacked, and the worker lives on."""

from __future__ import annotations

import json
import pickle
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from amqp import Message
from kombu import Connection

from pipeline_app.application import prepare
from pipeline_app.runtime import Runtime
from pipeline_app.transport.depth import depths
from pipeline_app.transport.topology import EXCHANGE, PARKED_EXCHANGE, named_queue
from tests.integration.helpers import prove
from tests.integration.worker_run import STAGES, items, make_run, wait
from tests.project import Project, eventually
from tests.worker import Worker

QUEUE = "demo.first"
#: A hint of ours in every respect, but for a message that there never was: it is dropped.
HINT = {"v": 1, "run": "r", "stage": "first", "partition": "default", "message": "nobody's"}
NO_EMBED: dict[str, Any] = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


#: Other headers of Celery's, and what they may be.
HEADERS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("parent_id", "argsrepr", "kwargsrepr", "origin", "lang", "shadow"), (str,)),
    **dict.fromkeys(("retries", "group_index", "replaced_task_nesting"), (int,)),
    "ignore_result": (bool,),
    "stamps": (dict,),
    "stamped_headers": (list,),
}
ODD_HEADERS = [
    (name, odd) for name in HEADERS for odd in ({"a": [1]}, [], ["a"], "odd", "x" * 5000, 7, True, 1.5, None)
]


class Bomb:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@dataclass(kw_only=True)
class Foreign:
    """A message as anybody who may write to RabbitMQ can make it; by default one of ours."""

    body: bytes | str = json.dumps([[HINT], {}, NO_EMBED])
    content_type: str | None = "application/json"
    content_encoding: str | None = "utf-8"
    headers: dict[str, Any] | None = field(
        default_factory=lambda: {"task": QUEUE, "id": "somebody's", "lang": "py", "root_id": "somebody's"}
    )
    properties: dict[str, Any] = field(default_factory=dict)


def with_headers(**changed: Any) -> Foreign:
    message = Foreign()
    assert message.headers is not None
    message.headers |= changed
    return message


def with_hint(**changed: Any) -> Foreign:
    return Foreign(body=json.dumps([[HINT | changed], {}, NO_EMBED]))


def refused(bomb: Path) -> Iterator[Foreign]:
    """None of these is for a stage, whatever is in it; they go into the parked queue."""
    for body in (b"\xff\xfe", b"", "null", "{}", "[]", "[1, 2, 3]", "[[], {}]", "[[], {}, null]", "[" * 20_000):
        yield Foreign(body=body)
    for task in (5, None, True, [], [1], {}, {"a": 1}, "", "x" * 3000, "demo.nothing", "os.system"):
        yield with_headers(task=task)
    for name in (5, None, {}, [], "", "x" * 300, "nul\x00"):
        yield with_headers(id=name)
    yield with_headers(root_id={"a": 1})
    for name, odd in ODD_HEADERS:
        if not isinstance(odd, (*HEADERS[name], type(None))):
            yield with_headers(**{name: odd})
    for late in ("2999-01-01T00:00:00", "nonsense", 5):
        yield with_headers(eta=late)
        yield with_headers(expires=late)
    yield with_headers(expires="2000-01-01T00:00:00")
    yield with_headers(group="g")
    for limit in ("abc", [1], [0.001, None], 5):
        yield with_headers(timelimit=limit)
    yield with_headers(compression="zlib")
    yield with_headers(compression="nonsense")
    yield Foreign(headers=None)
    yield Foreign(headers=None, body=json.dumps({"task": QUEUE, "id": "old", "args": [HINT], "kwargs": {}}))
    pickled = pickle.dumps([[Bomb(bomb)], {}, {}])
    yaml = f"- [!!python/object/apply:os.mkdir ['{bomb}']]\n- {{}}\n- {{}}\n"
    for kind, encoding, body in (
        ("application/x-python-serialize", "binary", pickled),
        ("application/x-yaml", "utf-8", yaml),
        ("application/x-msgpack", "binary", b"\x93\x90\x80\x80"),
        ("application/data", "binary", pickled),
        ("text/plain", "utf-8", "hello"),
        (None, None, pickled),
    ):
        yield Foreign(content_type=kind, content_encoding=encoding, body=body)
        yield Foreign(content_type=kind, content_encoding=encoding, body=body, headers=None)


def parked() -> Iterator[Foreign]:
    """These are a stage's tasks with arguments that are none; they are kept in the store."""
    for changed in (
        {"v": 2},
        {"v": None},
        {"message": 7},
        {"message": "\ud800"},
        {"message": "m" * 100_000},
        {"run": ""},
    ):
        yield with_hint(**changed)
    for body in ([[], {}, NO_EMBED], [[HINT, 1], {}, NO_EMBED], [[HINT], {"more": 1}, NO_EMBED], [[None], {}, {}]):
        yield Foreign(body=json.dumps(body))


def dropped() -> Iterator[Foreign]:
    """These are hints, for a message that there is not, with oddities that nobody has to look at."""
    for name, odd in ODD_HEADERS:
        if isinstance(odd, (*HEADERS[name], type(None))):
            yield with_headers(**{name: odd})
    for embed in ({"chain": 5}, {"chain": [{"a": 1}]}, {"chord": {}}, {}):
        yield Foreign(body=json.dumps([[HINT], {}, NO_EMBED | embed]))
    yield with_headers(unknown=Decimal("1.5"))
    yield Foreign(content_encoding="nonsense")  # JSON is JSON
    yield Foreign(
        properties={"priority": 255, "reply_to": "nobody", "correlation_id": "x" * 200, "expiration": "60000"}
    )


def at_random(seed: int, number: int) -> Iterator[Foreign]:
    """Any of the parts of a message may be anything."""
    chance = random.Random(seed)

    def thing(depth: int = 0) -> Any:
        text = "".join(chance.choices(string.printable + "äß\x00\u2028", k=chance.randrange(12)))
        return chance.choice(
            [None, True, 0, -1, 1 << 40, 1.5, text, text * 50]
            + ([] if depth > 2 else [[thing(depth + 1)], {text[:5] or "a": thing(depth + 1)}])
        )

    names = [
        "task",
        "id",
        "root_id",
        "eta",
        "expires",
        "timelimit",
        "retries",
        "group",
        "compression",
        "lang",
        "shadow",
    ]
    for _ in range(number):
        message = with_headers(**{name: thing() for name in chance.sample(names, chance.randrange(4))})
        if chance.random() < 0.5:
            message.body = chance.choice(
                [chance.randbytes(chance.randrange(60)), json.dumps(thing()), json.dumps([thing()] * 3)]
            )
        if chance.random() < 0.3:
            message.content_type = chance.choice([None, "application/x-python-serialize", "text/plain", "x/y"])
        if chance.random() < 0.3:
            message.content_encoding = chance.choice([None, "binary", "utf-16", "x"])
        if chance.random() < 0.2:
            message.headers = None
        yield message


def put(url: str, messages: list[Foreign]) -> None:
    """Publish through our exchange and, every other one, past it."""
    with Connection(url) as connection:
        channel: Any = connection.default_channel
        named_queue(QUEUE, "quorum")(channel).declare()
        channel.confirm_select()
        for number, message in enumerate(messages):
            body = message.body if isinstance(message.body, bytes) else message.body.encode()
            made = Message(
                body,
                content_type=message.content_type,
                content_encoding=message.content_encoding,
                application_headers=message.headers,
                **message.properties,
            )
            exchange = EXCHANGE.name if number % 2 else ""
            channel.basic_publish_confirm(made, exchange=exchange, routing_key=QUEUE, mandatory=True)


@pytest.fixture
def rt(project: Project) -> Runtime:
    """On a broker that nobody has used."""
    project.amqp_url = project.services.new_vhost()
    project.write("stages.py", STAGES.replace("CHUNK", "1"))
    made = project.runtime()
    prepare(made)
    return made


def waits_in(project: Project, *names: str) -> dict[str, int]:
    """Messages that are in queues, those included that a worker has."""
    vhost = project.amqp_url.rpartition("/")[2]
    rows = project.services.rabbitmqctl("list_queues", "-p", vhost, "name", "messages").splitlines()
    found = dict(row.split("\t") for row in rows)
    return {name: int(found.get(name, 0)) for name in names}


def settled(project: Project, worker: Worker) -> None:
    """Wait until nothing is left of what was put there, neither in the queue nor with the worker."""
    worker.wait_for(lambda: depths(project.amqp_url, [QUEUE])[QUEUE].ready == 0, 90)
    worker.wait_for(lambda: waits_in(project, QUEUE) == {QUEUE: 0}, 60)


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "solo"])
def test_every_foreign_message_ends_where_it_should(project: Project, rt: Runtime, tmp_path: Path, pool: str) -> None:
    """Given messages of all wrong kinds, then each is where the documents say, and every slot still works."""
    bomb = tmp_path / "loaded"
    fates = [list(refused(bomb)), list(parked()), list(dropped())]
    parking = PARKED_EXCHANGE.name
    with project.worker("-Q", QUEUE, pool=pool) as worker:
        put(project.amqp_url, [message for messages in fates for message in messages])
        settled(project, worker)
        # RabbitMQ moves what was rejected in its own time.
        worker.wait_for(lambda: depths(project.amqp_url, [parking])[parking].ready >= len(fates[0]))
        worker.wait_for(lambda: worker.text.count("'not open'") >= len(fates[2]))
        in_broker = depths(project.amqp_url, [parking])[parking].ready
        in_store = rt.store.db.parked_messages.count_documents({})
        ends = (in_broker, in_store, worker.text.count("'not open'"))
        assert ends == tuple(len(messages) for messages in fates)
        assert not bomb.exists()

        every_slot_works(project, rt, worker, slots=1 if pool == "solo" else 2)
    assert "Unrecoverable error" not in worker.text


@pytest.mark.parametrize("pool", ["prefork", "threads"])
@pytest.mark.parametrize("seed", range(2))
def test_messages_of_any_kind(project: Project, rt: Runtime, pool: str, seed: int) -> None:
    """Given messages that chance made, then none of them stays in the queue or costs a slot."""
    with project.worker("-Q", QUEUE, pool=pool) as worker:
        put(project.amqp_url, list(at_random(seed, 300)))
        settled(project, worker)
        every_slot_works(project, rt, worker, slots=2)
    assert "Unrecoverable error" not in worker.text


def every_slot_works(project: Project, rt: Runtime, worker: Worker, *, slots: int) -> None:
    """As many handlers as there are slots run at the same time, in the process that was there from the start."""
    names = "abcdefgh"[:slots]
    make_run(project, rt, *items(*names, wait_for="go"))
    worker.wait_for(lambda: len(project.calls()) == slots)
    project.write("go", "")
    eventually(lambda: all((project.folder / f"ended-{name}").exists() for name in names))
    wait(rt, stage="first")
    assert worker.process.poll() is None
    prove(rt, pending=slots)
