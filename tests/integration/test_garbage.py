"""What a message leaves behind in a process: nothing that only the collector of garbage finds.

A worker runs for weeks. Objects that lead back to each other, with the inputs of all jobs of a message, would stay
until Python looks through all of its memory, which it does rarely: the process grows meanwhile.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

import pytest
from celery.app.trace import trace_task

from pipeline_app import Job, PermanentError, RateLimited, Stage
from pipeline_app.application import make_celery, prepare
from pipeline_app.control import runs
from pipeline_app.control.results import results
from pipeline_app.control.seed import seeding
from pipeline_app.domain.hint import Hint
from pipeline_app.flow.consume import ChunkFailedError
from tests.integration.helpers import NewFlow, attempts, begin, hints, lines, outcomes, pipeline
from tests.project import Project


def fine(n: int, job: Job) -> int:
    return n


def fails(n: int) -> None:
    raise ValueError(n)


def fails_after_tries(n: int) -> None:
    """Keeps what it caught in its own frame, as loops of tries do."""
    last: Exception | None = None
    for _ in range(2):
        try:
            fails(n)
        except ValueError as exc:
            last = exc
    assert last is not None
    raise last


def fails_for_a_reason(n: int) -> None:
    try:
        fails_after_tries(n)
    except ValueError as exc:
        raise RuntimeError("it had a reason") from exc


def buried(n: int) -> None:
    raise PermanentError(f"not {n}")


def limited(n: int) -> None:
    raise RateLimited(retry_after=60, selector={"provider": f"p{n}"})


def slow(n: int) -> None:
    for _ in range(500):
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("handler", "options"),
    [
        (fine, {}),
        (fine, {"soft_time_limit": 20, "time_limit": 30}),
        (slow, {"soft_time_limit": 0.1, "time_limit": 30}),
        (fails, {}),
        (fails_after_tries, {}),
        (fails_for_a_reason, {}),
        (buried, {}),
        (limited, {}),
    ],
    ids=[
        "fine",
        "fine within limits",
        "over its soft limit",
        "fails",
        "fails after tries",
        "fails for a reason",
        "buried",
        "rate limited",
    ],
)
def test_garbage_of_messages(
    project: Project, new_flow: NewFlow, handler: Callable[..., Any], options: dict[str, Any]
) -> None:
    """Given messages that ended in this way, in the main thread or another, then reference counting has freed them."""
    chosen = pipeline(Stage(handler, chunk=2, **options))
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(8, tags={"provider": "p"}))
    flow = new_flow(rt)
    first, *others = hints(rt)

    def run(some: Sequence[Hint]) -> None:
        for hint in some:
            with nullcontext() if handler is fine else suppress(ChunkFailedError):
                flow.run(hint)

    # What is made once for each process is made.
    run([first])
    with ThreadPoolExecutor(1) as pool:

        def run_here_and_there() -> None:
            run(others[:2])
            pool.submit(run, others[2:]).result()

        assert unreachable(run_here_and_there) == []
    expected = {fine: "ok", limited: "deferred"}.get(handler, "failed")
    assert outcomes(attempts(rt)) == [expected] * 8


def test_garbage_of_a_task_that_failed(project: Project, new_flow: NewFlow) -> None:
    """Given messages that failed as a whole, then what Celery keeps of each task's traceback is freed with it."""
    chosen = pipeline(Stage(fails, chunk=2))
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(6))
    flow = new_flow(rt)
    app = make_celery(rt.settings, {chosen.name: chosen}, lambda: flow)
    task = app.tasks[f"{chosen.name}.fails"]
    states = []

    def run(some: Sequence[Hint]) -> None:
        for hint in some:
            request = {"id": hint.message, "delivery_info": {}, "hostname": "here"}
            done = trace_task(task, hint.message, [hint.as_dict()], {}, request, app=app)
            states.append(done.info.state)

    first, *others = hints(rt)
    run([first])

    assert unreachable(lambda: run(others)) == []
    assert states == ["FAILURE"] * 3


COUNTING = """
import gc

from pipeline_app import Pipeline, Stage


def first(n: int) -> dict:
    return {"frozen": gc.get_freeze_count()}


demo = Pipeline("demo", stages=[Stage(first)])
"""


def test_children_share_what_was_there_before(project: Project) -> None:
    """Given a worker whose children are forked, then their collectors leave what they share with it alone."""
    rt = project.runtime()
    prepare(rt)
    project.write("stages.py", COUNTING)
    project.json("run", "init", "r", "--pipeline", "demo")
    seeding.seed(rt, "r", lines(1))

    with project.worker(pool="prefork", concurrency=1):
        runs.wait(rt, "r", timeout_s=60)

    (result,) = results(rt, "r")
    assert result["result"]["frozen"] > 10_000


def unreachable(call: Callable[[], None]) -> list[str]:
    """Objects of ours, and of tracebacks, that only the collector found after `call`."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        call()
        gc.collect()
        return [repr(found)[:100] for found in gc.garbage if _is_ours(found)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def _is_ours(found: object) -> bool:
    # By its type alone: an object whose class says otherwise, or that stands for one that is gone, is not asked.
    if type(found) is FrameType:
        return "pipeline_app" in Path(found.f_code.co_filename).parts or found.f_code.co_filename == __file__
    module = found.__module__ if type(found) is FunctionType else type(found).__module__
    return module is not None and module.startswith(("pipeline_app.", "billiard."))
