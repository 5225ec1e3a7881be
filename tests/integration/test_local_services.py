"""Embedded services as real processes: each test has project folders of its own, and ends whatever it started there."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from pymongo import MongoClient

from pipeline_app import settings
from pipeline_app.errors import RefusedError, StoreError, UsageError
from pipeline_app.local import files, mongod, processes, rabbitmq, services, workers

needs_rabbitmq = pytest.mark.skipif(
    rabbitmq.find_tools() is None and not os.environ.get("CI"), reason="this machine has no rabbitmq-server"
)

Projects = Callable[[str], Path]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Projects]:
    """Makes a project's folder, or returns to it; in the end nothing may be left of any of them."""
    monkeypatch.delenv("AMQP_URL", raising=False)
    monkeypatch.delenv("MONGODB_URL", raising=False)
    used: set[Path] = set()

    def enter(name: str) -> Path:
        folder = tmp_path / f"project {name}"  # a space, as people have
        folder.mkdir(exist_ok=True)
        used.add(folder)
        monkeypatch.chdir(folder)
        return folder

    yield enter
    for folder in used:
        enter(folder.name.removeprefix("project "))
        services.down(worker_grace_s=1.0)
        assert left_behind(folder) == []


def left_behind(folder: Path) -> list[str]:
    """Running processes in whose command line or environment the folder stands."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *process.environ().values()]
        except (psutil.Error, OSError):
            continue
        if process.pid != os.getpid() and any(str(folder) in word for word in words):
            found.append(" ".join(words)[:200])
    return found


def through_broker(url: str, action: str) -> str:
    """Put a message into a durable queue, or get it, with kombu in a process of its own (it never closes MongoDB)."""
    script = textwrap.dedent(
        """
        import sys
        from kombu import Connection
        url, action = sys.argv[1:]
        with Connection(url) as connection, connection.SimpleQueue("letters") as queue:
            if action == "get":
                message = queue.get(timeout=5)
                message.ack()
                print(message.payload)
            else:
                queue.put(action)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, url, action], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def write_note(url: str, text: str) -> None:
    """In a transaction, as the store writes."""
    with (
        MongoClient[dict[str, str]](url, serverSelectionTimeoutMS=5000) as client,
        client.start_session() as session,
        session.start_transaction(),
    ):
        client.get_default_database()["notes"].insert_one({"text": text}, session=session)


def read_notes(url: str) -> list[str]:
    with MongoClient[dict[str, str]](url, serverSelectionTimeoutMS=5000) as client:
        return [note["text"] for note in client.get_default_database()["notes"].find()]


def states() -> dict[str, str]:
    return {status.name: status.state for status in services.status()}


def eventually(condition: Callable[[], bool], within_s: float = 15.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@needs_rabbitmq
def test_two_projects_do_not_meet_even_on_ports_that_the_other_one_had(
    project: Projects, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a project that ran, and another one that took its ports meanwhile
    monkeypatch.setenv("RABBITMQ_NODENAME", "somebody@elsewhere")  # the user's own node is none of our business
    first = project("first")
    before = services.up(broker="rabbitmq")
    write_note(before.mongodb_url, "of the first")
    through_broker(before.amqp_url, "to the first")
    assert states() == {"mongod": "running", "rabbitmq": "running"}
    assert services.down() == ["rabbitmq", "mongod"]
    assert left_behind(first) == []

    second = project("second")
    for ports in ("mongod/port.json", "rabbitmq/ports.json"):
        (second / ".pipeline" / ports).parent.mkdir(parents=True)
        (second / ".pipeline" / ports).write_bytes((first / ".pipeline" / ports).read_bytes())
    other = services.up(broker="rabbitmq")
    assert (other.amqp_url, other.mongodb_url) == (before.amqp_url, before.mongodb_url)

    # When the first one comes back
    project("first")
    after = services.up(broker="rabbitmq")

    # Then it is on other ports, has all of its data, and none of them are the other's
    assert not {after.amqp_url, after.mongodb_url} & {other.amqp_url, other.mongodb_url}
    assert read_notes(after.mongodb_url) == ["of the first"]
    assert read_notes(other.mongodb_url) == []
    assert rabbitmq.ctl(first / ".pipeline", "list_queues", "name").split() == ["name", "letters"]
    assert rabbitmq.ctl(second / ".pipeline", "list_queues", "name").split() == []
    assert through_broker(after.amqp_url, "get") == "to the first"

    # And each ends alone
    services.down()
    assert left_behind(first) == []
    project("second")
    assert states() == {"mongod": "running", "rabbitmq": "running"}


def test_without_rabbitmq_mongod_is_the_broker(project: Projects) -> None:
    # Given a project with a space in its path
    folder = project("alone")

    # When it comes up twice
    said: list[str] = []
    first = services.up(said.append, broker="mongodb")
    again = services.up(broker="mongodb")

    # Then the second call found the first one's, and so do settings
    assert first.started == ("mongod",)
    assert again.started == ()
    assert (again.amqp_url, again.mongodb_url) == (first.amqp_url, first.mongodb_url)
    assert settings.load().amqp_url == first.amqp_url
    assert settings.load().mongodb_url == first.mongodb_url
    assert said[0] == "starting mongod"
    assert states() == {"mongod": "running", "broker (mongodb transport)": "running"}

    # And messages and data outlast a `down`
    through_broker(first.amqp_url, "kept")
    write_note(first.mongodb_url, "kept")
    assert services.down() == ["mongod"]
    assert left_behind(folder) == []
    assert states()["mongod"] == "stopped"
    assert not settings.services_file().exists()
    later = services.up(broker="mongodb")
    assert through_broker(later.amqp_url, "get") == "kept"
    assert read_notes(later.mongodb_url) == ["kept"]


def test_a_server_that_does_not_answer_is_unreachable(project: Projects) -> None:
    project("frozen")
    services.up(broker="mongodb")
    pid = services.status()[0].pid
    assert pid is not None

    os.kill(pid, signal.SIGSTOP)
    try:
        assert states()["mongod"] == "unreachable"
    finally:
        os.kill(pid, signal.SIGCONT)

    assert states()["mongod"] == "running"


def test_two_commands_at_once_start_one_server(project: Projects) -> None:
    folder = project("busy")

    with ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda _: services.up(broker="mongodb"), range(2)))

    assert sorted(found.started for found in both) == [(), ("mongod",)]
    assert both[0].mongodb_url == both[1].mongodb_url
    assert len(left_behind(folder)) == 1


def test_a_recycled_pid_is_not_killed(project: Projects) -> None:
    # Given files that name a pid which belongs to somebody else by now
    folder = project("stale")
    state_dir = folder / ".pipeline"
    files.make_state_dir(state_dir)
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        created = psutil.Process(stranger.pid).create_time() - 3600
        record = {"pid": stranger.pid, "create_time": created, "log": "", "mark": f"{state_dir}:mongod"}
        written = {"amqp_url": "mongodb://127.0.0.1:1/b", "mongodb_url": "mongodb://127.0.0.1:1/a"}
        files.write_json(
            state_dir / "services.json",
            {**written, "processes": [{"name": "mongod", **record}, {"name": "x", **record}]},
        )
        worker = {"name": "w", "stage": "survey.load", "pool": "solo", "concurrency": 1}
        process = {"name": "worker-w", **record}
        files.write_json(state_dir / "workers.json", {"workers": [{**worker, "process": process}]})

        # When the project's services are stopped
        assert states()["mongod"] == "stopped"
        assert workers.running() == []
        stopped = services.down()

        # Then the stranger lives
        assert stopped == []
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


@needs_rabbitmq
def test_a_start_that_fails_takes_the_other_one_back(project: Projects) -> None:
    # Given data that mongod cannot read
    folder = project("broken")
    data = folder / ".pipeline" / "mongod" / "data"
    data.mkdir(parents=True)
    (data / "WiredTiger").write_text("WiredTiger\nof another world\n")
    (data / "WiredTiger.turtle").write_text("this is no turtle file\n")

    # When both are started
    with pytest.raises(StoreError) as caught:
        services.up(broker="rabbitmq")

    # Then the error has mongod's reason, and nothing is left of RabbitMQ
    assert "mongod ended while it started" in caught.value.message
    assert "WiredTiger" in caught.value.message
    assert "mongod.log" in (caught.value.hint or "")
    assert left_behind(folder) == []
    assert not settings.services_file().exists()


def start_up(folder: Path, broker: str) -> subprocess.Popen[bytes]:
    """`up` as a command of its own, in a process group of its own, as a shell starts it."""
    script = f"from pipeline_app.local import services; services.up(broker={broker!r})"
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=folder, stderr=subprocess.DEVNULL, start_new_session=True
    )


@needs_rabbitmq
@pytest.mark.parametrize(("later_s", "presses"), [(0.0, 1), (1.5, 3)])
def test_ctrl_c_while_it_starts_leaves_nothing(project: Projects, later_s: float, presses: int) -> None:
    # Given a command that has started mongod and RabbitMQ, which is not ready yet
    folder = project("interrupted")
    state_dir = folder / ".pipeline"
    command = start_up(folder, "rabbitmq")
    assert eventually(lambda: bool(processes.marked(state_dir, "rabbitmq") and processes.marked(state_dir, "mongod")))
    time.sleep(later_s)  # the moment at which somebody happens to press it

    # When Ctrl-C comes, also from somebody impatient
    for _ in range(presses):
        os.killpg(command.pid, signal.SIGINT)
        time.sleep(0.1)

    # Then it ends as interrupted, with nothing left
    assert command.wait(timeout=20) == -signal.SIGINT
    assert left_behind(folder) == []
    assert not settings.services_file().exists()


@needs_rabbitmq
def test_what_a_killed_command_left_is_found_again(project: Projects) -> None:
    # Given a command that was killed before it could write anything down
    folder = project("killed")
    state_dir = folder / ".pipeline"
    command = start_up(folder, "rabbitmq")
    assert eventually(lambda: bool(processes.marked(state_dir, "rabbitmq") and processes.marked(state_dir, "mongod")))
    os.killpg(command.pid, signal.SIGKILL)
    command.wait()
    orphan = processes.marked(state_dir, "mongod")[0].pid

    # When the next one comes
    found = services.up(broker="mongodb")

    # Then it has the data to itself
    assert not psutil.pid_exists(orphan) or psutil.Process(orphan).status() == psutil.STATUS_ZOMBIE
    write_note(found.mongodb_url, "mine")
    assert set(services.down()) >= {"mongod", "rabbitmq"}
    assert left_behind(folder) == []


def test_damaged_addresses_do_not_stop_down(project: Projects) -> None:
    folder = project("damaged")
    services.up(broker="mongodb")
    settings.services_file().write_text('{"amqp_url": "mongo')

    assert services.down() == ["mongod"]
    assert left_behind(folder) == []
    assert settings.read_services_file() == {}


def test_a_process_is_found_after_the_clock_was_moved(project: Projects) -> None:
    # Given a process whose creation time reads otherwise than when it was written down
    folder = project("clock")
    state_dir = folder / ".pipeline"
    files.make_state_dir(state_dir)
    record = processes.start("sleeper", ["sleep", "60"], state_dir=state_dir, env=os.environ)
    moved = replace(record, create_time=record.create_time - 3600)

    # Then it is still the same process, by its mark, and ends when asked to
    found = processes.find(moved)
    assert found is not None
    assert found.pid == record.pid
    assert processes.stop([moved], grace_s=5.0) == []
    assert processes.find(record) is None


def test_a_port_in_use_is_not_chosen() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", processes.free_port()))
        taken.listen()
        port = taken.getsockname()[1]

        assert processes.free_port(port) != port

    assert processes.free_port(port) == port


def test_without_any_mongod_the_error_says_what_to_install(
    project: Projects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given neither a mongod on PATH nor the wheel
    project("bare")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "fiftyone", None)  # how Python itself says that it is not installed

    with pytest.raises(StoreError) as caught:
        services.up(broker="mongodb")

    assert "pipeline-app[local]" in (caught.value.hint or "")


def test_the_wheels_binary_gets_its_run_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = make_wheel(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PATH", str(tmp_path))

    found = mongod.find_binary(tmp_path)

    assert found == binary
    assert os.access(binary, os.X_OK)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_wheel_of_somebody_else_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a wheel that root installed, and a project of another user
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        binary = make_wheel(Path(folder) / "site")
        state_dir = Path(folder) / "state"
        state_dir.mkdir()
        state_dir.chmod(0o777)
        monkeypatch.syspath_prepend(Path(folder) / "site")
        monkeypatch.setenv("PATH", folder)

        # When that user looks for mongod
        os.seteuid(65534)
        try:
            found = mongod.find_binary(state_dir)
        finally:
            os.seteuid(0)

        # Then there is a copy that runs, and the wheel is as it was
        assert found == state_dir / "mongod" / "bin" / "mongod"
        assert os.access(found, os.X_OK)
        assert not os.access(binary, os.X_OK)


def make_wheel(site: Path) -> Path:
    binary = site / "fiftyone" / "db" / "bin" / "mongod"
    binary.parent.mkdir(parents=True)
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o644)
    return binary


#: A Celery application of the name that workers are started with: what it does is not the matter here.
APPLICATION = """
import os, signal, time
from celery import Celery
app = Celery("pipeline_app", broker=os.environ["BROKER"])
app.conf.worker_enable_remote_control = False
app.conf.broker_transport_options = {"polling_interval": 0.1}

@app.task(name="stubborn")
def stubborn():
    open("stubborn-runs", "w").close()
    time.sleep(60)
"""


def test_workers_are_started_found_again_and_stopped(project: Projects) -> None:
    # Given services, and an application in the project's folder
    folder = project("working")
    (folder / "pipeline_app.py").write_text(APPLICATION)
    broker = services.up(broker="mongodb").amqp_url
    start = {"pool": "prefork", "concurrency": 1, "env": {"BROKER": broker}}

    # When two workers are started
    started = workers.start(["survey.load", "survey.analyze"], names=["load", "analyze"], **start)

    # Then they are there, under their names
    assert workers.running() == started
    assert [(worker.name, worker.stage) for worker in started] == [
        ("load", "survey.load"),
        ("analyze", "survey.analyze"),
    ]
    assert all(eventually(lambda w=worker: " ready." in processes.tail(w.log)) for worker in started)
    with pytest.raises(RefusedError, match="load runs already"):
        workers.start(["survey.load"], names=["load"], **start)
    with pytest.raises(UsageError):
        workers.start(["survey.load"], names=["../load"], **start)

    # And one that is busy beyond its time is killed, with its children
    send = (
        "import sys; from celery import Celery; Celery(broker=sys.argv[1]).send_task('stubborn', queue='survey.load')"
    )
    subprocess.run([sys.executable, "-c", send, broker], check=True)
    assert eventually((folder / "stubborn-runs").exists)
    family = [psutil.Process(started[0].pid), *psutil.Process(started[0].pid).children(recursive=True)]
    assert len(family) == 2
    assert workers.stop(["load"], grace_s=0.5) == ["load"]
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)

    # And `down` lets the other one end by itself
    assert [worker.name for worker in workers.running()] == ["analyze"]
    assert services.down() == ["worker analyze", "mongod"]
    log = Path(started[1].log).read_text()
    assert "Warm shutdown" in log
    assert "ERROR" not in log  # nor did the two disturb each other at their first connection
    assert json.loads((folder / ".pipeline" / "workers.json").read_text()) == {"workers": []}
