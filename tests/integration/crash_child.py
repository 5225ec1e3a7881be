"""Processes that test_crash_points.py kills: each does one step of the protocol, and dies in the middle of it.

They come from a nursery, a process in which everything is imported once: for each line on its standard input it forks a
child that takes the step named there, and prints the child's pid and how it ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from pipeline_app import Job, Pipeline, RateLimited, Stage
from pipeline_app.application import make_celery
from pipeline_app.control.accounts.verify import verify
from pipeline_app.control.changes import cancelling, moving
from pipeline_app.control.duties import hold_release, sweep
from pipeline_app.control.seed import paging, seeding
from pipeline_app.control.targets import holds, throttles
from pipeline_app.domain.hint import Hint
from pipeline_app.domain.outcome import ErrorRecord
from pipeline_app.domain.rates import Budget, Rate
from pipeline_app.domain.selection import Selection
from pipeline_app.errors import DuplicateJobError
from pipeline_app.flow.consume import Flow
from pipeline_app.flow.give_back import give_back
from pipeline_app.runtime import Runtime, build
from pipeline_app.settings import Settings
from pipeline_app.store import messages

#: What the handlers of a process do besides their work.
during: list[Callable[[Job], None]] = []


def first(n: int, job: Job) -> int:
    for act in during:
        act(job)
    job.spend(1, "tokens")
    return n + 1


def second(n: int) -> dict[str, int]:
    return {"n": n}


#: Takes the results of the last stage; nobody runs it, the test reads its queue.
NOTIFY: dict[str, Any] = {"task": "notify", "args": [], "kwargs": {}, "options": {}}

PIPELINE = Pipeline("crash", [Stage(first, chunk=3), Stage(second, chunk=2)], partition_by=["kind"], then=[NOTIFY])


#: More than enough for every job, and all that there is to be kept of it: slots, locks, what was spent.
LIMITS: dict[str, Any] = {
    "rate": Rate.parse("1000/s"),
    "burst": 100,
    "concurrency": 10,
    "budget": Budget.parse("100000 tokens/h"),
}


def lines(run: str) -> list[dict[str, Any]]:
    """Five jobs in two partitions, one of them delayed."""
    return [
        {"job_id": f"{run}-{n}", "payload": n, "tags": {"kind": "ab"[n % 2]}, "delay_s": 60 if n == 4 else 0}
        for n in range(5)
    ]


def runtime(amqp_url: str, mongodb_url: str) -> Runtime:
    """A runtime that knows PIPELINE."""
    settings = Settings(amqp_url=amqp_url, mongodb_url=mongodb_url)
    table = {PIPELINE.name: PIPELINE}
    return build(settings, make_celery(settings, table, no_flow), table)


def no_flow() -> Flow:
    raise AssertionError("no Celery worker here")


def seed(rt: Runtime, run: str, _: str) -> None:
    seeding.seed(rt, run, lines(run))


def seed_whole(rt: Runtime, run: str, _: str) -> None:
    seeding.seed(rt, run, lines(run), whole=True)


def take_back(rt: Runtime, run: str, _: str) -> None:
    """A whole batch whose last job is in the run already."""
    more = [{"job_id": f"{run}-{n}", "payload": n} for n in (11, 12, 0)]
    # A page each, so that there is something to be taken back.
    paging.PAGE = 2
    with contextlib.suppress(DuplicateJobError):
        seeding.seed(rt, run, more, whole=True)


def handle(rt: Runtime, run: str, hint: str) -> None:
    flow = Flow(rt, lambda: False)
    flow.run(Hint(**json.loads(hint)))
    flow.notes.flush()


def handle_late(rt: Runtime, run: str, hint: str) -> None:
    """The claim is taken away in the middle, as the sweep does when a lease has ended."""
    lost = ErrorRecord(type="WorkerLost", message="its lease ended", traceback="")

    def take(_: Job) -> None:
        for row in messages.claimed(rt.store, _id=json.loads(hint)["message"]):
            give_back(rt, row, lost=lost)

    during.append(take)
    handle(rt, run, hint)


def handle_limited(rt: Runtime, run: str, hint: str) -> None:
    """The provider says that it is closed."""

    def refuse(_: Job) -> None:
        raise RateLimited("429", retry_after=3600)

    during.append(refuse)
    handle(rt, run, hint)


def hold(rt: Runtime, run: str, _: str) -> None:
    holds.set_hold(rt, run=run, selector={"kind": "b"})


def clear_hold(rt: Runtime, run: str, _: str) -> None:
    holds.clear(rt, run=run, selector={"kind": "b"}, at_once=True)


def probe(rt: Runtime, run: str, _: str) -> None:
    """What the pacing does with holds."""
    hold_release.probe_held(rt)
    hold_release.release_kept_by_nothing(rt)


def throttle(rt: Runtime, run: str, _: str) -> None:
    throttles.set_throttle(rt, run=run, selector={"kind": "b"}, **LIMITS)


def clear_throttle(rt: Runtime, run: str, _: str) -> None:
    throttles.clear(rt, run=run, selector={"kind": "b"})


def give_priorities(rt: Runtime, run: str, _: str) -> None:
    moving.set_priority(rt, run, Selection(), 7)


def cancel(rt: Runtime, run: str, _: str) -> None:
    cancelling.cancel(rt, run)


#: Of the five jobs of `lines`, those with an odd number.
ODD = Selection(selector={"kind": "b"})


def cancel_some(rt: Runtime, run: str, _: str) -> None:
    cancelling.cancel_jobs(rt, run, ODD)


def move_some(rt: Runtime, run: str, _: str) -> None:
    moving.move_jobs(rt, run, Selection(job_ids=(f"{run}-0", f"{run}-1", f"{run}-4")), "second")


def repair(rt: Runtime, run: str, _: str) -> None:
    verify(rt, run, repair=True)


def one_round(rt: Runtime, run: str, _: str) -> None:
    """Every duty of the sweep, as its leader does them."""
    sweep.end_leases(rt)
    sweep.sweep(lambda: rt).round(rt)


STEPS: dict[str, Callable[[Runtime, str, str], None]] = {
    step.__name__: step
    for step in (
        *(seed, seed_whole, take_back, handle, handle_late, handle_limited),
        *(cancel, cancel_some, move_some, repair, one_round),
        *(hold, clear_hold, probe, throttle, clear_throttle, give_priorities),
    )
}

#: Steps that a worker takes with a message that it has claimed.
OF_A_WORKER = frozenset({"handle", "handle_late", "handle_limited"})


def nursery() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if not pid:
            rt = runtime(order["amqp_url"], order["mongodb_url"])
            STEPS[order["step"]](rt, order["run"], order["detail"])
            os._exit(0)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
