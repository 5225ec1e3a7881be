"""What brings jobs on by itself: ended leases, due times, hints that are gone, definitions that come back."""

from __future__ import annotations

import threading
from collections import Counter
from datetime import timedelta
from types import SimpleNamespace

import pytest

from pipeline_app import Pipeline, Retry, Stage
from pipeline_app.control.duties import sweep
from pipeline_app.control.sight.status import status
from pipeline_app.domain.partition import queue_name
from pipeline_app.domain.states import DeadKind, JobState
from pipeline_app.flow.give_back import give_back
from pipeline_app.runtime import Runtime
from pipeline_app.store import messages, workers
from pipeline_app.transport.depth import depths
from tests.integration.helpers import (
    as_row,
    attempts,
    backdate,
    begin,
    double,
    in_broker,
    job,
    lines,
    open_ids,
    outcomes,
    pipeline,
    prove,
    pump,
    register,
    take,
)
from tests.project import Project, eventually


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


def test_much_to_take_back_is_taken_back_in_several_rounds(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given more than there is time for in one round, then the next rounds go on, and other duties come between."""
    chosen = pipeline(double)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(4))
    take(rt, "gone", *open_ids(rt))
    claimed = len(messages.claimed(rt.store))
    assert claimed > 2
    spent = iter(range(100))
    monkeypatch.setattr(sweep, "SPELL_S", 1.5)
    monkeypatch.setattr(sweep, "time", SimpleNamespace(monotonic=lambda: next(spent)))

    sweep.end_leases(rt)
    left = len(messages.claimed(rt.store))
    assert 0 < left < claimed
    for _ in range(claimed):
        sweep.end_leases(rt)
    assert messages.claimed(rt.store) == []
    monkeypatch.undo()
    pump(rt)
    prove(rt, terminal=4)


def test_one_that_cannot_be_taken_back_yet_keeps_up_no_other(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a job that somebody writes on, when it is to be taken back first, then the others do not wait for it."""
    chosen = pipeline(double)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(6))
    take(rt, "gone", *open_ids(rt))
    monkeypatch.setattr(sweep, "SPELL_S", 30.0)
    monkeypatch.setattr(
        sweep, "random", SimpleNamespace(shuffle=lambda rows: rows.sort(key=lambda row: row["jobs"] == ["j0"]))
    )

    with rt.store.session() as session, session.start_transaction():
        rt.store.db.job_states.update_one({"job": "j0"}, {"$set": {"written": True}}, session=session)
        sweeper = threading.Thread(target=sweep.end_leases, args=(rt,))
        sweeper.start()
        eventually(lambda: [row["jobs"] for row in messages.claimed(rt.store)] == [["j0"]])
        session.abort_transaction()
    sweeper.join(30)

    assert messages.claimed(rt.store) == []
    pump(rt)
    prove(rt, terminal=6)


def test_a_job_that_loses_its_worker_too_often(project: Project) -> None:
    """Given a job whose workers are lost again and again, when that is four times what its stage allows, it ends.

    Each time it may have been something else that ended them.
    """
    chosen = pipeline(Stage(double, chunk=2, losses=1))
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(2))
    take(rt, "gone", *open_ids(rt))
    sweep.end_leases(rt)
    for worker in ("gone, too", "once more", "at last"):
        assert job(rt, "j0")["state"] == JobState.PENDING
        take(rt, worker, job(rt, "j0")["message"])
        sweep.end_leases(rt)
    pump(rt)

    prove(rt, terminal=1, dead_lettered=1)
    assert job(rt, "j0")["reason"] == DeadKind.WORKER_LOST
    assert outcomes(attempts(rt, job="j0")) == ["lost"] * 4
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
    chosen = pipeline(Stage(flaky, chunk=5, retry=again), Stage(as_row, chunk=2), partition_by=["kind"])
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
    old = pipeline(Stage(double, chunk=2), as_row)
    new = Pipeline(old.name, [Stage(double, chunk=1), Stage(as_row)])
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
