"""`hold`, `throttle`, `pause` and `resume` as people use them: real processes, a real RabbitMQ, a real MongoDB."""

from __future__ import annotations

import json
import subprocess
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.nodes import NodeProject
from tests.project import eventually

HOLD = {
    "hold",
    "run",
    "stage",
    "selector",
    "state",
    "until",
    "reason",
    "actor",
    "origin",
    "held_jobs",
    "closings",
    "created_at",
    "ended_at",
}
#: A time to come.
NEXT_YEAR = f"{datetime.now(UTC).year + 1}-03-01T14:32:00Z"

THROTTLE = {
    "throttle",
    "run",
    "selector",
    "rate_per_s",
    "burst",
    "concurrency",
    "budget",
    "ordered",
    "stage",
    "reason",
    "actor",
    "created_at",
    "waiting_jobs",
    "running",
    "spent",
    "period_ends_at",
}
PAUSE = {"pause", "run", "stage", "partition", "reason", "actor", "created_at", "waiting_jobs"}
TOLD = {"workers", "workers_alive", "matching", "dry_run"}


def jobs(number: int, **payload: Any) -> list[dict[str, Any]]:
    return [
        {"job_id": f"j{n:03}", "payload": {"n": n, **payload}, "tags": {"kind": "odd" if n % 2 else "even"}}
        for n in range(number)
    ]


def states(project: NodeProject, run: str = "r1") -> dict[str, int]:
    """State -> jobs of a run, without states that no job is in."""
    found: dict[str, int] = project.json("run", "status", run)["states"]
    return {state: number for state, number in found.items() if number}


def error(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The error object on standard error; nothing else may be printed."""
    assert done.stdout == ""
    found: dict[str, Any] = json.loads(done.stderr)["error"]
    assert set(found) == {"code", "message", "hint"}
    return found


def at(text: str) -> datetime:
    assert text.endswith("Z")
    return datetime.fromisoformat(text)


# --- holds ---


def test_a_hold_from_setting_it_to_the_last_job(project: NodeProject) -> None:
    # Given a worker, and a target that is closed before its jobs come
    with project.node():
        held = project.json("hold", "set", "--selector", "kind=odd", "--reason", "429 since 14:02")
        assert set(held) == HOLD | TOLD
        assert (held["state"], held["until"], held["run"]) == ("active", None, None)
        assert (held["workers"], held["workers_alive"], held["dry_run"]) == (1, 1, False)
        project.seed("r1", jobs(10))

        # Then only the others are done
        eventually(lambda: states(project) == {"terminal": 5, "held": 5})
        assert not any(f"j{n:03}" in line for n in (1, 3, 5, 7, 9) for line in project.calls())
        # and the list says what is closed, by whom, why, and how many it keeps
        [row] = project.json("hold", "list")
        assert set(row) == HOLD | {"kind", "partition"}
        assert (row["hold"], row["kind"], row["selector"]) == (held["hold"], "hold", {"kind": "odd"})
        assert (row["held_jobs"], row["origin"], row["reason"]) == (5, "operator", "429 since 14:02")
        assert "@" in row["actor"]
        text = project.cli("hold", "list").stdout
        assert "kind=odd for all runs" in text
        assert "429 since 14:02" in text
        assert row["actor"] in text

        # When it is cleared, then all jobs go on by themselves, without an attempt lost
        cleared = project.json("hold", "clear", held["hold"])
        assert ([row["hold"] for row in cleared["cleared"]], cleared["dry_run"]) == ([held["hold"]], False)
        assert project.json("run", "wait", "r1", "--timeout", "60")["states"]["terminal"] == 10
        eventually(lambda: project.json("hold", "list") == [])
    assert {row["attempt"] for row in project.json("attempts", "r1", "--stage", "first")} == {1}
    [row] = project.json("hold", "list", "--ended")
    assert (row["hold"], row["state"], row["held_jobs"]) == (held["hold"], "ended", 0)
    assert at(row["ended_at"]) >= at(row["created_at"])
    assert project.json("run", "verify", "r1")["ok"]


def test_a_hold_says_what_it_will_change_and_where_it_is_in_force(project: NodeProject) -> None:
    # Given jobs that wait in the queue and one that comes later, and no worker
    project.seed("r1", [*jobs(5), {"job_id": "late", "payload": {"n": 9}, "tags": {"kind": "odd"}, "delay_s": 3600}])

    # When a target is closed
    done = project.cli("hold", "set", "--selector", "kind=odd", "--until", NEXT_YEAR)

    # Then it says what, until when, how many, and that nobody is there to keep to it
    lines = done.stdout.splitlines()
    assert lines[0] == (f"closes kind=odd for all runs until {NEXT_YEAR}: 3 jobs match (1 waiting, 2 pending)")
    assert done.returncode == 0
    assert "no worker runs" in done.stderr

    # And with a worker: on how many it is in force; and that a target without jobs may be a slip of the pen
    with project.node():
        done = project.cli("hold", "set", "--selector", "kid=odd", "--run", "last")
        assert done.stdout.splitlines()[0] == "closes kid=odd for run r1 until it is cleared: 0 jobs match"
        assert "is in force on 1 of 1 worker\n" in done.stdout
        assert "no job that is on its way matches" in done.stderr


def test_a_dry_run_of_a_hold_changes_nothing(project: NodeProject) -> None:
    # Given jobs, and a hold
    project.seed("r1", jobs(4))
    made = project.json("hold", "set", "--selector", "kind=odd", "--run", "r1", "--reason", "first")

    # When other holds are tried, one of them on the same jobs
    new = project.json("hold", "set", "--selector", "kind=even", "--until", "+30m", "--dry-run")
    same = project.json("hold", "set", "--selector", "kind=odd", "--run", "last", "--reason", "second", "--dry-run")

    # Then the answer has the same keys and says what it would be
    assert set(new) == set(same) == set(made)
    assert (new["hold"], new["dry_run"], new["matching"]["pending"]) == (None, True, 2)
    assert at(new["until"]) - datetime.now(UTC) < timedelta(minutes=30)
    assert (same["hold"], same["run"], same["reason"]) == (made["hold"], "r1", "second")
    # and nothing was changed
    would_open = project.json("hold", "clear", made["hold"], "--dry-run")
    assert ([row["hold"] for row in would_open["cleared"]], would_open["dry_run"]) == ([made["hold"]], True)
    [row] = project.json("hold", "list")
    assert (row["hold"], row["reason"], row["state"]) == (made["hold"], "first", "active")
    assert "nothing was changed" in project.cli("hold", "clear", made["hold"], "--dry-run").stdout
    assert "nothing was changed" in project.cli("hold", "set", "--selector", "a=b", "--dry-run").stdout


def test_a_hold_ends_by_itself_at_its_time(project: NodeProject) -> None:
    # Given a worker, and a hold that keeps jobs
    with project.node():
        project.json("hold", "set", "--selector", "kind=odd")
        project.seed("r1", jobs(4))
        eventually(lambda: states(project) == {"terminal": 2, "held": 2})

        # When it is told when to end
        ends = at(project.json("hold", "set", "--selector", "kind=odd", "--until", "+2s")["until"])

        # Then its jobs go on by themselves, and not before
        project.json("run", "wait", "r1", "--timeout", "60")
        eventually(lambda: project.json("hold", "list") == [])
    assert states(project) == {"terminal": 4}
    rows = project.json("attempts", "r1", "--stage", "first")
    started = {row["job_id"]: at(row["started_at"]) for row in rows}
    assert min(started["j001"], started["j003"]) >= ends


def test_set_again_a_hold_has_the_new_time_and_reason(project: NodeProject) -> None:
    first = project.json("hold", "set", "--selector", "a=1", "--selector", "b=2", "--reason", "one")
    again = project.json("hold", "set", "--selector", "b=2", "--selector", "a=1", "--until", "+1h", "--reason", "two")
    assert again["hold"] == first["hold"]
    [row] = project.json("hold", "list")
    assert (row["reason"], row["until"], row["created_at"]) == ("two", again["until"], first["created_at"])


def test_a_hold_is_cleared_by_the_words_that_set_it(project: NodeProject) -> None:
    # Given holds on the same tags, for all runs and for one, and two more on that one
    for run in ("r1", "r2"):
        project.json("run", "init", run, "--pipeline", "demo")
    for_all = project.json("hold", "set", "--selector", "kind=odd")["hold"]
    for_one = project.json("hold", "set", "--selector", "kind=odd", "--run", "r1")["hold"]
    project.json("hold", "set", "--selector", "kind=even", "--run", "r1")
    other = project.json("hold", "set", "--selector", "kind=even", "--run", "r2")["hold"]

    def in_force(*arguments: str) -> set[str]:
        return {row["hold"] for row in project.json("hold", "list", *arguments) if row["state"] == "active"}

    # Then a list for one run has what applies to it
    assert in_force("--run", "last") == {for_all, other}
    # and without --run the one for all runs is cleared, at once: nothing of it is left to probe
    cleared = project.json("hold", "clear", "--selector", "kind=odd", "--at-once")
    assert [(row["hold"], row["state"]) for row in cleared["cleared"]] == [(for_all, "ended")]
    assert for_one in in_force()
    # and with --run alone all of that run
    done = project.cli("hold", "clear", "--run", "r1")
    assert "opens kind=odd for run r1" in done.stdout
    assert "opens kind=even for run r1" in done.stdout
    assert "cleared 2 holds" in done.stdout
    assert in_force() == {other}


def test_what_is_not_there_is_not_cleared(project: NodeProject) -> None:
    # Given a hold that was cleared already
    project.json("run", "init", "r1", "--pipeline", "demo")
    gone = project.json("hold", "set", "--selector", "kind=odd")["hold"]
    project.json("hold", "clear", gone, "--at-once")

    # Then nothing matches it, nor what never was
    for arguments in ([gone], ["h-0"], ["--selector", "kind=odd"], ["--run", "r1"]):
        for dry_run in ([], ["--dry-run"]):
            done = project.cli("hold", "clear", *arguments, *dry_run, "--json")
            assert done.returncode == 1
            found = error(done)
            assert (found["code"], "hold list" in found["hint"]) == ("not_found", True)
    assert project.cli("hold", "list").stdout == "nothing is closed\n"


# --- throttles ---


def test_a_throttle_from_setting_it_to_clearing_it(project: NodeProject) -> None:
    # Given jobs of which some are throttled, in every stage
    project.seed("r1", jobs(12))
    made = project.json(
        "throttle", "set", "--selector", "kind=odd", "--rate", "5/s", "--burst", "2", "--reason", "plan"
    )
    assert set(made) == THROTTLE | {"matching", "dry_run"}
    assert (made["rate_per_s"], made["burst"], made["concurrency"], made["budget"]) == (5.0, 2, None, None)
    assert (made["matching"]["pending"], made["dry_run"]) == (6, False)

    # When a worker takes them
    begin = time.monotonic()
    with project.node():
        project.json("run", "wait", "r1", "--timeout", "60")
        took_s = time.monotonic() - begin

        # Then 6 jobs in 3 stages took their time, but for the burst
        assert took_s >= (6 * 3 - 2) / 5
        assert states(project) == {"terminal": 12}
        # and no attempt was lost, and nothing is left behind
        assert {row["attempt"] for row in project.json("attempts", "r1", "--limit", "1000")} == {1}
        [row] = project.json("throttle", "list")
        assert set(row) == THROTTLE
        assert (row["throttle"], row["waiting_jobs"], row["running"]) == (made["throttle"], 0, 0)
    text = project.cli("throttle", "list").stdout
    assert "5/s (burst 2)" in text
    assert "kind=odd for all runs" in text
    assert row["actor"] in text

    # When it is cleared, then it is gone
    cleared = project.json("throttle", "clear", made["throttle"])
    assert ([row["throttle"] for row in cleared["cleared"]], cleared["dry_run"]) == ([made["throttle"]], False)
    assert project.cli("throttle", "list").stdout == "nothing is throttled\n"
    assert project.json("run", "verify", "r1")["ok"]


def test_a_throttle_says_what_it_will_change(project: NodeProject) -> None:
    # Given jobs
    project.seed("r1", jobs(5))
    selector = ("--selector", "kind=odd", "--run", "r1")

    # When they are limited in every way, then it says how much, and how many
    limits = ("--rate", "100/10s", "--concurrency", "3", "--budget", "100000 tokens/1d")
    done = project.cli("throttle", "set", *selector, *limits)
    assert done.returncode == 0
    assert done.stdout.splitlines()[0] == (
        "limits kind=odd for run r1 to 10/s (burst 1), 3 at a time, 100000 tokens/1d: 2 jobs match (2 pending)"
    )
    [row] = project.json("throttle", "list", "--run", "r1")
    assert row["budget"] == {"amount": 100_000.0, "unit": "tokens", "period_s": 86400.0}
    assert row["spent"] == 0.0
    assert at(row["period_ends_at"]) - datetime.now(UTC) < timedelta(days=1)

    # When it is set again, then it says what that replaces
    done = project.cli("throttle", "set", *selector, "--concurrency", "4")
    assert "replaces 10/s (burst 1), 3 at a time, 100000 tokens/1d" in done.stdout
    [row] = project.json("throttle", "list")
    assert (row["concurrency"], row["rate_per_s"], row["budget"]) == (4, None, None)


def test_a_dry_run_of_a_throttle_changes_nothing(project: NodeProject) -> None:
    # Given a throttle
    project.seed("r1", jobs(4))
    made = project.json("throttle", "set", "--selector", "kind=odd", "--rate", "5/s")

    # When others are tried, one of them on the same jobs
    new = project.json("throttle", "set", "--selector", "kind=even", "--concurrency", "2", "--dry-run")
    same = project.json("throttle", "set", "--selector", "kind=odd", "--rate", "7/s", "--dry-run")

    # Then the answer has the same keys, and nothing was changed
    assert set(new) == set(same) == set(made)
    assert (new["throttle"], new["concurrency"], new["dry_run"]) == (None, 2, True)
    assert (same["throttle"], same["rate_per_s"]) == (made["throttle"], 7.0)
    assert project.json("throttle", "clear", "--selector", "kind=odd", "--dry-run")["dry_run"]
    [row] = project.json("throttle", "list")
    assert (row["throttle"], row["rate_per_s"]) == (made["throttle"], 5.0)


def test_a_throttle_is_cleared_by_the_words_that_set_it(project: NodeProject) -> None:
    # Given throttles for the same tags, for all runs and for one
    project.json("run", "init", "r1", "--pipeline", "demo")
    for_all = project.json("throttle", "set", "--selector", "kind=odd", "--rate", "5/s")["throttle"]
    for_one = project.json("throttle", "set", "--selector", "kind=odd", "--rate", "5/s", "--run", "last")["throttle"]

    # Then each is cleared by itself
    assert project.json("throttle", "clear", "--selector", "kind=odd")["cleared"][0]["throttle"] == for_all
    assert [row["throttle"] for row in project.json("throttle", "list")] == [for_one]
    done = project.cli("throttle", "clear", "--run", "r1")
    assert "takes 5/s (burst 1) from kind=odd for run r1" in done.stdout
    assert "cleared 1 throttle\n" in done.stdout
    # and what is not there is not cleared
    for arguments in ([for_all], ["--selector", "kind=odd"], ["--run", "r1"]):
        done = project.cli("throttle", "clear", *arguments, "--json")
        assert (done.returncode, error(done)["code"]) == (1, "not_found")


# --- pauses ---


def test_a_paused_stage_waits_over_restarts_until_it_is_resumed(project: NodeProject) -> None:
    # Given a run whose second stage is paused before a worker comes
    project.seed("r1", jobs(6))
    made = project.json("pause", "last", "--stage", "second", "--reason", "bug in second")
    assert set(made) == PAUSE | TOLD
    assert (made["run"], made["stage"], made["partition"], made["dry_run"]) == ("r1", "second", None, False)

    # When one worker comes and goes, and another comes
    with project.node():
        eventually(lambda: states(project) == {"waiting": 6})
    with project.node():
        # Then all jobs wait before that stage
        by_stage = {row["stage"]: row for row in project.json("run", "status", "r1")["stages"]}
        assert (by_stage["first"]["completed"], by_stage["second"]["completed"]) == (6, 0)
        assert by_stage["second"]["states"]["waiting"] == 6
        # and the list of what is closed says so
        [row] = project.json("hold", "list")
        assert set(row) == HOLD | {"kind", "partition"}
        assert (row["kind"], row["hold"], row["stage"], row["held_jobs"]) == ("pause", made["pause"], "second", 6)
        text = project.cli("hold", "list").stdout
        assert "run r1, stage second" in text
        assert "bug in second" in text

        # When it is resumed, then the run ends
        resumed = project.json("resume", "r1", "--stage", "second")
        assert [set(row) for row in resumed["resumed"]] == [PAUSE]
        assert (resumed["resumed"][0]["waiting_jobs"], resumed["still_paused"]) == (6, [])
        assert project.json("run", "wait", "r1", "--timeout", "60")["states"]["terminal"] == 6
    assert project.json("hold", "list") == []
    assert project.json("run", "verify", "r1")["ok"]


def test_a_pause_says_what_it_will_change(project: NodeProject) -> None:
    # Given a run with jobs of two partitions, and a worker
    project.seed("r1", jobs(5))
    with project.node("-Q", "demo.third"):
        # When a partition of it is paused, and then all of it
        part = project.cli("pause", "r1", "--partition", "kind__odd")
        whole = project.cli("pause", "r1")

    # Then it says what, how many jobs that stops, and where it is in force
    assert part.stdout.splitlines()[0] == "pauses run r1, partition kind__odd: 2 jobs match (2 pending)"
    assert whole.stdout.splitlines()[0] == "pauses run r1: 5 jobs match (5 pending)"
    assert "is in force on 1 of 1 worker\n" in whole.stdout

    # When all of it is resumed, then it says what still stands
    done = project.cli("resume", "last")
    assert done.returncode == 0
    assert "resumed run r1\n" in done.stdout
    assert "still paused: run r1, partition kind__odd" in done.stderr


def test_what_is_not_paused_is_not_resumed(project: NodeProject) -> None:
    # Given a run of which one stage is paused
    project.seed("r1", jobs(2))
    project.json("pause", "r1", "--stage", "second")

    # Then another place is not resumed, and the hint says what is paused
    for arguments in (["r1"], ["r1", "--stage", "third"], ["r1", "--stage", "second", "--partition", "kind__odd"]):
        done = project.cli("resume", *arguments, "--json")
        assert done.returncode == 1
        found = error(done)
        assert (found["code"], found["hint"]) == ("not_found", "paused are: run r1, stage second")
    project.json("resume", "r1", "--stage", "second")
    found = error(project.cli("resume", "r1", "--stage", "second", "--json"))
    assert found["hint"].startswith("nothing of run r1 is paused")


def test_a_dry_run_of_a_pause_changes_nothing(project: NodeProject) -> None:
    # Given a run
    project.seed("r1", jobs(4))

    # When pausing is tried, then the answer is that of pausing, and nothing is paused
    tried = project.json("pause", "r1", "--stage", "first", "--reason", "x", "--dry-run")
    assert (tried["pause"], tried["dry_run"], tried["matching"]["pending"]) == (None, True, 4)
    assert project.json("hold", "list") == []
    made = project.json("pause", "r1", "--stage", "first")
    assert set(tried) == set(made)

    # When resuming is tried, then it stays paused
    tried = project.json("resume", "r1", "--stage", "first", "--dry-run")
    assert [row["pause"] for row in tried["resumed"]] == [made["pause"]]
    assert set(tried) == {"resumed", "still_paused", "dry_run"}
    assert [row["hold"] for row in project.json("hold", "list")] == [made["pause"]]
    assert "nothing was changed" in project.cli("resume", "r1", "--stage", "first", "--dry-run").stdout


def test_a_pause_is_not_cleared_as_a_hold(project: NodeProject) -> None:
    project.json("run", "init", "r1", "--pipeline", "demo")
    made = project.json("pause", "r1")
    done = project.cli("hold", "clear", made["pause"], "--json")
    found = error(done)
    assert (done.returncode, found["code"]) == (1, "refused")
    assert "resume" in found["hint"]
    assert [row["hold"] for row in project.json("hold", "list")] == [made["pause"]]


# --- all of them ---


USAGE, NOT_FOUND = (2, "usage"), (1, "not_found")

BAD_HOLDS = [
    (["hold", "set"], USAGE),
    (["hold", "set", "--selector", "provider"], USAGE),
    (["hold", "set", "--selector", "=openai"], USAGE),
    (["hold", "set", "--selector", "a=1", "--selector", "a=2"], USAGE),
    (["hold", "set", "--selector", "a=1", "--until", "-5m"], USAGE),
    (["hold", "set", "--selector", "a=1", "--until", "2020-01-01T00:00:00Z"], USAGE),
    (["hold", "set", "--selector", "a=1", "--until", "+5parsecs"], USAGE),
    (["hold", "set", "--selector", "a=1", "--until", "tomorrow"], USAGE),
    (["hold", "set", "--selector", "a=1", "--until", "-5m", "--dry-run"], USAGE),
    (["hold", "set", "--selector", "a=1", "--run", "nope"], NOT_FOUND),
    (["hold", "set", "--selector", "a=1", "--run", "nope", "--dry-run"], NOT_FOUND),
    (["hold", "clear"], USAGE),
    (["hold", "clear", "h-1", "--selector", "a=1"], USAGE),
    (["hold", "clear", "--selector", "a"], USAGE),
    (["hold", "clear", "--selector", "a=1", "--run", "nope"], NOT_FOUND),
    (["hold", "list", "--run", "nope"], NOT_FOUND),
]
BAD_THROTTLES = [
    (["throttle", "set", "--rate", "5/s"], USAGE),
    (["throttle", "set", "--selector", "a", "--rate", "5/s"], USAGE),
    (["throttle", "set", "--selector", "a=1"], USAGE),
    (["throttle", "set", "--selector", "a=1", "--rate", "-5/s"], USAGE),
    (["throttle", "set", "--selector", "a=1", "--rate", "0/s"], USAGE),
    (["throttle", "set", "--selector", "a=1", "--rate", "5/parsec"], USAGE),
    (["throttle", "set", "--selector", "a=1", "--rate", "5"], USAGE),
    (["throttle", "set", "--selector", "a=1", "--rate", "-5/s", "--dry-run"], USAGE),
    (["throttle", "set", "--selector", "a=1", "--burst", "2"], USAGE),
    (["throttle", "set", "--selector", "a=1", "--rate", "5/s", "--burst", "0"], USAGE),
    (["throttle", "set", "--selector", "a=1", "--concurrency", "-1"], USAGE),
    (["throttle", "set", "--selector", "a=1", "--budget", "-5 usd/d"], USAGE),
    (["throttle", "set", "--selector", "a=1", "--budget", "5 usd"], USAGE),
    (["throttle", "set", "--selector", "a=1", "--rate", "5/s", "--run", "nope"], NOT_FOUND),
    (["throttle", "set", "--selector", "a=1", "--rate", "5/s", "--run", "nope", "--dry-run"], NOT_FOUND),
    (["throttle", "clear"], USAGE),
    (["throttle", "clear", "t-0"], NOT_FOUND),
    (["throttle", "list", "--run", "nope"], NOT_FOUND),
]
BAD_PAUSES = [
    (["pause"], USAGE),
    (["pause", "nope"], NOT_FOUND),
    (["pause", "r1", "--stage", "nope"], NOT_FOUND),
    (["pause", "r1", "--partition", "nope"], NOT_FOUND),
    (["pause", "r1", "--partition", "nope", "--dry-run"], NOT_FOUND),
    (["resume", "nope"], NOT_FOUND),
    (["resume", "r1", "--stage", "nope"], NOT_FOUND),
]


@pytest.mark.parametrize("cases", [BAD_HOLDS, BAD_THROTTLES, BAD_PAUSES], ids=["hold", "throttle", "pause"])
def test_bad_input_is_a_clear_error_and_changes_nothing(
    project: NodeProject, cases: list[tuple[list[str], tuple[int, str]]]
) -> None:
    # Given a run
    project.json("run", "init", "r1", "--pipeline", "demo")

    # When commands are called with what they do not take, then each says no in its way
    for arguments, (code, name) in cases:
        done = project.cli(*arguments, "--json")
        assert (done.returncode, error(done)["code"]) == (code, name), arguments
    # and nothing was changed
    assert project.json("hold", "list", "--ended") == []
    assert project.json("throttle", "list") == []


def test_celery_has_the_same_commands(project: NodeProject) -> None:
    # Given a run
    celery = ("celery", "-A", "pipeline_app")
    project.json("run", "init", "r1", "--pipeline", "demo")

    def answer(*arguments: str) -> Any:
        done = project.run(*celery, *arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    # When they are called under celery, then they do the same
    held = answer("hold", "set", "--selector", "kind=odd", "--reason", "x")
    paused = answer("pause", "r1")
    assert answer("hold", "list") == project.json("hold", "list")
    assert {row["hold"] for row in answer("hold", "list")} == {held["hold"], paused["pause"]}
    answer("throttle", "set", "--selector", "kind=odd", "--rate", "39/s")
    assert answer("throttle", "clear", "--selector", "kind=odd")["cleared"][0]["rate_per_s"] == 39.0
    answer("resume", "r1")
    assert [row["hold"] for row in project.json("hold", "list")] == [held["hold"]]
    # and so are the exit codes
    assert project.run(*celery, "hold", "set", "--selector", "kind").returncode == 2
    assert project.run(*celery, "hold", "clear", "h-0").returncode == 1


def test_a_broker_that_is_away_keeps_nobody_from_closing_a_target(project: NodeProject) -> None:
    # Given a broker that does not answer, and a worker that it had
    project.json("run", "init", "r1", "--pipeline", "demo")
    away = {"AMQP_URL": "amqp://joe:secret@127.0.0.1:1//"}
    with project.node():
        # When a target is closed, then it is, and the command says that the worker was not told
        done = project.cli("hold", "set", "--selector", "kind=odd", env=away)
        assert done.returncode == 0
        assert "is in force on 0 of 1 worker" in done.stdout
        assert "1 worker did not answer" in done.stderr
        assert "secret" not in done.stdout + done.stderr

        # and it comes to hear of it by itself
        project.seed("r1", jobs(4), init=False)
        eventually(lambda: states(project) == {"terminal": 2, "held": 2})
