"""What brings jobs on by itself, duty by duty, and that two leaders at once do no harm."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import pytest

from pipeline_app import Pipeline, Retry, Stage
from pipeline_app.application import prepare
from pipeline_app.control import cancelling, paging, runs, seeding, sweep
from pipeline_app.control.status import status
from pipeline_app.domain.partition import queue_name
from pipeline_app.domain.states import DeadKind, JobState
from pipeline_app.errors import StoreError
from pipeline_app.flow.consume import ChunkFailedError, Flow
from pipeline_app.flow.give_back import give_back
from pipeline_app.runtime import Runtime
from pipeline_app.store import counters, manifests, messages, workers
from pipeline_app.transport.depth import depths
from tests.integration.helpers import (
    attempts,
    backdate,
    begin,
    by_state,
    everything,
    hints,
    in_broker,
    in_threads,
    job,
    lines,
    outcomes,
    pipeline,
    prove,
    pump,
)
from tests.project import Project

NewFlow = Callable[[Runtime], Flow]


def double(n: int) -> int:
    return n * 2


def after(n: int) -> dict[str, int]:
    return {"n": n}


def register(rt: Runtime, worker: str, **fields: Any) -> None:
    """A worker that is alive, and runs every stage."""
    stages = [f"{chosen.name}.{stage.name}" for chosen in rt.pipelines.values() for stage in chosen.stages]
    fields = {"queues": [], "stages": stages, "definitions": [], "concurrency": 1, **fields}
    record = {"worker": worker, "state": "running", "ended_at": None, **fields}
    workers.register(rt.store, worker, record)


def take(rt: Runtime, worker: str, *ids: str) -> list[Any]:
    """A claim that the worker will never record."""
    return messages.claim(rt.store, ids, worker=worker, process=worker, token=f"{worker}/1")


def open_ids(rt: Runtime, run: str = "r") -> list[str]:
    return [hint.message for hint in hints(rt, run)]


def ready(rt: Runtime, chosen: Pipeline, stage: str) -> int:
    name = queue_name(chosen.name, stage, "default")
    return depths(rt.settings.amqp_url, [name])[name].ready


def test_a_worker_whose_lease_ended_loses_its_messages(project: Project) -> None:
    """Given a worker that holds a chunk, when its lease ends, then its jobs go on one by one, each with a loss."""
    chosen = pipeline(Stage(double, chunk=3))
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(3))
    register(rt, "w")
    (held,) = take(rt, "w", *open_ids(rt))

    sweep.end_leases(rt)
    assert messages.states(rt.store, [held["_id"]]) == {held["_id"]: "claimed"}, "it lives"
    backdate(rt, "workers", workers.LEASE_S, "lease_until")
    sweep.end_leases(rt)

    assert messages.states(rt.store, [held["_id"]]) == {held["_id"]: "closed"}
    assert [row["state"] for row in rt.store.db.workers.find()] == ["stale"]
    assert [row["jobs"] for row in rt.store.db.messages.find({"state": "open"})] == [["j0"], ["j1"], ["j2"]]
    assert {row["job"]: (row["outcome"], row["worker"]) for row in attempts(rt)} == {
        f"j{n}": ("lost", "w") for n in range(3)
    }
    assert [job(rt, f"j{n}")["losses"] for n in range(3)] == [1, 1, 1]
    assert [job(rt, f"j{n}")["failures"] for n in range(3)] == [0, 0, 0]
    pump(rt)
    prove(rt, terminal=3)


def test_a_job_that_loses_its_worker_too_often(project: Project) -> None:
    """Given a stage that allows two losses, when a job's worker is lost twice, then the job is dead-lettered."""
    chosen = pipeline(Stage(double, chunk=2, losses=2))
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(2))
    take(rt, "gone", *open_ids(rt))
    sweep.end_leases(rt)
    (first, _) = open_ids(rt)

    take(rt, "gone too", first)
    sweep.end_leases(rt)
    pump(rt)

    prove(rt, terminal=1, dead_lettered=1)
    assert job(rt, "j0")["reason"] == DeadKind.WORKER_LOST
    assert outcomes(attempts(rt, job="j0")) == ["lost", "lost"]
    assert outcomes(attempts(rt, job="j1")) == ["lost", "ok"]


def test_giving_back_without_a_loss_is_free(project: Project) -> None:
    """Given a worker that says goodbye, when it gives a chunk back, then that goes on whole, without a loss."""
    chosen = pipeline(Stage(double, chunk=3))
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(3))
    (held,) = take(rt, "w", *open_ids(rt))

    (fresh,) = give_back(rt, held, lost=None)
    again = give_back(rt, held, lost=None)

    assert (fresh["jobs"], again) == (["j0", "j1", "j2"], [])
    assert attempts(rt) == []
    assert job(rt, "j0")["losses"] == 0
    sweep.publish_or_leave(rt, [fresh])
    pump(rt)
    prove(rt, terminal=3)


def test_jobs_that_are_due_are_released_in_full_chunks(project: Project) -> None:
    """Given delayed jobs, when their time comes, then they are enqueued together; not before, and not twice."""
    chosen = pipeline(Stage(double, chunk=4))
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(10, delay_s=300))
    prove(rt, waiting=10)

    sweep.release_due(rt)
    assert (open_ids(rt), job(rt, "j0")["reason"]) == ([], "delay")
    backdate(rt, "job_states", 301, "due_at")
    sweep.release_due(rt)
    sweep.release_due(rt)

    assert [len(row["jobs"]) for row in rt.store.db.messages.find()] == [4, 4, 2]
    assert "due_at" not in job(rt, "j0")
    pump(rt)
    prove(rt, terminal=10)


def test_due_jobs_of_several_stages_and_states(project: Project) -> None:
    """Given delayed jobs and jobs that wait for a retry, in two stages and partitions, then each goes where it was."""

    def flaky(n: int) -> int:
        if n % 2 and n not in seen:
            seen.add(n)
            raise ValueError("once")
        return n

    seen: set[int] = set()
    again = Retry(attempts=3, backoff="300s")
    chosen = pipeline(Stage(flaky, chunk=5, retry=again), Stage(after, chunk=2), partition_by=["kind"])
    rt = project.runtime(chosen)
    rows = [{"job_id": f"j{n}", "payload": n, "tags": {"kind": "ab"[n > 5]}} for n in range(10)]
    begin(rt, chosen, [*rows, {"job_id": "late", "payload": 100, "delay_s": 300}])
    pump(rt)
    prove(rt, terminal=5, retry_waiting=5, waiting=1)

    backdate(rt, "job_states", 301, "due_at")
    sweep.release_due(rt)
    pump(rt)

    prove(rt, terminal=11)
    assert Counter(outcomes(attempts(rt, stage="flaky"))) == {"ok": 11, "failed": 5}


def test_a_hint_that_is_gone_is_published_again(project: Project) -> None:
    """Given an open message whose hint the broker lost, then after a while it is there again, under the same id."""
    chosen = pipeline(double)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(1))
    name = queue_name(chosen.name, "double", "default")
    ((hint,),) = in_broker(rt, name)

    sweep.publish_forgotten(rt)
    assert ready(rt, chosen, "double") == 0, "it may only just have been taken"
    backdate(rt, "messages", messages.FORGOTTEN_AFTER_S + 1, "published_at", "check_at")
    sweep.publish_forgotten(rt)

    assert ready(rt, chosen, "double") == 1
    (row,) = rt.store.db.messages.find()
    assert (row["_id"], row["publishes"]) == (hint["message"], 2)
    pause = row["check_at"] - row["published_at"]
    assert pause == timedelta(seconds=2 * messages.FORGOTTEN_AFTER_S), "the pause doubles"
    pump(rt)
    prove(rt, terminal=1)


def test_a_hint_that_waits_in_its_queue_is_not_doubled(project: Project) -> None:
    """Given old messages whose hints wait in their queue, then they are left alone."""
    chosen = pipeline(double)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(3))
    backdate(rt, "messages", 3600, "published_at", "check_at")

    sweep.publish_forgotten(rt)

    assert ready(rt, chosen, "double") == 3
    pump(rt)
    prove(rt, terminal=3)


def test_a_hint_that_was_overtaken_is_published_again(project: Project) -> None:
    """Given a message whose hint is gone while later ones still wait, when a later one is claimed, then it is sent."""
    chosen = pipeline(double)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(3))
    lost, claimed, waits = open_ids(rt)
    in_broker(rt, queue_name(chosen.name, "double", "default"))
    backdate(rt, "messages", 3600, "published_at", "check_at", _id=lost)
    backdate(rt, "messages", 1800, "published_at", "check_at", _id=claimed)
    sweep.publish_or_leave(rt, list(rt.store.db.messages.find({"_id": waits})))
    register(rt, "w")
    take(rt, "w", claimed)

    sweep.publish_forgotten(rt)

    assert {hint["message"] for (hint,) in in_broker(rt, queue_name(chosen.name, "double", "default"))} == {lost, waits}


def test_jobs_wait_for_a_worker_that_knows_their_definition(project: Project) -> None:
    """Given a run whose pipeline was changed since, then its jobs wait, and go on when a worker has its definition."""
    old = pipeline(Stage(double, chunk=2), after)
    new = Pipeline(old.name, [Stage(double, chunk=1), Stage(after)])
    rt, changed = project.runtime(old), project.runtime(new)
    begin(rt, old, lines(4))

    assert set(pump(changed)) == {"waits for a worker with its definition"}
    register(rt, "changed", definitions=[new.hash])
    sweep.release_definitions(rt)

    assert job(rt, "j0")["reason"] == "definition"
    prove(rt, waiting=4)
    assert any("definition" in warning for warning in status(rt, "r").warnings)
    register(rt, "unchanged", definitions=["something else", old.hash])
    sweep.release_definitions(rt)
    assert [len(row["jobs"]) for row in rt.store.db.messages.find({"state": "open"})] == [2, 2]
    pump(rt)
    prove(rt, terminal=4)
    assert not any("definition" in warning for warning in status(rt, "r").warnings)


def test_a_job_that_waits_again_is_released_again(project: Project) -> None:
    """Given released jobs that met a worker with other code again, then they are released once more."""
    old = pipeline(double)
    new = Pipeline(old.name, [Stage(double, chunk=7)])
    rt, changed = project.runtime(old), project.runtime(new)
    begin(rt, old, lines(2))
    register(rt, "unchanged", definitions=[old.hash])
    pump(changed)
    sweep.release_definitions(rt)
    pump(changed)  # the worker with other code was faster again
    prove(rt, waiting=2)

    sweep.release_definitions(rt)
    pump(rt)

    prove(rt, terminal=2)


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


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeding adds two jobs at a time."""
    monkeypatch.setattr(paging, "PAGE", 2)


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

    chosen = pipeline(Stage(flaky, retry=Retry(backoff="300s")), after)
    rt = project.runtime(chosen)
    begin(rt, chosen, [*lines(4), {"job_id": "late", "payload": 9, "delay_s": 300}])
    flow = new_flow(rt)
    done, fails, _, held = hints(rt)
    for hint in (done, fails):
        try_run(flow, hint)
    try_run(flow, hints(rt, stage="after")[0])
    take(rt, "gone", held.message)
    manifests.update(rt.store, "r", {"cancelled_at": rt.store.now()})
    assert by_state(rt) == {"terminal": 1, "retry_waiting": 1, "pending": 2, "waiting": 1}

    cancelling.sweep(rt)

    assert seen == [0, 1]
    prove(rt, terminal=1, cancelled=4)
    cancelling.sweep(rt)
    assert manifests.get(rt.store, "r")["cancel_done"]
    sweep.end_leases(rt)
    assert pump(rt) == ["not open"] * 5
    prove(rt, terminal=1, cancelled=4)


def try_run(flow: Flow, hint: Any) -> None:
    with contextlib.suppress(ChunkFailedError):
        flow.run(hint)


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
    chosen = pipeline(Stage(double, chunk=2), after)
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


@pytest.mark.usefixtures("small_pages")
def test_two_leaders_at_once(project: Project, new_flow: NewFlow) -> None:
    """Given work for every duty, when two processes sweep at the same time, then it is done, nothing twice."""
    failed: set[int] = set()

    def flaky(n: int) -> int:
        if n % 3 == 0 and n not in failed:
            failed.add(n)
            raise ValueError("once")
        return n

    chosen = pipeline(Stage(flaky, chunk=3, retry=Retry(backoff="300s")), Stage(after, chunk=2), partition_by=["kind"])
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
        leader = sweep.Sweep(lambda: mine)
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
