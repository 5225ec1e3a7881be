"""A process is killed at every write that a step of the protocol makes: right before it, and right after it.

The store's commands go through a proxy that kills their sender, so that no gap between two writes is left out; whoever
adds a write adds a gap that is tested. docs/crash-points.md says what brings the jobs on in each.
"""

from __future__ import annotations

import json
import re

import pytest

from pipeline_app.application import prepare
from pipeline_app.control.accounts.verify import verify
from pipeline_app.control.results import results
from pipeline_app.control.seed import seeding
from pipeline_app.domain.states import JobState
from pipeline_app.runtime import Runtime
from pipeline_app.store import manifests, messages
from tests.integration import crash_child
from tests.integration.helpers import attempts, backdate, by_state, hints, prove, pump
from tests.integration.nursery import Nursery, each_gap, finish, go_through, take_away
from tests.project import REPOSITORY, Project

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def rt(project: Project) -> Runtime:
    """The runtime of those who live on."""
    made = project.runtime(crash_child.PIPELINE)
    prepare(made)
    return made


def test_seeding_a_stream(nursery: Nursery, rt: Runtime) -> None:
    """Given a seeder that is killed, when the same jobs are seeded again, then each is in the run once, and runs."""
    for run in each_gap(nursery, rt, "seed"):
        assert not manifests.batches(rt.store, run, "open", "closing", "removing")
        seeding.seed(rt, run, crash_child.lines(run), skip_existing=True)
        assert manifests.batches(rt.store, run) == manifests.batches(rt.store, run, "closed")
        finish(rt, run)


def test_seeding_a_whole_batch(nursery: Nursery, rt: Runtime) -> None:
    """Given a seeder that is killed, then nothing of its batch runs, unless it was closed, before it is complete."""
    for run in each_gap(nursery, rt, "seed_whole"):
        if manifests.batches(rt.store, run, "interrupted"):
            pump(rt)
            assert not set(by_state(rt, run)) - {JobState.PENDING, JobState.WAITING}
            assert not list(rt.store.db.job_attempts.find({"run": run}))
        seeding.seed(rt, run, crash_child.lines(run), whole=True, skip_existing=True)
        finish(rt, run)


def test_taking_a_batch_back(nursery: Nursery, rt: Runtime) -> None:
    """Given a whole batch that is refused, when its seeder is killed over it, then it goes entirely or is resumed."""

    def arrange(run: str) -> str:
        seeding.seed(rt, run, crash_child.lines(run))
        return ""

    for run in each_gap(nursery, rt, "take_back", arrange):
        left = rt.store.db.job_states.count_documents({"run": run}) - 5
        # Interrupted before it found the duplicate it is kept for its seeder; afterwards nothing of it is left.
        assert bool(left) <= bool(manifests.batches(rt.store, run, "interrupted"))
        assert not manifests.batches(rt.store, run, "open", "closing", "removing")
        for row in manifests.batches(rt.store, run, "interrupted"):
            manifests.set_batch(rt.store, row["_id"], "removing", expected=("interrupted",))
            seeding.remove_batch(rt, run, row["_id"])
        finish(rt, run)


@pytest.mark.parametrize("stage", ["first", "second"])
def test_a_message_in_its_stage(nursery: Nursery, rt: Runtime, stage: str) -> None:
    """Given a worker that is killed between claim and acknowledgement, then its jobs go on, recorded once."""

    def arrange(run: str) -> str:
        seeding.seed(rt, run, crash_child.lines(run))
        if stage == "second":
            take_away(rt)
            for hint in hints(rt, run):
                crash_child.handle(rt, run, json.dumps(vars(hint)))
        # The hint that the dead worker had taken; RabbitMQ would deliver it again.
        return json.dumps(vars(hints(rt, run, stage=stage)[0]))

    for run in each_gap(nursery, rt, "handle", arrange):
        finish(rt, run)


def test_a_message_whose_claim_was_taken(nursery: Nursery, rt: Runtime) -> None:
    """Given a worker that lost its claim while its handlers ran, when it is killed over that, then nothing is missing
    but perhaps its line in the ledger.
    """

    def arrange(run: str) -> str:
        seeding.seed(rt, run, crash_child.lines(run))
        return json.dumps(vars(hints(rt, run, stage="first")[0]))

    for run in each_gap(nursery, rt, "handle_late", arrange):
        refused = attempts(rt, run, outcome="refused")
        assert all(row["stage"] == "first" for row in refused)
        finish(rt, run)
        # Of the zombie nothing counts: whoever took the work over did it.
        assert len(attempts(rt, run, outcome="ok")) == 10


def test_cancelling_a_run(nursery: Nursery, rt: Runtime) -> None:
    """Given someone who cancels a run and is killed, then it is cancelled as soon as its flag is written."""

    def arrange(run: str) -> str:
        seeding.seed(rt, run, crash_child.lines(run))
        return ""

    for run in each_gap(nursery, rt, "cancel", arrange):
        if manifests.get(rt.store, run)["cancelled_at"] is None:
            finish(rt, run)
            continue
        pump(rt)
        prove(rt, run, cancelled=5)


def test_cancelling_some_jobs(nursery: Nursery, rt: Runtime) -> None:
    """Given someone who cancels some jobs and is killed, when that is asked again, then those are, and no other."""

    def arrange(run: str) -> str:
        seeding.seed(rt, run, crash_child.lines(run))
        return ""

    for run in each_gap(nursery, rt, "cancel_some", arrange):
        crash_child.cancel_some(rt, run, "")
        go_through(rt, run)
        prove(rt, run, terminal=3, cancelled=2)


def test_moving_some_jobs(nursery: Nursery, rt: Runtime) -> None:
    """Given someone who moves some jobs and is killed, when that is asked again, then each was moved once."""

    def arrange(run: str) -> str:
        seeding.seed(rt, run, crash_child.lines(run))
        return ""

    for run in each_gap(nursery, rt, "move_some", arrange):
        crash_child.move_some(rt, run, "")
        go_through(rt, run)
        prove(rt, run, terminal=5)
        # Moved past the first stage, nothing was added to them.
        want = {f"{run}-{n}": {"n": n if n in (0, 1, 4) else n + 1} for n in range(5)}
        assert {row["job_id"]: row["result"] for row in results(rt, run)} == want


def test_a_round_of_the_sweep(nursery: Nursery, rt: Runtime) -> None:
    """Given a sweep with work in every duty, when its leader is killed, then the next one finishes it."""

    def arrange(run: str) -> str:
        seeding.seed(rt, run, crash_child.lines(run))
        first = hints(rt, run)[0].message
        messages.claim(rt.store, [first], worker="gone", process="gone", token="gone/1")
        backdate(rt, "messages", 3600, "check_at", run=run)
        backdate(rt, "job_states", 3600, "due_at", run=run)
        backdate(rt, "run_counters", 3600, "at", run=run)
        rt.store.db.messages.update_many({"run": run, "state": "open"}, {"$set": {"published_at": None}})
        return ""

    for run in each_gap(nursery, rt, "one_round", arrange):
        finish(rt, run)


def test_the_table_names_tests_that_exist() -> None:
    """Given docs/crash-points.md, then every test that it names is there."""
    text = (REPOSITORY / "docs" / "crash-points.md").read_text()
    folder = REPOSITORY / "tests" / "integration"
    there = {name for file in folder.glob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())}
    there |= {f"{file.name}::{name}" for file in folder.glob("test_*.py") for name in there if name in file.read_text()}

    named = set(re.findall(r"`(?:…::)?((?:test_\w+\.py::)?test_\w+)`", text))

    assert len(named) > 30
    assert named - there == set()


def test_a_repair(nursery: Nursery, rt: Runtime) -> None:
    """Given a run that was broken and a repair that is killed, when it is repaired again, then all jobs get through."""

    def arrange(run: str) -> str:
        seeding.seed(rt, run, crash_child.lines(run))
        lost, waits = f"{run}/{run}-1", f"{run}/{run}-4"
        message = rt.store.db.job_states.distinct("message", {"_id": lost})[0]
        rt.store.db.messages.delete_one({"_id": message})
        rt.store.db.job_states.update_one({"_id": waits}, {"$unset": {"due_at": ""}, "$set": {"message": "nobody's"}})
        rt.store.db.run_counters.update_one({"run": run}, {"$inc": {"states.pending": -2, "completed": 1}})
        rt.store.db.pipeline_events.delete_one({"run": run})
        return ""

    for run in each_gap(nursery, rt, "repair", arrange):
        assert verify(rt, run, repair=True).ok
        assert not verify(rt, run, repair=True).repaired
        finish(rt, run)
