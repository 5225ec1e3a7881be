"""What becomes of outcomes: all that still fit are recorded at once, each once, whatever the store answers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline_app import Stage
from pipeline_app.control.duties import sweep
from pipeline_app.domain.outcome import AttemptOutcome, Move, Outcome
from pipeline_app.domain.states import JobState
from pipeline_app.flow import claim, record
from pipeline_app.runtime import Runtime
from pipeline_app.store import outputs, transition
from pipeline_app.store.transition import JobMove, Transition
from tests.integration.gate import Gate
from tests.integration.helpers import (
    NewFlow,
    as_row,
    attempts,
    begin,
    claimed,
    double,
    hints,
    job,
    lines,
    outcomes,
    pipeline,
    prove,
    pump,
)
from tests.integration.proxy import MongoProxy
from tests.project import Project, eventually


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
        running = pool.submit(new_flow(rt).run, hints(rt)[0])
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


@pytest.mark.parametrize("outage", ["lost", "cut", "cut in it", "frozen"])
def test_the_store_goes_away_during_the_handler(
    project: Project,
    new_flow: NewFlow,
    mongo_proxy: MongoProxy,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
    outage: str,
) -> None:
    """Given a store that is away when a handler ends, then its outcome is kept until it is back, and recorded once."""
    chosen = pipeline(gate.stage(chunk=2), as_row_stage())
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(2))
    monkeypatch.setattr("pipeline_app.store.client.CALL_TIMEOUT_S", 1.0)
    worker = project.runtime(chosen, mongodb_url=mongo_proxy.address(project.mongodb_url))
    take: dict[str, Callable[[], None]] = {
        "lost": lambda: mongo_proxy.lose_answers("commitTransaction", times=4),
        "cut": mongo_proxy.cut,
        "cut in it": mongo_proxy.cut_in_transaction,
        "frozen": mongo_proxy.freeze,
    }
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(new_flow(worker).run, hints(rt)[0])
        assert gate.entered.wait(10)
        take[outage]()
        gate.may_end.set()
        if outage != "lost":
            eventually(lambda: len(gate.calls) == 2 and mongo_proxy.is_away)
            with pytest.raises(TimeoutError):
                running.result(1.5)  # it waits, and does not give up
            mongo_proxy.restore()
        assert running.result(30) == "2 advance"
    pump(rt)

    assert gate.calls == ["j0", "j1"]
    prove(rt, terminal=2)
    assert outcomes(attempts(rt)) == ["ok"] * 4
