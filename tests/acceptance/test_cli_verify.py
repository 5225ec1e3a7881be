"""`run verify --repair` as people use it: what it says, what it changes, and its exit codes."""

from __future__ import annotations

import json
from typing import Any

from tests.nodes import NodeProject


def break_run(project: NodeProject) -> None:
    """A run of three jobs: one is gone for good, one lost its message, a count is wrong."""
    project.seed("r1", [{"job_id": f"j{n}", "payload": {"n": n}, "tags": {"kind": str(n)}} for n in range(3)])
    db = project.runtime().store.db
    db.job_states.delete_one({"_id": "r1/j0"})
    job = db.job_states.find_one({"_id": "r1/j1"})
    assert job is not None
    db.messages.delete_one({"_id": job["message"]})
    db.run_counters.update_one({"run": "r1"}, {"$inc": {"completed": 4}})


def state_of(project: NodeProject) -> dict[str, Any]:
    db = project.runtime().store.db
    return {name: list(db[name].find().sort("_id", 1)) for name in sorted(db.list_collection_names())}


def test_repairing_says_what_it_does_and_what_is_left(project: NodeProject) -> None:
    # Given a run with problems of which one cannot be repaired
    break_run(project)

    # When it is asked what a repair would do, then it says so, and nothing changes
    before = state_of(project)
    planned = project.cli("run", "verify", "r1", "--repair", "--dry-run")
    assert planned.returncode == 1
    assert "--repair would repair:\n  1 job to be enqueued anew\n  2 counts to be corrected\n" in planned.stdout
    assert project.json("run", "verify", "r1", "--repair", "--dry-run", code=1)["repairs"] == {
        "enqueued": 1,
        "counts": 2,
    }
    assert state_of(project) == before

    # When it is repaired, then it says what it will do, what it did, and what is left
    done = project.cli("run", "verify", "r1", "--repair")
    assert done.returncode == 1
    assert done.stdout.startswith(
        "run r1: 4 problems, repairing:\n  1 job to be enqueued anew\n  2 counts to be corrected\n"
        "repaired 3 problems:\n  1 job enqueued anew\n  2 counts corrected\n"
        "run r1: 3 jobs seeded: 2 pending\n"
    )
    assert "it is gone: 3 jobs were seeded, 2 are there" in done.stdout
    assert "1 problem in run r1" in done.stderr

    # And the others get through
    with project.node():
        project.json("run", "wait", "r1", "--timeout", "30")
    found = project.json("run", "verify", "r1", "--repair", code=1)
    assert (found["states"]["terminal"], found["repaired"], found["repairs"]) == (2, 0, {})
    assert [(row["kind"], row["job_id"]) for row in found["problems"]] == [("lost", "j0")]


def test_a_run_that_can_be_repaired_is_exit_code_0(project: NodeProject) -> None:
    # Given a run whose counters are wrong
    project.seed("r1", [{"job_id": "j0", "payload": {"n": 0}}])
    project.runtime().store.db.run_counters.update_one({"run": "r1"}, {"$inc": {"states.pending": 9}})
    assert project.json("run", "status", "r1")["states"]["pending"] == 10

    # When it is repaired, then nothing is left, and a second time there is nothing to do
    found = project.json("run", "verify", "r1", "--repair")
    assert (found["ok"], found["repaired"], found["repairs"], found["problems"]) == (True, 1, {"counts": 1}, [])
    assert project.json("run", "status", "r1")["states"]["pending"] == 1
    again = project.cli("run", "verify", "last", "--repair")
    assert (again.returncode, again.stdout) == (
        0,
        "run r1: 1 job seeded: 1 pending\nevery job is accounted for\n",
    )


def test_wrong_usage(project: NodeProject) -> None:
    # A dry run of nothing is a mistake, and so is a run that is not there
    done = project.cli("run", "verify", "r1", "--dry-run", "--json")
    assert (done.returncode, json.loads(done.stderr)["error"]["code"]) == (2, "usage")
    done = project.cli("run", "verify", "nope", "--repair", "--json")
    assert (done.returncode, json.loads(done.stderr)["error"]["code"]) == (1, "not_found")
