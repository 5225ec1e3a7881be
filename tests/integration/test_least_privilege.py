"""A whole pipeline and every command as the users that docs/security.md makes, with its own commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from kombu import Connection, Queue
from pymongo import MongoClient
from pymongo.errors import OperationFailure

from pipeline_app.store.client import Store
from tests.integration.secured import admin, guarded_mongod, make_mongodb_user, make_rabbitmq_user
from tests.integration.test_store import die_in_a_transaction
from tests.project import Project, eventually
from tests.services import TestServices
from tests.unit.test_cli_commands import COMMANDS

PASSWORD = "tulip-bulb-77"

#: What a service says when it refuses.
REFUSALS = ("ACCESS_REFUSED", "not authorized", "requires authentication", "refuses us")

#: Commands that use no services of the user's, or start some.
LOCAL = {"demo", "up", "down", "services", "try"}


@pytest.fixture(scope="module")
def mongodb_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with guarded_mongod(tmp_path_factory.mktemp("guarded")) as port:
        yield make_mongodb_user(port, PASSWORD)


@pytest.fixture
def project(tmp_path: Path, services: TestServices, mongodb_url: str) -> Iterator[Project]:
    made = Project(tmp_path, services)
    made.amqp_url = make_rabbitmq_user(services, PASSWORD)
    made.mongodb_url = mongodb_url
    yield made
    # The user of the application may not remove its database.
    with admin(urlsplit(mongodb_url).port or 0) as client:
        client.drop_database("pipeline_app")


def commands(worker: str) -> dict[str, list[str]]:
    """Arguments for every command that uses the services, about the run `r` with its dead letter, and another run."""
    target = ["--selector", "kind=none"]
    stage = ["--run", "r", "--stage", "first"]
    return {
        "run init": ["other", "--pipeline", "demo"],
        "hold set": [*target, "--until", "+1h"],
        "run seed": ["other", "--jobs", "one.jsonl"],
        "hold list": [],
        "priority": ["other", "5", "--job", "held"],
        "move": ["other", "--to", "second", "--job", "held"],
        "cancel": ["other", "--job", "held", "--yes"],
        "hold clear": target,
        "run cancel": ["other", "--yes"],
        "run status": ["r"],
        "run watch": ["r"],
        "run wait": ["r", "--timeout", "30"],
        "run list": [],
        "run results": ["r"],
        "run verify": ["r", "--repair"],
        "workers": [],
        "failures": ["r", "--grouped"],
        "attempts": ["r"],
        "events": ["r"],
        "job": ["r", "dead"],
        "why": ["r", "dead"],
        "throttle set": [*target, "--rate", "5/s"],
        "throttle list": [],
        "throttle clear": target,
        "pause": ["r", "--stage", "second"],
        "resume": ["r", "--stage", "second"],
        # Long enough for the three that follow.
        "replay start": ["r", "--status", "terminal", "--rate", "1/m", "--yes"],
        "replay list": ["r"],
        "replay pause": ["REPLAY"],
        "replay resume": ["REPLAY"],
        "replay cancel": ["REPLAY"],
        "stage start": [*stage, "--dry-run"],
        "stage scale": [*stage, "--workers", "2", "--dry-run"],
        "stage replace": [*stage, "--dry-run"],
        "stage stop": [*stage, "--worker", worker],
        "check": [],
    }


#: The other run's only job, which a hold keeps where it is.
HELD = '{"job_id": "held", "payload": {"n": 1}, "tags": {"kind": "none"}}\n'

#: Calls commands one after the other in one process: reads {name: arguments}, prints {name: [exit code, output]}.
CALL_ALL = """
import json, sys
from click.testing import CliRunner
from pipeline_app.views.cli.main import app

answers, replay = {}, ""
for name, arguments in json.load(sys.stdin).items():
    words = [replay if word == "REPLAY" else word for word in arguments]
    done = CliRunner().invoke(app, [*name.split(), *words, "--json"])
    answers[name] = [done.exit_code, done.output]
    if name == "replay start":
        replay = json.loads(done.stdout)["operation"]
print(json.dumps(answers))
"""


@pytest.mark.timeout(300)
def test_a_pipeline_and_every_command_as_the_documented_users(project: Project) -> None:
    """Given users with the documented rights, then jobs of all fates go through, and nothing is refused to anybody."""
    rows = [{"job_id": f"j{n}", "payload": {"n": n, "fail": n % 3}, "tags": {"kind": f"k{n % 4}"}} for n in range(24)]
    rows += [{"job_id": "dead", "payload": {"n": 1, "permanent": True}}]
    rows += [{"job_id": "killer", "payload": {"n": 2, "kill": True}}]
    project.write("one.jsonl", HELD)
    with project.worker("-E", pool="prefork") as first, project.worker("-E", "-Q", "demo.first", pool="solo") as second:
        project.seed("r", rows)
        # One job kills its process, and runs in one of its own the last time.
        states = project.json("run", "wait", "r", "--timeout", "120", timeout=150)["states"]
        assert (states["terminal"], states["dead_lettered"]) == (24, 2)

        name = next(row["worker"] for row in project.json("workers") if row["worker"].startswith(second.log.stem))
        done = project.run(sys.executable, "-c", CALL_ALL, input=json.dumps(commands(name)), timeout=120)
        assert done.returncode == 0, done.stderr
        for command, (code, output) in json.loads(done.stdout).items():
            if command != "check":  # it says itself what it may not look at
                assert code == 0, (command, code, output)
                assert not [word for word in REFUSALS if word in output], (command, output)
        findings = json.loads(json.loads(done.stdout)["check"][1])["findings"]
        assert not [row for row in findings if row["severity"] == "error"], findings
        for arguments in (["inspect", "ping"], ["inspect", "active_queues"], ["status"]):
            asked = project.run("celery", "-A", "pipeline_app", *arguments)
            assert asked.returncode == 0, (arguments, asked.stdout, asked.stderr)
        log = first.text + second.text
    assert not [line for line in log.splitlines() if any(word in line for word in REFUSALS)]
    assert project.json("run", "verify", "r")["ok"]


def test_no_command_was_forgotten() -> None:
    assert set(COMMANDS) - LOCAL == set(commands(""))


def test_what_a_killed_process_had_locked_is_freed(project: Project) -> None:
    """Given a process of the same user that was killed in its transaction, then the user may end that."""
    store = Store(project.mongodb_url)
    store.db.job_states.insert_one({"_id": "r/1"})
    die_in_a_transaction(project.mongodb_url, "victim")
    try:
        assert eventually(lambda: store.end_transactions("victim")) == 1
    finally:
        store.close()


def test_the_user_of_rabbitmq_may_do_nothing_else(project: Project) -> None:
    with Connection(project.amqp_url) as connection:
        for name in ("demonstration", "other.queue", "pipeline_app.others"):
            with pytest.raises(connection.channel_errors, match="access to queue"):
                Queue(name, durable=True)(connection.channel()).declare()
        with pytest.raises(connection.channel_errors, match=r"access to exchange 'amq\.fanout'"):
            publish(connection.channel(), "amq.fanout")


def publish(channel: Any, exchange: str) -> None:
    """Publish and wait until the broker has looked at it."""
    channel.confirm_select()
    channel.basic_publish_confirm(channel.prepare_message(b"x"), exchange=exchange)


def test_the_user_of_mongodb_may_do_nothing_else(project: Project) -> None:
    with MongoClient[dict[str, Any]](project.mongodb_url) as client:
        for refused in (
            lambda: client.other.things.insert_one({}),
            lambda: client.admin.system.users.find_one(),
            lambda: client.pipeline_app.command("createUser", "x", pwd="x", roles=[]),
            lambda: client.drop_database("pipeline_app"),
            lambda: client.pipeline_app.job_states.drop(),
        ):
            with pytest.raises(OperationFailure, match="not authorized"):
                refused()
