"""Passwords are nowhere to be seen, whatever people look at; and what is no JSON is never unpacked."""

from __future__ import annotations

import base64
import json
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import quote, urlsplit

import psutil
import pytest
from kombu import Connection

from pipeline_app.local import processes
from pipeline_app.transport.topology import named_queue
from tests.integration.secured import admin, guarded_mongod, make_mongodb_user, make_rabbitmq_user
from tests.integration.test_least_privilege import CALL_ALL, HELD, commands
from tests.project import CELERYCONFIG, STAGES, Project, eventually
from tests.services import TestServices

#: With characters that are written otherwise in an address.
PASSWORD = "tulip/bulb@77"
SPELLINGS = (PASSWORD, quote(PASSWORD, safe=""), quote(PASSWORD))

#: A handler whose error shows its own address, as those of HTTP clients do.
TELLTALE = STAGES.replace(
    '        raise PermanentError("it says so")',
    '        raise PermanentError("cannot reach " + os.environ["AMQP_URL"] + " nor " + os.environ["MONGODB_URL"])',
)


@pytest.fixture
def project(tmp_path: Path, services: TestServices) -> Iterator[Project]:
    """A project whose services want a password, which its celeryconfig.py has as well."""
    made = Project(tmp_path / "project", services)
    made.amqp_url = make_rabbitmq_user(services, PASSWORD)
    made.write("stages.py", TELLTALE)
    with guarded_mongod(tmp_path) as port:
        made.mongodb_url = make_mongodb_user(port, PASSWORD)
        addresses = f"amqp_url = {made.amqp_url!r}\nmongodb_url = {made.mongodb_url!r}\n"
        made.write("celeryconfig.py", CELERYCONFIG + addresses)
        yield made


def titles() -> str:
    """What everybody on this machine can read of every process."""
    found = []
    for process in psutil.process_iter():
        try:
            found.append(f"{process.name()} {' '.join(process.cmdline())}")
        except psutil.Error:
            continue
    return "\n".join(found)


def in_queues(url: str, *names: str) -> str:
    """The messages that wait in queues, with all that they carry; they stay."""
    found = []
    with Connection(url) as connection:
        channel: Any = connection.default_channel
        for name in names:
            named_queue(name, "quorum")(channel).declare()
            while message := channel.basic_get(name):
                found.append(f"{message.body!r} {message.headers} {message.properties}")
    return "\n".join(found)


def in_store(url: str) -> str:
    """Every document."""
    with admin(urlsplit(url).port or 0) as client:
        names = client.pipeline_app.list_collection_names()
        return "\n".join(f"{name} {row}" for name in names for row in client.pipeline_app[name].find())


@contextmanager
def running(project: Project, name: str, *command: str, **env: str) -> Iterator[Path]:
    """A command of Celery in the background; the file of what it prints."""
    state_dir = project.folder / ".watching"
    (state_dir / "logs").mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "celery", "-A", "pipeline_app", *command]
    record = processes.start(name, words, state_dir=state_dir, env={**project.env, **env}, cwd=project.folder)
    try:
        yield Path(record.log)
    finally:
        processes.stop([record], grace_s=10)


def page(port: int, path: str) -> str:
    """A page of Flower."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    request.add_header("Authorization", "Basic " + base64.b64encode(b"me:sesame").decode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(answer.read().decode())


def pages(port: int) -> str:
    """What Flower shows of the workers and the broker."""

    def workers() -> list[str]:
        try:
            return list(json.loads(page(port, "/api/workers?refresh=1")))
        except (URLError, OSError):
            return []

    names = eventually(workers, 60)
    paths = [
        "/workers",
        "/tasks",
        "/broker",
        "/api/workers",
        "/api/tasks",
        *[f"/worker/{quote(name)}" for name in names],
    ]
    return "\n".join(page(port, path) for path in paths)


@pytest.mark.timeout(400)
def test_a_password_is_seen_nowhere(project: Project) -> None:
    """Given services with a password, then it stands in nothing that a pipeline, its tools and its failures print."""
    seen: dict[str, str] = {}
    rows = [{"job_id": f"j{n}", "payload": {"n": n, "fail": n % 2}, "tags": {"kind": "ab"[n % 2]}} for n in range(6)]
    rows += [{"job_id": "dead", "payload": {"n": 1, "permanent": True}}]
    rows += [{"job_id": "killer", "payload": {"n": 2, "kill": True}}]
    project.write("one.jsonl", HELD)
    port = processes.free_port(None)

    # Given a run that waits in the queues
    project.seed("r", rows)
    seen["queues"] = in_queues(project.amqp_url, "demo.first", "demo.first.kind__a")

    # When it goes through under the eyes of everything that can look
    with (
        running(project, "events", "events", "--dump") as events,
        running(
            project, "flower", "flower", f"--port={port}", "--address=127.0.0.1", FLOWER_BASIC_AUTH="me:sesame"
        ) as flower,
        project.worker("-E", "-l", "DEBUG", pool="prefork") as first,
        project.worker("-E", "-l", "DEBUG") as second,
    ):
        project.json("run", "wait", "r", "--timeout", "120", timeout=150)
        seen["titles"] = titles()
        name = next(row["worker"] for row in project.json("workers") if row["worker"].startswith(second.log.stem))
        asked = project.run(sys.executable, "-c", CALL_ALL, input=json.dumps(commands(name)), timeout=120)
        assert asked.returncode == 0, asked.stderr
        seen["commands"] = asked.stdout + asked.stderr
        for words in (["inspect", "conf"], ["inspect", "stats"], ["inspect", "report"], ["report"]):
            asked = project.run("celery", "-A", "pipeline_app", *words)
            assert asked.returncode == 0, (words, asked.stdout, asked.stderr)
            seen["celery " + " ".join(words)] = asked.stdout + asked.stderr
        seen["Flower's pages"] = pages(port)
        eventually(lambda: "task received: demo.first" in events.read_text())
        seen["a worker's log"], seen["the other's"] = first.text, second.text
        seen["events"], seen["Flower's log"] = events.read_text(), flower.read_text()
    seen["the store"] = in_store(project.mongodb_url)
    seen["errors"] = errors(project)

    # Then all of them speak of the services, and none of them says the password
    shown = {where: [word for word in SPELLINGS if word in text] for where, text in seen.items()}
    assert not any(shown.values()), {where: words for where, words in shown.items() if words}
    assert "cannot reach amqp://" in seen["commands"]
    assert ":***@127.0.0.1" in seen["the store"]
    for where in ("a worker's log", "celery inspect conf", "celery report", "Flower's pages", "errors"):
        assert "127.0.0.1" in seen[where], where


def errors(project: Project) -> str:
    """What commands say when something is wrong with the addresses."""
    user = urlsplit(project.amqp_url).username
    amqp = ("AMQP_URL", "amqp://{}@127.0.0.1:{}/")
    mongodb = ("MONGODB_URL", "mongodb://{}@127.0.0.1:{}/pipeline_app")
    said = []
    for (variable, form), credentials, place in [
        (amqp, f"{user}:{SPELLINGS[1]}", 1),  # nobody there
        (amqp, f"nobody:{SPELLINGS[1]}", urlsplit(project.amqp_url).port),  # another user
        (amqp, f"{user}:{PASSWORD}", 1),  # not spelled as an address is
        (mongodb, f"pipeline:{SPELLINGS[1]}", 1),
        (mongodb, f"nobody:{SPELLINGS[1]}", urlsplit(project.mongodb_url).port),
        (mongodb, f"pipeline:{PASSWORD}", 1),
        (mongodb, f"pipeline:{SPELLINGS[1]}", "nonsense"),
    ]:
        env = {variable: form.format(credentials, place), "PIPELINE_TRACEBACK": "1"}
        done = project.cli("run", "status", "r", env=env)
        said.append(done.stdout + done.stderr)
    started = project.run("celery", "-A", "pipeline_app", "report", env={"AMQP_URL": f"amqp://{user}:{PASSWORD}@h/"})
    assert started.returncode != 0
    return "\n".join([*said, started.stdout, started.stderr])


def test_a_password_given_as_a_flag_leaves_the_command_line(project: Project) -> None:
    """Given a command that runs for long, when its address was a flag, then its title does not show it."""
    state_dir = project.folder / ".watching"
    (state_dir / "logs").mkdir(parents=True)
    url = f"mongodb://somebody:{SPELLINGS[1]}@127.0.0.1:1/pipeline_app"
    command = ["pipeline-app", "--mongodb-url", url, f"--amqp-url=amqp://a:{SPELLINGS[1]}@h/", "run", "wait", "r"]
    record = processes.start("wait", command, state_dir=state_dir, env=project.env, cwd=project.folder)
    process = psutil.Process(record.pid)
    try:
        # Until Python has read the command line, it is there: the command begins again without it.
        eventually(lambda: SPELLINGS[1] not in " ".join(process.cmdline()))
        assert process.cmdline()[-3:] == ["run", "wait", "r"]
        assert SPELLINGS[1] not in titles()
        # It has what it was given all the same.
        eventually(lambda: "somebody:***@127.0.0.1" in Path(record.log).read_text())
        assert SPELLINGS[1] not in Path(record.log).read_text()
    finally:
        processes.stop([record], grace_s=10)
