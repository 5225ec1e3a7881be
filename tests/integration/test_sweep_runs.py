"""What the sweep does for runs: batches of dead seeders, cancelled runs, counters; and two leaders at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from pipeline_app import Job, Pipeline, Retry, Stage
from pipeline_app.application import prepare
from pipeline_app.control import runs
from pipeline_app.control.changes import cancelling
from pipeline_app.control.duties import sweep
from pipeline_app.control.seed import seeding
from pipeline_app.control.sight.status import status
from pipeline_app.domain.partition import queue_name
from pipeline_app.domain.states import JobState
from pipeline_app.errors import StoreError
from pipeline_app.runtime import Runtime
from pipeline_app.store import counters, manifests
from tests.integration.helpers import (
    NewFlow,
    as_row,
    backdate,
    begin,
    by_state,
    double,
    everything,
    hints,
    in_broker,
    in_threads,
    job,
    lines,
    open_ids,
    pipeline,
    prove,
    pump,
    register,
    take,
    try_run,
)
from tests.project import Project


def vanish(rows: list[dict[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Job lines of a seeder that is gone after them: it closes nothing and takes nothing back."""
    yield from rows
    raise StoreError("gone")


def abandoned(rt: Runtime, run: str, chosen: Pipeline, state: str, *, whole: bool) -> str:
    """A batch of six jobs whose seeder died in that state; its id."""
    prepare(rt)
    runs.create_run(rt, run, chosen)
    with pytest.raises(StoreError):
        seeding.seed(rt, run, vanish(lines(6)), whole=whole)
    (row,) = manifests.batches(rt.store, run)
    manifests.set_batch(rt.store, row["_id"], state, expected=("open",))
    return str(row["_id"])


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("whole", [False, True])
def test_a_seeder_that_died_in_the_middle(project: Project, whole: bool) -> None:
    """Given an open batch whose seeder is gone, when its lease has ended, then `wait` and `status` name it."""
    chosen = pipeline(Stage(double, chunk=2))
    rt = project.runtime(chosen)
    batch = abandoned(rt, "r", chosen, "open", whole=whole)

    seeding.sweep(rt)
    assert status(rt, "r").seeding == [batch], "its seeder may be slow"
    backdate(rt, "seed_batches", 60, "lease_until")
    seeding.sweep(rt)

    now = runs.wait(rt, "r", timeout_s=10)
    assert (now.interrupted, now.seeding, now.state) == ([batch], [], "active")
    assert not now.is_past(None)
    assert any(batch in warning for warning in now.warnings)
    pump(rt)
    prove(rt, **({"pending": 6} if whole else {"terminal": 6}))


@pytest.mark.usefixtures("small_pages")
def test_a_batch_that_was_being_closed_is_closed(project: Project) -> None:
    """Given a whole batch whose seeder died while closing it, then the sweep closes and publishes it."""
    chosen = pipeline(Stage(double, chunk=2))
    rt = project.runtime(chosen)
    batch = abandoned(rt, "r", chosen, "closing", whole=True)
    seeding.sweep(rt)
    assert in_broker(rt, queue_name(chosen.name, "double", "default")) == []

    backdate(rt, "seed_batches", 60, "lease_until")
    seeding.sweep(rt)

    assert [row["_id"] for row in manifests.batches(rt.store, "r", "closed")] == [batch]
    pump(rt)
    prove(rt, terminal=6)
    assert runs.wait(rt, "r", timeout_s=10).state == "complete"


@pytest.mark.usefixtures("small_pages")
def test_a_batch_that_was_being_taken_back_goes_entirely(project: Project) -> None:
    """Given a whole batch whose seeder died while taking it back, then nothing of it is left."""
    chosen = pipeline(Stage(double, chunk=2))
    rt = project.runtime(chosen)
    abandoned(rt, "r", chosen, "removing", whole=True)
    backdate(rt, "seed_batches", 60, "lease_until")

    seeding.sweep(rt)

    found = everything(rt)
    for name in ("job_states", "messages", "pipeline_events", "run_counters", "seed_batches"):
        assert found[name] == [], name
    prove(rt)


def test_cancelling_is_finished(project: Project, new_flow: NewFlow) -> None:
    """Given a run whose cancel flag is set and whose jobs are everywhere, then the sweep moves all that is left."""
    seen: list[int] = []

    def flaky(n: int) -> int:
        seen.append(n)
        if n == 1:
            raise ValueError("later")
        return n

    chosen = pipeline(Stage(flaky, retry=Retry(backoff="300s")), as_row)
    rt = project.runtime(chosen)
    begin(rt, chosen, [*lines(4), {"job_id": "late", "payload": 9, "delay_s": 300}])
    flow = new_flow(rt)
    done, fails, _, held = hints(rt)
    for hint in (done, fails):
        try_run(flow, hint)
    try_run(flow, hints(rt, stage="as_row")[0])
    take(rt, "gone", held.message)
    manifests.update(rt.store, "r", {"cancelled_at": rt.store.now()})
    assert by_state(rt) == {"terminal": 1, "retry_waiting": 1, "pending": 1, "running": 1, "waiting": 1}

    cancelling.sweep(rt)

    assert seen == [0, 1]
    prove(rt, terminal=1, cancelled=4)
    cancelling.sweep(rt)
    assert manifests.get(rt.store, "r")["cancel_done"]
    sweep.end_leases(rt)
    assert pump(rt) == ["not open"] * 5
    prove(rt, terminal=1, cancelled=4)


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("state", ["open", "closing", "removing"])
def test_a_run_is_cancelled_while_a_whole_batch_is_seeded(project: Project, state: str) -> None:
    """Given a run that is cancelled over an unfinished whole batch, then in the end all counts agree, whatever it was.

    The seeder died, too: nothing but the sweep is left.
    """
    chosen = pipeline(Stage(double, chunk=2))
    rt = project.runtime(chosen)
    abandoned(rt, "r", chosen, state, whole=True)
    cancelling.cancel(rt, "r")
    for _ in range(3):
        cancelling.sweep(rt)
        backdate(rt, "seed_batches", 60, "lease_until")
        seeding.sweep(rt)
    cancelling.sweep(rt)
    pump(rt)

    prove(rt, **({} if state == "removing" else {"cancelled": 6}))
    assert manifests.get(rt.store, "r")["cancel_done"]


def test_counters_of_idle_processes_are_folded(project: Project) -> None:
    """Given counters that nobody adds to, then one document is left for each place; busy and seeding ones stay."""
    chosen = pipeline(Stage(double, chunk=2), as_row)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(6))
    pump(rt)
    before = counters.totals(rt.store, "r")
    sweep.fold_counters(rt)
    assert counters.FOLDED not in rt.store.db.run_counters.distinct("worker"), "they are busy"

    backdate(rt, "run_counters", sweep.FOLD_IDLE_S + 1, "at")
    sweep.fold_counters(rt)

    assert rt.store.db.run_counters.distinct("worker") == [counters.FOLDED]
    assert rt.store.db.run_counters.count_documents({}) == 2
    assert counters.totals(rt.store, "r") == before
    prove(rt, terminal=6)


@pytest.mark.usefixtures("small_pages")
def test_counters_of_a_batch_that_may_be_taken_back_are_not_folded(project: Project) -> None:
    """Given a whole batch that is open, when counters are folded, then it still can be taken back with its counts."""
    chosen = pipeline(double)
    rt = project.runtime(chosen)
    batch = abandoned(rt, "r", chosen, "open", whole=True)
    backdate(rt, "run_counters", 3600, "at")
    sweep.fold_counters(rt)

    manifests.set_batch(rt.store, batch, "removing", expected=("open",))
    seeding.remove_batch(rt, "r", batch)

    prove(rt)


def flaky(n: int, job: Job) -> int:
    """Also found by the process of its own in which a job goes on that lost its worker."""
    if n % 3 == 0 and job.attempt == 1:
        raise ValueError("once")
    return n


@pytest.mark.usefixtures("small_pages")
def test_two_leaders_at_once(project: Project, new_flow: NewFlow) -> None:
    """Given work for every duty, when two processes sweep at the same time, then it is done, nothing twice."""
    chosen = pipeline(Stage(flaky, chunk=3, retry=Retry(backoff="300s")), Stage(as_row, chunk=2), partition_by=["kind"])
    other = Pipeline(chosen.name, [Stage(flaky, chunk=9)])
    rt, second, changed = project.runtime(chosen), project.runtime(chosen), project.runtime(other)
    rows = [{"job_id": f"j{n}", "payload": n, "tags": {"kind": "abc"[n % 3]}} for n in range(60)]
    prepare(rt)
    register(rt, "alive", definitions=[chosen.hash])
    # Some jobs failed and wait, some are in the second stage with nobody told, some are held by the dead.
    begin(rt, chosen, rows)
    for hint in hints(rt)[:10]:
        try_run(new_flow(rt), hint)
    take(rt, "gone", *open_ids(rt)[4:12])
    # Jobs that nobody knew, a cancel that began, batches in every state.
    begin(rt, chosen, rows[:20], run="definition")
    for hint in hints(rt, "definition"):
        new_flow(changed).run(hint)
    begin(rt, chosen, rows[:20], run="cancelled")
    manifests.update(rt.store, "cancelled", {"cancelled_at": rt.store.now()})
    for state in ("open", "closing", "removing"):
        abandoned(rt, state, chosen, state, whole=True)
    # What their seeders were at is ended: those here live on.
    rt.store.db.seed_batches.update_many({}, {"$set": {"process": "gone"}})
    rt.store.db.messages.update_many({"state": "open"}, {"$set": {"published_at": None}})
    in_broker(rt, *rt.store.db.partitions.distinct("_id"))
    for collection, field in (
        ("job_states", "due_at"),
        ("messages", "check_at"),
        ("seed_batches", "lease_until"),
        ("run_counters", "at"),
    ):
        backdate(rt, collection, 3600, field)

    def lead(mine: Runtime) -> None:
        leader = sweep.sweep(lambda: mine)
        for _ in range(4):
            sweep.end_leases(mine)
            leader.round(mine)

    in_threads(lambda: lead(rt), lambda: lead(second))
    pump(rt)

    backdate(rt, "job_states", 3600, "due_at")
    in_threads(lambda: lead(rt), lambda: lead(second))
    pump(rt)
    prove(rt, "r", terminal=60)
    prove(rt, "definition", terminal=20)
    prove(rt, "cancelled", cancelled=20)
    prove(rt, "open", pending=6)
    prove(rt, "closing", terminal=6)
    prove(rt, "removing")
    assert job(rt, "j0")["state"] == JobState.TERMINAL
