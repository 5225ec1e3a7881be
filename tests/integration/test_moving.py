"""Moving waiting jobs to another stage, and their priority."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pipeline_app import Job, Pipeline, Retry, Stage
from pipeline_app.control.changes import cancelling, moving
from pipeline_app.control.duties import sweep
from pipeline_app.control.results import results
from pipeline_app.control.sight.ledger import events
from pipeline_app.control.sight.why import why
from pipeline_app.control.targets import holds
from pipeline_app.domain.partition import queue_name
from pipeline_app.domain.selection import Selection
from pipeline_app.domain.states import JobState
from pipeline_app.errors import NotFoundError, UsageError
from pipeline_app.runtime import Runtime
from pipeline_app.store import throttles
from tests.integration.gate import Gate
from tests.integration.helpers import (
    NewFlow,
    attempts,
    backdate,
    begin,
    hints,
    in_broker,
    job,
    lines,
    outcomes,
    pipeline,
    prove,
    pump,
    try_run,
)
from tests.project import Project, eventually


def first(n: int) -> int:
    return n + 1


def second(n: int) -> int:
    return n + 10


def third(n: int) -> dict[str, int]:
    return {"n": n}


def three(**options: Any) -> Pipeline:
    """first -> second -> third; a job `jN` that goes through all ends with N + 11."""
    return pipeline(*(Stage(handler, **options) for handler in (first, second, third)))


def found(rt: Runtime) -> dict[str, int]:
    return {row["job_id"]: row["result"]["n"] for row in results(rt, "r")}


def test_jobs_of_a_chunk_in_the_broker(project: Project) -> None:
    """Given a chunk that nobody claimed, when two of its jobs are moved on, then the others go on where they were."""
    chosen = three(chunk=4)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(4))
    some = Selection(job_ids=("j1", "j2"))
    assert moving.preview_move(rt, "r", some, "third") == {
        "matched": 2,
        "by_stage": {"first": 2},
        "by_status": {"pending": 2},
        "by_partition": {"default": 2},
    }

    assert moving.move_jobs(rt, "r", some, "third", actor="me") == 2

    prove(rt, pending=4)
    assert sorted((hint.stage, *sorted(message_jobs(rt, hint.message))) for hint in hints(rt)) == [
        ("first", "j0", "j3"),
        ("third", "j1", "j2"),
    ]
    last = events(rt, "r", job_id="j1")[-1]
    assert (last["event"], last["details"]) == ("moved", {"from": "first", "to": "third", "actor": "me"})
    assert pump(rt).count("not open") == 1
    prove(rt, terminal=4)
    assert found(rt) == {"j0": 11, "j1": 1, "j2": 2, "j3": 14}
    assert moving.move_jobs(rt, "r", some, "second") == 0


def message_jobs(rt: Runtime, message: str) -> list[str]:
    row = rt.store.db.messages.find_one({"_id": message})
    assert row is not None
    return list(row["jobs"])


def test_back_to_a_stage_that_it_has_been_through(project: Project, new_flow: NewFlow) -> None:
    """Given a job on its way to the third stage, when it is moved to the first, then it goes through all once more.

    It takes along what the third was to get, in a new generation, so that nothing counts as recorded twice.
    """
    keys: list[str] = []

    def begins(n: int, job: Job) -> int:
        keys.append(job.key)
        return n + 1

    chosen = pipeline(Stage(begins, name="first"), second, third)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(2))
    for stage in ("first", "second"):
        for hint in hints(rt, stage=stage):
            new_flow(rt).run(hint)

    assert moving.move_jobs(rt, "r", Selection(job_ids=("j1",)), "first") == 1

    assert job(rt, "j1")["generation"] == 1
    pump(rt)
    prove(rt, terminal=2)
    assert found(rt) == {"j0": 11, "j1": 23}
    assert len(set(keys)) == 3


def test_jobs_that_wait_in_the_store(project: Project, new_flow: NewFlow) -> None:
    """Given jobs that are held, delayed and to be retried, when they are moved, then they wait on for the same."""

    def fails(n: int) -> int:
        if n == 1:
            raise ValueError("later")
        return n

    chosen = pipeline(Stage(fails, retry=Retry(backoff="300s")), second, third)
    rt = project.runtime(chosen)
    late = {"job_id": "late", "payload": 7, "delay_s": 300}
    begin(rt, chosen, [{**line, "tags": {"owner": line["job_id"]}} for line in lines(2)] + [late])
    to_hold, to_fail = hints(rt)
    try_run(new_flow(rt), to_fail)
    hold = holds.set_hold(rt, selector={"owner": "j0"})["hold"]
    new_flow(project.runtime(chosen)).run(to_hold)
    before = {name: job(rt, name) for name in ("j0", "j1", "late")}

    assert moving.move_jobs(rt, "r", Selection(), "second") == 3

    prove(rt, held=1, retry_waiting=1, waiting=1)
    for name, row in before.items():
        now = job(rt, name)
        assert (now["stage"], now["state"], now["failures"]) == ("second", row["state"], 0)
        assert [now.get(field) for field in ("due_at", "waits_for")] == [row.get(k) for k in ("due_at", "waits_for")]
        why(rt, "r", name)
    assert job(rt, "j0")["waits_for"] == hold
    backdate(rt, "job_states", 301, "due_at")
    sweep.release_due(rt)
    pump(rt)
    prove(rt, held=1, terminal=2)
    assert found(rt) == {"j1": 11, "late": 17}


def test_a_job_that_runs_stays(project: Project, new_flow: NewFlow, gate: Gate) -> None:
    """Given a job whose handler runs and one that waits, when the stage is emptied, then only the second moves."""
    chosen = pipeline(gate.stage(name="first"), third)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(2))
    runs, waits = hints(rt)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(new_flow(rt).run, runs)
        assert gate.entered.wait(10)
        everything = Selection(stage="first")
        assert moving.preview_move(rt, "r", everything, "third")["matched"] == 1
        assert moving.move_jobs(rt, "r", everything, "third") == 1
        gate.may_end.set()
        running.result(30)

    assert job(rt, message_jobs(rt, waits.message)[0])["stage"] == "third"
    assert outcomes(attempts(rt)) == ["ok"]
    prove(rt, pending=2)


def test_a_queue_that_is_emptied_while_it_is_worked_on(project: Project, new_flow: NewFlow) -> None:
    """Given a run in full flight, when its first stage is emptied, then no handler runs for nothing.

    Whatever is claimed is left alone, to the last moment.
    """
    chosen = three(chunk=2)
    rt, other = project.runtime(chosen), project.runtime(chosen)
    begin(rt, chosen, lines(300))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(pump, rt, new_flow(rt))
        eventually(lambda: other.store.db.job_attempts.count_documents({}) > 20)
        moved = moving.move_jobs(other, "r", Selection(stage="first"), "third")
        running.result(60)
    pump(rt)

    assert 0 < moved < 300
    prove(rt, terminal=300)
    assert set(outcomes(attempts(rt))) == {"ok"}
    assert sum(result == int(name[1:]) for name, result in found(rt).items()) == moved


def test_what_cannot_be_moved(project: Project) -> None:
    """Given a stage or job that is not there, or the stage where they are, then that is said."""
    chosen = three()
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(1))

    with pytest.raises(NotFoundError, match="has no stage 'fourth'"):
        moving.move_jobs(rt, "r", Selection(), "fourth")
    with pytest.raises(UsageError, match="jobs of stage first cannot be moved to stage first"):
        moving.move_jobs(rt, "r", Selection(stage="first"), "first")
    with pytest.raises(NotFoundError, match="no job 'j7'"):
        moving.move_jobs(rt, "r", Selection(job_ids=("j7",)), "second")
    assert moving.move_jobs(rt, "r", Selection(), "first") == 0
    prove(rt, pending=1)


def test_a_cancelled_run_moves_nothing(project: Project) -> None:
    """Given a run that was cancelled, then none of its jobs is moved or given a priority."""
    chosen = three()
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(2))
    cancelling.cancel(rt, "r")

    assert moving.move_jobs(rt, "r", Selection(), "second") == 0
    assert moving.set_priority(rt, "r", Selection(), 5) == 0
    prove(rt, cancelled=2)


def test_the_priority_of_jobs_that_are_held(project: Project, new_flow: NewFlow) -> None:
    """Given held jobs, when some are given a priority, then only those change, and the run stays unordered."""
    chosen = three()
    rt = project.runtime(chosen)
    begin(rt, chosen, [{**line, "tags": {"kind": "ab"[n % 2], "owner": "me"}} for n, line in enumerate(lines(4))])
    holds.set_hold(rt, selector={"owner": "me"}, run="r")
    for hint in hints(rt):
        new_flow(project.runtime(chosen)).run(hint)
    odd = Selection(selector={"kind": "b"})
    assert moving.preview_priority(rt, "r", odd, -3)["matched"] == 2

    assert moving.set_priority(rt, "r", odd, -3, actor="me") == 2
    assert moving.set_priority(rt, "r", odd, -3) == 0

    assert [job(rt, f"j{n}")["priority"] for n in range(4)] == [0, -3, 0, -3]
    (event,) = [row for row in events(rt, "r") if row["event"] == "priority"]
    assert (event["jobs"], event["details"]) == (["j1", "j3"], {"priority": -3, "actor": "me"})
    assert not [row for row in throttles.all_of(rt.store) if row["run"] == "r"]
    prove(rt, held=4)


def test_the_priority_of_jobs_in_the_broker(project: Project, new_flow: NewFlow) -> None:
    """Given jobs in the broker, when one is given a priority, then the run is ordered from then on."""
    chosen = three()
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(3))
    new_flow(rt).run(hints(rt)[0])

    assert moving.set_priority(rt, "r", Selection(job_ids=("j2",)), 7) == 1

    assert job(rt, "j2")["priority"] == 7
    (ordering,) = [row for row in throttles.all_of(rt.store) if row["run"] == "r"]
    assert ordering["ordered"]
    assert job(rt, "j2")["state"] == JobState.PENDING
    prove(rt, pending=3)


@pytest.mark.parametrize("priority", [-1001, 1001, True, 1.5, "high", None])
def test_what_is_no_priority(project: Project, priority: Any) -> None:
    """Given what is no priority, then that is said, and nothing changes."""
    chosen = three()
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(1))

    with pytest.raises(UsageError, match="a priority is a whole number from -1000 to 1000, not"):
        moving.set_priority(rt, "r", Selection(), priority)
    assert job(rt, "j0")["priority"] == 0


def test_a_broker_that_is_away(project: Project) -> None:
    """Given a broker that does not answer, when jobs are moved, then they are, and the sweep publishes them later."""
    chosen = three()
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(2))
    cut_off = project.runtime(chosen, amqp_url="amqp://guest:guest@127.0.0.1:1//")

    assert moving.move_jobs(cut_off, "r", Selection(), "third") == 2

    assert in_broker(rt, queue_name(chosen.name, "third", "default")) == []
    backdate(rt, "messages", 10, "check_at")
    sweep.publish_unpublished(rt)
    pump(rt)
    prove(rt, terminal=2)
