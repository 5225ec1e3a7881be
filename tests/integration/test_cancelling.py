"""Cancelling jobs of a run: waiting, on their way and running; and handlers that are stopped after their grace."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pipeline_app import Retry, Stage
from pipeline_app.application import prepare
from pipeline_app.control.changes import cancelling, selecting
from pipeline_app.control.seed import seeding
from pipeline_app.control.sight.ledger import events
from pipeline_app.control.sight.status import status
from pipeline_app.control.sight.why import why
from pipeline_app.control.targets import holds, pauses
from pipeline_app.domain.selection import Selection
from pipeline_app.domain.states import JobState, MessageState
from pipeline_app.errors import NotFoundError
from pipeline_app.runtime import Runtime
from pipeline_app.store import jobs, manifests, messages, workers
from pipeline_app.store.workers import FLAGS
from tests.integration.gate import Gate
from tests.integration.helpers import (
    NewFlow,
    as_row,
    attempts,
    backdate,
    begin,
    double,
    hints,
    job,
    lines,
    open_ids,
    outcomes,
    pipeline,
    prove,
    pump,
    register,
    take,
    try_run,
)
from tests.integration.test_sweep_runs import abandoned
from tests.integration.worker_run import held
from tests.project import Project, eventually
from tests.worker import Worker


def flaky(n: int) -> int:
    if n == 1:
        raise ValueError("later")
    return n


def tagged(number: int, **fields: Any) -> list[dict[str, Any]]:
    """Jobs of which every other one is odd."""
    return [{**line, "tags": {"kind": "ab"[n % 2]}, **fields} for n, line in enumerate(lines(number))]


def test_jobs_that_are_everywhere(project: Project, new_flow: NewFlow) -> None:
    """Given jobs in every state, when those of one tag are cancelled, then all others go on, and all counts agree."""
    chosen = pipeline(Stage(flaky, retry=Retry(backoff="300s")), as_row, partition_by=["provider"])
    rt = project.runtime(chosen)
    late = [{**line, "job_id": f"late-{line['job_id']}", "delay_s": 300} for line in tagged(2)]
    begin(rt, chosen, [*tagged(6), *late])
    flow = new_flow(rt)
    done, fails, held_a, held_b, _, _ = hints(rt)
    for hint in (done, fails):
        try_run(flow, hint)
    try_run(flow, hints(rt, stage="as_row")[0])
    holds.set_hold(rt, selector={"kind": "a"}, run="r")
    holds.set_hold(rt, selector={"kind": "b"}, run="r")
    for hint in (held_a, held_b):
        new_flow(project.runtime(chosen)).run(hint)
    prove(rt, terminal=1, retry_waiting=1, held=2, pending=2, waiting=2)
    odd = Selection(selector={"kind": "b"})
    assert cancelling.preview(rt, "r", odd) == {
        "matched": 4,
        "by_stage": {"flaky": 4},
        "by_status": {"held": 1, "pending": 1, "retry_waiting": 1, "waiting": 1},
        "by_partition": {"default": 4},
    }

    assert cancelling.cancel_jobs(rt, "r", odd, actor="me") == 4

    prove(rt, terminal=1, held=1, pending=1, waiting=1, cancelled=4)
    for job_id in ("j1", "j3", "j5", "late-j1"):
        row = job(rt, job_id)
        assert row["state"] == JobState.CANCELLED
        assert not set(row) & set(jobs.PARKED_FIELDS)
    last = events(rt, "r", job_id="late-j1")[-1]
    assert (last["event"], last["details"]) == ("cancelled", {"actor": "me"})
    assert why(rt, "r", "j5")["reason"].startswith("it was cancelled at ")
    assert cancelling.cancel_jobs(rt, "r", odd) == 0
    assert cancelling.preview(rt, "r", odd)["matched"] == 0


def test_hints_of_cancelled_jobs_are_dropped(project: Project) -> None:
    """Given chunks, when all jobs of one and one of another are cancelled, then the first is closed, the other runs."""
    seen: list[int] = []
    chosen = pipeline(Stage(seen.append, name="see", chunk=3))
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(6))

    assert cancelling.cancel_jobs(rt, "r", Selection(job_ids=("j0", "j1", "j2", "j4"))) == 4

    assert len(hints(rt)) == 1
    assert sorted(pump(rt)) == ["2 advance, 1 skip", "not open"]
    assert seen == [3, 5]
    prove(rt, terminal=2, cancelled=4)


def test_a_run_whose_jobs_are_held_and_paused(project: Project, new_flow: NewFlow) -> None:
    """Given jobs that a hold and a pause keep, when the run is cancelled, then nothing of what kept them is left."""
    chosen = pipeline(double)
    rt = project.runtime(chosen)
    begin(rt, chosen, tagged(2))
    first, second = hints(rt)
    holds.set_hold(rt, selector={"kind": "a"})
    new_flow(project.runtime(chosen)).run(first)
    pauses.pause(rt, "r")
    new_flow(project.runtime(chosen)).run(second)
    prove(rt, held=1, waiting=1)

    assert cancelling.cancel(rt, "r") == 2

    prove(rt, cancelled=2)
    for job_id in ("j0", "j1"):
        assert not set(job(rt, job_id)) & set(jobs.PARKED_FIELDS)
    assert why(rt, "r", "j0")["reason"].startswith("its run was cancelled at ")


def test_one_job_of_a_chunk_that_runs(project: Project, new_flow: NewFlow, gate: Gate) -> None:
    """Given a chunk that runs, when one of its jobs is cancelled, then the others run to the end, grace or not."""
    chosen = pipeline(gate.stage(chunk=2, grace=0))
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(2))
    register(rt, rt.incarnation(), pool="threads")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(new_flow(rt).run, hints(rt)[0])
        assert gate.entered.wait(10)
        assert cancelling.preview(rt, "r", Selection())["by_status"] == {"running": 2}
        assert cancelling.cancel_jobs(rt, "r", Selection(job_ids=("j0",))) == 1
        cancelling.stop_handlers(rt)
        assert status(rt, "r").states["running"] == 1
        gate.may_end.set()
        running.result(30)

    prove(rt, terminal=1, cancelled=1)
    assert {row["job"]: row["outcome"] for row in attempts(rt)} == {"j0": "refused", "j1": "ok"}


def test_jobs_of_a_chunk_that_are_cancelled_before_their_turn_do_not_start(
    project: Project, new_flow: NewFlow, gate: Gate
) -> None:
    chosen = pipeline(gate.stage(chunk=4))
    rt = project.runtime(chosen)
    rt.memory._version = lambda: workers.version(rt.store, FLAGS)  # as in a worker
    begin(rt, chosen, lines(4))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(new_flow(rt).run, hints(rt)[0])
        assert gate.entered.wait(10)
        assert cancelling.cancel_jobs(rt, "r", Selection(job_ids=("j1", "j2"))) == 2
        gate.may_end.set()
        running.result(30)

    assert gate.calls == ["j0", "j3"]
    prove(rt, terminal=2, cancelled=2)


def test_all_jobs_of_a_chunk_that_runs(project: Project, new_flow: NewFlow, gate: Gate) -> None:
    """Given a thread that runs a chunk, when all its jobs are cancelled, then its message is closed after the grace.

    Not before it; and what the handler does later is refused.
    """
    chosen = pipeline(gate.stage(chunk=2, grace="60s"))
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(2))
    register(rt, rt.incarnation(), pool="threads")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(new_flow(rt).run, hints(rt)[0])
        assert gate.entered.wait(10)
        cancelling.cancel_jobs(rt, "r", Selection(job_ids=("j0",)))
        cancelling.cancel_jobs(rt, "r", Selection(job_ids=("j1",)))
        cancelling.stop_handlers(rt)
        assert len(held(rt)) == 1
        backdate(rt, "messages", 61, "cancelled_at")
        cancelling.stop_handlers(rt)
        assert held(rt) == []
        gate.may_end.set()
        running.result(30)

    prove(rt, cancelled=2)
    assert set(outcomes(attempts(rt))) == {"refused"}


def test_a_worker_that_does_not_obey(project: Project, new_flow: NewFlow, gate: Gate) -> None:
    """Given a pool of processes that nobody can tell anything, then the message is closed when it had time enough."""
    chosen = pipeline(gate.stage(grace=0))
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(1))
    register(rt, rt.incarnation(), pool="prefork")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(new_flow(rt).run, hints(rt)[0])
        assert gate.entered.wait(10)
        cancelling.cancel_jobs(rt, "r", Selection(job_ids=("j0",)))
        cancelling.stop_handlers(rt)
        assert len(held(rt)) == 1
        backdate(rt, "messages", cancelling.OBEYS_S, "cancelled_at")
        cancelling.stop_handlers(rt)
        assert held(rt) == []
        gate.may_end.set()
        running.result(30)

    prove(rt, cancelled=1)


def test_jobs_that_run_while_others_cancel_them(project: Project, new_flow: NewFlow) -> None:
    """Given a run in full flight, when half of it is cancelled meanwhile, then every job is accounted for."""
    chosen = pipeline(Stage(double, chunk=3), Stage(as_row, chunk=2))
    rt, other = project.runtime(chosen), project.runtime(chosen)
    begin(rt, chosen, tagged(300))
    half = Selection(selector={"kind": "b"})
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(pump, rt, new_flow(rt))
        eventually(lambda: other.store.db.job_attempts.count_documents({}) > 20)
        done = cancelling.cancel_jobs(other, "r", half)
        running.result(60)
    pump(rt)

    assert 0 < done <= 150
    prove(rt, terminal=300 - done, cancelled=done)
    assert cancelling.preview(rt, "r", half)["matched"] == 0


def test_many_jobs_in_small_pages(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given more jobs than a page, then all are cancelled, and progress is told."""
    monkeypatch.setattr(selecting, "PAGE", 7)
    chosen = pipeline(Stage(double, chunk=2))
    rt = project.runtime(chosen)
    begin(rt, chosen, tagged(50))
    told: list[int] = []

    assert cancelling.cancel_jobs(rt, "r", Selection(states=(JobState.PENDING,)), progress=told.append) == 50

    assert told[0] == 7
    assert told[-1] == 50
    prove(rt, cancelled=50)


@pytest.mark.usefixtures("small_pages")
def test_jobs_of_a_batch_that_may_be_taken_back(project: Project) -> None:
    """Given a whole batch that is not closed, when jobs are cancelled, then its own are not: they don't show yet."""
    chosen = pipeline(Stage(double, chunk=2))
    rt = project.runtime(chosen)
    batch = abandoned(rt, "r", chosen, "open", whole=True)

    assert cancelling.cancel_jobs(rt, "r", Selection(states=(JobState.PENDING,))) == 0

    manifests.set_batch(rt.store, batch, "removing", expected=("open",))
    seeding.remove_batch(rt, "r", batch)
    prove(rt)


def test_what_is_not_there(project: Project) -> None:
    """Given a run, stage or job that is not there, then it is named, and nothing is cancelled."""
    chosen = pipeline(double)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(1))

    for run, selection, named in (
        ("q", Selection(), "there is no run 'q'"),
        ("r", Selection(stage="triple"), "has no stage 'triple'"),
        ("r", Selection(job_ids=("j0", "j7")), "run r has no job 'j7'"),
    ):
        with pytest.raises(NotFoundError, match=named):
            cancelling.cancel_jobs(rt, run, selection)
    assert cancelling.cancel_jobs(rt, "r", Selection(states=(JobState.TERMINAL,))) == 0
    prove(rt, pending=1)


def test_a_worker_that_is_gone_with_its_cancelled_jobs(project: Project) -> None:
    """Given a dead worker's message whose jobs were cancelled, then it is closed, and nothing is lost by that."""
    chosen = pipeline(Stage(double, chunk=2, grace=0))
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(2))
    take(rt, "gone", *open_ids(rt))
    cancelling.cancel_jobs(rt, "r", Selection(stage="double"))

    cancelling.stop_handlers(rt)

    (message,) = rt.store.db.messages.find()
    assert message["state"] == MessageState.CLOSED
    assert attempts(rt) == []
    prove(rt, cancelled=2)


# With real workers.

STAGES = """
import os
import time
from pathlib import Path

from pipeline_app import Job, Pipeline, Stage


def work(n: int, job: Job) -> int:
    with Path("calls.log").open("a") as log:
        log.write(f"{job.stage} {job.id} {job.attempt} {os.getpid()}\\n")
    try:
        while not Path(f"go-{job.id}").exists():
            time.sleep(0.02)
    finally:
        Path(f"left-{job.id}").touch()
    Path(f"ended-{job.id}").touch()
    return n


demo = Pipeline("demo", [Stage(work, chunk=CHUNK, grace=0.5)])
"""


@pytest.fixture
def rt(project: Project) -> Runtime:
    made = project.runtime()
    prepare(made)
    return made


def start(project: Project, rt: Runtime, number: int, chunk: int = 1) -> None:
    project.write("stages.py", STAGES.replace("CHUNK", str(chunk)))
    project.json("run", "init", "r", "--pipeline", "demo")
    seeding.seed(rt, "r", lines(number))


def there(project: Project, name: str) -> bool:
    return (project.folder / name).exists()


@pytest.mark.parametrize("whole", [True, False])
def test_a_process_is_stopped(project: Project, rt: Runtime, whole: bool) -> None:
    """Given handlers in processes, when a job (or the run) is cancelled, then its handler is stopped after the grace.

    Nothing of it counts as a loss, its slot is free again, and what runs beside it is left alone.
    """
    start(project, rt, 3)
    with project.worker(pool="prefork", concurrency=2) as worker:
        eventually(lambda: len(project.calls()) == 2)
        (one, pid), (other, _) = sorted((line.split()[1], line.split()[3]) for line in project.calls())
        if whole:
            cancelling.cancel(rt, "r")
        else:
            cancelling.cancel_jobs(rt, "r", Selection(job_ids=(one,)))
            assert job(rt, one)["state"] == JobState.CANCELLED

        worker.wait_for(lambda: there(project, f"left-{one}"))
        if whole:
            worker.wait_for(lambda: held(rt) == [])
        else:
            worker.wait_for(lambda: len(project.calls()) == 3)
            assert not there(project, f"left-{other}")
            for name in {"j0", "j1", "j2"} - {one}:
                project.write(f"go-{name}", "")
            eventually(lambda: status(rt, "r").state == "complete")
        worker.stop()

    assert not there(project, f"ended-{one}")
    assert pid not in {line.split()[3] for line in project.calls() if line.split()[1] not in (one,)}
    assert "lost" not in outcomes(attempts(rt))
    assert job(rt, one)["losses"] == 0
    prove(rt, **({"cancelled": 3} if whole else {"cancelled": 1, "terminal": 2}))


def test_a_thread_cannot_be_stopped(project: Project, rt: Runtime) -> None:
    """Given a handler in a thread, when its job is cancelled, then after the grace nothing shows as running any more.

    What it does later is refused.
    """
    start(project, rt, 2)
    with project.worker(pool="threads", concurrency=1) as worker:
        eventually(project.calls)
        one = project.calls()[0].split()[1]
        cancelling.cancel_jobs(rt, "r", Selection(job_ids=(one,)))
        worker.wait_for(lambda: all(one not in row["jobs"] for row in held(rt)))
        assert not there(project, f"left-{one}")
        for name in ("j0", "j1"):
            project.write(f"go-{name}", "")
        eventually(lambda: status(rt, "r").state == "complete")
        worker.wait_for(lambda: "refused" in outcomes(attempts(rt)))

    prove(rt, cancelled=1, terminal=1)
    assert {row["job"]: row["outcome"] for row in attempts(rt)}[one] == "refused"


def test_the_others_of_a_chunk_in_a_process(project: Project, rt: Runtime) -> None:
    """Given a chunk in a process, when the job that runs is cancelled, then nothing is stopped: the others go on."""
    start(project, rt, 3, chunk=3)
    with project.worker(pool="prefork", concurrency=1) as worker:
        eventually(project.calls)
        one = project.calls()[0].split()[1]
        cancelling.cancel_jobs(rt, "r", Selection(job_ids=(one,)))
        backdate(rt, "messages", 60, "cancelled_at")
        rounds_of_the_sweep(rt, worker)
        assert not there(project, f"left-{one}")
        for name in ("j0", "j1", "j2"):
            project.write(f"go-{name}", "")
        eventually(lambda: status(rt, "r").state == "complete")

    prove(rt, cancelled=1, terminal=2)
    assert sorted(outcomes(attempts(rt))) == ["ok", "ok", "refused"]


def rounds_of_the_sweep(rt: Runtime, worker: Worker) -> None:
    """Wait until the sweep has looked at everything: it publishes what it finds unpublished, at every round."""
    for _ in range(2):
        chosen = messages.document(
            run="r", pipeline="demo", stage="work", partition="default", queue="demo.work", jobs=[], now=rt.store.now()
        )
        rt.store.db.messages.insert_one({**chosen, "check_at": chosen["created_at"]})
        worker.wait_for(lambda id=chosen["_id"]: rt.store.db.messages.find_one({"_id": id})["published_at"] is not None)
