"""Who may run a message, and whose outcome counts: claims are compare-and-set, records are guarded by them."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from celery.exceptions import WorkerLostError

from pipeline_app import Job, Stage
from pipeline_app.control import sweep
from pipeline_app.domain.job import job_key
from pipeline_app.domain.outcome import AttemptOutcome, Move, Outcome
from pipeline_app.domain.states import JobState
from pipeline_app.flow import claim, record
from pipeline_app.flow.consume import Flow
from pipeline_app.flow.worker import Janitor
from pipeline_app.runtime import Runtime
from pipeline_app.store import messages, outputs, transition
from pipeline_app.store.transition import JobMove, Transition
from tests.integration.helpers import attempts, begin, hints, in_threads, job, lines, outcomes, pipeline, prove, pump
from tests.integration.proxy import MongoProxy
from tests.project import Project, eventually

NewFlow = Callable[[Runtime], Flow]


class Gate:
    """A handler that waits until it may go on, and counts its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.entered = threading.Event()
        self.may_end = threading.Event()

    def stage(self, **options: Any) -> Stage:
        def work(n: int, job: Job) -> dict[str, Any]:
            self.calls.append(job.id)
            number = len(self.calls)
            self.entered.set()
            assert self.may_end.wait(30)
            return {"n": n, "call": number}

        return Stage(work, **options)


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.may_end.set()


def double(n: int) -> int:
    return n * 2


def as_row(n: int) -> dict[str, int]:
    return {"n": n}


def started(flow: Flow, hint: Any, pool: ThreadPoolExecutor) -> Any:
    return pool.submit(flow.run, hint)


def test_every_message_has_one_winner(project: Project) -> None:
    """Given many open messages, when two workers claim all of them at once, then each gets what the other does not."""
    chosen = pipeline(double)
    two = [project.runtime(chosen), project.runtime(chosen)]
    begin(two[0], chosen, lines(60))
    ids = [hint.message for hint in hints(two[0])]
    won: list[str] = []

    def take(rt: Runtime, ids: list[str]) -> None:
        for message in ids:
            won.extend(work.message for work in claim.claim(rt, [message], rt.token()) if work is not None)

    in_threads(lambda: take(two[0], ids), lambda: take(two[1], ids), lambda: take(two[1], ids[::-1]))

    assert Counter(won) == Counter(ids)


def test_the_same_token_may_claim_again(project: Project) -> None:
    """Given a claim, when it is repeated, then its own token gets it again and no other does."""
    chosen = pipeline(double)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(2))
    ids = [hint.message for hint in hints(rt)]
    mine = {"worker": "w", "process": "p", "token": "mine"}
    first = messages.claim(rt.store, ids, **mine)

    again = messages.claim(rt.store, ids, **mine)
    others = messages.claim(rt.store, ids, **{**mine, "token": "theirs"})

    assert again == first
    assert [row["_id"] for row in again] == ids
    assert others == []


def test_two_deliveries_that_are_claimed_together(project: Project) -> None:
    """Given a message that was delivered twice, when one process claims both at once, then only one of them has it."""
    chosen = pipeline(double)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(1))
    message = hints(rt)[0].message

    works = claim.claim(rt, [message, message], rt.token())

    assert [work is not None for work in works] == [True, False]


def test_the_answer_to_a_claim_is_lost(project: Project, new_flow: NewFlow, mongo_proxy: MongoProxy) -> None:
    """Given a claim that happened and was not answered, when it is asked for again, then its jobs run, once."""
    chosen = pipeline(double)
    rt = project.runtime(chosen)
    worker = project.runtime(chosen, mongodb_url=mongo_proxy.address(project.mongodb_url))
    begin(rt, chosen, lines(1))
    mongo_proxy.lose_answers("update", "messages")

    answer = new_flow(worker).run(hints(rt)[0])

    assert answer == "1 advance"
    prove(rt, terminal=1)
    assert outcomes(attempts(rt)) == ["ok"]


def test_answers_to_claims_of_several_threads_are_lost(
    project: Project, new_flow: NewFlow, mongo_proxy: MongoProxy
) -> None:
    """Given threads that share a claim whose answer is lost, then each has its message in the end."""
    chosen = pipeline(double)
    rt = project.runtime(chosen)
    worker = project.runtime(chosen, mongodb_url=mongo_proxy.address(project.mongodb_url))
    begin(rt, chosen, lines(12))
    flow = new_flow(worker)
    mongo_proxy.lose_answers("update", "messages", times=3)

    in_threads(*[lambda hint=hint: flow.run(hint) for hint in hints(rt)])

    prove(rt, terminal=12)


def test_a_second_delivery_after_the_end(project: Project, new_flow: NewFlow) -> None:
    """Given a message that is done, when its hint comes again, then nothing happens."""
    calls: list[int] = []

    def work(n: int) -> int:
        calls.append(n)
        return n

    chosen = pipeline(work)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(1))
    flow = new_flow(rt)
    hint = hints(rt)[0]

    assert [flow.run(hint), flow.run(hint)] == ["1 advance", "not open"]

    assert calls == [0]
    prove(rt, terminal=1)


def test_a_second_delivery_meanwhile(project: Project, new_flow: NewFlow, gate: Gate) -> None:
    """Given a message whose handler runs, when its hint comes to another worker, then that leaves it alone, at once."""
    chosen = pipeline(gate.stage())
    one, other = project.runtime(chosen), project.runtime(chosen)
    begin(one, chosen, lines(1))
    hint = hints(one)[0]
    with ThreadPoolExecutor(1) as pool:
        running = started(new_flow(one), hint, pool)
        assert gate.entered.wait(10)

        assert new_flow(other).run(hint) == "not open"

        gate.may_end.set()
        assert running.result(30) == "1 advance"
    assert gate.calls == ["j0"]
    prove(one, terminal=1)


def test_the_outcome_of_a_zombie_is_refused(project: Project, new_flow: NewFlow, gate: Gate) -> None:
    """Given a worker whose message was given to another, when it ends after all, then its outcome changes nothing.

    What it did is kept as an attempt `refused`.
    """
    chosen = pipeline(gate.stage(chunk=2), Stage(lambda row: row, name="after"))
    zombie, rt = project.runtime(chosen), project.runtime(chosen)
    begin(rt, chosen, lines(2))
    hint = hints(rt)[0]
    with ThreadPoolExecutor(1) as pool:
        running = started(new_flow(zombie), hint, pool)
        assert gate.entered.wait(10)
        sweep.end_leases(rt)  # the zombie is not registered: it has no lease
        gate.calls.clear()
        gate.may_end.set()
        # The second job of the zombie may run before or after those of the other worker.
        pump(rt)
        answer = running.result(30)

    assert answer == "2 advance"
    assert Counter(outcomes(attempts(rt, stage="work"))) == {"lost": 2, "refused": 2, "ok": 2}
    prove(rt, terminal=2)
    for n in range(2):
        mine = job_key("r", f"j{n}")
        kept = [row["_id"] for row in rt.store.db.job_outputs.find({"_id": {"$regex": f"^{mine}/work/"}})]
        assert len(kept) == 1
        assert hint.message not in kept[0]
    refused = attempts(rt, outcome=AttemptOutcome.REFUSED)
    assert {row["worker"] for row in refused} == {zombie.incarnation()}


def test_a_zombie_that_ends_first_is_refused_all_the_same(project: Project, new_flow: NewFlow, gate: Gate) -> None:
    """Given a message that was taken back and not run again yet, when the zombie ends, then it still is refused."""
    chosen = pipeline(gate.stage())
    zombie, rt = project.runtime(chosen), project.runtime(chosen)
    begin(rt, chosen, lines(1))
    with ThreadPoolExecutor(1) as pool:
        running = started(new_flow(zombie), hints(rt)[0], pool)
        assert gate.entered.wait(10)
        sweep.end_leases(rt)
        gate.may_end.set()
        running.result(30)

    assert job(rt, "j0")["state"] == JobState.PENDING
    assert outcomes(attempts(rt)) == ["lost", "refused"]
    assert list(rt.store.db.job_outputs.find()) == []
    pump(rt)
    prove(rt, terminal=1)


def move_away(rt: Runtime, job_id: str) -> None:
    """What an operator's cancel of one job would do."""
    row = job(rt, job_id)
    plan = Transition(now=rt.store.now(), worker="operator")
    plan.moves.append(
        JobMove(keys=[row["_id"]], guard={"state": row["state"]}, set={"state": JobState.CANCELLED, "message": None})
    )
    plan.count(("r", row["stage"], row["partition"]), JobState.PENDING, JobState.CANCELLED, 1)
    transition.apply(rt.store, plan)


def test_one_job_of_a_chunk_moves_on_while_it_runs(project: Project, new_flow: NewFlow, gate: Gate) -> None:
    """Given a chunk that runs, when one of its jobs is cancelled, then that one is refused and the others recorded."""
    chosen = pipeline(gate.stage(chunk=3), as_row_stage())
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(3))
    with ThreadPoolExecutor(1) as pool:
        running = started(new_flow(rt), hints(rt)[0], pool)
        assert gate.entered.wait(10)
        move_away(rt, "j1")
        gate.may_end.set()
        running.result(30)
    pump(rt)

    prove(rt, terminal=2, cancelled=1)
    assert {row["job"]: row["outcome"] for row in attempts(rt, stage="work")} == {
        "j0": "ok",
        "j1": "refused",
        "j2": "ok",
    }


def as_row_stage() -> Stage:
    return Stage(lambda row: row, name="after", chunk=3)


def test_one_job_of_a_chunk_moved_on_before(project: Project) -> None:
    """Given a chunk one of whose jobs names no message any more, when it is claimed, then only the others run."""
    calls: list[int] = []

    def work(n: int) -> int:
        calls.append(n)
        return n

    chosen = pipeline(Stage(work, chunk=3))
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(3))
    move_away(rt, "j1")

    pump(rt)

    assert calls == [0, 2]
    prove(rt, terminal=2, cancelled=1)
    assert {row["job"] for row in attempts(rt)} == {"j0", "j2"}


def test_chunks_are_split_between_stages(project: Project) -> None:
    """Given stages with chunks of 6, 4 and 3 and two partitions, then every message has one partition and fits."""
    chosen = pipeline(
        Stage(double, chunk=6), Stage(as_row, chunk=4), Stage(lambda row: row, name="last", chunk=3),
        partition_by=["kind"],
    )  # fmt: skip
    rt = project.runtime(chosen)
    rows = [{"job_id": f"j{n}", "payload": n, "tags": {"kind": "ab"[n % 3 == 0]}} for n in range(20)]
    begin(rt, chosen, rows)

    pump(rt)

    prove(rt, terminal=20)
    for stage, chunk in (("double", 6), ("as_row", 4), ("last", 3)):
        sent = list(rt.store.db.messages.find({"stage": stage}))
        assert sorted(name for row in sent for name in row["jobs"]) == sorted(f"j{n}" for n in range(20))
        assert max(len(row["jobs"]) for row in sent) == chunk
        for row in sent:
            kind = {"kind__a": "a", "kind__b": "b"}[row["partition"]]
            assert {job(rt, name)["tags"]["kind"] for name in row["jobs"]} == {kind}


def test_threads_that_record_together(project: Project, new_flow: NewFlow) -> None:
    """Given threads that share a process, when their messages end at the same time, then each is recorded once."""
    chosen = pipeline(Stage(double, chunk=2), Stage(as_row, chunk=3))
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(120))
    flow = new_flow(rt)

    for stage in ("double", "as_row"):
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(flow.run, hints(rt, stage=stage)))
        assert set(answers) <= {"2 advance", "1 advance"}
    flow.notes.flush()

    prove(rt, terminal=120)
    recorded = rt.store.db.pipeline_events.distinct("at", {"event": "recorded"})
    assert len(recorded) < 120, "no two records were committed together"


def made(works: list[claim.Work], rt: Runtime) -> list[record.Record]:
    """Records of works whose jobs all went well."""
    return [
        record.Record(
            work=work,
            code_version="1",
            outcomes=[
                Outcome(
                    job_id=name,
                    move=Move.ADVANCE,
                    attempt=AttemptOutcome.OK,
                    output=outputs.encode_output("r", name, work.stage, work.message, 1),
                    started_at=rt.store.now(),
                )
                for name in work.job_ids
            ],
        )
        for work in works
    ]


def claimed(rt: Runtime) -> list[claim.Work]:
    return [work for work in claim.claim(rt, [hint.message for hint in hints(rt)], rt.token()) if work is not None]


def test_one_of_a_group_is_refused(project: Project) -> None:
    """Given records that are committed together, when one lost its claim and one a job, then the rest is recorded."""
    chosen = pipeline(Stage(double, chunk=2), as_row)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(6))
    whole, taken, partly = claimed(rt)
    rt.store.db.messages.update_one({"_id": taken.message}, {"$set": {"token": "theirs", "worker": "gone"}})
    move_away(rt, partly.job_ids[0])

    next_messages = record.record_together(rt, made([whole, taken, partly], rt))

    assert [[row["jobs"] for row in rows] for rows in next_messages] == [[["j0"], ["j1"]], [], [["j5"]]]
    assert {row["job"]: row["outcome"] for row in attempts(rt)} == {
        "j0": "ok", "j1": "ok", "j2": "refused", "j3": "refused", "j4": "refused", "j5": "ok",
    }  # fmt: skip
    sweep.end_leases(rt)
    for row in rt.store.db.messages.find({"state": "open"}):
        sweep.publish_or_leave(rt, [row])
    pump(rt)
    prove(rt, terminal=5, cancelled=1)


def test_records_are_asked_for_again(project: Project) -> None:
    """Given records that were committed although nobody heard of it, when asked again, then they say the same."""
    chosen = pipeline(Stage(double, chunk=2), as_row)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(4))
    records = made(claimed(rt), rt)
    first = record.record_together(rt, records)

    again = record.record_together(rt, records)

    assert again == first
    assert [len(rows) for rows in first] == [2, 2]
    assert outcomes(attempts(rt)) == ["ok"] * 4
    assert rt.store.db.messages.count_documents({"stage": "as_row"}) == 4
    for rows in first:
        sweep.publish_or_leave(rt, rows)
    pump(rt)
    prove(rt, terminal=4)


@pytest.mark.parametrize("outage", ["lost", "cut", "frozen"])
def test_the_store_goes_away_during_the_handler(
    project: Project,
    new_flow: NewFlow,
    mongo_proxy: MongoProxy,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
    outage: str,
) -> None:
    """Given a store that is away when a handler ends, then its outcome is kept until it is back, and recorded once."""
    monkeypatch.setattr("pipeline_app.store.client.CALL_TIMEOUT_S", 1.0)
    chosen = pipeline(gate.stage(chunk=2), as_row_stage())
    rt = project.runtime(chosen)
    worker = project.runtime(chosen, mongodb_url=mongo_proxy.address(project.mongodb_url))
    begin(rt, chosen, lines(2))
    take: dict[str, Callable[[], None]] = {
        "lost": lambda: mongo_proxy.lose_answers("commitTransaction", times=4),
        "cut": mongo_proxy.cut,
        "frozen": mongo_proxy.freeze,
    }
    with ThreadPoolExecutor(1) as pool:
        running = started(new_flow(worker), hints(rt)[0], pool)
        assert gate.entered.wait(10)
        take[outage]()
        gate.may_end.set()
        if outage != "lost":
            eventually(lambda: len(gate.calls) == 2)
            with pytest.raises(TimeoutError):
                running.result(1.5)  # it waits, and does not give up
            mongo_proxy.restore()
        assert running.result(30) == "2 advance"
    pump(rt)

    assert gate.calls == ["j0", "j1"]
    prove(rt, terminal=2)
    assert outcomes(attempts(rt)) == ["ok"] * 4


def test_a_lost_child_takes_no_message_from_a_brother(project: Project) -> None:
    """Given a message that another child of the same worker runs, when one is lost over it, then it stays claimed."""
    chosen = pipeline(double)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(1))
    (work,) = claimed(rt)
    janitor = Janitor(lambda: rt)

    janitor.lost(work.message, WorkerLostError("killed"), os.getpid() + 1)
    janitor.drain(10)
    assert messages.states(rt.store, [work.message]) == {work.message: "claimed"}
    janitor.lost(work.message, WorkerLostError("killed"), os.getpid())
    janitor.drain(10)

    assert messages.states(rt.store, [work.message]) == {work.message: "closed"}
    pump(rt)
    prove(rt, terminal=1)
    assert outcomes(attempts(rt)) == ["lost", "ok"]
