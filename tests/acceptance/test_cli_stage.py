"""`stage start`, `stop`, `replace`, `scale`: workers that outlive the command that started them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.nodes import NodeProject
from tests.project import eventually

#: Each test starts several workers, one after the other.
pytestmark = pytest.mark.timeout(300)

HOST = socket.gethostname()
DONE = {"run", "stage", "dry_run", "queues", "started", "stopped", "left"}
SHOWN = {"worker", "host", "pid", "pool", "concurrency", "select", "skip", "state", "log"}
FIRST = ("--run", "r1", "--stage", "first")
THREADS = ("--pool", "threads", "--concurrency", "1")


@pytest.fixture
def project(project: NodeProject) -> Iterator[NodeProject]:
    """A project whose detached workers end with the test."""
    yield project
    done = project.cli("down")
    assert done.returncode == 0, done.stderr
    assert project.json("services")["workers"] == []


def jobs(number: int, kind: str = "a", **payload: Any) -> list[dict[str, Any]]:
    return [{"job_id": f"{kind}{n}", "payload": {"n": n, **payload}, "tags": {"kind": kind}} for n in range(number)]


def records(project: NodeProject) -> dict[str, dict[str, Any]]:
    """Name without the host -> record, of the workers listed; the last one of a name."""
    return {row["worker"].partition("@")[0]: row for row in project.json("workers")}


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [row["worker"] for row in rows]


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_for_go(project: NodeProject) -> None:
    """Let handlers of the first stage wait for the file `go`."""
    code = (project.folder / "stages.py").read_text()
    waiting = 'while not Path("go").exists():\n        time.sleep(0.05)'
    project.write("stages.py", code.replace("time.sleep(item.sleep_s)", waiting))


@contextmanager
def stopping(project: NodeProject) -> Iterator[subprocess.Popen[str]]:
    """The command that stops a worker, from when it waits for that."""
    command = ["pipeline-app", "stage", "stop", *FIRST]
    with subprocess.Popen(
        command, cwd=project.folder, env=project.env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as started:
        assert started.stderr is not None
        assert "stopping 1 worker" in started.stderr.readline()
        yield started


def stage(project: NodeProject, command: str, *arguments: str, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = project.json("stage", command, *FIRST, *arguments, code=code, timeout=120)
    assert set(found) == DONE
    assert all(set(row) == SHOWN for name in ("started", "stopped", "left") for row in found[name])
    assert (found["run"], found["stage"]) == ("r1", "demo.first")
    return found


def test_workers_from_start_to_stop(project: NodeProject) -> None:
    # Given a run with jobs of two kinds
    project.seed("r1", [*jobs(4), *jobs(4, "b")])

    # When two workers are started for one of them
    found = stage(project, "start", "--workers", "2", "--select", "kind=a", *THREADS)

    # Then they are there, under their names, with a log each, in sessions of their own
    assert names(found["started"]) == [f"demo.first-1@{HOST}", f"demo.first-2@{HOST}"]
    assert found["queues"] == ["demo.first.kind__a"]
    for row in found["started"]:
        assert (row["state"], row["select"], row["skip"]) == ("running", ["kind=a"], [])
        assert (row["pool"], row["concurrency"], row["host"]) == ("threads", 1, HOST)
        assert os.getsid(row["pid"]) == row["pid"]
        assert row["log"] == str(project.folder / f".pipeline/logs/worker-{row['worker'].partition('@')[0]}.log")
    listed = records(project)
    assert {name: row["log"] for name, row in listed.items()} == {
        row["worker"].partition("@")[0]: row["log"] for row in found["started"]
    }
    # and do that kind and no other
    eventually(lambda: len(project.calls()) == 4)
    assert {line.split()[1][0] for line in project.calls()} == {"a"}
    eventually(lambda: f"demo.first-1@{HOST} ready" in Path(listed["demo.first-1"]["log"]).read_text())

    # When another is started, then it has the next number, and the rest is done
    text = project.cli("stage", "start", *FIRST, "--skip", "kind=a", *THREADS)
    assert "starting 1 worker: demo.first-3" in text.stderr
    assert f"started 1 worker: demo.first-3@{HOST}\n" in text.stdout
    assert "they consume demo.first.kind__b\n" in text.stdout
    eventually(lambda: len(project.calls()) == 8)
    assert "demo.first only kind=a" in project.cli("workers").stdout
    assert "demo.first not kind=a" in project.cli("workers").stdout
    assert [row["worker"] for row in project.json("services")["workers"]] == [f"demo.first-{n}" for n in (1, 2, 3)]

    # When those with the selector are stopped, then only they; and then all
    found = stage(project, "stop", "--select", "kind=a")
    assert sorted(names(found["stopped"])) == [f"demo.first-1@{HOST}", f"demo.first-2@{HOST}"]
    assert {row["state"] for row in found["stopped"]} == {"stopped"}
    assert not any(alive(row["pid"]) for row in found["stopped"])
    assert names(stage(project, "stop")["stopped"]) == [f"demo.first-3@{HOST}"]
    assert {row["state"] for row in records(project).values()} == {"stopped"}
    assert "runs demo.first" in project.cli("stage", "stop", *FIRST).stderr
    assert project.cli("stage", "stop", *FIRST).returncode == 1


def test_what_cannot_be_meant_starts_nothing(project: NodeProject) -> None:
    # Given a run
    project.seed("r1", jobs(1))

    for says, code, words in (
        ("no partition of demo.first fits --select kind=b", 1, (*FIRST, "--select", "kind=b")),
        ("no partition of demo.first fits --skip kind=a", 1, (*FIRST, "--skip", "kind=a")),
        ("has no stage 'fist'", 1, ("--run", "r1", "--stage", "fist")),
        ("no run 'r2'", 1, ("--run", "r2", "--stage", "first")),
        ("no job has both", 2, (*FIRST, "--select", "kind=a", "--select", "kind=b")),
    ):
        # When a worker is asked for that nothing fits, then the answer is no, and there is none
        done = project.cli("stage", "start", *words, "--json")
        assert done.returncode == code, done.stderr
        assert says in json.loads(done.stderr)["error"]["message"]
    assert "they are kind=a" in project.cli("stage", "start", *FIRST, "--select", "kind=b").stderr
    assert project.json("workers") == []
    assert project.json("services")["workers"] == []


def test_a_worker_that_cannot_start(project: NodeProject) -> None:
    """Given code that fails in a worker, then the command says so with the end of the log, and old workers go on."""
    project.seed("r1", jobs(1))
    old = stage(project, "start", *THREADS)["started"][0]
    code = (project.folder / "stages.py").read_text()
    project.write("stages.py", f"import sys\nassert 'worker' not in sys.argv, 'not today'\n{code}")

    done = project.cli("stage", "replace", *FIRST)

    assert done.returncode == 1
    assert "worker demo.first-2 ended while it started" in done.stderr
    assert "stages:demo: cannot import stages: not today" in done.stderr
    assert records(project)["demo.first-1"]["state"] == "running"
    assert alive(old["pid"])


def test_stopping_waits_for_what_runs(project: NodeProject) -> None:
    # Given a worker that was started by hand, in the middle of a handler
    wait_for_go(project)
    project.seed("r1", jobs(1))
    with project.worker("-Q", "demo.first", concurrency=1) as worker:
        eventually(project.calls)

        # When it is stopped, then for what runs is waited no longer than one wants to
        found = stage(project, "stop", "--timeout", "0.5", code=1)
        (left,) = found["left"]
        assert (left["pid"], left["state"], found["stopped"]) == (worker.process.pid, "stop_requested", [])

        # and when that is done it has ended by itself, with nothing lost
        with stopping(project) as waiting:
            project.write("go", "")
            assert waiting.communicate(timeout=60)[0] == f"stopped 1 worker: {left['worker']}\n"
            assert waiting.returncode == 0
        assert worker.process.wait(10) == 0
    assert [row["outcome"] for row in project.json("attempts", "r1", "--stage", "first")] == ["ok"]


def test_a_worker_of_several_stages_is_stopped_only_by_its_name(project: NodeProject) -> None:
    project.seed("r1", jobs(1))
    with project.worker("-Q", "demo.first,demo.second") as worker:
        done = project.cli("stage", "stop", *FIRST)
        assert done.returncode == 1
        assert "runs demo.second, too, and is left alone" in done.stderr
        assert "no worker runs demo.first" in done.stderr

        assert len(stage(project, "stop", "--worker", worker.log.stem)["stopped"]) == 1
        assert worker.process.wait(10) == 0


def test_workers_that_no_new_one_would_be_like_are_left_alone(project: NodeProject) -> None:
    """Given workers of an own task's queue, too, and of one partition, then neither is replaced or scaled away."""
    project.seed("r1", jobs(1))
    with project.node("-Q", "demo.first,celery"), project.node("-Q", "demo.first.kind__a"):
        done = project.cli("stage", "replace", *FIRST, "--dry-run")
        assert done.returncode == 1
        assert "runs celery, too, and is left alone" in done.stderr
        assert "runs only demo.first.kind__a, and is left alone" in done.stderr

        assert stage(project, "scale", "--workers", "0")["stopped"] == []
        status = {row["stage"]: row["workers"] for row in project.json("run", "status", "r1")["stages"]}
        assert status == {"first": 2, "second": 0, "third": 0}


def test_going_down_gives_back_what_takes_too_long(project: NodeProject) -> None:
    """Given a detached worker and a handler that does not end, when all is stopped, then the job has lost nothing."""
    project.seed("r1", jobs(1, sleep_s=600))
    stage(project, "start", *THREADS)
    eventually(project.calls)

    done = project.cli("down", timeout=60)

    assert done.returncode == 0, done.stderr
    states = project.json("run", "status", "r1")["states"]
    assert (states["pending"], states["running"]) == (1, 0)
    assert project.json("attempts", "r1") == []


def test_stopping_now_gives_back_what_runs(project: NodeProject) -> None:
    # Given a handler that takes long
    project.seed("r1", jobs(1, sleep_s=60))
    with project.worker("-Q", "demo.first", pool="prefork", concurrency=1) as worker:
        eventually(project.calls)

        # When its worker is stopped at once, by its name, then it is gone, and the job waits in its queue
        name = worker.log.stem
        found = stage(project, "stop", "--worker", name, "--now", "--timeout", "20")
        assert names(found["stopped"]) == [f"{name}@{HOST}"]
        assert worker.process.wait(5) == 0
    states = project.json("run", "status", "r1")["states"]
    assert (states["pending"], states["running"]) == (1, 0)
    assert project.cli("stage", "stop", *FIRST, "--worker", "nobody").returncode == 1
    assert project.cli("stage", "stop", *FIRST, "--worker", name, "--workers", "1").returncode == 2


def test_replacing_under_load_loses_nothing(project: NodeProject) -> None:
    # Given two workers with work
    project.seed("r1", jobs(60, sleep_s=0.2))
    old = stage(project, "start", "--workers", "2", "--skip", "kind=b", *THREADS)["started"]
    eventually(project.calls)

    # When they are replaced
    found = stage(project, "replace", "--concurrency", "2")

    # Then the new ones are like them, and were ready before the old ones were told
    assert sorted(names(found["stopped"])) == names(old)
    assert names(found["started"]) == [f"demo.first-3@{HOST}", f"demo.first-4@{HOST}"]
    assert {(row["pool"], row["concurrency"], tuple(row["skip"])) for row in found["started"]} == {
        ("threads", 2, ("kind=b",))
    }
    rt = project.runtime()
    rows = {row["worker"].partition("@")[0]: row for row in rt.store.db.workers.find()}
    ready = max(rows[f"demo.first-{n}"]["started_at"] for n in (3, 4))
    assert ready < min(rows[f"demo.first-{n}"]["stop_requested_at"] for n in (1, 2))
    # and every job runs once
    project.json("run", "wait", "r1", "--stage", "first", "--timeout", "90")
    assert Counter(line.split()[1] for line in project.calls()) == dict.fromkeys((f"a{n}" for n in range(60)), 1)
    assert project.json("run", "verify", "r1")["ok"]


def test_scaling_starts_or_stops_the_difference(project: NodeProject) -> None:
    # Given one worker with a selector
    project.seed("r1", jobs(1))
    stage(project, "start", "--select", "kind=a", *THREADS)

    # When one without is wanted, and then two, then it is not counted
    for number in (1, 2):
        found = stage(project, "scale", "--workers", str(number), *THREADS)
        assert (names(found["started"]), found["stopped"]) == ([f"demo.first-{number + 1}@{HOST}"], [])

    # When one is enough, then the newest goes
    found = stage(project, "scale", "--workers", "1")
    assert (names(found["stopped"]), found["started"]) == ([f"demo.first-3@{HOST}"], [])
    done = project.cli("stage", "scale", *FIRST, "--workers", "1")
    assert (done.returncode, done.stdout) == (0, "nothing to do\n")

    # And nobody is left when none is wanted
    assert len(stage(project, "scale", "--workers", "0")["stopped"]) == 1
    assert len(stage(project, "scale", "--workers", "0", "--select", "kind=a")["stopped"]) == 1
    assert {row["state"] for row in records(project).values()} == {"stopped"}


def test_two_who_start_at_once_never_give_a_name_twice(project: NodeProject) -> None:
    project.seed("r1", jobs(1))

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda _: stage(project, "start", "--workers", "2", *THREADS), range(2)))

    given = [name for one in found for name in names(one["started"])]
    assert sorted(given) == [f"demo.first-{n}@{HOST}" for n in (1, 2, 3, 4)]
    assert len({row["pid"] for one in found for row in one["started"]}) == 4


def test_who_is_interrupted_only_stops_waiting(project: NodeProject) -> None:
    # Given a worker in the middle of a handler
    wait_for_go(project)
    project.seed("r1", jobs(1))
    (row,) = stage(project, "start", *THREADS)["started"]
    eventually(project.calls)

    # When the command that stops it is interrupted
    with stopping(project) as waiting:
        waiting.send_signal(signal.SIGINT)
        error = waiting.communicate(timeout=60)[1]
        assert waiting.returncode == 130
    assert "the workers were asked to stop, and will" in error

    # Then it stops all the same, after its handler
    assert alive(row["pid"])
    project.write("go", "")
    eventually(lambda: not alive(row["pid"]))
    assert [line["outcome"] for line in project.json("attempts", "r1", "--stage", "first")] == ["ok"]


def test_dry_runs_change_nothing(project: NodeProject) -> None:
    # Given a worker
    project.seed("r1", jobs(1))
    stage(project, "start", *THREADS)
    rt = project.runtime()

    def now() -> Any:
        records = [(row["_id"], row["state"], row.get("stop")) for row in rt.store.db.workers.find()]
        return records, project.json("services")["workers"]

    before = now()

    # When the commands are only tried
    for command in (
        ("start", "--workers", "2"),
        ("stop",),
        ("stop", "--now", "--worker", "demo.first-1"),
        ("replace",),
        ("scale", "--workers", "3"),
        ("scale", "--workers", "0"),
    ):
        done = project.cli("stage", command[0], *FIRST, *command[1:], "--dry-run")

        # Then they say what they would do, and nothing was changed
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout.startswith("would "), command
        assert done.stdout.splitlines()[-1] == "nothing was changed: this is a dry run", command
        assert now() == before, command
    found = stage(project, "replace", "--dry-run")
    assert (names(found["started"]), found["started"][0]["pid"]) == ([f"demo.first-2@{HOST}"], None)
    assert names(found["stopped"]) == [f"demo.first-1@{HOST}"]


def test_a_worker_that_begins_anew_is_the_same_worker(project: NodeProject) -> None:
    # Given a detached worker that is to begin anew after ten jobs, and as many jobs
    project.seed("r1", jobs(10))
    (row,) = stage(project, "start", "--max-jobs", "10", *THREADS)["started"]
    store = project.runtime().store.db.workers

    # When they are done, then it begins anew: another record of the same worker, in the same process and log
    eventually(lambda: store.count_documents({}) == 2, timeout=60)
    found = list(store.find().sort("started_at", 1))
    assert [one["state"] for one in found] == ["stopped", "running"]
    assert {(one["worker"], one["pid"], one["log"]) for one in found} == {(row["worker"], row["pid"], row["log"])}
    assert "recycling, it has run 10 jobs" in Path(row["log"]).read_text()
    (listed,) = project.json("services")["workers"]
    assert (listed["worker"], listed["pid"]) == ("demo.first-1", row["pid"])

    # And it goes on with what comes
    project.seed("r1", jobs(4, "b"), init=False)
    eventually(lambda: len(project.calls()) == 14)
    assert Counter(line.split()[1] for line in project.calls()).most_common(1)[0][1] == 1
    assert {line.split()[3] for line in project.calls()} == {str(row["pid"])}

    # And when it is stopped, it stops for good
    (stopped,) = stage(project, "stop")["stopped"]
    assert (stopped["worker"], stopped["pid"]) == (row["worker"], row["pid"])
    assert not alive(row["pid"])
    assert store.count_documents({}) == 2
    assert project.json("services")["workers"] == []


def test_a_new_worker_begins_anew_as_the_old_one_did(project: NodeProject) -> None:
    """Given a worker with such options, when it is replaced, then the new one has them but for what is said anew."""
    project.seed("r1", jobs(1))
    stage(project, "start", "--max-age", "12h", "--max-jobs", "1000", *THREADS)

    (new,) = stage(project, "replace", "--max-jobs", "2000", "--max-memory", "2 GB")["started"]

    words = psutil.Process(new["pid"]).cmdline()
    assert [word for word in words if word.startswith("--max")] == [
        "--max-jobs=2000",
        "--max-age=12h",
        "--max-memory=2 GB",
    ]
    # And what no worker could read is refused before any is started
    for command in ("start", "replace", "scale"):
        done = project.cli("stage", command, *FIRST, "--workers", "2", "--max-age", "soon")
        assert done.returncode == 2
        assert "'--max-age': not a duration: 'soon'" in done.stderr
    assert [row["pid"] for row in project.json("services")["workers"]] == [new["pid"]]
