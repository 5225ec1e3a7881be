"""`pipeline-app cancel`, `move` and `priority`: real processes, a real RabbitMQ, a real MongoDB."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from typing import Any

import pytest

from tests.nodes import NodeProject
from tests.project import eventually


def jobs(number: int, **payload: Any) -> list[dict[str, Any]]:
    """Jobs of which every other one is odd."""
    return [
        {"job_id": f"j{n}", "payload": {"n": n, **payload}, "tags": {"kind": "odd" if n % 2 else "even"}}
        for n in range(number)
    ]


def states(project: NodeProject, run: str = "r1") -> dict[str, int]:
    """State -> jobs; no zeros."""
    now = project.json("run", "status", run)["states"]
    return {state: number for state, number in now.items() if number}


def error(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The error object on standard error; nothing else may be printed."""
    assert done.stdout == ""
    found: dict[str, Any] = json.loads(done.stderr)["error"]
    return found


def test_some_jobs_are_cancelled(project: NodeProject) -> None:
    # Given a run with odd and even jobs
    project.seed("r1", jobs(6))

    # When it is asked what cancelling the odd ones would change, then that is said, and nothing changes
    odd = ("cancel", "r1", "--selector", "kind=odd")
    expected = {
        "run": "r1",
        "matched": 3,
        "by_stage": {"first": 3},
        "by_status": {"pending": 3},
        "by_partition": {"kind__odd": 3},
    }
    assert project.json(*odd, "--dry-run") == {**expected, "cancelled": 0, "dry_run": True}
    text = project.cli(*odd, "--dry-run")
    assert text.stdout.splitlines() == [
        "cancels jobs of run r1: 3 jobs",
        "  by stage: first 3",
        "  by status: pending 3",
        "  by partition: kind__odd 3",
        "nothing was changed: this is a dry run",
    ]
    assert states(project) == {"pending": 6}

    # When they are cancelled, then only they are
    assert project.json(*odd, "--yes") == {**expected, "cancelled": 3, "dry_run": False}
    assert states(project) == {"pending": 3, "cancelled": 3}
    assert "it was cancelled at" in project.cli("why", "r1", "j1").stdout

    # And once more there is nothing to cancel: the answer is no
    assert error(project.cli(*odd, "--json"))["code"] == "not_found"

    # And the others go through all stages
    with project.node():
        waited = project.json("run", "wait", "r1", "--timeout", "60")
    assert (waited["states"]["terminal"], waited["states"]["cancelled"]) == (3, 3)
    assert project.json("run", "verify", "r1")["ok"]


def test_without_a_filter_the_run_is_cancelled(project: NodeProject) -> None:
    # Given a run
    project.seed("r1", jobs(4))

    # When it is cancelled without any filter, first to see what that would do
    assert project.json("cancel", "last", "--dry-run")["matched"] == 4
    assert project.json("run", "status", "r1")["state"] == "active"
    done = project.cli("cancel", "last", "--yes")

    # Then all of it is, and no more jobs may be added
    assert done.stdout.splitlines()[0] == "cancels run r1: 4 jobs"
    assert done.stdout.splitlines()[-1] == "cancelled 4 jobs of run r1"
    now = project.json("run", "status", "r1")
    assert (now["state"], now["states"]["cancelled"]) == ("cancelled", 4)


def test_jobs_are_moved(project: NodeProject) -> None:
    # Given a run
    project.seed("r1", jobs(4))

    # When its odd jobs are moved past the first stage
    done = project.cli("move", "r1", "--to", "second", "--selector", "kind=odd", "--yes")

    # Then it says so
    assert done.returncode == 0
    assert done.stdout.splitlines()[0] == "moves jobs of run r1 to second: 2 jobs"
    assert done.stdout.splitlines()[-1] == "moved 2 jobs of run r1 to second"
    # and they stand there, in that stage's queue
    now = project.json("run", "status", "r1")
    assert [row["states"]["pending"] for row in now["stages"]] == [2, 2, 0]
    odd = next(part for part in now["stages"][1]["partitions"] if part["partition"] == "kind__odd")
    assert odd["ready"] == 1

    # and all end well, without having been in the first
    with project.node():
        project.json("run", "wait", "r1", "--timeout", "60")
    assert sorted(line.split()[1] for line in project.calls()) == ["j0", "j2"]
    assert project.json("run", "verify", "r1")["ok"]
    rows = map(json.loads, project.cli("events", "r1", "--job", "j1", "--json").stdout.splitlines())
    details = next(row for row in rows if row["event"] == "moved")["details"]
    assert (details["from"], details["to"]) == ("first", "second")
    assert "@" in details["actor"]


def test_a_priority_is_given(project: NodeProject) -> None:
    # Given a run
    project.seed("r1", jobs(4))

    # When some of its jobs are to go after the others (a number that looks like an option)
    odd = ("priority", "r1", "-5", "--selector", "kind=odd")
    assert project.json(*odd, "--dry-run")["changed"] == 0
    given = project.json(*odd)

    # Then it says so, and the run goes through
    assert (given["priority"], given["matched"], given["changed"]) == (-5, 2, 2)
    done = project.cli("priority", "r1", "10", "--job", "j2")
    assert done.stdout.splitlines()[-1] == "1 job of run r1 changed to priority 10"
    with project.node():
        waited = project.json("run", "wait", "r1", "--timeout", "60")
    assert waited["states"]["terminal"] == 4
    assert project.json("run", "verify", "r1")["ok"]


def test_jobs_go_by_priority(project: NodeProject) -> None:
    # Given a run of many jobs, each in a message of its own, none of which was taken yet
    project.write("stages.py", (project.folder / "stages.py").read_text().replace("chunk=5", "chunk=1"))
    project.seed("r1", [{**row, "tags": {"kind": "one"}} for row in jobs(300)])

    # When the last one is given the highest priority, and one worker takes them one by one
    project.json("priority", "r1", "1000", "--job", "j299")
    with project.node("-Q", "demo.first", concurrency=1):
        eventually(lambda: len(project.calls()) == 300, timeout=90)

    # Then it goes before all that were not on their way by then: those are a short runway
    order = [line.split()[1] for line in project.calls()]
    assert order.index("j299") < 100, order


@pytest.mark.parametrize("answer", ["n", "y"])
@pytest.mark.parametrize(
    ("command", "question", "refused"),
    [
        (("cancel", "r1", "--job", "j0"), "cancel 1 job? [y/N]", "nothing was cancelled"),
        (("move", "r1", "--to", "third", "--job", "j0"), "move 1 job to third? [y/N]", "nothing was moved"),
        (("priority", "r1", "7", "--job", "j0"), "give 1 job priority 7? [y/N]", "nothing was changed"),
    ],
)
def test_it_asks_at_a_terminal(
    project: NodeProject, command: tuple[str, ...], question: str, refused: str, answer: str
) -> None:
    # Given somebody at a terminal
    project.seed("r1", jobs(1))
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        ["pipeline-app", *command],
        cwd=project.folder,
        env=project.env,
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.write(main, f"{answer}\n".encode())
    out, err = process.communicate(timeout=60)
    os.close(main)
    os.close(terminal)

    # Then what it will do is shown and asked, and done only if the answer is yes
    assert "1 job" in out
    assert question in err
    assert process.returncode == (0 if answer == "y" else 1)
    assert (refused in err) == (answer == "n")
    row = project.runtime().store.db.job_states.find_one({"job": "j0"})
    assert row is not None
    untouched = (row["state"], row["stage"], row["priority"]) == ("pending", "first", 0)
    assert untouched == (answer == "n")


@pytest.mark.parametrize(
    ("arguments", "code", "name"),
    [
        (("cancel", "nope"), 1, "not_found"),
        (("cancel", "r1", "--job", "nope"), 1, "not_found"),
        (("cancel", "r1", "--stage", "nope"), 1, "not_found"),
        (("cancel", "r1", "--selector", "kind=none"), 1, "not_found"),
        (("cancel", "r1", "--selector", "kind"), 2, "usage"),
        (("cancel", "r1", "--status", "terminal"), 2, "usage"),
        (("move", "r1", "--job", "j0"), 2, "usage"),
        (("move", "r1", "--to", "nope"), 1, "not_found"),
        (("move", "r1", "--to", "first"), 1, "not_found"),
        (("move", "r1", "--to", "first", "--stage", "first"), 2, "usage"),
        (("priority", "r1", "1001"), 2, "usage"),
        (("priority", "r1", "high"), 2, "usage"),
        (("priority", "r1", "--nonsense", "3"), 2, "usage"),
        (("priority", "r1", "3", "--status", "held"), 1, "not_found"),
    ],
)
def test_what_cannot_be_done_changes_nothing(
    project: NodeProject, arguments: tuple[str, ...], code: int, name: str
) -> None:
    # Given a run
    project.seed("r1", jobs(1))

    # When something is asked that cannot be done, then that is said in one error object
    done = project.cli(*arguments, "--json")
    assert done.returncode == code, done.stderr
    assert error(done)["code"] == name
    # and nothing changed
    assert states(project) == {"pending": 1}


def test_celery_has_the_same_commands(project: NodeProject) -> None:
    # Given a run
    project.seed("r1", jobs(2))

    # When a job is cancelled by way of Celery, then it is
    done = project.run("celery", "-A", "pipeline_app", "cancel", "r1", "--job", "j0", "--json")
    assert json.loads(done.stdout)["cancelled"] == 1, done.stderr
    assert states(project) == {"pending": 1, "cancelled": 1}
