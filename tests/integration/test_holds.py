"""Holds and pauses: what they keep, and how it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from pipeline_app import Job, Pipeline, RateLimited, Retry, Stage
from pipeline_app.application import prepare
from pipeline_app.control import runs
from pipeline_app.control.duties import hold_release, throttle_release
from pipeline_app.control.seed import paging, seeding
from pipeline_app.control.targets import holds, pauses
from pipeline_app.errors import DuplicateJobError, NotFoundError, UsageError
from pipeline_app.flow.consume import Flow
from pipeline_app.runtime import Runtime
from pipeline_app.store import manifests, workers
from pipeline_app.store.workers import FLAGS
from tests.integration.helpers import (
    as_row,
    attempts,
    backdate,
    begin,
    by_state,
    double,
    everything,
    job,
    lines,
    outcomes,
    pipeline,
    prove,
    pump,
)
from tests.project import Project

OPEN_AI, OTHER = {"tags": {"provider": "openai"}}, {"tags": {"provider": "other"}}


class Provider:
    """A target that says when it may be asked again."""

    def __init__(self, **limited: Any) -> None:
        self.calls: list[str] = []
        self.limited: dict[str, Any] | None = limited or None
        self.error: Exception | None = None

    def stage(self, **options: Any) -> Stage:
        def ask(n: int, job: Job) -> int:
            self.calls.append(job.id)
            if self.limited is not None:
                raise RateLimited("429", **self.limited)
            if self.error is not None:
                raise self.error
            return n

        return Stage(ask, **options)


def make(project: Project, *stages: Any, **options: Any) -> tuple[Runtime, Pipeline]:
    chosen = pipeline(*stages, **options)
    rt = project.runtime(chosen)
    # As in a worker whose lifeline sees every change at once.
    rt.memory._version = lambda: workers.version(rt.store, FLAGS)
    return rt, chosen


def let_go(rt: Runtime, flow: Flow | None = None, rounds: int = 20) -> None:
    """The duties of the release, and what they let go, until nothing moves."""
    for _ in range(rounds):
        hold_release.probe_held(rt)
        hold_release.release_kept_by_nothing(rt)
        if not pump(rt, flow):
            break


# Holds


def test_a_hold_keeps_what_matches_and_nothing_else(project: Project) -> None:
    rt, chosen = make(project, double, as_row)
    begin(rt, chosen, [*lines(5, **OPEN_AI), *[{**row, "job_id": f"o{n}"} for n, row in enumerate(lines(5, **OTHER))]])

    held = holds.set_hold(rt, selector={"provider": "openai"}, reason="they close", actor="me")
    pump(rt)

    prove(rt, held=5, terminal=5)
    assert held["state"] == "active"
    (row,) = holds.listing(rt)
    assert (row["held_jobs"], row["reason"], row["actor"], row["origin"]) == (5, "they close", "me", "operator")
    assert job(rt, "j0")["waits_for"] == row["hold"]
    assert not attempts(rt, job="j0")


def test_a_hold_of_one_run_leaves_others_alone(project: Project) -> None:
    rt, chosen = make(project, as_row)
    begin(rt, chosen, lines(2, **OPEN_AI), run="mine")
    begin(rt, chosen, lines(2, **OPEN_AI), run="theirs")

    holds.set_hold(rt, selector={"provider": "openai"}, run="mine")
    pump(rt)

    prove(rt, "mine", held=2)
    prove(rt, "theirs", terminal=2)


def test_of_a_chunk_only_what_matches_is_held(project: Project) -> None:
    rt, chosen = make(project, Stage(as_row, chunk=10), partition_by=[])
    begin(rt, chosen, [*lines(3, **OPEN_AI), {"job_id": "free", "payload": 1, **OTHER}])

    holds.set_hold(rt, selector={"provider": "openai"})
    pump(rt)

    prove(rt, held=3, terminal=1)


def test_a_hold_set_while_a_chunk_runs_keeps_the_rest_of_it(project: Project) -> None:
    calls: list[int] = []

    def first_closes(n: int) -> dict[str, int]:
        calls.append(n)
        if len(calls) == 1:
            holds.set_hold(rt, selector={"provider": "openai"})
        return {"n": n}

    rt, chosen = make(project, Stage(first_closes, chunk=10))
    begin(rt, chosen, lines(5, **OPEN_AI))

    pump(rt)

    assert len(calls) == 1
    prove(rt, held=4, terminal=1)


def test_a_hold_whose_time_is_over_probes_first_and_then_ramps_up(project: Project) -> None:
    provider = Provider()
    rt, chosen = make(project, provider.stage())
    begin(rt, chosen, lines(40, **OPEN_AI))
    holds.set_hold(rt, selector={"provider": "openai"}, until=rt.store.now() + timedelta(minutes=30))
    pump(rt)
    assert by_state(rt) == {"held": 40}

    hold_release.probe_held(rt)
    assert by_state(rt) == {"held": 40}, "its time has not come"

    backdate(rt, "target_holds", 1801, "until")
    sizes = []
    for _ in range(8):
        before = len(provider.calls)
        hold_release.probe_held(rt)
        hold_release.release_kept_by_nothing(rt)
        pump(rt)
        sizes.append(len(provider.calls) - before)

    assert sizes[:4] == [3, 6, 12, 19]
    prove(rt, terminal=40)
    assert holds.listing(rt) == []
    (row,) = holds.listing(rt, ended=True)
    assert row["state"] == "ended"


def test_while_it_is_probed_nothing_else_passes(project: Project) -> None:
    provider = Provider()
    rt, chosen = make(project, provider.stage())
    begin(rt, chosen, lines(5, **OPEN_AI))
    holds.set_hold(rt, selector={"provider": "openai"})
    pump(rt)

    holds.clear(rt, selector={"provider": "openai"})
    hold_release.probe_held(rt)
    begin(rt, chosen, lines(5, **OPEN_AI), run="later")
    pump(rt)

    assert by_state(rt, "later") == {"held": 5}
    assert len(provider.calls) == 3
    let_go(rt)
    prove(rt, terminal=5)
    prove(rt, "later", terminal=5)


def test_probes_that_fail_close_it_again_for_longer(project: Project) -> None:
    provider = Provider()
    provider.error = ValueError("still broken")
    rt, chosen = make(project, provider.stage(retry=Retry(attempts=5, backoff="1h")))
    begin(rt, chosen, lines(5, **OPEN_AI))
    holds.set_hold(rt, selector={"provider": "openai"}, until=rt.store.now() + timedelta(seconds=100))
    pump(rt)
    backdate(rt, "target_holds", 101, "until")

    hold_release.probe_held(rt)
    pump(rt)
    hold_release.probe_held(rt)

    (row,) = holds.listing(rt)
    assert (row["state"], row["closings"]) == ("active", 2)
    assert 190 < (row["until"] - rt.store.now()).total_seconds() <= 200
    assert by_state(rt) == {"held": 2, "retry_waiting": 3}


def test_one_probe_that_fails_for_itself_does_not_close_it(project: Project) -> None:
    def ask(n: int) -> int:
        if n == 0:
            raise ValueError("this one")
        return n

    rt, chosen = make(project, Stage(ask, retry=Retry(attempts=1)))
    begin(rt, chosen, lines(10, **OPEN_AI))
    holds.set_hold(rt, selector={"provider": "openai"})
    pump(rt)

    holds.clear(rt, selector={"provider": "openai"})
    let_go(rt)

    prove(rt, terminal=9, dead_lettered=1)


def test_cleared_at_once_it_lets_everything_go(project: Project) -> None:
    rt, chosen = make(project, as_row)
    begin(rt, chosen, lines(30, **OPEN_AI))
    held = holds.set_hold(rt, selector={"provider": "openai"})
    pump(rt)

    (row,) = holds.clear(rt, hold=held["hold"], at_once=True)
    assert (row["state"], row["held_jobs"]) == ("ended", 30)
    hold_release.release_kept_by_nothing(rt)
    pump(rt)

    prove(rt, terminal=30)


def test_jobs_that_another_hold_keeps_are_no_probes(project: Project) -> None:
    provider = Provider()
    rt, chosen = make(project, provider.stage(), partition_by=[])
    models = ["big"] * 5 + ["small"] * 3
    rows = [{**row, "tags": {"provider": "openai", "model": models[n]}} for n, row in enumerate(lines(8))]
    begin(rt, chosen, rows)
    holds.set_hold(rt, selector={"provider": "openai"})
    pump(rt)
    holds.set_hold(rt, selector={"model": "big"})

    holds.clear(rt, selector={"provider": "openai"})
    let_go(rt)

    assert sorted(set(provider.calls)) == ["j5", "j6", "j7"]
    prove(rt, held=5, terminal=3)
    holds.clear(rt, selector={"model": "big"})
    let_go(rt)
    prove(rt, terminal=8)


def test_jobs_go_by_priority_and_then_in_the_order_in_which_they_came(project: Project) -> None:
    provider = Provider()
    rt, chosen = make(project, provider.stage())
    holds.set_hold(rt, selector={"provider": "openai"})
    begin(rt, chosen, [{**row, "priority": int(n == 7)} for n, row in enumerate(lines(10, **OPEN_AI))])
    assert by_state(rt) == {"held": 10}

    holds.clear(rt, selector={"provider": "openai"}, at_once=True)
    for _ in range(3):
        hold_release.release_kept_by_nothing(rt)
        throttle_release.release_throttled(rt)
        pump(rt)

    assert provider.calls == ["j7", *[f"j{n}" for n in range(10) if n != 7]]


def test_what_is_wrong_is_said(project: Project) -> None:
    rt, chosen = make(project, as_row)
    begin(rt, chosen, lines(1))
    before = everything(rt)

    with pytest.raises(UsageError, match="would be over"):
        holds.set_hold(rt, selector={"a": "b"}, until=rt.store.now() - timedelta(seconds=1))
    with pytest.raises(UsageError, match="closes a target"):
        holds.set_hold(rt, selector={})
    with pytest.raises(NotFoundError, match="no run 'nope'"):
        holds.set_hold(rt, selector={"a": "b"}, run="nope")
    with pytest.raises(NotFoundError, match="no hold on a=b in force"):
        holds.clear(rt, selector={"a": "b"})

    assert everything(rt) == before


# Holds that the work sets


def test_a_rate_limit_closes_the_target_and_costs_no_attempt(project: Project) -> None:
    provider = Provider(retry_after="60")
    rt, chosen = make(project, provider.stage(retry=Retry(attempts=1)))
    begin(rt, chosen, [*lines(100, **OPEN_AI), {"job_id": "free", "payload": 1, **OTHER}])

    flow = Flow(rt, lambda: False)
    pump(rt, flow)

    assert len(provider.calls) == 2, "one for each target"
    prove(rt, held=101)
    assert outcomes(attempts(rt)) == ["deferred", "deferred"]
    assert job(rt, provider.calls[0])["failures"] == 0
    assert job(rt, provider.calls[0])["deferrals"] == 1
    row = holds.listing(rt)[0]
    assert (row["selector"], row["origin"], row["run"]) == ({"provider": "openai"}, "handler", None)
    assert 50 < (row["until"] - rt.store.now()).total_seconds() <= 60

    provider.limited = None
    backdate(rt, "target_holds", 61, "until")
    let_go(rt, flow)
    prove(rt, terminal=101)


def test_a_probe_that_is_rate_limited_closes_for_longer(project: Project) -> None:
    provider = Provider(retry_after=10)
    rt, chosen = make(project, provider.stage())
    begin(rt, chosen, lines(20, **OPEN_AI))
    flow = Flow(rt, lambda: False)
    pump(rt, flow)
    for closings, longest in ((2, 20), (3, 40), (4, 80)):
        backdate(rt, "target_holds", 1000, "until")
        flow = Flow(rt, lambda: False)
        hold_release.probe_held(rt)
        pump(rt, flow)
        (row,) = holds.listing(rt)
        assert (row["state"], row["closings"]) == ("active", closings)
        assert longest - 2 < (row["until"] - rt.store.now()).total_seconds() <= longest
    assert len(provider.calls) == 4, "the first probe that is refused stops the others"
    prove(rt, held=20)


def test_a_handler_may_name_the_target(project: Project) -> None:
    provider = Provider(retry_after=60, selector={"model": "big"})
    rt, chosen = make(project, provider.stage(), partition_by=[])
    begin(rt, chosen, [{**row, "tags": {"provider": "a", "model": "big"}} for row in lines(3)])

    pump(rt)

    assert holds.listing(rt)[0]["selector"] == {"model": "big"}
    prove(rt, held=3)


def test_a_job_without_tags_closes_its_stage(project: Project) -> None:
    provider = Provider(retry_after=60)
    rt, chosen = make(project, double, provider.stage())
    begin(rt, chosen, lines(3))

    pump(rt)

    row = holds.listing(rt)[0]
    assert (row["selector"], row["stage"]) == ({}, f"{chosen.name}.ask")
    prove(rt, held=3)


def test_what_an_operator_closed_a_handler_does_not_open_earlier(project: Project) -> None:
    provider = Provider(retry_after=1)
    rt, chosen = make(project, provider.stage())
    begin(rt, chosen, lines(1, **OPEN_AI))
    flow = Flow(rt, lambda: False)
    provider_stage = chosen.stages[0]
    assert provider_stage.name == "ask"
    holds.set_hold(rt, selector={"provider": "openai"}, reason="contract")
    row = holds.listing(rt)[0]

    from pipeline_app.domain.target import Target
    from pipeline_app.store import holds as store_holds

    store_holds.close(
        rt.store, store_holds.HOLD, Target(selector={"provider": "openai"}),
        until=rt.store.now() + timedelta(seconds=1), reason="429", actor="handler", by_handler=True,
    )  # fmt: skip

    assert holds.listing(rt)[0] == row
    pump(rt, flow)
    prove(rt, held=1)


def test_the_budget_of_deferrals_ends(project: Project) -> None:
    provider = Provider(retry_after=1)
    rt, chosen = make(project, provider.stage(deferrals=2))
    begin(rt, chosen, lines(1, **OPEN_AI))
    pump(rt)
    backdate(rt, "target_holds", 100, "until")

    hold_release.probe_held(rt)
    pump(rt)

    prove(rt, dead_lettered=1)
    assert job(rt, "j0")["reason"] == "exhausted"
    assert job(rt, "j0")["deferrals"] == 2


@pytest.mark.parametrize(
    "said",
    [
        {"retry_after": timedelta(seconds=5)},
        {"retry_after": "soon"},
        {"until": "tomorrow"},
        {"until": datetime.max.replace(tzinfo=timezone(-timedelta(hours=5)))},
        {"retry_after": "Fri, 31 Dec 9999 23:59:59 -0500"},
        {"selector": "a=b"},
        {"message": ValueError("an exception"), "retry_after": 5},
        {"message": "half a \udc80 character", "retry_after": 5},
    ],
)
def test_whatever_a_handler_says_its_target_is_closed_and_nothing_else_is_hurt(
    project: Project, said: dict[str, Any]
) -> None:
    def ask(n: int, job: Job) -> int:
        if job.tags["provider"] == "openai":
            raise RateLimited(**said)
        return n

    rt, chosen = make(project, Stage(ask, chunk=5, retry=Retry(attempts=1)))
    begin(rt, chosen, [*lines(2, **OPEN_AI), {"job_id": "free", "payload": 1, **OTHER}])
    pump(rt)

    prove(rt, held=2, terminal=1)
    (row,) = holds.listing(rt)
    assert timedelta() < row["until"] - rt.store.now() < timedelta(days=3651)


def test_after_probes_failed_once_the_next_ones_may_pass(project: Project) -> None:
    """Given workers that remember the hold as it was, when it is probed again, then they let its probes pass."""
    provider = Provider()
    provider.error = ValueError("down")
    rt, chosen = make(project, provider.stage(retry=Retry(attempts=9, backoff="1h")))
    begin(rt, chosen, lines(20, **OPEN_AI))
    flow = Flow(rt, lambda: False)
    holds.set_hold(rt, selector={"provider": "openai"})
    pump(rt, flow)
    holds.clear(rt, selector={"provider": "openai"})
    for _ in range(2):
        hold_release.probe_held(rt)
        pump(rt, flow)
    assert holds.listing(rt)[0]["state"] == "active"

    provider.error = None
    backdate(rt, "target_holds", 1000, "until")
    let_go(rt, flow)

    assert by_state(rt) == {"retry_waiting": 3, "terminal": 17}


def test_two_holds_on_the_same_jobs_do_not_wait_for_each_other(project: Project) -> None:
    rt, chosen = make(project, as_row)
    prepare(rt)
    runs.create_run(rt, "r", chosen)
    holds.set_hold(rt, selector={"provider": "openai"}, run="r")
    seeding.seed(rt, "r", lines(5, **OPEN_AI))
    holds.set_hold(rt, selector={"provider": "openai"})
    begin(rt, chosen, lines(5, **OPEN_AI), run="other")
    assert len({job(rt, "j0")["waits_for"], job(rt, "j0", "other")["waits_for"]}) == 2

    holds.clear(rt, selector={"provider": "openai"}, run="r")
    holds.clear(rt, selector={"provider": "openai"})
    for _ in range(5):
        let_go(rt)

    prove(rt, terminal=5)
    prove(rt, "other", terminal=5)


def test_a_hold_that_was_cleared_is_set_again_by_the_next_refusal(project: Project) -> None:
    provider = Provider(until=datetime(2100, 1, 1, tzinfo=UTC))
    rt, chosen = make(project, provider.stage())
    begin(rt, chosen, lines(3, **OPEN_AI))
    flow = Flow(rt, lambda: False)
    pump(rt, flow)
    assert len(provider.calls) == 1

    holds.clear(rt, selector={"provider": "openai"}, at_once=True)
    hold_release.release_kept_by_nothing(rt)
    pump(rt, flow)

    assert len(provider.calls) == 2
    (row,) = holds.listing(rt)
    assert (row["state"], row["closings"], row["held_jobs"]) == ("active", 2, 3)


def test_jobs_of_a_batch_that_is_not_closed_stay_where_they_are(project: Project) -> None:
    """Given a file whose jobs are held, when its seeding fails after the hold is over, then nothing of it ran."""
    provider = Provider()
    rt, chosen = make(project, provider.stage())
    prepare(rt)
    runs.create_run(rt, "r", chosen)
    hold = holds.set_hold(rt, selector={"provider": "openai"})["hold"]

    def rows() -> Iterator[dict[str, Any]]:
        yield from lines(paging.PAGE, **OPEN_AI)
        holds.clear(rt, hold=hold, at_once=True)
        hold_release.release_kept_by_nothing(rt)
        pump(rt)
        yield {"job_id": "j0"}

    with pytest.raises(DuplicateJobError):
        seeding.seed(rt, "r", rows(), whole=True)

    assert provider.calls == []
    prove(rt)


def test_probes_that_nobody_takes_do_not_keep_it_closed(project: Project) -> None:
    provider = Provider()
    rt, chosen = make(project, provider.stage(), partition_by=["kind"])
    rows = [{**row, "tags": {"provider": "openai", "kind": "ab"[n >= 3]}} for n, row in enumerate(lines(8))]
    prepare(rt)
    holds.set_hold(rt, selector={"provider": "openai"})
    begin(rt, chosen, rows)
    holds.clear(rt, selector={"provider": "openai"})
    hold_release.probe_held(rt)
    assert rt.store.db.messages.distinct("partition", {"state": "open"}) == ["kind__a"]

    backdate(rt, "messages", 6, "created_at")
    hold_release.probe_held(rt)

    assert sorted(rt.store.db.messages.distinct("partition", {"state": "open"})) == ["kind__a", "kind__b"]


# Pauses


def test_a_paused_stage_keeps_its_jobs_and_lets_them_go(project: Project) -> None:
    rt, chosen = make(project, double, as_row)
    begin(rt, chosen, lines(4))

    pauses.pause(rt, "r", stage="as_row", reason="look first")
    pump(rt)
    prove(rt, waiting=4)
    assert job(rt, "j0")["stage"] == "as_row"
    assert job(rt, "j0")["reason"] == "pause"

    (row,) = pauses.resume(rt, "r", stage="as_row")
    assert row["waiting_jobs"] == 4
    let_go(rt)
    prove(rt, terminal=4)


def test_a_paused_run_and_a_paused_partition(project: Project) -> None:
    rt, chosen = make(project, as_row, partition_by=["kind"])
    begin(rt, chosen, [{**row, "tags": {"kind": "ab"[n % 2]}} for n, row in enumerate(lines(4))])

    pauses.pause(rt, "r", partition="kind__a")
    pump(rt)
    prove(rt, waiting=2, terminal=2)
    with pytest.raises(NotFoundError, match="not paused"):
        pauses.resume(rt, "r")
    with pytest.raises(NotFoundError, match="no partition"):
        pauses.pause(rt, "r", partition="kind__c")

    pauses.pause(rt, "r")
    pauses.resume(rt, "r", partition="kind__a")
    let_go(rt)
    prove(rt, waiting=2, terminal=2)
    pauses.resume(rt, "r")
    let_go(rt)
    prove(rt, terminal=4)
    assert manifests.get(rt.store, "r")["cancelled_at"] is None
