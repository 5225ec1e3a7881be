"""Order per key: one job of a key at a time through the whole pipeline, in the order in which they were added."""

from __future__ import annotations

import threading
from collections import defaultdict

import pytest

from pipeline_app import PermanentError, Pipeline, RateLimited
from pipeline_app.control.changes import cancelling, moving
from pipeline_app.control.duties import hold_release, ordering, sweep
from pipeline_app.control.seed import seeding
from pipeline_app.control.sight.why import why
from pipeline_app.control.targets import holds
from pipeline_app.domain.outcome import ErrorRecord
from pipeline_app.domain.selection import Selection
from pipeline_app.domain.states import JobState
from pipeline_app.flow.give_back import give_back
from pipeline_app.runtime import Runtime
from pipeline_app.store import partitions
from pipeline_app.store.client import Document
from tests.integration.gate import Gate
from tests.integration.helpers import (
    NewFlow,
    backdate,
    begin,
    by_state,
    hints,
    job,
    new_run,
    pipeline,
    prove,
    pump,
    take,
    try_run,
)
from tests.integration.ordered import Diary, go, in_order, keyed, states, with_diary
from tests.integration.replays import carry_out, start
from tests.project import Project, eventually


@pytest.fixture
def chosen(diary: Diary) -> Pipeline:
    return with_diary(diary)


@pytest.fixture
def rt(project: Project, chosen: Pipeline) -> Runtime:
    return new_run(project, chosen)


def test_one_after_the_other_through_all_stages(rt: Runtime, diary: Diary) -> None:
    """Given jobs of three keys and some without, then each key's go one at a time, in order, and none is forgotten."""
    rows = [row for group in zip(keyed("a", 4), keyed("b", 4), keyed("c", 4), strict=True) for row in group]
    seeding.seed(rt, "r", [*rows, {"job_id": "free", "payload": 0}])

    assert by_state(rt) == {"waiting": 12, "pending": 1}
    go(rt)

    for key in "abc":
        assert diary.of(key) == in_order(*[f"{key}{n}" for n in range(4)])
    prove(rt, terminal=13)
    # Nothing is left of it.
    assert rt.store.db.turns.count_documents({}) == 0
    assert rt.store.db.job_states.count_documents({"$or": [{"has_turn": True}, {"queues_for": {"$exists": True}}]}) == 0


def test_jobs_of_one_key_share_a_partition(rt: Runtime, chosen: Pipeline) -> None:
    """Given jobs with all kinds of tags, then those of a key are in one of the pipeline's partitions for that."""
    for n in range(40):
        seeding.seed(rt, "r", [{"job_id": f"{n}.{tag}", "order_key": n, "tags": {"kind": tag}} for tag in "xy"])

    found: dict[str, set[str]] = defaultdict(set)
    for row in rt.store.db.job_states.find():
        found[row["order_key"]].add(row["partition"])
    assert all(len(names) == 1 for names in found.values())
    assert set.union(*found.values()) == {f"order-{n}" for n in range(4)}
    # Workers find them like others, and may be pointed at them.
    rows = {row["_id"]: row["tags"] for row in partitions.of_pipelines(rt.store, [chosen.name])}
    assert rows[f"{chosen.name}.second.order-3"] == {"order_partition": "3"}
    assert len(rows) == 8


def test_a_job_that_is_not_at_rest_keeps_the_others_waiting(rt: Runtime, diary: Diary) -> None:
    """Given a job that waits for its retry, is delayed, or is held, then the next of its key waits behind it."""
    diary.faults["retried0"] = ValueError("once more")
    diary.faults["held0"] = RateLimited("not now", retry_after=3600)
    delayed = keyed("delayed", 2)
    delayed[0] |= {"delay_s": 3600}
    seeding.seed(rt, "r", [*keyed("retried", 2), *keyed("held", 2, tags={"p": "x"}), *delayed])
    go(rt)
    assert states(rt, "retried0", "retried1") == ["retry_waiting", "waiting"]
    assert states(rt, "held0", "held1") == ["held", "waiting"]
    assert states(rt, "delayed0", "delayed1") == ["waiting", "waiting"]
    assert (job(rt, "delayed0")["reason"], job(rt, "delayed1")["reason"]) == ("delay", "order")
    prove(rt, retry_waiting=1, held=1, waiting=4)

    diary.faults.clear()
    backdate(rt, "job_states", 7200, "due_at")
    sweep.release_due(rt)
    go(rt)
    assert diary.of("retried") == in_order("retried0", "retried1")
    assert diary.of("delayed") == in_order("delayed0", "delayed1")
    holds.clear(rt, selector={"p": "x"}, at_once=True)

    def let_go() -> bool:
        hold_release.release_kept_by_nothing(rt)
        go(rt)
        return diary.of("held") == in_order("held0", "held1")

    # This process hears of the hold's end within a second.
    eventually(let_go)
    prove(rt, terminal=6)


def test_a_delayed_job_is_delayed_when_its_turn_comes(rt: Runtime, diary: Diary) -> None:
    """Given a delay of a job that has one before it, then it waits for both, and neither delays the one before."""
    rows = keyed("a", 3)
    rows[1] |= {"delay_s": 3600}
    seeding.seed(rt, "r", rows)
    sweep.release_due(rt)
    go(rt)

    assert diary.entries == in_order("a0")
    assert states(rt, "a1", "a2") == ["waiting", "waiting"]
    assert why(rt, "r", "a1")["waits_for"]["kind"] == "delay"
    backdate(rt, "job_states", 7200, "due_at")
    sweep.release_due(rt)
    go(rt)
    assert diary.entries == in_order("a0", "a1", "a2")
    assert "starts_at" not in job(rt, "a1")


def test_every_way_to_rest_passes_the_turn_on(rt: Runtime, diary: Diary) -> None:
    """Given jobs that are dead-lettered, expire, are cancelled, or lose their worker for ever, then the next goes."""
    diary.faults["dead0"] = PermanentError("no")
    expired = keyed("late", 3)
    for row in expired[:2]:
        row["expires_at"] = "2020-01-01T00:00:00Z"
    seeding.seed(rt, "r", [*keyed("dead", 2), *expired, *keyed("gone", 2), *keyed("lost", 2)])
    ordering.give_turns(rt)
    cancelling.cancel_jobs(rt, "r", Selection(job_ids=("gone0",)))
    rt.store.db.job_states.update_one({"job": "lost0"}, {"$set": {"losses": 1000}})
    lost = rt.store.db.messages.find_one({"jobs": "lost0"})
    assert lost is not None
    _lose(rt, lost)
    go(rt)

    assert states(rt, "dead0", "late0", "late1", "gone0", "lost0") == [
        "dead_lettered", "dead_lettered", "dead_lettered", "cancelled", "dead_lettered"
    ]  # fmt: skip
    assert sorted(diary.entries) == sorted(in_order("dead1", "late2", "gone1", "lost1"))
    prove(rt, dead_lettered=4, cancelled=1, terminal=4)


def _lose(rt: Runtime, message: Document) -> None:
    for row in take(rt, "w", message["_id"]):
        give_back(rt, row, lost=ErrorRecord.of(RuntimeError("its worker is gone")))


def test_a_cancelled_job_whose_handler_runs_is_waited_for(project: Project, new_flow: NewFlow, gate: Gate) -> None:
    """Given a job that is cancelled under its handler, then the next of its key starts when that has ended."""
    chosen = pipeline(gate.stage())
    rt = project.runtime(chosen)
    begin(rt, chosen, keyed("a", 2))
    ordering.give_turns(rt)
    [hint] = hints(rt)
    running = threading.Thread(target=try_run, args=(new_flow(rt), hint))
    running.start()
    assert gate.entered.wait(20)

    cancelling.cancel_jobs(rt, "r", Selection(job_ids=("a0",)))
    ordering.give_turns(rt)
    assert states(rt, "a0", "a1") == ["cancelled", "waiting"]
    # Nor does the same job, should it be replayed meanwhile.
    carry_out(rt, start(rt, Selection(states=(JobState.CANCELLED,)))["operation"])
    ordering.give_turns(rt)
    assert states(rt, "a0", "a1") == ["waiting", "waiting"]

    gate.may_end.set()
    running.join(20)
    ordering.give_turns(rt)
    assert states(rt, "a0", "a1") == ["pending", "waiting"]


@pytest.mark.parametrize("state", ["terminal", "dead_lettered", "cancelled"])
def test_a_replayed_job_waits_for_its_turn(rt: Runtime, diary: Diary, state: str) -> None:
    """Given a job at rest that is replayed while another of its key goes, then it waits, and goes before later ones."""
    if state == "dead_lettered":
        diary.faults["a0"] = PermanentError("a bug")
    seeding.seed(rt, "r", keyed("a", 4))
    if state == "cancelled":
        cancelling.cancel_jobs(rt, "r", Selection(job_ids=("a0",)))
    while job(rt, "a1")["state"] != "pending":
        ordering.give_turns(rt)
        if job(rt, "a1")["state"] != "pending":
            pump(rt)
    assert states(rt, "a0", "a1", "a2") == [state, "pending", "waiting"]
    diary.faults.clear()
    diary.entries.clear()

    row = carry_out(rt, start(rt, Selection(states=(JobState(state),)))["operation"])

    assert (row["released"], job(rt, "a0")["reason"], job(rt, "a0")["generation"]) == (1, "order", 1)
    go(rt)
    assert diary.entries == in_order("a1", "a0", "a2", "a3")
    prove(rt, terminal=4)


def test_jobs_that_wait_are_replayed_into_their_queue(rt: Runtime, diary: Diary) -> None:
    """Given waiting jobs that are replayed by force, then one that waits for its turn does so still."""
    diary.faults["a0"] = ValueError("once more")
    seeding.seed(rt, "r", keyed("a", 3))
    go(rt)
    assert states(rt, "a0", "a1") == ["retry_waiting", "waiting"]
    diary.faults.clear()

    everything_that_waits = Selection(states=(JobState.WAITING, JobState.RETRY_WAITING))
    carry_out(rt, start(rt, everything_that_waits, force=True)["operation"])

    assert states(rt, "a0", "a1", "a2") == ["pending", "waiting", "waiting"]
    go(rt)
    assert diary.entries == in_order("a0", "a1", "a2")
    prove(rt, terminal=3)


def test_moved_jobs_keep_their_turns(rt: Runtime, diary: Diary) -> None:
    """Given jobs of a key that are moved to another stage, then they go from there, one at a time, in order."""
    seeding.seed(rt, "r", keyed("a", 3))
    ordering.give_turns(rt)

    assert moving.move_jobs(rt, "r", Selection(), "second") == 3

    assert states(rt, "a0", "a1", "a2") == ["pending", "waiting", "waiting"]
    go(rt)
    assert diary.entries == ["a0.second", "a1.second", "a2.second"]
    prove(rt, terminal=3)


def test_a_cancelled_run_gives_no_turns(rt: Runtime, diary: Diary) -> None:
    """Given a run with jobs that wait for their turns, when it is cancelled, then none of them starts, and all end."""
    seeding.seed(rt, "r", keyed("a", 5))
    ordering.give_turns(rt)

    cancelling.cancel(rt, "r")
    cancelling.sweep(rt)
    go(rt)

    assert diary.entries == []
    prove(rt, cancelled=5)
    assert rt.store.db.turns.count_documents({}) == 0


def test_why_a_job_waits(rt: Runtime) -> None:
    """Given jobs of a key, then `why` says whose turn it is and how many come before."""
    seeding.seed(rt, "r", keyed("a", 4))
    before = why(rt, "r", "a0")
    assert before["reason"] == (
        "jobs with the order key 'a' go one at a time, and the turn is given any moment; it is the next"
    )
    assert before["hint"] == "a worker has to run for that: celery -A pipeline_app worker"
    ordering.give_turns(rt)

    found = why(rt, "r", "a3")
    assert found["reason"] == (
        "jobs with the order key 'a' go one at a time: "
        "it is the turn of job 'a0', which is pending in first; 2 wait before it"
    )
    assert found["waits_for"] == {"kind": "order", "order_key": "a", "job_id": "a0", "before": 2}
    assert found["hint"] == "pipeline-app why r a0 says what that waits for"
