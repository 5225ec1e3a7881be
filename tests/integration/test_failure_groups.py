"""Failures in groups: every failed job is in one, alike errors in the same one, and the numbers add up."""

from __future__ import annotations

from datetime import timedelta

import pytest

from pipeline_app import PermanentError, Retry, Stage
from pipeline_app.control.duties import sweep
from pipeline_app.control.sight import ledger
from pipeline_app.domain.states import JobState
from pipeline_app.errors import NotFoundError
from pipeline_app.runtime import Runtime
from pipeline_app.store import jobs
from pipeline_app.store.client import Document
from tests.integration.helpers import as_row, begin, job, lines, pipeline, prove, pump, take
from tests.project import Project

ROW = [
    "group",
    "stage",
    "type",
    "message",
    "frame",
    "count",
    "dead_lettered",
    "retrying",
    "first_at",
    "last_at",
    "sample_job",
]


def ask_provider(n: int) -> int:
    """A handler with two faults, each with numbers of its own in the message; every fourth job is fine."""
    if n % 4 == 1:
        raise PermanentError(f"no account {n:04d} at https://api.example/v1/{n}")
    if n % 4 in (2, 3):
        raise ValueError(f"answer {n} has {n * 3.5} parts too many")
    return n


def groups(rt: Runtime) -> dict[str, Document]:
    """Groups of the run by the type of their error."""
    rows = ledger.failure_groups(rt, "r")
    assert all(list(row) == ROW for row in rows)
    return {row["type"]: row for row in rows}


def test_alike_errors_are_one_group(project: Project) -> None:
    """Given twenty jobs of which fifteen fail in two ways, when they are grouped, then there are two groups."""
    chosen = pipeline(Stage(ask_provider, chunk=7, retry=Retry(attempts=2, backoff="10m")), as_row)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(20))
    pump(rt)
    prove(rt, dead_lettered=5, retry_waiting=10, terminal=5)

    # Then the larger one is first, though nothing of it is dead yet
    found = ledger.failure_groups(rt, "r")
    assert [(row["type"], row["count"], row["dead_lettered"], row["retrying"]) for row in found] == [
        ("ValueError", 10, 0, 10),
        ("pipeline_app.errors.PermanentError", 5, 5, 0),
    ]
    assert all(list(row) == ROW for row in found)

    # and each has a sample whose error it shows, its place, and its times
    retrying, dead = found
    for row in found:
        n = job(rt, row["sample_job"])["payload"]
        assert str(n) in row["message"]
        assert row["frame"] == f"{__name__}:ask_provider"
        assert row["first_at"] <= row["last_at"] <= rt.store.now()
        assert job(rt, row["sample_job"])["error_group"] == row["group"]
    assert (retrying["stage"], dead["stage"]) == ("ask_provider", "ask_provider")
    assert retrying["group"] != dead["group"]

    # and from a group one comes to its jobs
    listed = ledger.failures(rt, "r", group=dead["group"])
    assert {row["job_id"] for row in listed} == {f"j{n}" for n in range(1, 20, 4)}
    assert {row["group"] for row in ledger.failures(rt, "r")} == {dead["group"]}
    assert ledger.failures(rt, "r", group=retrying["group"]) == []

    # and no more groups are given than were asked for
    assert [row["type"] for row in ledger.failure_groups(rt, "r", limit=1)] == ["ValueError"]


def fail_in_both(n: int) -> int:
    """A handler that two stages have."""
    raise PermanentError(f"no {n}")


def pass_even(n: int) -> int:
    """Only even jobs come to the next stage."""
    return n if n % 2 == 0 else fail_in_both(n)


def test_a_group_is_of_one_stage(project: Project) -> None:
    """Given the same error at the same place in two stages, then there is a line for each."""
    chosen = pipeline(pass_even, fail_in_both)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(5))
    pump(rt)

    found = ledger.failure_groups(rt, "r")
    assert [(row["stage"], row["count"]) for row in found] == [("fail_in_both", 3), ("pass_even", 2)]
    assert len({row["group"] for row in found}) == 1
    assert [row["count"] for row in ledger.failure_groups(rt, "r", stage="pass_even")] == [2]
    with pytest.raises(NotFoundError):
        ledger.failure_groups(rt, "r", stage="nope")
    assert len(ledger.failures(rt, "r", group=found[0]["group"])) == 5
    assert len(ledger.failures(rt, "r", group=found[0]["group"], stage="pass_even")) == 2


def ask_number(n: int) -> int:
    """A handler that is strict about its input."""
    return n


def test_what_dies_without_a_handler_is_in_a_group_too(project: Project) -> None:
    """Given jobs that expired, that have a bad payload, and whose workers died, then each of them is in a group."""
    chosen = pipeline(Stage(ask_number, losses=1))
    rt = project.runtime(chosen)
    rows = [
        *lines(2, expires_at=(rt.store.now() - timedelta(days=1)).isoformat()),
        {"job_id": "bad", "payload": "many"},
        {"job_id": "lost1", "payload": 0},
        {"job_id": "lost2", "payload": 0},
    ]
    begin(rt, chosen, rows)
    for job_id, worker in (("lost1", "celery@web-1/77/aa"), ("lost2", "celery@db/4711/0b")):
        # Workers that have no lease any more take it, until the stage has had enough of that.
        while job(rt, job_id)["state"] == JobState.PENDING:
            take(rt, worker, job(rt, job_id)["message"])
            sweep.end_leases(rt)
    pump(rt)
    prove(rt, dead_lettered=5)

    # Then those whose workers died are one group, whatever the names of those were
    found = groups(rt)
    assert {name: row["count"] for name, row in found.items()} == {
        "expired": 2,
        "pipeline_app.errors.InvalidInputError": 1,
        "WorkerLost": 2,
    }
    assert found["WorkerLost"]["sample_job"] in {"lost1", "lost2"}
    assert (found["expired"]["group"], found["expired"]["message"]) == (
        "expired",
        "its expires_at passed before it was started",
    )
    assert all(row["frame"] is None for row in found.values())
    assert sum(row["dead_lettered"] for row in found.values()) == 5
    assert [row["job_id"] for row in ledger.failures(rt, "r", group="expired")] == ["j0", "j1"]


def fail_twice_differently(n: int) -> int:
    """A handler whose second fault is another one than its first."""
    raise FAULTS.pop()


FAULTS: list[Exception] = []


def test_a_job_is_only_in_the_group_of_its_last_error(project: Project) -> None:
    """Given a job that fails in one way and then, tried again, in another, then the first group is gone."""
    chosen = pipeline(Stage(fail_twice_differently, retry=Retry(attempts=2, backoff="0s")))
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(1))
    FAULTS[:] = [KeyError("second"), ValueError("first")]
    pump(rt)
    assert set(groups(rt)) == {"ValueError"}

    # When its retry is due
    sweep.release_due(rt)
    assert groups(rt) == {}
    pump(rt)

    # Then only its last error counts
    found = groups(rt)
    assert {name: (row["count"], row["message"]) for name, row in found.items()} == {"KeyError": (1, "'second'")}
    assert jobs.failure_groups(rt.store, "another run", stage=None, limit=1) == []
