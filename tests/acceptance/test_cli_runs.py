"""`pipeline-app run ...` as people use it: real processes, a real RabbitMQ, a real MongoDB."""

from __future__ import annotations

import itertools
import json
import os
import pty
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.nodes import NodeProject
from tests.project import eventually

STATES = {"waiting", "pending", "running", "retry_waiting", "held", "terminal", "dead_lettered", "cancelled"}


def jobs(number: int, **payload: Any) -> list[dict[str, Any]]:
    return [
        {"job_id": f"j{n:03}", "payload": {"n": n, **payload}, "tags": {"kind": "odd" if n % 2 else "even"}}
        for n in range(number)
    ]


def write_jobs(project: NodeProject, rows: list[dict[str, Any]]) -> str:
    return str(project.write("jobs.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))


@contextmanager
def started(project: NodeProject, *command: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A command of ours that is still running."""
    process = subprocess.Popen(
        command,
        cwd=project.folder,
        env=project.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def error(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The error object on standard error; nothing else may be printed."""
    assert done.stdout == ""
    found: dict[str, Any] = json.loads(done.stderr)["error"]
    assert set(found) == {"code", "message", "hint"}
    return found


def test_a_run_from_the_first_command_to_the_last_result(project: NodeProject) -> None:
    # Given a run, and jobs of which one fails for good and one fails twice before it succeeds
    made = project.json("run", "init", "r1", "--pipeline", "demo")
    assert (made["run"], made["stages"], made["warnings"]) == ("r1", ["first", "second", "third"], [])
    rows = jobs(23)
    rows[3]["payload"]["permanent"] = True
    rows[4]["payload"]["fail"] = 2
    seeded = project.json("run", "seed", "r1", "--jobs", write_jobs(project, rows))
    assert (seeded["run"], seeded["added"], seeded["skipped"], seeded["published"]) == ("r1", 23, 0, True)

    # When a worker takes them, and somebody waits
    with project.node():
        waited = project.json("run", "wait", "last", "--timeout", "60")

        # Then waiting ends with the answer yes, and by --strict with no
        assert (waited["done"], waited["state"]) == (True, "complete")
        strict = project.json("run", "wait", "r1", "--strict", code=1)
        assert (strict["done"], strict["outcome"]) == (False, "dead_letters")
        # and up to a stage that no dead letter is in, yes
        status = project.json("run", "status", "r1")

    # Then the status has every key, and counts that add up
    assert list(status) == ["run", "pipeline", "state", "seeded", "states", "stages", "warnings", "as_of"]
    assert set(status["states"]) == STATES
    assert status["states"] == {**dict.fromkeys(STATES, 0), "terminal": 22, "dead_lettered": 1}
    assert [row["completed"] for row in status["stages"]] == [22, 22, 22]
    assert set(status["stages"][0]["partitions"][0]) == {"partition", "queue", "ready", "consumers"}
    assert status["as_of"].endswith("Z")

    # and there is a result for every terminal job, a line for each
    lines = project.cli("run", "results", "r1", "--json").stdout.splitlines()
    results = {row["job_id"]: row for row in map(json.loads, lines)}
    assert set(results) == {row["job_id"] for row in rows} - {"j003"}
    assert results["j005"] == {
        "job_id": "j005",
        "result": {"n": 5, "square": 25, "done": True},
        "tags": {"kind": "odd"},
    }

    # and, now that nothing consumes, the account is exact
    verified = project.json("run", "verify", "r1")
    assert (verified["ok"], verified["exact"], verified["problems"]) == (True, True, [])
    listed = project.json("run", "list")
    assert [(row["run"], row["state"], row["seeded"]) for row in listed] == [("r1", "complete", 23)]


def test_verify_says_no_when_a_job_is_lost(project: NodeProject) -> None:
    # Given a run one of whose jobs somebody deleted
    project.seed("r1", jobs(3))
    project.runtime().store.db.job_states.delete_one({"_id": "r1/j001"})

    # Then verify says what is missing, as JSON and as text
    found = project.json("run", "verify", "r1", code=1)
    assert not found["ok"]
    assert "lost" in {row["kind"] for row in found["problems"]}
    text = project.cli("run", "verify", "r1")
    assert text.returncode == 1
    assert "3 jobs were seeded, 2 are there" in text.stdout


def test_a_bad_line_adds_nothing_of_a_file(project: NodeProject) -> None:
    # Given a file whose last line is broken, behind more jobs than one page
    project.json("run", "init", "r1", "--pipeline", "demo")
    path = write_jobs(project, jobs(1500))
    with open(path, "a") as file:
        file.write('\n{"job_id": "x", "tags": 5}\n')

    # When it is seeded
    found = error(project.cli("run", "seed", "r1", "--jobs", path, "--json"))

    # Then the line is named, and the run is empty
    assert found["code"] == "bad_job_line"
    assert found["message"].startswith(f"{path}: line 1502: tags: ")
    assert found["hint"] == "nothing of the file was added"
    assert project.json("run", "status", "r1")["seeded"] == 0


def test_a_duplicate_takes_the_whole_file_back(project: NodeProject) -> None:
    # Given a run with a job that is also at the end of a file
    project.seed("r1", [{"job_id": "j1200", "payload": {"n": 1}}])
    rows = [{"job_id": f"j{n}", "payload": {"n": n}} for n in range(1500)]
    path = write_jobs(project, rows)

    # When it is seeded, then it is refused and nothing of it is there
    found = error(project.cli("run", "seed", "r1", "--jobs", path, "--json"))
    assert (found["code"], found["message"]) == ("duplicate_job", "job 'j1200' is in run r1 already")
    assert "nothing of the file was added" in found["hint"]
    assert project.json("run", "status", "r1")["seeded"] == 1

    # And with --skip-existing all others are added
    seeded = project.json("run", "seed", "r1", "--jobs", path, "--skip-existing")
    assert (seeded["added"], seeded["skipped"]) == (1499, 1)
    assert project.json("run", "status", "r1")["seeded"] == 1500


@pytest.mark.parametrize("source", ["-", "/dev/stdin"])
def test_standard_input_keeps_what_came_before_a_bad_line(project: NodeProject, source: str) -> None:
    # Given input with a bad line behind the first page
    project.json("run", "init", "r1", "--pipeline", "demo")
    good = [json.dumps({"job_id": f"j{n}", "payload": {"n": n}}) for n in range(1100)]
    text = "\n".join([*good[:1050], "nonsense", *good[1050:]])

    # When it is seeded
    found = error(project.cli("run", "seed", "r1", "--jobs", source, "--json", input=text))

    # Then the error says how many were added, which is true
    assert "line 1051" in found["message"]
    added = project.json("run", "status", "r1")["seeded"]
    assert f"{added:,} jobs were added" in found["hint"]
    assert 0 < added < 1100

    # And --skip-existing goes on
    seeded = project.json("run", "seed", "r1", "--jobs", "-", "--skip-existing", input="\n".join(good))
    assert (seeded["added"], seeded["skipped"]) == (1100 - added, added)


def test_a_seeding_that_is_stopped_is_noticed_and_goes_on(project: NodeProject) -> None:
    # Given a seeding from a pipe, which publishes as it comes and is stopped before the last job
    project.json("run", "init", "r1", "--pipeline", "demo")
    lines = [json.dumps({"job_id": f"j{n}", "payload": {"n": n}}) + "\n" for n in range(1001)]
    command = ("pipeline-app", "run", "seed", "r1", "--jobs", "-")
    with started(project, *command, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write("".join(lines[:-1]))
        process.stdin.flush()
        eventually(lambda: project.json("run", "status", "r1")["seeded"] == 1000)
        process.send_signal(signal.SIGINT)

        # Then it says how many are in, and exits as Ctrl-C does
        assert process.wait(30) == 130
        assert process.stderr is not None
        assert "1,000 jobs were added; --skip-existing goes on" in process.stderr.read()

    # and waiting for the run is refused, with the batch and the remedy
    waited = project.cli("run", "wait", "r1", "--timeout", "30")
    assert waited.returncode == 1
    assert "was interrupted" in waited.stderr
    assert "--skip-existing" in waited.stderr
    assert project.json("run", "wait", "r1", code=1)["outcome"] == "interrupted"

    # When the same input is seeded again, then only what was missing is added, and waiting goes on
    seeded = project.json("run", "seed", "r1", "--jobs", "-", "--skip-existing", input="".join(lines))
    assert (seeded["added"], seeded["skipped"]) == (1, 1000)
    assert project.json("run", "wait", "r1", "--timeout", "0", code=1)["outcome"] == "timeout"


def test_seeding_does_not_need_the_broker(project: NodeProject) -> None:
    # Given a broker that is away
    project.json("run", "init", "r1", "--pipeline", "demo")
    away = {"AMQP_URL": "amqp://joe:secret@127.0.0.1:1//"}

    # When jobs are seeded, then they are safe, and the command says that they are not published
    lines = "".join(json.dumps(row) + "\n" for row in jobs(3))
    done = project.cli("run", "seed", "r1", "--jobs", "-", input=lines, env=away)
    assert done.returncode == 0
    assert "added 3 jobs to run r1" in done.stdout
    assert "the broker does not answer" in done.stderr
    assert "secret" not in done.stderr

    # And a worker brings them on when the broker is there
    with project.node():
        assert project.json("run", "wait", "r1", "--timeout", "60")["states"]["terminal"] == 3


def test_wait_names_what_is_not_done(project: NodeProject) -> None:
    # Given jobs that no worker takes
    project.seed("r1", jobs(4))

    # When somebody waits for a moment
    done = project.cli("run", "wait", "r1", "--timeout", "0.3")

    # Then the answer is no, with the number and the reason
    assert done.returncode == 1
    assert "run r1 is not done after 0.3 s: 4 pending" in done.stderr
    assert "nothing consumes demo.first.kind__even, demo.first.kind__odd" in done.stderr


def test_wait_for_a_stage_does_not_wait_for_the_next(project: NodeProject) -> None:
    # Given a worker for the first stage only
    project.seed("r1", jobs(4))
    with project.node("-Q", "demo.first"):
        # Then waiting for that stage ends, and for the next does not
        assert project.json("run", "wait", "r1", "--stage", "first", "--timeout", "60")["done"]
        assert not project.json("run", "wait", "r1", "--stage", "second", "--timeout", "0", code=1)["done"]
    done = project.cli("run", "wait", "r1", "--stage", "nope", "--json")
    assert error(done)["code"] == "not_found"
    assert done.returncode == 1


def test_watch_ends_with_the_run_and_gives_a_line_for_each_change(project: NodeProject) -> None:
    # Given a run that goes on
    project.seed("r1", jobs(6, sleep_s=1.5))
    with project.node():
        # When it is watched
        done = project.cli("run", "watch", "last", "--json")
    assert done.returncode == 0
    lines = [json.loads(line) for line in done.stdout.splitlines()]

    # Then the lines are statuses that differ, and the last one is complete
    assert lines[-1]["state"] == "complete"
    assert {row["run"] for row in lines} == {"r1"}
    contents = [{**row, "as_of": None} for row in lines]
    assert all(one != other for one, other in itertools.pairwise(contents))
    assert len(lines) > 1


def test_watch_draws_bars_on_a_terminal(project: NodeProject) -> None:
    # Given a terminal of 100 columns and a run that is done
    project.seed("r1", jobs(3))
    with project.node():
        project.json("run", "wait", "r1", "--timeout", "60")
    main, terminal = pty.openpty()
    env = {**project.env, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        ["pipeline-app", "run", "watch", "r1"], cwd=project.folder, env=env, stdout=terminal, stderr=terminal
    )
    os.close(terminal)

    # Then there is a line for every stage and one for the run
    text = read_all(main)
    assert process.wait(30) == 0
    for name in ("first", "second", "third", "all"):
        assert any(line.startswith(name) and "3 / 3" in line for line in text.splitlines()), text


def read_all(descriptor: int) -> str:
    chunks = []
    while True:
        try:
            chunk = os.read(descriptor, 65536)
        except OSError:  # the other side is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(descriptor)
    # Cursor movements and colours stand before the text of a line.
    return "".join(
        part.partition("m")[2] if index and part[:1] == "[" and "m" in part[:12] else part
        for index, part in enumerate(b"".join(chunks).decode().split("\x1b"))
    )


def test_ctrl_c_stops_watching_and_not_the_run(project: NodeProject) -> None:
    project.seed("r1", jobs(2))
    with started(project, "pipeline-app", "run", "watch", "r1", "--json") as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["run"] == "r1"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    assert project.json("run", "status", "r1")["state"] == "active"


def test_a_cancelled_run_starts_nothing_any_more(project: NodeProject) -> None:
    # Given jobs that nobody took yet, and one that is to come later
    project.seed("r1", [*jobs(5), {"job_id": "late", "payload": {"n": 9}, "delay_s": 3600}])

    # When the run is cancelled, without a terminal to ask
    would = project.json("run", "cancel", "r1", "--dry-run")
    assert would == {"run": "r1", "matched": 6, "cancelled": 0, "dry_run": True}
    assert project.json("run", "status", "r1")["state"] == "active"
    cancelled = project.json("run", "cancel", "r1")

    # Then all of them are, and waiting ends
    assert cancelled == {"run": "r1", "matched": 6, "cancelled": 6, "dry_run": False}
    assert project.json("run", "wait", "r1", "--strict")["states"]["cancelled"] == 6
    assert project.json("run", "cancel", "r1")["cancelled"] == 0
    # and a worker runs none of them
    with project.node():
        eventually(lambda: any(row["state"] == "running" for row in project.json("workers")))
        time.sleep(1)
    assert project.calls() == []
    # and no job can be added
    refused = project.cli("run", "seed", "r1", "--jobs", "-", "--json", input='{"job_id": "z"}\n')
    assert error(refused)["code"] == "refused"


def test_cancel_asks_at_a_terminal(project: NodeProject) -> None:
    # Given somebody who types "n"
    project.seed("r1", jobs(2))
    main, terminal = pty.openpty()
    with started(project, "pipeline-app", "run", "cancel", "r1", stdin=terminal) as process:
        os.write(main, b"n\n")
        out, err = process.communicate(timeout=30)
    os.close(terminal)
    os.close(main)

    # Then nothing was cancelled
    assert process.returncode == 1
    assert "cancel run r1 with 2 jobs that are not done?" in err
    assert "nothing was cancelled" in err
    assert out == "cancels run r1: 2 jobs not done\n"
    assert project.json("run", "status", "r1")["states"]["pending"] == 2


def test_a_run_from_a_definition_file(project: NodeProject) -> None:
    # Given a file that the workers' celeryconfig.py does not name
    project.write("other.toml", 'name = "other"\n[[stages]]\nhandler = "stages:second"\n')
    project.write("stages.py", "def second(n: int) -> dict:\n    return {'square': n * n}\n")
    project.write("celeryconfig.py", "pipelines = []\n")

    # When a run is made from it, then it is made, with a warning
    made = project.json("run", "init", "r1", "--definition", "other.toml")
    assert (made["pipeline"], made["stages"]) == ("other", ["second"])
    assert "add other.toml to celeryconfig.py" in made["warnings"][0]

    # And once it is named, without
    project.write("celeryconfig.py", "pipelines = ['other.toml']\n")
    assert project.json("run", "init", "r2", "--definition", "other.toml")["warnings"] == []
    project.json("run", "seed", "r2", "--jobs", "-", input='{"job_id": "a", "payload": 7}\n')
    with project.node():
        project.json("run", "wait", "r2", "--timeout", "60")
    assert json.loads(project.cli("run", "results", "r2", "--json").stdout)["result"] == {"square": 49}


@pytest.mark.parametrize(
    ("arguments", "code", "name"),
    [
        (["init", "r1", "--pipeline", "demo"], 1, "run_exists"),
        (["init", "r2", "--pipeline", "nope"], 1, "not_found"),
        (["init", "r2"], 2, "usage"),
        (["init", "r2", "--pipeline", "demo", "--definition", "x.toml"], 2, "usage"),
        (["init", "last", "--pipeline", "demo"], 2, "usage"),
        (["init", "r2", "--definition", "missing.toml"], 2, "definition"),
        (["status", "nope"], 1, "not_found"),
        (["seed", "nope", "--jobs", "-"], 1, "not_found"),
        (["seed", "r1", "--jobs", "missing.jsonl"], 2, "usage"),
        (["wait", "nope"], 1, "not_found"),
        (["wait", "r1", "--timeout", "-1"], 2, "usage"),
        (["results", "nope"], 1, "not_found"),
        (["verify", "nope"], 1, "not_found"),
        (["cancel", "nope"], 1, "not_found"),
    ],
)
def test_bad_input_is_a_clear_error(project: NodeProject, arguments: list[str], code: int, name: str) -> None:
    project.json("run", "init", "r1", "--pipeline", "demo")
    done = project.cli("run", *arguments, "--json", input="")
    assert done.returncode == code
    assert error(done)["code"] == name


@pytest.mark.parametrize("arguments", [["run", "status", "last"], ["workers"]])
def test_a_store_that_is_away_is_exit_code_3(project: NodeProject, arguments: list[str]) -> None:
    # When nothing answers at the store's address
    away = {"MONGODB_URL": "mongodb://joe:secret@127.0.0.1:1/x"}
    begin = time.monotonic()
    done = project.cli(*arguments, "--json", env=away)

    # Then the command says so within seconds, with the address and without the password
    assert done.returncode == 3
    assert time.monotonic() - begin < 15
    found = error(done)
    assert found["code"] == "store_unreachable"
    assert "joe:***@127.0.0.1:1" in found["message"]
    assert "secret" not in done.stderr


def test_a_broker_that_is_away_is_a_warning(project: NodeProject) -> None:
    project.seed("r1", jobs(1))
    status = project.json("run", "status", "r1", env={"AMQP_URL": "amqp://joe:secret@127.0.0.1:1//"})
    assert status["states"]["pending"] == 1
    assert any("joe:***@127.0.0.1:1" in text for text in status["warnings"])


def test_flags_win_over_the_environment(project: NodeProject) -> None:
    project.json("run", "init", "r1", "--pipeline", "demo")
    away = {"MONGODB_URL": "mongodb://127.0.0.1:1/x"}
    done = project.cli("--mongodb-url", project.mongodb_url, "run", "list", "--json", env=away)
    assert [row["run"] for row in json.loads(done.stdout)] == ["r1"]


def test_a_reader_that_has_enough_is_no_error(project: NodeProject) -> None:
    # Given more events than a pipe holds
    project.seed("r1", [{"job_id": f"{n:04}" + "x" * 190, "payload": {"n": n}} for n in range(1000)])

    # When the reader leaves after the first line
    done = project.run("bash", "-c", "set -o pipefail; pipeline-app events r1 --json | head -c 10")

    # Then nothing is said about it
    assert (done.returncode, done.stderr) == (0, "")
