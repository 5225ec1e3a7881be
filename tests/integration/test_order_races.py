"""Order per key when several act at once, a process dies in the middle, or somebody meddles with the store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipeline_app import Pipeline
from pipeline_app.control.accounts.verify import verify
from pipeline_app.control.changes import cancelling
from pipeline_app.control.changes.release import enqueue_parked
from pipeline_app.control.duties import ordering
from pipeline_app.control.seed import seeding
from pipeline_app.domain.selection import Selection
from pipeline_app.domain.states import JobState
from pipeline_app.errors import DuplicateJobError, StoreError
from pipeline_app.runtime import Runtime
from pipeline_app.store import jobs, manifests, turns
from pipeline_app.store.client import Document, Session, Store
from pipeline_app.store.turns import Pass
from tests.integration.helpers import (
    backdate,
    by_state,
    everything,
    in_threads,
    job,
    new_run,
    prove,
    pump,
)
from tests.integration.ordered import Diary, assert_one_at_a_time, go, in_order, keyed, states, with_diary
from tests.integration.replays import carry_out, start
from tests.project import Project, eventually


@pytest.fixture
def chosen(diary: Diary) -> Pipeline:
    return with_diary(diary)


@pytest.fixture
def rt(project: Project, chosen: Pipeline) -> Runtime:
    return new_run(project, chosen)


@pytest.mark.usefixtures("small_pages")
def test_a_whole_batch_takes_no_turn_before_it_is_closed(rt: Runtime, diary: Diary) -> None:
    """Given a file that is added in one go, then jobs of before it go meanwhile, and its own when it is closed."""
    seeding.seed(rt, "r", [{"job_id": "a", "payload": 0, "order_key": "a"}])

    def slowly() -> Iterator[dict[str, Any]]:
        yield from keyed("a", 4)
        go(rt)
        assert diary.entries == in_order("a")
        prove(rt, terminal=1, waiting=4)

    seeding.seed(rt, "r", slowly(), whole=True)
    go(rt)

    assert diary.entries == in_order("a", "a0", "a1", "a2", "a3")
    prove(rt, terminal=5)


@pytest.mark.usefixtures("small_pages")
def test_a_whole_batch_that_is_taken_back_leaves_nothing(rt: Runtime) -> None:
    """Given a job that is there twice in a file, then nothing of the file is left, no turn either."""
    before = everything(rt)

    with pytest.raises(DuplicateJobError):
        seeding.seed(rt, "r", [*keyed("a", 4), {"job_id": "a0"}], whole=True)

    assert everything(rt) == {**before, "partitions": everything(rt)["partitions"]}


@pytest.mark.usefixtures("small_pages")
def test_a_batch_whose_closing_was_cut_short(rt: Runtime, diary: Diary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a seeder that dies while it closes its batch, then the sweep finishes that, also a second time."""
    queued = turns.not_queued
    pages: list[int] = []

    def die_at_the_second(*args: Any) -> list[Document]:
        rows = queued(*args)
        pages.append(len(rows))
        if len(pages) == 3:
            raise KeyboardInterrupt
        return rows

    with monkeypatch.context() as patched:
        patched.setattr(turns, "not_queued", die_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            seeding.seed(rt, "r", keyed("a", 6), whole=True)
    assert rt.store.db.job_states.count_documents({"queues_for": {"$exists": True}}) == 2
    [batch] = manifests.batches(rt.store, "r", "closing")
    # What is not shown yet is no flaw.
    prove(rt, waiting=6)

    backdate(rt, "seed_batches", 60, "lease_until")
    seeding.sweep(rt)
    assert not manifests.batches(rt.store, "r", "closing")
    seeding.close_batch(rt, batch)
    go(rt)
    assert diary.entries == in_order(*[f"a{n}" for n in range(6)])
    prove(rt, terminal=6)


@pytest.mark.usefixtures("small_pages")
def test_a_seeding_that_goes_on_keeps_the_order(rt: Runtime, diary: Diary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a whole batch that was interrupted, when it is seeded on, then the jobs of before go first."""

    def dies() -> Iterator[dict[str, Any]]:
        yield from keyed("a", 2)
        raise StoreError("the store is away")

    with pytest.raises(StoreError):
        seeding.seed(rt, "r", dies(), whole=True)
    backdate(rt, "seed_batches", 60, "lease_until")
    closed = seeding.close_batch

    def close_while_workers_run(*args: Any) -> bool:
        done = closed(*args)
        ordering.give_turns(rt)
        return done

    monkeypatch.setattr(seeding, "close_batch", close_while_workers_run)
    assert seeding.seed(rt, "r", keyed("a", 4), whole=True, skip_existing=True).added == 2
    go(rt)

    assert diary.entries == in_order("a0", "a1", "a2", "a3")
    prove(rt, terminal=4)


def between(monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[], object], *, after: bool = True) -> None:
    """Once, do something else right after (or before) the duty asked that question."""
    asked = getattr(turns, name)

    def ask(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(turns, name, asked)
        if not after:
            act()
        answer = asked(*args, **options)
        if after:
            act()
        return answer

    monkeypatch.setattr(turns, name, ask)


@pytest.mark.parametrize("whole", [False, True])
def test_a_job_that_comes_when_nobody_waits_any_more(
    rt: Runtime, diary: Diary, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """Given a job that is added between the look for the next and the end of the turn, then it is not forgotten."""
    seeding.seed(rt, "r", keyed("a", 1))
    ordering.give_turns(rt)
    pump(rt)
    between(monkeypatch, "first", lambda: seeding.seed(rt, "r", keyed("a", 2)[1:], whole=whole))

    go(rt)

    assert diary.entries == in_order("a0", "a1")
    prove(rt, terminal=2)


@pytest.mark.parametrize("whole", [False, True])
def test_a_page_that_is_added_while_the_next_is_chosen(
    rt: Runtime, diary: Diary, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """Given a page between the look for the next and its turn, then the turn is given all the same, in order."""
    rows = keyed("a", 4)
    seeding.seed(rt, "r", rows[:1])
    between(monkeypatch, "first", lambda: seeding.seed(rt, "r", rows[1:2], whole=whole))
    ordering.give_turns(rt)
    assert states(rt, "a0", "a1") == ["pending", "waiting"]
    pump(rt)

    between(monkeypatch, "first", lambda: seeding.seed(rt, "r", rows[2:], whole=whole))
    ordering.give_turns(rt)

    assert states(rt, "a0", "a1", "a2", "a3") == ["terminal", "pending", "waiting", "waiting"]
    go(rt)
    assert diary.entries == in_order("a0", "a1", "a2", "a3")
    prove(rt, terminal=4)


def test_a_page_that_is_under_way_while_a_turn_is_passed_on(
    rt: Runtime, diary: Diary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a page whose transaction is open when the next job gets the turn, then that goes right after the page."""
    seeding.seed(rt, "r", keyed("a", 1))
    wake, pass_on = turns.wake, turns.carry_out
    woken, met = threading.Event(), threading.Event()
    tries: list[str] = []

    def wake_and_wait(store: Store, session: Session, ids: Any, new: Any, now: Any) -> None:
        wake(store, session, ids, new, now)
        if new:
            woken.set()
            assert met.wait(30)

    def pass_on_again(store: Store, session: Session, passes: Any) -> frozenset[str]:
        if tries:
            met.set()
        tries.append("tried")
        return pass_on(store, session, passes)

    monkeypatch.setattr(turns, "wake", wake_and_wait)
    seeder = threading.Thread(target=seeding.seed, args=(rt, "r", keyed("a", 2)[1:]))

    def begin_a_page() -> None:
        seeder.start()
        assert woken.wait(30)
        monkeypatch.setattr(turns, "carry_out", pass_on_again)

    between(monkeypatch, "first", begin_a_page)
    ordering.give_turns(rt)
    seeder.join(30)

    assert len(tries) > 1
    assert states(rt, "a0", "a1") == ["pending", "waiting"]
    go(rt)
    assert diary.entries == in_order("a0", "a1")
    prove(rt, terminal=2)


def test_a_turn_that_changed_for_the_transaction_alone(rt: Runtime) -> None:
    """Given a change of a turn that only the transaction sees, then it is not taken for passed on."""
    seeding.seed(rt, "r", keyed("a", 1))
    [row] = turns.due(rt.store, 10)
    goes = Pass(turn="r/a", version=row["version"], joined=row["joined"], holder="r/a0")

    def pass_on(session: Session) -> frozenset[str]:
        turns.wake(rt.store, session, {"r/a"}, (), rt.store.now())
        return turns.carry_out(rt.store, session, [goes])

    assert rt.store.transaction(pass_on) == {"r/a"}


def test_an_earlier_job_that_comes_back_while_the_next_is_chosen(
    rt: Runtime, diary: Diary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a replay between the look for the next and its turn, then two of the key never go at once."""
    seeding.seed(rt, "r", keyed("a", 2))
    ordering.give_turns(rt)
    pump(rt)
    assert states(rt, "a0", "a1") == ["terminal", "waiting"]
    terminal = Selection(states=(JobState.TERMINAL,))
    between(monkeypatch, "first", lambda: carry_out(rt, start(rt, terminal)["operation"]))

    ordering.give_turns(rt)
    assert_one_at_a_time(rt)
    go(rt)

    assert diary.entries == in_order("a0", "a0", "a1")
    prove(rt, terminal=2)


def test_a_next_job_that_is_cancelled_while_it_is_chosen(
    rt: Runtime, diary: Diary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a cancel between the look for the next and its turn, then the one behind it goes, and other keys too."""
    seeding.seed(rt, "r", [*keyed("a", 2), *keyed("b", 1)])
    between(monkeypatch, "first", lambda: cancelling.cancel_jobs(rt, "r", Selection(job_ids=("a0",))))

    ordering.give_turns(rt)
    assert states(rt, "a0", "a1", "b0") == ["cancelled", "waiting", "pending"]
    go(rt)

    assert sorted(diary.entries) == in_order("a1", "b0")
    prove(rt, terminal=2, cancelled=1)


def test_a_job_that_comes_to_rest_during_the_look(rt: Runtime, diary: Diary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a job that ends after the look for such, while its turn is due anyway, then it does not keep the turn."""
    seeding.seed(rt, "r", keyed("a", 2))
    ordering.give_turns(rt)
    seeding.seed(rt, "r", keyed("a", 3)[2:])
    between(monkeypatch, "over", lambda: pump(rt))

    ordering.give_turns(rt)

    assert states(rt, "a0", "a1", "a2") == ["terminal", "pending", "waiting"]
    assert [row["job"] for row in rt.store.db.job_states.find({"has_turn": True})] == ["a1"]
    go(rt)
    prove(rt, terminal=3)


def test_a_look_that_is_overtaken_settles_nothing(rt: Runtime, diary: Diary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a turn that ends, goes and comes again while somebody looks at it, then who waits now is not forgotten."""
    seeding.seed(rt, "r", keyed("a", 1))
    ordering.give_turns(rt)
    rt.store.db.turns.update_one({"_id": "r/a"}, {"$set": {"due": rt.store.now()}})

    def overtake() -> None:
        pump(rt)
        ordering.give_turns(rt)
        assert rt.store.db.turns.count_documents({}) == 0
        seeding.seed(rt, "r", keyed("a", 2)[1:])

    between(monkeypatch, "holders", overtake)
    ordering.give_turns(rt)
    go(rt)

    assert diary.entries == in_order("a0", "a1")
    prove(rt, terminal=2)


def test_a_release_that_comes_too_late(rt: Runtime, diary: Diary) -> None:
    """Given a delayed job that is due, when it waits for its turn by then, then it is not let go beside another."""
    rows = keyed("a", 2)
    rows[0] |= {"delay_s": 3600}
    seeding.seed(rt, "r", rows)
    ordering.give_turns(rt)
    backdate(rt, "job_states", 7200, "due_at")
    due = jobs.due(rt.store, rt.store.now(), 10)
    assert [row["job"] for row in due] == ["a0"]
    cancelling.cancel_jobs(rt, "r", Selection(job_ids=("a0",)))
    ordering.give_turns(rt)
    carry_out(rt, start(rt, Selection(states=(JobState.CANCELLED,)))["operation"])
    assert states(rt, "a0", "a1") == ["waiting", "pending"]

    assert enqueue_parked(rt, due, "due") == []

    assert_one_at_a_time(rt)
    go(rt)
    assert diary.entries == in_order("a1", "a0")
    prove(rt, terminal=2)


def test_two_who_lead_at_once(project: Project, rt: Runtime, chosen: Pipeline, diary: Diary) -> None:
    """Given two leaders, seeders and cancels at the same time, then each turn is given once at a time."""
    others = [project.runtime(chosen) for _ in range(2)]
    keys = [f"k{n}-" for n in range(4)]
    ended = threading.Event()

    def lead(mine: Runtime) -> None:
        while not ended.is_set():
            ordering.give_turns(mine)

    def work() -> None:
        for n in range(4):
            rows = [{"job_id": f"{key}{n}.{m}", "payload": n, "order_key": key} for key in keys for m in range(3)]
            seeding.seed(rt, "r", rows)
            cancelling.cancel_jobs(rt, "r", Selection(job_ids=(f"{keys[n]}{n}.1",)))
            assert_one_at_a_time(rt)
            pump(rt)
        eventually(lambda: pump(rt) or by_state(rt).keys() <= {"terminal", "cancelled"}, timeout=60)
        ended.set()

    in_threads(work, *[lambda mine=mine: lead(mine) for mine in others])

    for key in keys:
        entries = diary.of(key)
        names = [entry.rpartition(".")[0] for entry in entries[::2]]
        assert entries == in_order(*names)
        assert names == sorted(names)
    done = by_state(rt)
    assert done["terminal"] + done["cancelled"] == 4 * 4 * 3
    prove(rt, terminal=done["terminal"], cancelled=done["cancelled"])


def test_a_turn_that_somebody_removed_is_made_anew(rt: Runtime, diary: Diary) -> None:
    """Given a turn that somebody removed in MongoDB while a job at rest had it, then the key goes on."""
    seeding.seed(rt, "r", keyed("a", 3))
    ordering.give_turns(rt)
    pump(rt)
    rt.store.db.turns.delete_many({})

    go(rt)

    assert diary.entries == in_order("a0", "a1", "a2")
    prove(rt, terminal=3)


def test_a_turn_that_is_there_by_now_stays_with_who_has_it(
    rt: Runtime, diary: Diary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a leader that saw no turn, and acts when its holder has it again, then who waits is not forgotten."""
    seeding.seed(rt, "r", keyed("a", 1))
    ordering.give_turns(rt)
    pump(rt)
    rt.store.db.turns.delete_many({})

    def a_whole_life() -> None:
        go(rt)  # another leader ends the turn
        carry_out(rt, start(rt, Selection(states=(JobState.TERMINAL,)))["operation"])
        ordering.give_turns(rt)
        seeding.seed(rt, "r", keyed("a", 2)[1:])
        ordering.give_turns(rt)  # the turn is not due any more: a0 has it
        pump(rt)

    between(monkeypatch, "first", a_whole_life)
    ordering.give_turns(rt)

    go(rt)
    assert states(rt, "a0", "a1") == ["terminal", "terminal"]
    assert diary.entries == in_order("a0", "a0", "a1")
    prove(rt, terminal=2)


def test_a_turn_that_got_lost_is_found_and_mended(rt: Runtime, diary: Diary) -> None:
    """Given a turn of which no trace is left, then accounting names the jobs, and a repair brings them on."""
    seeding.seed(rt, "r", keyed("a", 3))
    ordering.give_turns(rt)
    pump(rt)
    rt.store.db.turns.delete_many({})
    rt.store.db.job_states.update_many({}, {"$unset": {"has_turn": ""}})
    ordering.give_turns(rt)

    found = verify(rt, "r")
    assert [(row.kind, row.job_id) for row in found.problems] == [("lost", "a1"), ("lost", "a2")]
    assert found.todo.planned() == {"queued": 2}
    assert verify(rt, "r", repair=True).repairs == {"queued": 2}
    go(rt)
    assert diary.entries == in_order("a0", "a1", "a2")
    prove(rt, terminal=3)


def test_a_turn_that_others_write_on_all_the_time_keeps_up_no_others(rt: Runtime) -> None:
    """Given one turn that somebody's transaction holds, then the others are passed on meanwhile, and it afterwards."""
    keys = [f"k{number}" for number in range(8)]
    seeding.seed(rt, "r", [row for key in keys for row in keyed(key, 1)])
    firsts = [f"{key}0" for key in keys]
    with rt.store.session() as session, session.start_transaction():
        turns.wake(rt.store, session, {"r/k3"}, (), rt.store.now())

        def all_but_one() -> bool:
            ordering.give_turns(rt)
            return states(rt, *firsts).count("pending") == len(keys) - 1

        eventually(all_but_one)
        assert states(rt, "k30") == ["waiting"]
        session.abort_transaction()
    ordering.give_turns(rt)
    pump(rt)
    prove(rt, terminal=len(keys))


def test_a_lost_result_is_made_once_more_in_turn(rt: Runtime, diary: Diary) -> None:
    """Given a terminal job whose result is gone, when that is repaired while another of its key goes, then it waits."""
    seeding.seed(rt, "r", keyed("a", 2))
    ordering.give_turns(rt)
    pump(rt)
    ordering.give_turns(rt)
    assert states(rt, "a0", "a1") == ["terminal", "pending"]
    result = job(rt, "a0")["input"]
    assert rt.store.db.job_outputs.delete_one({"_id": f"r/a0/{result}"}).deleted_count == 1

    assert verify(rt, "r", repair=True).repairs == {"replayed": 1}

    assert job(rt, "a0")["reason"] == "order"
    go(rt)
    assert diary.entries == [*in_order("a0", "a1"), "a0.second"]
    prove(rt, terminal=2)


def test_the_next_of_a_key_is_read_without_the_others(rt: Runtime) -> None:
    """Given thousands of jobs that wait for few turns, then a look reads as many of them as there are turns."""
    seeding.seed(rt, "r", [row for key in "abcde" for row in keyed(key, 2000)])
    names = [f"r/{key}" for key in "abcde"]
    found = {turn: row["job"] for turn, row in turns.first(rt.store, names).items()}
    assert found == {f"r/{key}": f"{key}0" for key in "abcde"}

    profile = _profiled(rt, lambda: turns.first(rt.store, names))
    assert profile["keysExamined"] <= 2 * len(names)
    assert profile["docsExamined"] <= len(names)


def _profiled(rt: Runtime, ask: Callable[[], object]) -> Document:
    rt.store.db.command("profile", 2)
    try:
        ask()
    finally:
        rt.store.db.command("profile", 0)
    found = rt.store.db["system.profile"].find_one({"command.aggregate": "job_states"}, sort=[("ts", -1)])
    assert found is not None
    return found
