"""Accounting: whatever is wrong with a job is named, and repaired as far as it can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pipeline_app import Pipeline, Stage
from pipeline_app.control.accounts.verify import repaired, verify
from pipeline_app.control.changes import cancelling
from pipeline_app.control.duties import sweep
from pipeline_app.control.seed import seeding
from pipeline_app.domain.states import JobState
from pipeline_app.runtime import Runtime
from pipeline_app.store import messages
from tests.integration.broken import (
    close_message,
    doubled,
    events_of,
    flip,
    named,
    pump_some,
    update,
)
from tests.integration.helpers import (
    NewFlow,
    as_row,
    attempts,
    begin,
    double,
    everything,
    hints,
    job,
    lines,
    open_ids,
    pipeline,
    prove,
    pump,
    take,
)
from tests.project import Project

# What is counted


def test_jobs_whose_message_is_claimed_run(project: Project) -> None:
    """Given jobs in every state, when one message is claimed, then its jobs run, and the sum is what was seeded."""
    rt, _ = doubled(project, 8)
    take(rt, "w", open_ids(rt)[0])
    flip(rt, "j2", "held", waits_for="h-1")
    flip(rt, "j3", "waiting", reason="throttle", waits_for="t-1")

    found = prove(rt, pending=4, running=2, held=1, waiting=1)

    assert sum(found.states.values()) == found.seeded == 8
    assert list(found.states) == [str(state) for state in JobState]


@pytest.mark.usefixtures("tiny_pages")
def test_jobs_whose_ids_are_in_an_odd_order(project: Project) -> None:
    """Given job ids that stand in another order than their attempts, when looked at in pages, then all are counted."""
    chosen = pipeline(Stage(double, chunk=2), as_row)
    rt = project.runtime(chosen)
    begin(rt, chosen, [{"job_id": name, "payload": 1} for name in ("a", "a-b", "a0", "a/double", "a/double/b", "a b")])
    pump(rt)

    prove(rt, terminal=6)
    for row in attempts(rt, stage="double"):
        rt.store.db.job_attempts.insert_one({**row, "_id": row["_id"][:-1] + "x"})
    found = verify(rt, "r")
    twice = [problem.job_id for problem in found.problems if problem.kind == "recorded_twice"]
    assert sorted(map(str, twice)) == ["a", "a b", "a-b", "a/double", "a/double/b", "a0"]
    assert [problem.detail for problem in found.problems if problem.kind == "counter"] == [
        "12 jobs completed it, the counters say 6"
    ]


def test_what_is_kept_by_something_is_not_lost(project: Project) -> None:
    """Given parked jobs that name what keeps them, or a time, then they are in order, also if that is gone."""
    rt, _ = doubled(project, 6)
    now = rt.store.now()
    flip(rt, "j0", "held", waits_for="h-gone", reason="hold")
    flip(rt, "j1", "waiting", waits_for="p-gone", reason="pause")
    flip(rt, "j2", "waiting", waits_for="t-gone", reason="throttle")
    flip(rt, "j3", "retry_waiting", due_at=now)
    flip(rt, "j4", "waiting", due_at=now, reason="delay")

    prove(rt, pending=1, held=1, waiting=3, retry_waiting=1)
    before = everything(rt)
    found = verify(rt, "r", repair=True)

    assert (found.ok, found.repaired, found.repairs) == (True, 0, {})
    assert everything(rt) == before, "there was nothing to repair"


def test_a_batch_that_is_being_taken_back_counts_as_gone(project: Project) -> None:
    """Given a batch that is half taken back, when the run is looked at, then nothing is amiss or mended."""
    chosen = pipeline(Stage(double, chunk=2))
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(2))
    batch = begin_batch(rt, chosen)
    rt.store.db.seed_batches.update_one({"_id": batch}, {"$set": {"state": "removing"}})
    rt.store.db.messages.delete_many({"batch": batch})
    rt.store.db.job_states.delete_one({"batch": batch})

    found = verify(rt, "r", repair=True)

    assert (found.ok, found.seeded, found.repaired, found.states["pending"]) == (True, 2, 0, 2)
    assert rt.store.db.job_states.count_documents({"batch": batch}) == 3


def begin_batch(rt: Runtime, chosen: Pipeline) -> str:
    """A second batch of four jobs."""
    return seeding.seed(rt, "r", [{"job_id": f"x{n}"} for n in range(4)]).batch


# Lost jobs


def delete_message(rt: Runtime) -> None:
    rt.store.db.messages.delete_one({"_id": job(rt, "j0")["message"]})


def no_message(rt: Runtime) -> None:
    for job_id in ("j0", "j1"):
        update(rt, job_id, {"$set": {"message": None}})


@pytest.mark.parametrize("harm", [close_message, delete_message, no_message])
def test_a_pending_job_without_a_message_is_enqueued(project: Project, harm: Callable[[Runtime], None]) -> None:
    """Given two jobs whose message is closed, gone or not named, when repaired, then they get another and go on."""
    rt, _ = doubled(project)
    harm(rt)

    found = verify(rt, "r")
    assert (found.ok, named(found)) == (False, {("lost", "j0"), ("lost", "j1")})
    found = verify(rt, "r", repair=True)

    assert (found.ok, found.repaired, found.repairs) == (True, 2, {"enqueued": 2})
    assert [row["jobs"] for row in events_of(rt, event="enqueued", why="repair")] == [["j0", "j1"]]
    pump(rt)
    assert prove(rt, terminal=6).exact


@pytest.mark.parametrize(
    ("state", "fields"),
    [
        ("waiting", {"reason": "throttle"}),
        ("waiting", {"reason": "pause", "waits_for": None}),
        ("waiting", {"reason": "definition"}),
        ("held", {"reason": "hold"}),
    ],
)
def test_a_parked_job_that_nothing_keeps_is_enqueued(project: Project, state: str, fields: dict[str, Any]) -> None:
    """Given a job that waits or is held for nothing, when repaired, then it goes on."""
    rt, _ = doubled(project)
    flip(rt, "j0", state, **fields)

    assert named(verify(rt, "r")) == {("lost", "j0")}
    found = verify(rt, "r", repair=True)

    assert (found.ok, found.repairs) == (True, {"enqueued": 1})
    assert not {"reason", "waits_for"} & job(rt, "j0").keys()
    pump(rt)
    prove(rt, terminal=6)


def test_jobs_that_wait_for_a_definition_are_not_lost_while_the_sweep_knows(project: Project) -> None:
    """Given a job that waits for a definition, then the flag of its run decides whether anybody lets it go."""
    rt, _ = doubled(project)
    flip(rt, "j0", "waiting", reason="definition")
    rt.store.db.run_manifests.update_one({"_id": "r"}, {"$set": {"awaits_definition": "m"}})

    prove(rt, pending=5, waiting=1)


def test_a_retry_without_a_time_is_due(project: Project) -> None:
    """Given a job that waits for a retry at no time, when repaired, then the sweep takes it."""
    rt, _ = doubled(project)
    flip(rt, "j0", "retry_waiting")

    assert named(verify(rt, "r")) == {("lost", "j0")}
    found = verify(rt, "r", repair=True)

    assert (found.ok, found.repairs) == (True, {"made_due": 1})
    sweep.release_due(rt)
    pump(rt)
    prove(rt, terminal=6)


def test_a_job_that_names_a_message_without_being_in_it(project: Project, new_flow: NewFlow) -> None:
    """Given parked jobs that name messages, one open and one of nobody, then they name none and are let go."""
    rt, _ = doubled(project)
    flip(rt, "j0", "held", waits_for="h-1")
    update(rt, "j0", {"$set": {"message": job(rt, "j1")["message"]}})
    flip(rt, "j5", "waiting", reason="throttle")
    update(rt, "j5", {"$set": {"message": "nobody's"}})

    assert named(verify(rt, "r")) == {("lost", "j0"), ("lost", "j5")}
    found = verify(rt, "r", repair=True)

    assert (found.ok, found.repaired, found.repairs) == (True, 2, {"enqueued": 1, "detached": 2})
    assert (job(rt, "j0")["state"], job(rt, "j0")["message"]) == ("held", None)
    pump(rt, new_flow(rt))
    prove(rt, terminal=5, held=1)


def test_a_result_that_is_gone_is_made_again(project: Project) -> None:
    """Given a terminal job whose result is gone, when repaired, then its last stage runs in a new generation."""
    rt, _ = doubled(project)
    pump(rt)
    rt.store.db.job_outputs.delete_one({"_id": f"r/j3/{job(rt, 'j3')['input']}"})

    found = verify(rt, "r")
    assert named(found) == {("lost", "j3")}
    found = repaired(rt, found)

    assert (found.ok, found.repairs, found.states["pending"]) == (True, {"replayed": 1}, 1)
    pump(rt)
    prove(rt, terminal=6)
    last = [row["generation"] for row in attempts(rt, job="j3", stage="as_row")]
    assert (last, len(attempts(rt, job="j3", stage="double"))) == ([0, 1], 1)
    result = rt.store.db.job_outputs.find_one({"_id": f"r/j3/{job(rt, 'j3')['input']}"})
    assert result is not None
    assert result["value"] == {"n": 6}


def test_a_result_of_an_only_stage_is_made_again_from_the_payload(project: Project) -> None:
    """Given a pipeline of one stage and a result that is gone, when repaired, then it is made from the payload."""
    chosen = pipeline(as_row)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(2))
    pump(rt)
    rt.store.db.job_outputs.delete_many({})

    assert verify(rt, "r", repair=True).repairs == {"replayed": 2}

    pump(rt)
    prove(rt, terminal=2)


def test_a_result_of_an_edited_input_is_made_again_from_that(project: Project) -> None:
    """Given a job that was replayed with an edited input, when its result is gone, then that input is taken."""
    rt, _ = doubled(project, 2)
    pump(rt)
    operation = f"r-{messages.new_id()}"
    rt.store.db.job_outputs.insert_one({"_id": f"r/j1/(edit)/{operation}", "value": 77})
    rt.store.db.job_outputs.delete_one({"_id": f"r/j1/{job(rt, 'j1')['input']}"})

    assert verify(rt, "r", repair=True).repairs == {"replayed": 1}

    pump(rt)
    prove(rt, terminal=2)
    result = rt.store.db.job_outputs.find_one({"_id": f"r/j1/{job(rt, 'j1')['input']}"})
    assert result is not None
    assert result["value"] == {"n": 77}


@pytest.mark.usefixtures("tiny_pages")
def test_what_cannot_be_brought_back_is_said(project: Project) -> None:
    """Given a deleted job, inputs that are gone, and a stage recorded twice, when repaired, then they are left."""
    rt, _ = doubled(project)
    flow_hints = hints(rt)
    pump_some(rt, flow_hints[:1])  # j0 and j1 stand in the second stage
    rt.store.db.job_outputs.delete_one({"_id": f"r/j0/{job(rt, 'j0')['input']}"})
    pump_some(rt, flow_hints[1:2])
    pump_some(rt, [hint for hint in hints(rt, stage="as_row") if job(rt, "j2")["message"] == hint.message])
    rt.store.db.job_outputs.delete_many({"_id": {"$regex": "^r/j2/"}})
    rt.store.db.job_states.delete_one({"_id": "r/j5"})
    (first,) = attempts(rt, job="j3", stage="double")
    rt.store.db.job_attempts.insert_one({**first, "_id": first["_id"][:-1] + "x"})

    found = verify(rt, "r", repair=True)

    assert not found.ok
    assert named(found) == {("lost", "j0"), ("lost", "j2"), ("lost", "j5"), ("recorded_twice", "j3")}
    assert found.problem_count == 4
    (gone,) = [problem.detail for problem in found.problems if problem.job_id == "j5"]
    assert gone.startswith("it is gone: 6 jobs were seeded, 5 are there; no command deletes jobs")
    assert found.counters_agree, "what is there is counted rightly now"
    assert (found.seeded, sum(found.states.values())) == (6, 5)
    assert not verify(rt, "r", repair=True).repaired, "what cannot be repaired is not tried"


def test_a_lost_job_of_a_cancelled_run_is_cancelled(project: Project) -> None:
    """Given a cancelled run with a job that came back from somewhere, when repaired, then it is cancelled as well."""
    rt, _ = doubled(project)
    cancelling.cancel(rt, "r")
    flip(rt, "j0", "pending")
    assert verify(rt, "r").ok, "the sweep is not done with the run, and takes it"
    rt.store.db.run_manifests.update_one({"_id": "r"}, {"$set": {"cancel_done": True}})

    assert named(verify(rt, "r")) == {("lost", "j0")}
    found = verify(rt, "r", repair=True)

    assert (found.ok, found.repairs) == (True, {"cancelled": 1})
    prove(rt, cancelled=6)


def test_jobs_of_a_batch_that_is_not_closed_are_left_alone(project: Project) -> None:
    """Given a whole batch whose seeder died, when a draft of it is gone, then it is said, and nothing starts."""
    rt, _ = doubled(project)
    rt.store.db.seed_batches.update_one({}, {"$set": {"state": "interrupted", "whole": True}})
    rt.store.db.messages.update_many({}, {"$set": {"state": "draft"}})
    delete_message(rt)

    found = verify(rt, "r", repair=True)

    assert (named(found), found.repaired) == ({("lost", "j0"), ("lost", "j1")}, 0)
    assert "is not closed" in found.problems[0].detail
