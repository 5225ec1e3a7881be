"""What asking about holds costs a job: microseconds, in a chunk of 200, with 1,000 holds in force.

    python -m benchmarks.hold_gate [--holds 1000] [--chunk 200] [--rounds 500] [--limit-us 5]

The real gates on a process's real memory, with one partition, so that no hold is ruled out by its place; no services.
`hold` is the one gate that looks for holds and pauses. `all` is the whole way of a job that may run: every gate when
its chunk is claimed, and again those that are asked right before its handler. Ends with 1 if `hold` takes the limit or
more in any layout of holds and tags, by the median over the rounds. It is the processor's time, so that what else the
machine does is not in it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from celery import Celery

from pipeline_app.domain.outcome import Move
from pipeline_app.domain.plan import RunPlan
from pipeline_app.domain.target import Target
from pipeline_app.flow import gates
from pipeline_app.flow.claim import Work
from pipeline_app.runtime import Runtime, build
from pipeline_app.settings import Settings

RUN, STAGE, TASK, PARTITION = "bench", "call", "bench.call", "default"
#: The number of a version that never changes: nothing is ever loaded from a store.
UNCHANGED = -1


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How holds and jobs are tagged."""

    name: str
    hold: Callable[[int], Mapping[str, str]]
    #: Tags of all jobs.
    tags: Mapping[str, str]
    #: What the hold gate must say.
    expected: Move | None = None


LAYOUTS = (
    Layout(
        name="one tag each, none matches",
        hold=lambda n: {"provider": f"p{n}"},
        tags={"provider": "open", "quota_pool": "gpt", "kind": "long"},
    ),
    Layout(
        name="two tags, the first shared",
        hold=lambda n: {"kind": "long", "provider": f"p{n}"},
        tags={"provider": "open", "quota_pool": "gpt", "kind": "long"},
    ),
    Layout(
        name="two tags, the last shared",
        hold=lambda n: {"provider": f"p{n}", "quota_pool": "gpt"},
        tags={"provider": "open", "quota_pool": "gpt", "kind": "long"},
    ),
    Layout(
        name="one to three tags",
        hold=lambda n: {"provider": f"p{n}", **({}, {"kind": "long"}, {"kind": "long", "quota_pool": "gpt"})[n % 3]},
        tags={"provider": "open", "quota_pool": "gpt", "kind": "long"},
    ),
    Layout(
        name="every job is held",
        hold=lambda n: {"provider": f"p{n}"},
        tags={"provider": "p7", "quota_pool": "gpt", "kind": "long"},
        expected=Move.HOLD,
    ),
)


def runtime(layout: Layout, holds: int) -> Runtime:
    """A process that remembers that many holds, as its handlers would have set them."""
    settings = Settings(amqp_url="amqp://127.0.0.1:1", mongodb_url="mongodb://127.0.0.1:1/bench")
    rt = build(settings, Celery("bench"), {}, version=lambda: UNCHANGED)
    for number in range(holds):
        target = Target(selector=layout.hold(number))
        rt.memory.close(target.digest("h-"), target)
    return rt


def work(layout: Layout, chunk: int) -> Work:
    """A claimed message of `chunk` jobs."""
    ids = [f"job-{n:05}" for n in range(chunk)]
    plan = RunPlan(
        run=RUN,
        pipeline="bench",
        hash="",
        stages=(),
        partition_by=None,
        order_partitions=1,
        bound=None,
        then=(),
        created_at=datetime.now(UTC),
    )
    return Work(
        plan=plan,
        stage=STAGE,
        task=TASK,
        partition=PARTITION,
        message="m",
        token="t",
        job_ids=ids,
        jobs={job: {"message": "m", "tags": dict(layout.tags)} for job in ids},
        inputs={},
    )


def hold_gate(rt: Runtime, claimed: Work) -> None:
    """The gate that looks for holds, once for every job."""
    now = rt.store.now()
    for job in claimed.job_ids:
        gates.closed(rt, claimed, job, now)


def all_gates(rt: Runtime, claimed: Work) -> None:
    """All gates that a job passes on its way to the handler."""
    for job in gates.sort(rt, claimed)[0]:
        gates.ask(gates.LATE_GATES, rt, claimed, job, rt.store.now())


def microseconds(what: Callable[[], None], chunk: int, rounds: int) -> Sequence[float]:
    """Microseconds for each job, one figure a round."""
    what()
    found: list[float] = []
    for _ in range(rounds):
        begin = time.thread_time()
        what()
        found.append((time.thread_time() - begin) / chunk * 1e6)
    return found


def main() -> None:
    """Print microseconds per job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--holds", type=int, default=1000)
    parser.add_argument("--chunk", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--limit-us", type=float, default=5.0)
    options = parser.parse_args()
    slow = False
    print(f"µs a job in a chunk of {options.chunk}, {options.holds} holds in force, {options.rounds} rounds")
    print(f"{'':30}{'hold: least':>12}{'median':>9}{'all: least':>14}{'median':>9}")
    for layout in LAYOUTS:
        rt, claimed = runtime(layout, options.holds), work(layout, options.chunk)
        verdict = gates.closed(rt, claimed, claimed.job_ids[0], rt.store.now())
        assert (verdict and verdict.move) == layout.expected, (layout.name, verdict)
        one = microseconds(partial(hold_gate, rt, claimed), options.chunk, options.rounds)
        every = microseconds(partial(all_gates, rt, claimed), options.chunk, options.rounds)
        print(f"{layout.name:30}{min(one):12.2f}{statistics.median(one):9.2f}"
              f"{min(every):14.2f}{statistics.median(every):9.2f}")  # fmt: skip
        slow = slow or statistics.median(one) >= options.limit_us
        rt.close()
    if slow:
        sys.exit(f"the hold gate takes {options.limit_us} µs or more")


if __name__ == "__main__":
    main()
