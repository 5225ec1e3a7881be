"""Whatever a handler does is an outcome of its job, recorded as such; it reaches neither the worker nor other jobs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel

from pipeline_app import Job, PermanentError, Retry, Stage
from pipeline_app.control.duties import sweep
from pipeline_app.control.sight.ledger import failures
from pipeline_app.domain.states import DeadKind, JobState
from pipeline_app.flow.consume import ChunkFailedError
from pipeline_app.runtime import Runtime
from tests.integration.helpers import (
    NewFlow,
    attempts,
    backdate,
    begin,
    hints,
    job,
    lines,
    outcomes,
    pipeline,
    prove,
    pump,
)
from tests.project import Project, eventually


class Item(BaseModel):
    n: int


def refuse(n: int) -> None:
    raise PermanentError(f"{n} can never succeed")


def model(item: Item) -> int:
    return item.n


def unserialisable(n: int) -> object:
    return threading.Lock()


def too_large(n: int) -> str:
    return "x" * (15 * 1024 * 1024)


def beyond_64_bits(n: int) -> dict[str, int]:
    return {"n": 2**64 + n}


@pytest.mark.parametrize(
    ("handler", "payload", "kind", "error", "text"),
    [
        (refuse, 7, DeadKind.PERMANENT, "pipeline_app.errors.PermanentError", "7 can never succeed"),
        (model, {"n": "x"}, DeadKind.INVALID_INPUT, "pipeline_app.errors.InvalidInputError", "n: Input should be a"),
        (model, {}, DeadKind.INVALID_INPUT, "pipeline_app.errors.InvalidInputError", "n: Field required"),
        (unserialisable, 1, DeadKind.INVALID_RESULT, "pipeline_app.errors.InvalidResultError", "cannot be serialised"),
        (too_large, 1, DeadKind.INVALID_RESULT, "pipeline_app.errors.InvalidResultError", "keep it elsewhere"),
        (beyond_64_bits, 1, DeadKind.INVALID_RESULT, "pipeline_app.errors.InvalidResultError", "8-byte ints"),
    ],
    ids=["permanent", "wrong type", "missing", "unserialisable", "too large", "large int"],
)
def test_errors_that_no_second_attempt_mends(
    project: Project, handler: Callable[..., Any], payload: Any, kind: DeadKind, error: str, text: str
) -> None:
    """Given a job that can never succeed, when its stage runs it, then it is dead-lettered at once with the reason."""
    chosen = pipeline(Stage(handler, retry=Retry(attempts=5)))
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(1, payload=lambda n: payload))

    assert pump(rt) == ["failed"]

    prove(rt, dead_lettered=1)
    (attempt,) = attempts(rt)
    assert (attempt["outcome"], attempt["attempt"], attempt["error"]["type"]) == ("failed", 1, error)
    assert text in attempt["error"]["message"]
    assert "Traceback" in attempt["error"]["traceback"]
    assert attempt["code_version"] == chosen.first.handler.code_version != "unknown"
    assert attempt["worker"] == rt.incarnation()
    (letter,) = failures(rt, "r")
    assert (letter["job_id"], letter["kind"], letter["attempts"]) == ("j0", kind, 1)
    assert letter["error"]["type"] == error


def test_bad_jobs_of_a_chunk_leave_the_others_alone(project: Project) -> None:
    """Given a chunk with every kind of failure in it, then each job has its own outcome, and the good ones go on."""
    doings: dict[str, Callable[[], Any]] = {
        "fine": lambda: {"n": 1},
        "permanent": lambda: refuse(1),
        "result": lambda: unserialisable(1),
        "large": lambda: too_large(1),
        "int": lambda: beyond_64_bits(1),
        "fails": lambda: 1 / 0,
        "memory": lambda: (_ for _ in ()).throw(MemoryError()),
        "also fine": lambda: "text",
    }

    def work(doing: str) -> Any:
        return doings[doing]()

    chosen = pipeline(Stage(work, chunk=20), Stage(lambda row: row, name="after", chunk=20))
    rt = project.runtime(chosen)
    begin(rt, chosen, [{"job_id": name, "payload": name} for name in doings])

    assert pump(rt) == ["2 advance, 2 retry, 4 bury", "2 advance"]

    prove(rt, terminal=2, retry_waiting=2, dead_lettered=4)
    assert {name: job(rt, name).get("reason") for name in ("permanent", "result", "large", "int")} == {
        "permanent": DeadKind.PERMANENT,
        "result": DeadKind.INVALID_RESULT,
        "large": DeadKind.INVALID_RESULT,
        "int": DeadKind.INVALID_RESULT,
    }
    assert job(rt, "memory")["state"] == JobState.RETRY_WAITING


@pytest.mark.parametrize("error", [MemoryError, SystemExit, KeyboardInterrupt, RecursionError, GeneratorExit])
def test_errors_that_would_end_a_worker(project: Project, error: type[BaseException]) -> None:
    """Given a handler that raises what ends processes, then that is an outcome like others, retried and exhausted."""

    def work(n: int) -> None:
        raise error("poison")

    chosen = pipeline(Stage(work, retry=Retry(attempts=2, backoff=0)))
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(1))

    pump(rt)
    sweep.release_due(rt)
    pump(rt)

    prove(rt, dead_lettered=1)
    assert job(rt, "j0")["reason"] == DeadKind.EXHAUSTED
    assert [row["error"]["type"] for row in attempts(rt)] == [error.__name__] * 2


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UnprintableError(), "(its message cannot be read)"),
        (ValueError("half \ud800 a pair"), "half ? a pair"),
        (ValueError("a \0 zero"), "a \\x00 zero"),
        (ValueError("long " * 10_000), ("long " * 10_000)[:2000]),
    ],
    ids=["unprintable", "surrogate", "zero", "long"],
)
def test_errors_that_cannot_be_stored_as_they_are(project: Project, error: Exception, message: str) -> None:
    """Given an error whose text MongoDB would refuse, then it is recorded all the same, in other words."""

    def work(n: int) -> None:
        raise error

    chosen = pipeline(Stage(work, retry=Retry(attempts=1)))
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(1))

    assert pump(rt) == ["failed"]

    prove(rt, dead_lettered=1)
    assert attempts(rt)[0]["error"]["message"] == message


def test_a_failing_job_is_tried_again_with_growing_pauses(project: Project) -> None:
    """Given a job that always fails, then it waits twice as long each time, keeps its key, and is exhausted."""
    seen: list[tuple[int, str]] = []

    def work(n: int, job: Job) -> None:
        seen.append((job.attempt, job.key))
        raise ValueError(f"attempt {job.attempt}")

    chosen = pipeline(Stage(work, retry=Retry(attempts=3, backoff="60s", cap="100s", jitter=0)))
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(1))

    for attempt, pause_s in ((1, 60), (2, 100)):
        assert pump(rt) == ["failed"]
        waiting = job(rt, "j0")
        assert waiting["state"] == JobState.RETRY_WAITING
        assert timedelta(seconds=pause_s - 10) < waiting["due_at"] - rt.store.now() <= timedelta(seconds=pause_s)
        prove(rt, retry_waiting=1)
        sweep.release_due(rt)
        assert pump(rt) == [], "it is not due yet"
        backdate(rt, "job_states", pause_s, "due_at")
        sweep.release_due(rt)
        assert len(seen) == attempt

    assert pump(rt) == ["failed"]
    prove(rt, dead_lettered=1)
    assert (job(rt, "j0")["reason"], job(rt, "j0")["failures"]) == (DeadKind.EXHAUSTED, 3)
    assert [number for number, _ in seen] == [1, 2, 3]
    assert len({key for _, key in seen}) == 1
    assert [(row["attempt"], row["outcome"], row["error"]["message"]) for row in attempts(rt)] == [
        (n, "failed", f"attempt {n}") for n in (1, 2, 3)
    ]


def test_failures_are_counted_for_each_stage(project: Project) -> None:
    """Given a job that failed in a stage and then went on, then the next stage counts from one, with another key."""
    keys: dict[str, str] = {}

    def flaky(n: int, job: Job) -> int:
        keys[job.stage] = job.key
        if job.attempt < 3:
            raise ValueError("not yet")
        return job.attempt

    def after(n: int, job: Job) -> int:
        keys[job.stage] = job.key
        if job.attempt < 3:
            raise ValueError("not yet")
        return n

    again = Retry(attempts=3, backoff=0)
    chosen = pipeline(Stage(flaky, retry=again), Stage(after, retry=again))
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(1))
    for _ in range(5):
        pump(rt)
        sweep.release_due(rt)
    pump(rt)

    prove(rt, terminal=1)
    assert outcomes(attempts(rt)) == ["failed", "failed", "ok", "failed", "failed", "ok"]
    assert keys["flaky"] != keys["after"]


def test_a_job_that_expired_is_not_started(project: Project, new_flow: NewFlow) -> None:
    """Given a job whose time is over when its chunk is claimed, then it is dead-lettered without an attempt."""
    calls: list[int] = []

    def work(n: int) -> int:
        calls.append(n)
        return n

    chosen = pipeline(Stage(work, chunk=3))
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(3, expires_at="2100-01-01T00:00:00Z"))
    rt.store.db.job_states.update_one({"job": "j1"}, {"$set": {"expires_at": rt.store.now() - timedelta(seconds=1)}})

    pump(rt)

    assert calls == [0, 2]
    prove(rt, terminal=2, dead_lettered=1)
    assert (job(rt, "j1")["reason"], job(rt, "j1")["failures"]) == (DeadKind.EXPIRED, 0)
    assert {row["job"] for row in attempts(rt)} == {"j0", "j2"}


def test_a_job_that_expires_while_its_chunk_runs_is_not_started(project: Project) -> None:
    """Given a long chunk, when a later job's time ends meanwhile, then it is not started any more."""
    over = threading.Event()

    def work(n: int) -> int:
        assert over.wait(30)
        return n

    chosen = pipeline(Stage(work, chunk=2))
    rt = project.runtime(chosen)
    expires_at = rt.store.now() + timedelta(seconds=1)
    first, second = lines(2)
    begin(rt, chosen, [first, {**second, "expires_at": expires_at}])

    def let_go() -> None:
        while rt.store.now() <= expires_at:
            time.sleep(0.01)
        over.set()

    threading.Thread(target=let_go).start()
    assert pump(rt) == ["1 advance, 1 bury"]

    prove(rt, terminal=1, dead_lettered=1)
    assert job(rt, "j1")["reason"] == DeadKind.EXPIRED


def test_a_run_that_is_cancelled_while_a_chunk_runs(project: Project, new_flow: NewFlow) -> None:
    """Given a long chunk, when its run is cancelled meanwhile, then the jobs that did not start yet are not started."""
    calls: list[int] = []
    rts: list[Runtime] = []

    def work(n: int) -> int:
        calls.append(n)
        if n == 0:
            sweep.cancelling.cancel(rts[0], "r")
            eventually(lambda: rt.memory.is_cancelled("r"))
        return n

    chosen = pipeline(Stage(work, chunk=3))
    rt = project.runtime(chosen)
    rts.append(project.runtime(chosen))
    begin(rt, chosen, lines(3))

    new_flow(rt).run(hints(rt)[0])

    assert calls == [0]
    prove(rt, cancelled=3)
    assert outcomes(attempts(rt)) == ["refused"]


def test_a_chunk_of_which_all_failed_is_a_failed_task(project: Project, new_flow: NewFlow) -> None:
    """Given a chunk of which every job failed, then its task fails with the first traceback; else it succeeds."""

    def work(n: int) -> float:
        return 1 / n

    chosen = pipeline(Stage(work, chunk=2))
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(4, payload=lambda n: max(0, n - 1)))
    failing, mixed = hints(rt)
    flow = new_flow(rt)

    with pytest.raises(ChunkFailedError, match="2 of 2 jobs failed") as failed:
        flow.run(failing)
    assert flow.run(mixed) == "2 advance"

    assert "ZeroDivisionError" in str(failed.value)
    prove(rt, terminal=2, retry_waiting=2)
