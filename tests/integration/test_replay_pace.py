"""How a replay goes on: at its pace, until it halts, is paused or cancelled, and whoever dies."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest

from pipeline_app import Stage
from pipeline_app.control.duties import pacing, replaying, sweep
from pipeline_app.control.replays import replay
from pipeline_app.domain.pace import Pace
from pipeline_app.errors import NotFoundError, RefusedError, StoreError
from pipeline_app.runtime import Runtime
from pipeline_app.store import counters, operations
from pipeline_app.store.client import Document
from tests.integration.helpers import by_state, in_threads, job, pipeline, prove, pump
from tests.integration.proxy import MongoProxy, Proxy
from tests.integration.replays import Broken, carry_out, start, with_dead_jobs
from tests.project import Project, eventually


@pytest.fixture
def broken() -> Broken:
    return Broken()


def make(project: Project, broken: Broken, number: int, **options: Any) -> Runtime:
    """A run whose jobs died of the bug."""
    chosen = pipeline(Stage(broken.handler(), **options))
    rt = project.runtime(chosen)
    with_dead_jobs(rt, chosen, number)
    return rt


def rounds(rt: Runtime, seconds: float) -> None:
    """What the leader of the pacing does in that time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        replaying.replay_on(rt)
        time.sleep(pacing.EVERY_S)


def replayed(rt: Runtime) -> list[tuple[Any, int]]:
    """(time, jobs) of each message that a replay made, oldest first."""
    rows = rt.store.db.pipeline_events.find({"run": "r", "event": "replayed"}).sort("at", 1)
    return [(row["at"], len(row["jobs"])) for row in rows]


def generations(rt: Runtime) -> Counter[int]:
    return Counter(row["generation"] for row in rt.store.db.job_states.find())


def test_a_replay_keeps_its_rate(project: Project, broken: Broken) -> None:
    """Given a stage with large chunks, when its jobs are replayed at a rate, then that rate is kept, in small messages,
    and a leader that was away for a while does not make up for it."""
    rt = make(project, broken, 1500, chunk=200)
    row = start(rt, pace=Pace(per_s=200))
    rounds(rt, 4)

    made = replayed(rt)
    begun, ended = made[0][0], made[-1][0]
    number = sum(jobs for at, jobs in made if at > begun)
    # Below it by what a machine stands still for: that is not made up for.
    assert 100 <= number / (ended - begun).total_seconds() <= 220
    assert (ended - begun).total_seconds() > 3
    windows = [
        sum(jobs for at, jobs in made if 0 < (at - begun).total_seconds() - start_s <= 2)
        for start_s in (0.0, 0.5, 1.0, 1.5, 2.0)
    ]
    assert 400 * 0.75 <= max(windows) <= 400 * 1.25
    assert max(jobs for _, jobs in made) <= 200 * replaying.MESSAGE_S

    time.sleep(2)
    replaying.replay_on(rt)
    burst = sum(jobs for at, jobs in replayed(rt) if at > ended)
    assert burst <= 200 * 0.5 + 1
    released = replay.show(rt, row["operation"])["released"]
    prove(rt, pending=released, dead_lettered=1500 - released)


def test_a_slow_replay_and_one_that_ramps(project: Project, broken: Broken) -> None:
    """Given one replay at two a second and one that begins with a tenth, then neither hurries."""
    rt = make(project, broken, 200)
    slow = start(rt, pace=Pace(per_s=2))
    ramped = start(rt, pace=Pace(per_s=200, ramp_s=3600))
    rounds(rt, 2)

    assert 1 <= replay.show(rt, slow["operation"])["released"] <= 6
    assert 10 <= replay.show(rt, ramped["operation"])["released"] <= 45


def test_a_replay_halts_by_itself(project: Project, broken: Broken) -> None:
    """Given a bug that is still there, when jobs are replayed, then the replay halts after so many failures and what
    was on its way; resumed, it counts anew, and with the bug mended it ends."""
    rt = make(project, broken, 120, chunk=5)
    row = start(rt, pace=Pace(per_s=100), halt_after=10)

    def halted() -> Document | None:
        replaying.replay_on(rt)
        pump(rt)
        found = replay.show(rt, row["operation"])
        return found if found["state"] == "halted" else None

    first = eventually(halted)
    assert first["why"].startswith(f"{first['failed']} attempts of replayed jobs failed again")
    # A round is never more than half a second's worth, and all of it is recorded before the next.
    assert 10 <= first["failed"] == first["released"] < 10 + 50
    assert first["ended_at"] is None
    prove(rt, dead_lettered=120)

    replay.resume(rt, row["operation"])
    second = eventually(halted)
    assert 10 <= second["failed"] - first["failed"] < 10 + 50
    broken.mended = True
    assert replay.resume(rt, row["operation"])["why"] is None
    done = carry_out(rt, row["operation"])
    pump(rt)

    assert (done["state"], done["released"]) == ("done", 120)
    assert set(generations(rt)) == {1}, "each of them was replayed once"
    prove(rt, terminal=120 - second["failed"], dead_lettered=second["failed"])


def test_failures_are_counted_over_retries_and_folding(project: Project, broken: Broken) -> None:
    """Given counters of processes that are gone, when they are folded, then a replay's are what they were."""
    rt = make(project, broken, 3)
    row = start(rt)
    carry_out(rt, row["operation"])
    pump(rt)
    assert counters.of_operation(rt.store, "r", row["operation"]) == {"failed": 3, "terminal": 0}

    counters.fold(rt.store, counters.idle(rt.store, rt.store.now() + timedelta(seconds=1)))
    broken.mended = True
    again = start(rt)
    carry_out(rt, again["operation"])
    pump(rt)
    counters.fold(rt.store, counters.idle(rt.store, rt.store.now() + timedelta(seconds=1)))

    assert counters.of_operation(rt.store, "r", row["operation"]) == {"failed": 3, "terminal": 0}
    assert counters.of_operation(rt.store, "r", again["operation"]) == {"failed": 0, "terminal": 3}
    prove(rt, terminal=3)


def test_pause_resume_and_cancel(project: Project, broken: Broken) -> None:
    """Given a replay, when it is paused, nothing more is replayed; resumed, it goes on; cancelled, it has ended."""
    rt = make(project, broken, 100)
    operation = start(rt, pace=Pace(per_s=20))["operation"]
    rounds(rt, 0.5)

    paused = replay.pause(rt, operation)
    rounds(rt, 0.5)
    assert replay.pause(rt, operation) == paused, "said again it is the same"
    assert 0 < paused["released"] < 20
    assert replay.resume(rt, operation)["state"] == "running"
    rounds(rt, 0.5)
    cancelled = replay.cancel(rt, operation)
    rounds(rt, 0.5)

    assert (cancelled["state"], cancelled["released"] > paused["released"]) == ("cancelled", True)
    assert replay.cancel(rt, operation) == cancelled
    assert by_state(rt) == {"pending": cancelled["released"], "dead_lettered": 100 - cancelled["released"]}
    for change in (replay.pause, replay.resume):
        with pytest.raises(RefusedError, match="is cancelled"):
            change(rt, operation)
    with pytest.raises(NotFoundError, match="no replay 'r-none'"):
        replay.pause(rt, "r-none")


def four(rt: Runtime) -> replaying.Due:
    """Four jobs may go."""
    return replaying.Due(at=rt.store.now(), since=rt.store.now(), jobs=4.0)


def test_a_step_happens_once(project: Project, broken: Broken) -> None:
    """Given a leader that died before it knew how far it came, when the next does the same step, then it is refused."""
    rt = make(project, broken, 10)
    row = start(rt)
    before = operations.get(rt.store, row["operation"])
    asked = replaying.Replay.of(rt.memory.need_plan("r"), before)

    first = replaying.step(rt, asked, before, four(rt))
    again = replaying.step(rt, asked, before, four(rt))

    assert (first is not None, again) == (True, None)
    assert generations(rt) == {1: 4, 0: 6}
    assert operations.get(rt.store, row["operation"])["released"] == 4
    assert carry_out(rt, row["operation"])["released"] == 10
    assert generations(rt) == {1: 10}
    broken.mended = True
    pump(rt)
    prove(rt, terminal=10)


def test_a_pause_that_comes_in_the_middle_of_a_step(project: Project, broken: Broken) -> None:
    """Given a leader that read that a replay runs, when that is paused before its step, then the step is refused."""
    rt = make(project, broken, 10)
    row = start(rt)
    before = operations.get(rt.store, row["operation"])
    replay.pause(rt, row["operation"])

    asked = replaying.Replay.of(rt.memory.need_plan("r"), before)

    assert replaying.step(rt, asked, before, four(rt)) is None
    prove(rt, dead_lettered=10)


def test_two_leaders_and_two_replays_of_the_same_jobs(project: Project, broken: Broken) -> None:
    """Given two replays of the same jobs and two workers that both lead, then each job is replayed once."""
    rt = make(project, broken, 300, chunk=10)
    first, second = start(rt), start(rt)

    def lead() -> None:
        while any(row["state"] == "running" for row in replay.listing(rt)):
            with contextlib.suppress(StoreError):
                replaying.replay_on(rt)

    in_threads(lead, lead)

    rows = [replay.show(rt, row["operation"]) for row in (first, second)]
    assert [row["state"] for row in rows] == ["done", "done"]
    assert sum(row["released"] for row in rows) == 300
    assert generations(rt) == {1: 300}
    prove(rt, pending=300)
    broken.mended = True
    pump(rt)
    prove(rt, terminal=300)


def test_the_answer_to_a_step_is_lost(
    project: Project, broken: Broken, mongo_proxy: MongoProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a store whose answers to a commit get lost, then no job is replayed twice and none is left out."""
    rt = make(project, broken, 20)
    monkeypatch.setattr("pipeline_app.store.client.CALL_TIMEOUT_S", 1.0)
    chosen = rt.pipelines.values()
    leader = project.runtime(*chosen, mongodb_url=mongo_proxy.address(project.mongodb_url))
    operation = start(rt, pace=Pace(per_s=40))["operation"]
    rounds(leader, 0.3)

    mongo_proxy.lose_answers("commitTransaction", times=4)
    with contextlib.suppress(StoreError):
        rounds(leader, 0.5)
    carry_out(leader, operation)

    assert generations(rt) == {1: 20}
    assert replay.show(rt, operation)["released"] == 20
    prove(rt, pending=20)


def test_a_broker_that_is_away(project: Project, broken: Broken, amqp_proxy: Proxy) -> None:
    """Given a broker that is away, then a replay lets nothing gather that would come out in one burst: it waits until
    the sweep has published what it let go."""
    rt = make(project, broken, 200)
    leader = project.runtime(*rt.pipelines.values(), amqp_url=amqp_proxy.address(project.amqp_url))
    operation = start(rt, pace=Pace(per_s=100))["operation"]
    rounds(leader, 0.2)
    amqp_proxy.cut()

    rounds(leader, 0.5)
    stuck = replay.show(rt, operation)["released"]
    rounds(leader, 0.5)
    assert replay.show(rt, operation)["released"] == stuck < 200
    amqp_proxy.restore()
    rt.store.db.messages.update_many({"published_at": None}, {"$set": {"check_at": rt.store.now()}})
    time.sleep(0.01)
    sweep.publish_unpublished(rt)
    carry_out(leader, operation)

    broken.mended = True
    pump(rt)
    prove(rt, terminal=200)
    assert job(rt, "j0")["generation"] == 1


def test_a_broken_replay_does_not_stand_in_the_way(project: Project, broken: Broken) -> None:
    """Given a replay whose document nobody can read, then it halts and says so, and the others go on."""
    rt = make(project, broken, 3)
    bad, good = start(rt), start(rt)
    rt.store.db.operations.update_one({"_id": bad["operation"]}, {"$unset": {"selection": ""}})

    carry_out(rt, good["operation"])

    prove(rt, pending=3)
    halted = operations.get(rt.store, bad["operation"])
    assert (halted["state"], halted["why"]) == ("halted", "a step failed: KeyError: 'selection'")
