"""Replays: which jobs they take, from which stage, with which input, and what is left of them in the accounts."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from pipeline_app import PermanentError, Pipeline, Retry, Stage
from pipeline_app.application import prepare
from pipeline_app.control.changes import cancelling
from pipeline_app.control.duties import replaying
from pipeline_app.control.replays import replay
from pipeline_app.control.results import results
from pipeline_app.control.seed import seeding
from pipeline_app.control.sight import ledger
from pipeline_app.control.targets import holds
from pipeline_app.domain.edit import Edit
from pipeline_app.domain.selection import Selection
from pipeline_app.domain.states import JobState
from pipeline_app.errors import NotFoundError, RefusedError, UsageError
from pipeline_app.runtime import Runtime
from pipeline_app.store import jobs, workers
from pipeline_app.store.workers import FLAGS
from tests.integration.helpers import (
    NewFlow,
    attempts,
    backdate,
    begin,
    by_state,
    everything,
    hints,
    job,
    lines,
    outcomes,
    pipeline,
    prove,
    pump,
    take,
    try_run,
)
from tests.integration.replays import TERMINAL, Broken, ask, carry_out, run_replay, start, with_dead_jobs
from tests.project import Project, eventually


@pytest.fixture
def broken() -> Broken:
    return Broken()



def test_dead_letters_run_once_more(project: Project, broken: Broken) -> None:
    """Given dead letters of a bug that was mended, when they are replayed, then they end well, as a new generation."""
    chosen = pipeline(Stage(broken.handler(), chunk=4))
    rt = project.runtime(chosen)
    with_dead_jobs(rt, chosen, 10)
    broken.mended = True

    row = start(rt, reason="bug in fetch", actor="ann@here")
    assert (row["state"], row["matched"], row["released"]) == ("running", 10, 0)
    assert by_state(rt) == {"dead_lettered": 10}, "starting it only records it"
    done = carry_out(rt, row["operation"])
    assert (done["state"], done["released"], done["skipped"], done["terminal"]) == ("done", 10, 0, 0)
    prove(rt, pending=10)
    pump(rt)

    prove(rt, terminal=10)
    assert [len(hint["jobs"]) for hint in rt.store.db.messages.find().sort("_id", 1)] == [4, 4, 2, 4, 4, 2]
    found = job(rt, "j3")
    assert (found["generation"], found["failures"], found["operation"]) == (1, 0, row["operation"])
    assert not {"reason", "died_in", "error_group"} & found.keys(), "it is not dead any more"
    assert [(a["generation"], a["attempt"], a["outcome"]) for a in attempts(rt, job="j3")] == [
        (0, 1, "failed"),
        (1, 1, "ok"),
    ]
    events = [event for event in ledger.events(rt, "r", job_id="j3") if event["event"] == "replayed"]
    (details,) = [event["details"] for event in events]
    assert details == {"operation": row["operation"], "actor": "ann@here"}
    (listed,) = replay.listing(rt, "last")
    assert (listed["terminal"], listed["failed"], listed["reason"]) == (10, 0, "bug in fetch")
    assert listed["ended_at"] is not None


def test_only_what_is_selected(project: Project, broken: Broken) -> None:
    """Given dead letters of many kinds, then a replay takes those that match all that it was told."""
    chosen = pipeline(broken.handler(), partition_by=["kind"])
    rt = project.runtime(chosen)
    rows = [{"job_id": f"j{n}", "payload": n, "tags": {"kind": "ab"[n % 2], "a.$b": "x"}} for n in range(6)]
    begin(rt, chosen, rows)
    pump(rt)
    broken.mended = True
    group = job(rt, "j0")["error_group"]

    assert ask(rt, Selection(selector={"kind": "a", "a.$b": "x"})).would_replay == 3
    assert ask(rt, Selection(selector={"kind": "a"}, job_ids=("j0", "j1"))).would_replay == 1
    assert ask(rt, Selection(group=group)).matched == 6
    assert ask(rt, Selection(group="another")).matched == 0
    assert ask(rt, Selection(since=rt.store.now() + timedelta(minutes=1))).matched == 0
    assert ask(rt, Selection(until=rt.store.now() - timedelta(minutes=1))).matched == 0
    row = run_replay(rt, Selection(selector={"kind": "b", "a.$b": "x"}, group=group))

    assert (row["released"], row["selection"]["selector"]) == (3, {"kind": "b", "a.$b": "x"})
    prove(rt, terminal=3, dead_lettered=3)
    assert {row["job"] for row in rt.store.db.job_states.find({"state": "terminal"})} == {"j1", "j3", "j5"}


def test_the_walk_goes_through_stages_and_pages(
    project: Project, broken: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given jobs that died in two stages, few of which match, then all of those are found, and each is taken once."""
    monkeypatch.setattr(jobs, "WALK", 3)
    monkeypatch.setattr(replay, "PAGE", 2)
    monkeypatch.setattr(replaying, "PAGE", 2)

    def sieve(n: int) -> int:
        if n % 2 and not broken.mended:
            raise PermanentError("odd")
        return n

    chosen = pipeline(Stage(sieve, chunk=3), Stage(broken.handler(), chunk=3), partition_by=[])
    rt = project.runtime(chosen)
    rows = [{"job_id": f"j{n:02}", "payload": n, "tags": {"rare": str(n % 5 == 0)}} for n in range(30)]
    begin(rt, chosen, rows)
    pump(rt)
    prove(rt, dead_lettered=30)
    broken.mended = True

    rare = Selection(selector={"rare": "True"})
    found = ask(rt, rare)
    row = run_replay(rt, rare)

    assert (found.matched, found.by_stage) == (6, {"sieve": 3, "fetch": 3})
    assert (row["matched"], row["released"]) == (6, 6)
    prove(rt, terminal=6, dead_lettered=24)
    assert {job["generation"] for job in rt.store.db.job_states.find({"state": "terminal"})} == {1}


def three_stages(calls: list[str]) -> Pipeline:
    """Each stage notes its call, and adds its name to the text."""

    def make(name: str) -> Stage:
        def handler(text: str) -> str:
            calls.append(f"{name} {text}")
            return text + name

        return Stage(handler, name=name, chunk=2)

    return pipeline(make("a"), make("b"), make("c"))


def test_from_an_earlier_stage_with_what_was_recorded_before_it(project: Project) -> None:
    """Given jobs that went through all stages, when they are replayed from the second, then the first is not run
    again, its output is the input, and no output is lost."""
    calls: list[str] = []
    chosen = three_stages(calls)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(3, payload=str))
    pump(rt)
    before = list(rt.store.db.job_outputs.find().sort("_id", 1))
    calls.clear()

    run_replay(rt, TERMINAL, from_stage="b")

    prove(rt, terminal=3)
    assert sorted(calls) == ["b 0a", "b 1a", "b 2a", "c 0ab", "c 1ab", "c 2ab"]
    kept = list(rt.store.db.job_outputs.find({"_id": {"$in": [row["_id"] for row in before]}}).sort("_id", 1))
    assert kept == before
    assert rt.store.db.job_outputs.count_documents({}) == len(before) + 6
    assert [row["result"] for row in results(rt, "r")] == ["0abc", "1abc", "2abc"]


def test_terminal_jobs_start_in_the_first_stage_and_what_is_latest_counts(project: Project) -> None:
    """Given jobs that ran twice, when they are replayed from the last stage, then with their latest output."""
    calls: list[str] = []
    chosen = three_stages(calls)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(2, payload=str))
    pump(rt)

    run_replay(rt, TERMINAL, edit=Edit.parse(["x=1"], replaces=True, payload={}))
    assert by_state(rt) == {"dead_lettered": 2}, "a dict and a text don't add up"
    run_replay(rt, edit=Edit.parse([], replaces=True, payload="new-"))
    prove(rt, terminal=2)
    calls.clear()
    run_replay(rt, TERMINAL, from_stage="c")

    prove(rt, terminal=2)
    assert calls == ["c new-ab", "c new-ab"]
    calls.clear()
    run_replay(rt, TERMINAL)
    assert sorted(calls)[:2] == ["a 0", "a 1"], "the payload is what it was"


def test_a_stage_that_nothing_was_recorded_for(project: Project, broken: Broken) -> None:
    """Given jobs that died in the first stage, when they are to start in the third, then they are left alone."""

    def pass_on(value: Any) -> Any:
        return value

    chosen = pipeline(broken.handler(), Stage(pass_on, name="b"), Stage(pass_on, name="c"))
    rt = project.runtime(chosen)
    with_dead_jobs(rt, chosen, 2)

    found = ask(rt, from_stage="c")
    assert (found.matched, found.no_input, found.would_replay, found.by_stage) == (2, 2, 0, {})
    with pytest.raises(RefusedError, match="2 without that input"):
        start(rt, from_stage="c")
    with pytest.raises(NotFoundError, match="no stage 'z'"):
        start(rt, from_stage="z")
    prove(rt, dead_lettered=2)


def test_an_edit_of_the_payload(project: Project, broken: Broken) -> None:
    """Given jobs with a bad payload, when they are replayed with an edit, then the handler gets what is edited, and
    the payload stays as it was seeded."""
    chosen = pipeline(Stage(broken.handler(), chunk=2))
    rt = project.runtime(chosen)
    with_dead_jobs(rt, chosen, 3, payload=lambda n: {"n": n, "model": "bad"} if n else 0)
    broken.mended = True
    broken.seen.clear()

    found = ask(rt, edit=Edit.parse(["model=good", "limits.tokens=5"]))
    row = run_replay(rt, edit=Edit.parse(["model=good", "limits.tokens=5"]))

    assert (found.would_replay, found.not_editable) == (2, 1)
    assert (row["released"], row["skipped"]) == (2, 1)
    prove(rt, terminal=2, dead_lettered=1)
    assert broken.seen == [{"n": n, "model": "good", "limits": {"tokens": 5}} for n in (1, 2)]
    shown = ledger.job(rt, "r", "j1")
    assert shown["payload"] == {"n": 1, "model": "bad"}
    assert (shown["outputs"][0]["stage"], shown["outputs"][0]["message"]) == ("(edit)", row["operation"])
    assert shown["outputs"][0]["value"] == broken.seen[0]


def test_an_edit_of_what_a_stage_made_lasts(project: Project, broken: Broken) -> None:
    """Given jobs that died in the second stage, when their input is edited and they die again, then a replay without
    an edit takes the edited input."""

    def load(n: int) -> dict[str, int]:
        return {"n": n}

    chosen = pipeline(load, broken.handler())
    rt = project.runtime(chosen)
    with_dead_jobs(rt, chosen, 1)
    run_replay(rt, edit=Edit.parse(["n=77"]))
    prove(rt, dead_lettered=1)
    broken.mended = True

    run_replay(rt)

    prove(rt, terminal=1)
    assert broken.seen == [{"n": 0}, {"n": 77}, {"n": 77}]
    assert job(rt, "j0")["generation"] == 2
    assert outcomes(attempts(rt, stage="load")) == ["ok"]
    # and from the stage before: with what that was seeded with
    run_replay(rt, TERMINAL, from_stage="fetch")
    assert broken.seen[-1] == {"n": 0}


def test_an_edit_that_mongodb_cannot_hold(project: Project, broken: Broken) -> None:
    chosen = pipeline(broken.handler())
    rt = project.runtime(chosen)
    with_dead_jobs(rt, chosen, 1, payload=lambda n: {})
    with pytest.raises(RefusedError, match="1 not to be edited so"):
        start(rt, edit=Edit.parse([f"n={2**70}"]))


def seeing_holds(rt: Runtime) -> Runtime:
    """As in a worker whose lifeline sees every change at once."""
    rt.memory._version = lambda: workers.version(rt.store, FLAGS)
    return rt


NOT_DUE = Selection(
    states=(
        JobState.RETRY_WAITING,
        JobState.WAITING,
        JobState.HELD,
        JobState.PENDING,
        JobState.DEAD_LETTERED,
    )
)


def test_what_is_not_due_is_left_alone_but_by_force(project: Project, broken: Broken) -> None:
    """Given a job of each kind that goes on by itself or is too late, then only force takes them; a hold
    that is in force keeps its job once more."""

    def fetch(name: str) -> str:
        if not broken.mended:
            if name == "late":
                raise PermanentError("a bug")
            raise ValueError("not now")
        return name

    chosen = pipeline(Stage(fetch, retry=Retry(attempts=3, backoff="300s", jitter=False)))
    rt = seeing_holds(project.runtime(chosen))
    first = [
        {"job_id": "retry", "payload": "retry"},
        {"job_id": "late", "payload": "late", "expires_at": "2100-01-01T00:00:00Z"},
        {"job_id": "delayed", "payload": "delayed", "delay_s": 300},
        {"job_id": "held", "payload": "held", "tags": {"kind": "held"}},
    ]
    prepare(rt)
    holds.set_hold(rt, selector={"kind": "held"})
    begin(rt, chosen, first)
    pump(rt)
    seeding.seed(rt, "r", [{"job_id": "pending", "payload": "pending"}])
    backdate(rt, "job_states", 80 * 365 * 86400, "expires_at", _id="r/late")
    prove(rt, retry_waiting=1, waiting=1, held=1, pending=1, dead_lettered=1)
    broken.mended = True

    found = ask(rt, NOT_DUE)
    assert (found.matched, found.not_due, found.would_replay) == (5, 5, 0)
    with pytest.raises(RefusedError, match="none of the 5 jobs that match would be replayed: 5 not due") as caught:
        start(rt, NOT_DUE)
    assert "--force" in (caught.value.hint or "")
    row = carry_out(rt, start(rt, NOT_DUE, force=True)["operation"])
    assert (row["released"], row["skipped"]) == (4, 1), "what is on its way is not taken, by force neither"
    assert len(hints(rt)) == 5
    pump(rt)

    prove(rt, terminal=4, held=1)
    assert outcomes(attempts(rt, job="pending")) == ["ok"]
    assert job(rt, "held")["generation"] == 1
    for name in ("retry", "delayed"):
        assert not {"due_at", "waits_for", "reason"} & job(rt, name).keys()


def test_what_became_due_needs_no_force(project: Project) -> None:
    """Given a delayed job whose time has come and a held one whose hold is over, then they are replayed."""
    chosen = pipeline(len)
    rt = seeing_holds(project.runtime(chosen))
    prepare(rt)
    holds.set_hold(rt, selector={"kind": "held"})
    held = {"job_id": "held", "payload": "xy", "tags": {"kind": "held"}}
    begin(rt, chosen, [{"job_id": "delayed", "payload": "x", "delay_s": 300}, held])
    pump(rt)
    prove(rt, waiting=1, held=1)
    backdate(rt, "job_states", 301, "due_at")
    holds.clear(rt, selector={"kind": "held"}, at_once=True)

    found = ask(rt, NOT_DUE)
    run_replay(rt, NOT_DUE)

    assert (found.not_due, found.by_status) == (0, {"waiting": 1, "held": 1})
    prove(rt, terminal=2)


def test_what_is_on_its_way_or_runs_is_nobody_s_to_take(project: Project) -> None:
    """Given a job in a queue and one whose message is claimed, then not even force takes them."""
    chosen = pipeline(len)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(2, payload=str))
    (first, _) = hints(rt)
    take(rt, "w", first.message)

    found = ask(rt, NOT_DUE, force=True)
    assert (found.matched, found.would_replay, found.not_due) == (2, 0, 2)
    with pytest.raises(UsageError, match="cannot be replayed"):
        ask(rt, Selection(states=(JobState.RUNNING,)))


def test_jobs_that_died_later_are_not_meant(project: Project, broken: Broken, new_flow: NewFlow) -> None:
    """Given a replay that was started, when another job dies before it came there, then that is left alone."""
    chosen = pipeline(broken.handler())
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(2))
    (early, late) = hints(rt)
    flow = new_flow(rt)
    try_run(flow, early)
    row = start(rt)
    eventually(lambda: rt.store.now() > row["created_at"] + timedelta(milliseconds=2))
    try_run(flow, late)

    done = carry_out(rt, row["operation"])

    assert (done["matched"], done["released"]) == (1, 1)
    assert by_state(rt) == {"pending": 1, "dead_lettered": 1}


def test_a_batch_that_is_not_closed_yet_is_not_there_yet(project: Project) -> None:
    """Given a file whose seeding stands in its middle, then its jobs don't match: they may be taken back."""
    chosen = pipeline(len)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(2, payload=str, delay_s=300))
    rt.store.db.seed_batches.update_one({}, {"$set": {"state": "open", "whole": True}})

    assert ask(rt, Selection(states=(JobState.WAITING,)), force=True).matched == 0


def test_a_dry_run_changes_nothing(project: Project, broken: Broken) -> None:
    """Given dead letters, when they are counted, also with an edit and from another stage, then nothing is written."""

    def pass_on(value: Any) -> Any:
        return value

    chosen = pipeline(Stage(pass_on, name="a"), broken.handler(), partition_by=["kind"])
    rt = project.runtime(chosen)
    rows = [{"job_id": f"j{n}", "payload": {"n": n}, "tags": {"kind": "ab"[n % 2]}} for n in range(5)]
    begin(rt, chosen, rows)
    pump(rt)
    before = everything(rt)

    found = ask(rt, edit=Edit.parse(["n=5"]), from_stage="a", force=True)

    assert everything(rt) == before
    assert found.as_dict() == {
        "matched": 5,
        "not_due": 0,
        "would_replay": 5,
        "no_input": 0,
        "not_editable": 0,
        "by_stage": {"fetch": 5},
        "by_status": {"dead_lettered": 5},
        "by_partition": {"kind__a": 3, "kind__b": 2},
    }


def test_what_matches_nothing(project: Project) -> None:
    """Given a run without dead letters, then a replay is refused, and says where the jobs are that were named."""
    chosen = pipeline(len)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(2, payload=str))
    pump(rt)

    with pytest.raises(NotFoundError, match="no job of run r matches") as caught:
        start(rt)
    assert "--status" in (caught.value.hint or "")
    with pytest.raises(NotFoundError) as caught:
        start(rt, Selection(job_ids=("j1",)))
    assert "1 terminal (--status terminal)" in (caught.value.hint or "")
    with pytest.raises(NotFoundError, match="no job 'j9'"):
        start(rt, Selection(job_ids=("j1", "j9")))
    assert replay.listing(rt) == []


def test_a_cancelled_run_is_not_replayed(project: Project, broken: Broken) -> None:
    """Given a replay, when its run is cancelled, then it ends; and no other can be started or resumed."""
    chosen = pipeline(broken.handler())
    rt = project.runtime(chosen)
    with_dead_jobs(rt, chosen, 3)
    running, paused = start(rt), start(rt)
    replay.pause(rt, paused["operation"])
    cancelling.cancel(rt, "r")

    ended = carry_out(rt, running["operation"])

    assert (ended["state"], ended["why"], ended["released"]) == ("cancelled", "its run was cancelled", 0)
    for refused in (lambda: start(rt), lambda: replay.resume(rt, paused["operation"])):
        with pytest.raises(RefusedError, match="was cancelled") as caught:
            refused()
        assert caught.value.hint == "make another run"
    prove(rt, dead_lettered=3)
