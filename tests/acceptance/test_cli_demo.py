"""`demo`, `up`, `down` and `services` as a newcomer types them: no address named, nothing running."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline_app.local import processes
from tests.project import REPOSITORY

pytestmark = pytest.mark.timeout(240)

FILES = {
    "good.py": '"""Doc."""\n\n\ndef f(x):\n    return 1 if x else 2\n',
    "pkg/__init__.py": "",
    "pkg/more.py": "class A:\n    pass\n",
    "pkg/test/test_more.py": "assert True\n",
    "pkg/bad.py": "print 'hello'\n",
    "site-packages/left_out.py": "x = 1\n",
}


class Clone:
    """A clone of the repository, as far as its application goes, and what a newcomer's shell has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "clone"
        self.folder.mkdir()
        shutil.copy(REPOSITORY / "celeryconfig.py", self.folder)
        shutil.copytree(REPOSITORY / "handlers", self.folder / "handlers")
        self.code = folder / "code"
        for name, text in FILES.items():
            (self.code / name).parent.mkdir(parents=True, exist_ok=True)
            (self.code / name).write_text(text)
        named = {"AMQP_URL", "MONGODB_URL"}
        self.env = {name: value for name, value in os.environ.items() if name not in named}
        self.env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{self.env['PATH']}"

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """`pipeline-app ARGUMENTS`, in a process group of its own."""
        return subprocess.Popen(
            ["pipeline-app", *arguments],
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The same, to its end."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=180)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def json(self, *arguments: str, code: int = 0) -> Any:
        """What it prints with --json, after checking its exit code."""
        done = self.run(*arguments, "--json")
        assert done.returncode == code, (arguments, done.returncode, done.stdout[-2000:], done.stderr[-4000:])
        return json.loads(done.stdout)

    def left_running(self) -> list[str]:
        """Names of processes that this project started and that still run."""
        return sorted(record.name for record in processes.marked(self.folder / ".pipeline"))


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Clone]:
    """A clone whose services are stopped afterwards."""
    made = Clone(tmp_path)
    yield made
    made.run("down")
    assert made.left_running() == []


def test_the_demo_accounts_for_every_file(clone: Clone) -> None:
    # When a newcomer surveys a folder
    done = clone.json("demo", str(clone.code))

    # Then every file is accounted for: the bad one is a dead letter, the one in site-packages is left out
    assert (done["ok"], done["seeded"]) == (True, 5)
    assert (done["states"]["terminal"], done["states"]["dead_lettered"]) == (4, 1)
    assert [row["job_id"] for row in done["failures"]] == ["pkg/bad.py"]
    assert done["verification"]["exact"]
    assert done["services"]["embedded"]

    # and the run is left to be looked at
    status = clone.json("run", "status", "last")
    assert (status["run"], status["state"]) == (done["run"], "complete")
    lines = clone.run("run", "results", "last", "--json").stdout.splitlines()
    rows = {row["job_id"]: row for row in map(json.loads, lines)}
    assert set(rows) == {"good.py", "pkg/__init__.py", "pkg/more.py", "pkg/test/test_more.py"}
    assert rows["good.py"]["result"]["lines"] == 5
    assert rows["pkg/test/test_more.py"]["tags"] == {"kind": "test"}

    # and the services, but no worker
    shown = clone.json("services")
    assert {row["state"] for row in shown["services"]} == {"running"}
    assert shown["workers"] == []
    assert [row["state"] for row in clone.json("workers")] == ["stopped"] * 3
    assert not any(name.startswith("worker") for name in clone.left_running())

    # and a second demo uses what runs, and says in words what came of it
    again = clone.run("demo", str(clone.code))
    assert again.returncode == 0, again.stderr
    assert "starting mongod" not in again.stderr
    assert "5 files in " in again.stdout
    assert "every job is accounted for" in again.stdout
    assert "PermanentError: is not Python" in again.stdout
    assert "pipeline-app down" in again.stdout
    assert len(clone.json("run", "list")) == 2

    # and `down` leaves no process
    stopped = clone.json("down")["stopped"]
    assert "mongod" in stopped
    assert clone.left_running() == []
    assert {row["state"] for row in clone.json("services")["services"]} == {"stopped"}
    assert clone.json("down") == {"stopped": []}


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("starting mongod", signal.SIGINT),
        ("starting 3 workers", signal.SIGINT),
        ("consuming", signal.SIGINT),
        ("consuming", signal.SIGTERM),
    ],
)
def test_an_interrupted_demo_leaves_no_process(clone: Clone, moment: str, number: signal.Signals) -> None:
    # Given a demo with enough to do, that has come to that moment
    for copy in range(300):
        (clone.code / f"copy{copy}.py").write_text("x = [1]\n" * 5000)
    process = clone.start("demo", str(clone.code))
    wait_for_moment(clone, process, moment)

    # When it is interrupted, twice, as impatient people do
    process.send_signal(number)
    time.sleep(0.2)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)

    # Then it exits as Ctrl-C does, and nothing of it is left
    assert process.returncode == 130, err
    assert "error: interrupted" in err
    assert "nothing was left running" in err
    assert "Traceback" not in err
    assert clone.left_running() == []
    assert not (clone.folder / ".pipeline" / "services.json").exists()


def wait_for_moment(clone: Clone, process: subprocess.Popen[str], moment: str) -> None:
    assert process.stderr is not None
    line = "starting 3 workers" if moment == "consuming" else moment
    while line not in (read := process.stderr.readline()):
        assert read, f"the demo ended with {process.wait()}"
    if moment == "consuming":
        deadline = time.monotonic() + 60
        while " ready." not in workers_logs(clone):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def workers_logs(clone: Clone) -> str:
    return "".join(path.read_text() for path in (clone.folder / ".pipeline" / "logs").glob("worker-*.log"))


def test_a_demo_whose_worker_dies_says_so(clone: Clone) -> None:
    # Given a demo with enough to do
    for copy in range(300):
        (clone.code / f"copy{copy}.py").write_text("x = [1]\n" * 5000)
    process = clone.start("demo", str(clone.code))
    wait_for_moment(clone, process, "consuming")

    # When one of its workers is killed
    (record,) = [found for found in processes.marked(clone.folder / ".pipeline") if found.name == "worker-demo.analyze"]
    psutil.Process(record.pid).kill()
    out, err = process.communicate(timeout=60)

    # Then it does not wait for ever, names the worker and its log, and stops the others
    assert process.returncode == 1
    assert "worker demo.analyze ended" in err
    assert record.log in err
    assert out == ""
    assert not any(name.startswith("worker") for name in clone.left_running())


def test_a_folder_without_python_is_wrong_usage(clone: Clone, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = clone.run("demo", str(tmp_path / "empty"), "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no Python file below" in json.loads(done.stderr)["error"]["message"]
    assert clone.run("demo", str(tmp_path / "missing")).returncode == 2
    assert not (clone.folder / ".pipeline").exists()


def test_a_demo_does_not_start_services_beside_those_that_were_named(clone: Clone) -> None:
    # Given an address that nobody answers at
    clone.env["MONGODB_URL"] = "mongodb://joe:secret@127.0.0.1:1/x"

    # Then demo and up fail with it, and start nothing
    for command in (["demo", str(clone.code)], ["up"]):
        done = clone.run(*command, "--json")
        assert done.returncode == 3
        assert "joe:***@127.0.0.1:1" in done.stderr
        assert "secret" not in done.stderr
    assert not (clone.folder / ".pipeline").exists()


def test_up_starts_what_every_other_command_finds(clone: Clone) -> None:
    # Given a project without services
    assert {row["state"] for row in clone.json("services")["services"]} == {"stopped"}

    # When they are started
    first = clone.json("up")

    # Then all of them were, a second time none is, and they are found
    assert (first["embedded"], "mongod" in first["started"]) == (True, True)
    assert "guest:guest" not in json.dumps(first)
    assert clone.json("up") == {**first, "started": []}
    clone.json("run", "init", "r1", "--pipeline", "survey")
    assert clone.json("run", "list")[0]["run"] == "r1"

    # and the data are there after down and up
    clone.json("down")
    assert clone.run("run", "list").returncode == 3
    clone.json("up")
    assert clone.json("run", "list")[0]["run"] == "r1"
