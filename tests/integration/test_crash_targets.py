"""Whoever closes, opens or bounds a target is killed at every write: nothing stays closed, locked or waiting for ever.

As `test_crash_points.py`, for holds, throttles and priorities.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from pipeline_app import runtime
from pipeline_app.application import prepare
from pipeline_app.control.changes import moving
from pipeline_app.control.duties import sweep, throttle_release
from pipeline_app.control.seed import seeding
from pipeline_app.control.targets import holds, throttles
from pipeline_app.domain.outcome import AttemptOutcome
from pipeline_app.domain.rates import Rate
from pipeline_app.domain.selection import Selection
from pipeline_app.runtime import Runtime
from pipeline_app.store import workers
from tests.integration import crash_child
from tests.integration.helpers import attempts, backdate, by_state, hints, pump
from tests.integration.nursery import Nursery, each_gap, finish
from tests.project import Project, eventually

pytestmark = pytest.mark.timeout(400)

KIND_B = {"kind": "b"}
SLOW = Rate.parse("1/h")


@pytest.fixture
def rt(project: Project, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """The runtime of a worker that lives on: it reads its flags anew when told, or when they are a second old."""
    monkeypatch.setattr(runtime, "SAFETY_S", 1.0)
    made = project.runtime(crash_child.PIPELINE)
    prepare(made)
    made.memory._version = lambda: workers.version(made.store, workers.FLAGS)
    return made


def seeded(rt: Runtime) -> Callable[[str], str]:
    def arrange(run: str) -> str:
        seeding.seed(rt, run, crash_child.lines(run))
        return ""

    return arrange


def held(rt: Runtime) -> Callable[[str], str]:
    """The jobs of kind b are held, the others are through."""

    def arrange(run: str) -> str:
        seeded(rt)(run)
        crash_child.hold(rt, run, "")
        pump(rt)
        assert by_state(rt, run)["held"] == 2
        return ""

    return arrange


def closed(rt: Runtime, run: str) -> set[str]:
    """Holds that this process goes by and that concern the run's jobs of kind b."""
    found = rt.memory.flags().closures.at(run, "crash.first", "kind__b").matching(KIND_B)
    return {closure.id for closure in found}


def bounded(rt: Runtime, run: str) -> set[str]:
    """Throttles that this process goes by and that concern the run's jobs of kind b."""
    found = rt.memory.flags().throttles.at(run, "crash.first", "kind__b").matching(KIND_B)
    return {throttle.id for throttle in found}


def let_go(rt: Runtime, run: str, delayed: int = 1) -> None:
    """The pacing goes on, and workers, until nothing waits any more but the jobs that are delayed."""

    def all_gone() -> bool:
        crash_child.probe(rt, run, "")
        throttle_release.release_throttled(rt)
        throttle_release.unlock_ended(rt)
        pump(rt)
        return by_state(rt, run) == {"terminal": 5 - delayed, **({"waiting": delayed} if delayed else {})}

    eventually(all_gone, timeout=20)


def test_setting_a_hold(nursery: Nursery, rt: Runtime) -> None:
    """Given someone who sets a hold and is killed, when it is written, then workers go by it, told or not."""
    for run in each_gap(nursery, rt, "hold", seeded(rt), writes=2):
        written = holds.listing(rt, run)
        # Nobody may have raised the version; then it is seen by its age.
        eventually(lambda written=written, run=run: len(closed(rt, run)) == len(written), timeout=10)
        if written:
            pump(rt)
            assert by_state(rt, run)["held"] == 2
            holds.clear(rt, run=run, selector=KIND_B, at_once=True)
        let_go(rt, run)
        finish(rt, run)


def test_clearing_a_hold(nursery: Nursery, rt: Runtime) -> None:
    """Given someone who clears a hold and is killed, when it has ended, then its jobs go on, whoever was told."""
    for run in each_gap(nursery, rt, "clear_hold", held(rt), writes=2):
        if holds.listing(rt, run):
            assert by_state(rt, run)["held"] == 2
            holds.clear(rt, run=run, selector=KIND_B, at_once=True)
        let_go(rt, run)
        finish(rt, run)


def test_a_handler_that_closes_its_target(nursery: Nursery, rt: Runtime) -> None:
    """Given a worker whose handler is rate limited and that is killed, then jobs are held or go on, at no cost."""

    def arrange(run: str) -> str:
        seeded(rt)(run)
        return json.dumps(vars(hints(rt, run, stage="first", partition="kind__b")[0]))

    for run in each_gap(nursery, rt, "handle_limited", arrange):
        in_force = [row for row in holds.listing(rt) if row["origin"] == "handler"]
        eventually(lambda in_force=in_force, run=run: len(closed(rt, run)) == len(in_force), timeout=10)
        pump(rt)
        assert by_state(rt, run).get("held", 0) == 2 * len(in_force)
        for row in in_force:
            holds.clear(rt, hold=row["hold"], at_once=True)
        let_go(rt, run)
        finish(rt, run)
        assert not attempts(rt, run, outcome=AttemptOutcome.FAILED)


def test_probing(nursery: Nursery, rt: Runtime) -> None:
    """Given a pacing that probes a hold and is killed, when another one leads, then all its jobs go on."""

    def arrange(run: str) -> str:
        held(rt)(run)
        holds.clear(rt, run=run, selector=KIND_B)
        return ""

    for run in each_gap(nursery, rt, "probe", arrange):
        let_go(rt, run)
        finish(rt, run)


def test_a_probe_whose_worker_dies(nursery: Nursery, rt: Runtime) -> None:
    """Given probes and the worker of one that is killed, then that says nothing of the target, and all go on."""

    def arrange(run: str) -> str:
        held(rt)(run)
        holds.clear(rt, run=run, selector=KIND_B)
        crash_child.probe(rt, run, "")
        probes = hints(rt, run, stage="first", partition="kind__b")
        assert len(probes) == 2, "each probe goes by itself"
        return json.dumps(vars(probes[0]))

    for run in each_gap(nursery, rt, "handle", arrange):
        before = {row["hold"]: row["closings"] for row in holds.listing(rt, run)}
        let_go(rt, run)
        finish(rt, run)
        after = {row["hold"]: row["closings"] for row in holds.listing(rt, run, ended=True)}
        assert all(after[hold] == closings for hold, closings in before.items()), "it was closed again"


def test_setting_a_throttle(nursery: Nursery, rt: Runtime) -> None:
    """Given someone who sets a throttle and is killed, when it is written, then workers go by it, told or not."""
    for run in each_gap(nursery, rt, "throttle", seeded(rt), writes=2):
        written = throttles.listing(rt, run)
        assert len(written) <= 1
        eventually(lambda written=written, run=run: len(bounded(rt, run)) == len(written), timeout=10)
        let_go(rt, run)
        finish(rt, run)


def test_taking_a_throttle_away(nursery: Nursery, rt: Runtime) -> None:
    """Given jobs that wait for a throttle and someone who is killed over removing it, when it is gone, they go on."""

    def arrange(run: str) -> str:
        seeded(rt)(run)
        throttles.set_throttle(rt, run=run, selector=KIND_B, **{**crash_child.LIMITS, "rate": SLOW, "burst": 1})
        pump(rt)
        assert by_state(rt, run)["waiting"] >= 2, "one waits for the throttle, another one is delayed"
        return ""

    for run in each_gap(nursery, rt, "clear_throttle", arrange, writes=2):
        if throttles.listing(rt, run):
            throttles.clear(rt, run=run, selector=KIND_B)
        let_go(rt, run)
        finish(rt, run)


def test_a_worker_that_dies_with_slots_and_locks(nursery: Nursery, rt: Runtime) -> None:
    """Given a throttle and a worker that is killed while it uses it, then others get leave, and no lock is left.

    What its handlers spent may not be counted; it is never counted that more was spent than the handlers said.
    """

    def arrange(run: str) -> str:
        seeded(rt)(run)
        crash_child.throttle(rt, run, "")
        return json.dumps(vars(hints(rt, run, stage="first", partition="kind__b")[0]))

    for run in each_gap(nursery, rt, "handle", arrange):
        throttle_release.unlock_ended(rt)
        (row,) = rt.store.db.throttles.find({"run": run})
        assert not row["locks"]
        let_go(rt, run)
        finish(rt, run)
        (row,) = rt.store.db.throttles.find({"run": run})
        # Two jobs of kind b, each of them perhaps twice.
        assert 0 < row["spent"] <= 4
        assert not row["locks"]


def test_giving_priorities(nursery: Nursery, rt: Runtime) -> None:
    """Given someone who gives priorities and is killed, when that is asked again, then all have it and go by it."""
    for run in each_gap(nursery, rt, "give_priorities", seeded(rt)):
        moving.set_priority(rt, run, Selection(), 7)
        assert rt.store.db.job_states.distinct("priority", {"run": run}) == [7]
        assert [row["ordered"] for row in rt.store.db.throttles.find({"run": run})] == [True]
        # The delayed one, too, goes by its priority when it is due.
        backdate(rt, "job_states", 3600, "due_at", run=run)
        sweep.release_due(rt)
        let_go(rt, run, delayed=0)
        finish(rt, run)
