"""What a job line says is what becomes of the job: its times, its tags, its id."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from pipeline_app import Pipeline, Stage
from pipeline_app.control import runs
from pipeline_app.control.duties import sweep
from pipeline_app.control.results import results
from pipeline_app.control.seed import seeding
from pipeline_app.runtime import Runtime
from pipeline_app.store import counters
from tests.integration.helpers import (
    backdate,
    begin,
    double,
    job,
    lines,
    new_run,
    pipeline,
    prove,
    pump,
)
from tests.project import Project


@pytest.fixture
def chosen() -> Pipeline:
    return pipeline(Stage(double, chunk=2))


@pytest.fixture
def rt(project: Project, chosen: Pipeline) -> Runtime:
    return new_run(project, chosen)


def test_times_of_a_job(rt: Runtime) -> None:
    """Given delays, start times and expiry, then each job starts when it may, and not after its time."""
    now = datetime.now(UTC)
    rows = [
        {"job_id": "now", "payload": 1, "not_before": now - timedelta(hours=1)},
        {"job_id": "delayed", "payload": 2, "delay_s": "10m"},
        {"job_id": "not before", "payload": 3, "not_before": (now + timedelta(minutes=20)).isoformat()},
        {"job_id": "both", "payload": 4, "delay_s": 60, "not_before": now + timedelta(minutes=30)},
        {"job_id": "expires", "payload": 5, "expires_at": now + timedelta(minutes=5)},
        {"job_id": "expires first", "payload": 6, "delay_s": "10m", "expires_at": now - timedelta(seconds=1)},
    ]
    seeding.seed(rt, "r", rows)
    pump(rt)
    prove(rt, terminal=2, waiting=4)

    passed: list[list[str]] = []
    for _ in range(3):
        backdate(rt, "job_states", 601, "due_at")
        sweep.release_due(rt)
        pump(rt)
        waiting = rt.store.db.job_states.find({"state": "waiting"}, {"job": 1}).sort("job", 1)
        passed.append([row["job"] for row in waiting])

    assert passed == [["both", "not before"], ["both"], []]
    prove(rt, terminal=5, dead_lettered=1)
    assert job(rt, "expires first")["reason"] == "expired"


TAGS: list[dict[str, str]] = [
    {},
    {"kind": ""},
    {"kind": "with space"},
    {"kind": "with/slash.and.dots"},
    {"kind": "Zürich – 東京 🚀"},
    {"kind": "x" * 500},
    {"kind": "x" * 499 + "y"},
    {"a": "b__c"},
    {"a__b": "c"},
    {"quota_pool": "gpt", "kind": "ignored"},
    {"default": "default"},
]


def test_odd_tags_have_queues_of_their_own(rt: Runtime, chosen: Pipeline) -> None:
    """Given tags of every kind, then no two targets share a queue, and RabbitMQ takes the names."""
    rows = [{"job_id": f"t{n}", "payload": n, "tags": tags} for n, tags in enumerate(TAGS)]

    seeding.seed(rt, "r", rows)

    queues = rt.store.db.messages.distinct("queue")
    assert len(queues) == len(TAGS)
    assert f"{chosen.name}.double" in queues
    assert all(len(name.encode()) <= 255 for name in queues)
    pump(rt)
    prove(rt, terminal=len(TAGS))
    assert {row["job_id"]: row["tags"] for row in results(rt, "r")} == {f"t{n}": tags for n, tags in enumerate(TAGS)}
    assert counters.totals(rt.store, "r")["double"]["completed"] == len(TAGS)


def test_two_runs_have_jobs_of_the_same_names(rt: Runtime, chosen: Pipeline) -> None:
    """Given two runs with the same job ids, some of them odd, then each has its own."""
    odd = ["a/b", "a%2Fb", "ä", ".", "$x", "a b", "1"]
    for run in ("r", "r-2"):
        if run != "r":
            runs.create_run(rt, run, chosen)
        seeding.seed(rt, run, [{"job_id": name, "payload": len(run)} for name in odd])

    pump(rt)

    for run in ("r", "r-2"):
        prove(rt, run, terminal=len(odd))
        assert {row["job_id"]: row["result"] for row in results(rt, run)} == dict.fromkeys(odd, 2 * len(run))


def test_seeding_uses_the_pipeline_that_the_run_was_made_of(project: Project) -> None:
    """Given a run of a pipeline that this process does not know any more, then jobs are added as its manifest says."""
    old = pipeline(Stage(double, chunk=3), partition_by=["kind"])
    maker = project.runtime(old)
    begin(maker, old, [])
    other = project.runtime()

    seeding.seed(other, "r", lines(6, tags={"kind": "a", "more": "x"}))

    assert [(row["jobs"], row["partition"]) for row in maker.store.db.messages.find()] == [
        (["j0", "j1", "j2"], "kind__a"),
        (["j3", "j4", "j5"], "kind__a"),
    ]
    pump(maker)
    prove(maker, terminal=6)
