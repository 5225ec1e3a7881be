"""Throttles: rates, bounds and budgets that all workers share, and the order in which jobs wait for them."""

from __future__ import annotations

import time
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest

from pipeline_app import Job, Pipeline, Stage
from pipeline_app.control.duties import hold_release, throttle_release
from pipeline_app.control.targets import throttles
from pipeline_app.domain.rates import Budget, Rate
from pipeline_app.errors import NotFoundError, UsageError
from pipeline_app.flow.consume import Flow
from pipeline_app.runtime import Runtime
from pipeline_app.store import throttles as store_throttles
from pipeline_app.store import workers
from pipeline_app.store.workers import FLAGS
from tests.integration.gate import Gate
from tests.integration.helpers import (
    as_row,
    begin,
    by_state,
    everything,
    hints,
    in_threads,
    job,
    lines,
    pipeline,
    prove,
    pump,
)
from tests.project import Project

TAGS: dict[str, Any] = {"tags": {"provider": "p"}}
SELECTOR = {"provider": "p"}


class Log:
    """A handler that notes when it was called, and by which job."""

    def __init__(self, costs: float = 0.0) -> None:
        self.times: list[float] = []
        self.jobs: list[str] = []
        self.costs = costs

    def stage(self, **options: Any) -> Stage:
        def ask(n: int, job: Job) -> int:
            self.times.append(time.monotonic())
            self.jobs.append(job.id)
            if self.costs:
                job.spend(self.costs, "tokens")
            return n

        return Stage(ask, **options)


def make(project: Project, *stages: Any, **options: Any) -> tuple[Runtime, Pipeline]:
    chosen = pipeline(*stages, **options)
    rt = project.runtime(chosen)
    rt.memory._version = lambda: workers.version(rt.store, FLAGS)
    return rt, chosen


def run_on(rt: Runtime, seconds: float, flow: Flow | None = None, **until: int) -> None:
    """Let go and run for that long, as the pacing and a worker would; or until so many jobs are in these states."""
    flow = flow or Flow(rt, lambda: False)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if until and Counter(row["state"] for row in rt.store.db.job_states.find()) == until:
            return
        throttle_release.release_throttled(rt)
        hold_release.release_kept_by_nothing(rt)
        if not pump(rt, flow):
            time.sleep(0.02)


def test_a_rate_is_kept_and_jobs_go_in_order(project: Project) -> None:
    log = Log()
    rt, chosen = make(project, log.stage())
    begin(rt, chosen, lines(60, **TAGS))
    throttles.set_throttle(rt, selector=SELECTOR, rate=Rate.parse("20/s"), reason="contract", actor="me")

    begun = time.monotonic()
    run_on(rt, 30.0, terminal=60)

    prove(rt, terminal=60)
    took = log.times[-1] - begun
    assert took > 2.8, took
    in_a_second = [sum(at <= other < at + 1 for other in log.times) for at in log.times]
    assert 12 <= max(in_a_second) <= 22, in_a_second
    assert log.jobs == [f"j{n}" for n in range(60)]


def test_what_has_to_wait_waits_in_the_store(project: Project) -> None:
    log = Log()
    rt, chosen = make(project, log.stage(chunk=50))
    begin(rt, chosen, lines(50, **TAGS))
    throttles.set_throttle(rt, selector=SELECTOR, rate=Rate.parse("10/s"))

    begun = time.monotonic()
    pump(rt)

    took = time.monotonic() - begun
    assert took < 4
    assert 1 <= len(log.jobs) <= 5 + 10 * took
    assert by_state(rt)["waiting"] == 50 - len(log.jobs)
    waiting = next(job(rt, f"j{n}") for n in range(50) if job(rt, f"j{n}")["state"] == "waiting")
    assert waiting["reason"] == "throttle"
    assert waiting["deferrals"] == 0


def test_who_comes_later_goes_behind_those_that_wait(project: Project) -> None:
    log = Log()
    rt, chosen = make(project, log.stage())
    throttle = throttles.set_throttle(rt, selector=SELECTOR, rate=Rate.parse("1/h"))["throttle"]
    begin(rt, chosen, lines(3, **TAGS), run="first")
    pump(rt)
    assert by_state(rt, "first")["waiting"] >= 2
    throttles.set_throttle(rt, selector=SELECTOR, rate=Rate.parse("1000/s"))

    begin(rt, chosen, lines(3, **TAGS), run="second")
    pump(rt)
    assert by_state(rt, "second") == {"waiting": 3}

    run_on(rt, 4.0)
    prove(rt, "first", terminal=3)
    prove(rt, "second", terminal=3)
    assert not store_throttles.all_of(rt.store)[0]["backlog"]
    assert throttle == throttles.listing(rt)[0]["throttle"]


def test_nothing_else_is_throttled(project: Project) -> None:
    rt, chosen = make(project, as_row)
    begin(rt, chosen, lines(20, tags={"provider": "other"}))
    throttles.set_throttle(rt, selector=SELECTOR, rate=Rate.parse("1/h"))
    throttles.set_throttle(rt, selector={"provider": "other"}, run=None, concurrency=5)

    pump(rt)

    prove(rt, terminal=20)


def test_a_bound_on_concurrency_is_kept_and_its_locks_are_given_back(project: Project, gate: Gate) -> None:
    rt, chosen = make(project, gate.stage())
    begin(rt, chosen, lines(5, **TAGS))
    throttles.set_throttle(rt, selector=SELECTOR, concurrency=2)
    flow = Flow(rt, lambda: False)
    todo = hints(rt)

    def both() -> None:
        in_threads(lambda: flow.run(todo[0]), lambda: flow.run(todo[1]))

    def others() -> None:
        while throttles.listing(rt)[0]["running"] < 2:
            time.sleep(0.01)
        for hint in todo[2:]:
            flow.run(hint)
        gate.may_end.set()

    in_threads(both, others)

    assert len(gate.calls) == 2
    prove(rt, waiting=3, terminal=2)
    assert throttles.listing(rt)[0]["running"] == 0
    run_on(rt, 30.0, flow, terminal=5)
    prove(rt, terminal=5)


def test_a_lock_of_a_worker_that_died_is_taken_back(project: Project) -> None:
    rt, chosen = make(project, as_row)
    begin(rt, chosen, lines(3, **TAGS))
    row = throttles.set_throttle(rt, selector=SELECTOR, concurrency=1)
    store_throttles.admit(
        rt.store, row["throttle"], number=1, message="gone", token="gone", patience_s=1, released=False
    )
    pump(rt)
    assert by_state(rt) == {"waiting": 3}

    run_on(rt, 0.5)
    assert by_state(rt) == {"waiting": 3}
    throttle_release.unlock_ended(rt)
    run_on(rt, 30.0, terminal=3)

    prove(rt, terminal=3)


def test_a_budget_ends_and_begins_anew_with_its_period(project: Project) -> None:
    log = Log(costs=10)
    rt, chosen = make(project, log.stage(chunk=10))
    begin(rt, chosen, lines(10, **TAGS))
    throttles.set_throttle(rt, selector=SELECTOR, budget=Budget.parse("40 tokens/1h"))

    run_on(rt, 30.0, terminal=4, waiting=6)
    run_on(rt, 0.5)

    prove(rt, terminal=4, waiting=6)
    (row,) = throttles.listing(rt)
    assert row["spent"] == 40
    assert timedelta() < row["period_ends_at"] - rt.store.now() <= timedelta(hours=1)

    rt.store.db.throttles.update_one({}, [{"$set": {"created_at": {"$subtract": ["$created_at", 3600_000]}}}])
    run_on(rt, 30.0, terminal=8, waiting=2)
    run_on(rt, 0.5)
    prove(rt, terminal=8, waiting=2)


def test_two_throttles_on_one_job_are_both_kept(project: Project) -> None:
    log = Log(costs=1)
    rt, chosen = make(project, log.stage(), partition_by=[])
    begin(rt, chosen, lines(10, tags={"provider": "p", "model": "m"}))
    throttles.set_throttle(rt, selector=SELECTOR, rate=Rate.parse("50/s"))
    throttles.set_throttle(rt, selector={"model": "m"}, budget=Budget.parse("5 tokens/1h"))

    run_on(rt, 2.0)

    prove(rt, terminal=5, waiting=5)


def test_a_throttle_that_is_taken_away_lets_its_jobs_go(project: Project) -> None:
    rt, chosen = make(project, as_row)
    begin(rt, chosen, lines(5, **TAGS))
    throttles.set_throttle(rt, selector=SELECTOR, rate=Rate.parse("1/d"))
    pump(rt)
    assert by_state(rt) == {"terminal": 1, "waiting": 4}

    (row,) = throttles.clear(rt, selector=SELECTOR)
    assert row["waiting_jobs"] == 4
    run_on(rt, 30.0, terminal=5)

    prove(rt, terminal=5)


def test_a_throttle_that_is_taken_away_lets_a_chunk_that_runs_go_on(project: Project) -> None:
    calls: list[int] = []

    def ask(n: int) -> int:
        calls.append(n)
        if len(calls) == 2:
            throttles.clear(rt, selector=SELECTOR)
        return n

    rt, chosen = make(project, Stage(ask, chunk=10))
    begin(rt, chosen, lines(10, **TAGS))
    throttles.set_throttle(rt, selector=SELECTOR, rate=Rate.parse("20/s"))

    pump(rt)

    prove(rt, terminal=10)


def test_a_bound_on_concurrency_lets_whole_chunks_go(project: Project) -> None:
    rt, chosen = make(project, Stage(as_row, chunk=50))
    begin(rt, chosen, lines(200, **TAGS))
    row = throttles.set_throttle(rt, selector=SELECTOR, concurrency=2)
    store_throttles.set_backlog(rt.store, row["throttle"], True)
    pump(rt)
    assert by_state(rt) == {"waiting": 200}

    throttle_release.release_throttled(rt)

    assert [len(hint["jobs"]) for hint in rt.store.db.messages.find({"state": "open"})] == [50, 50]
    run_on(rt, 30.0, terminal=200)
    prove(rt, terminal=200)


def test_an_ordered_run_goes_by_priority(project: Project) -> None:
    log = Log()
    rt, chosen = make(project, log.stage())
    begin(rt, chosen, [{**row, "priority": n % 3} for n, row in enumerate(lines(12))])
    throttles.order_run(rt, "r")
    pump(rt)
    assert by_state(rt) == {"waiting": 12}
    assert job(rt, "j0")["reason"] == "priority"

    run_on(rt, 30.0, terminal=12)

    prove(rt, terminal=12)
    assert log.jobs == sorted(log.jobs, key=lambda name: (-(int(name[1:]) % 3), int(name[1:])))


def test_a_stage_without_a_worker_does_not_hold_up_the_others(project: Project) -> None:
    log = Log()
    rt, chosen = make(project, log.stage(), partition_by=["kind"])
    begin(rt, chosen, [{**row, "tags": {"provider": "p", "kind": "ab"[n >= 3]}} for n, row in enumerate(lines(6))])
    throttles.set_throttle(rt, selector=SELECTOR, rate=Rate.parse("2/s"))
    row = store_throttles.all_of(rt.store)[0]
    store_throttles.set_backlog(rt.store, row["_id"], True)
    pump(rt)
    assert by_state(rt) == {"waiting": 6}

    throttle_release.release_throttled(rt)
    stuck = rt.store.db.messages.update_many(
        {"released_by": row["_id"]}, {"$set": {"created_at": rt.store.now() - timedelta(seconds=10)}}
    )
    assert stuck.modified_count
    throttle_release.release_throttled(rt)

    going = {m["partition"] for m in rt.store.db.messages.find({"released_by": row["_id"], "state": "open"})}
    assert going == {"kind__a", "kind__b"}


def test_what_is_wrong_is_said(project: Project) -> None:
    rt, chosen = make(project, as_row)
    begin(rt, chosen, lines(1))
    before = everything(rt)

    with pytest.raises(UsageError, match="limits something"):
        throttles.set_throttle(rt, selector=SELECTOR)
    with pytest.raises(UsageError, match="needs a target"):
        throttles.set_throttle(rt, selector={}, concurrency=1)
    with pytest.raises(UsageError, match="burst of a rate"):
        throttles.set_throttle(rt, selector=SELECTOR, concurrency=1, burst=2)
    with pytest.raises(UsageError, match="whole number from 1"):
        throttles.set_throttle(rt, selector=SELECTOR, concurrency=0)
    with pytest.raises(NotFoundError, match="no run 'nope'"):
        throttles.set_throttle(rt, selector=SELECTOR, concurrency=1, run="nope")
    with pytest.raises(NotFoundError, match="no throttle on provider=p"):
        throttles.clear(rt, selector=SELECTOR)

    assert everything(rt) == before
