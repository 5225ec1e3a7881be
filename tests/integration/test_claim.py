"""Who may run a message: claims are compare-and-set, and a worker that lost one changes nothing any more."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from celery.exceptions import WorkerLostError

from pipeline_app import Stage
from pipeline_app.control.duties import sweep
from pipeline_app.domain.job import job_key
from pipeline_app.domain.outcome import AttemptOutcome
from pipeline_app.domain.states import JobState
from pipeline_app.flow import claim
from pipeline_app.runtime import Runtime
from pipeline_app.store import messages
from pipeline_app.worker.janitor import Janitor
from pipeline_app.worker.lifeline import Shared
from tests.integration.gate import Gate
from tests.integration.helpers import (
    NewFlow,
    attempts,
    begin,
    claimed,
    double,
    hints,
    in_threads,
    job,
    lines,
    outcomes,
    pipeline,
    prove,
    pump,
)
from tests.integration.proxy import MongoProxy
from tests.project import Project


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
        running = pool.submit(new_flow(one).run, hint)
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
        running = pool.submit(new_flow(zombie).run, hint)
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
        running = pool.submit(new_flow(zombie).run, hints(rt)[0])
        assert gate.entered.wait(10)
        sweep.end_leases(rt)
        gate.may_end.set()
        running.result(30)

    assert job(rt, "j0")["state"] == JobState.PENDING
    assert outcomes(attempts(rt)) == ["lost", "refused"]
    assert list(rt.store.db.job_outputs.find()) == []
    pump(rt)
    prove(rt, terminal=1)


def test_a_lost_child_takes_no_message_from_a_brother(project: Project) -> None:
    """Given a message that another child of the same worker runs, when one is lost over it, then it stays claimed."""
    chosen = pipeline(double)
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(1))
    (work,) = claimed(rt)
    janitor = Janitor(lambda: rt, Shared())

    janitor.lost(work.message, WorkerLostError("killed"), os.getpid() + 1)
    janitor.drain(10)
    assert messages.states(rt.store, [work.message]) == {work.message: "claimed"}
    janitor.lost(work.message, WorkerLostError("killed"), os.getpid())
    janitor.drain(10)

    assert messages.states(rt.store, [work.message]) == {work.message: "closed"}
    pump(rt)
    prove(rt, terminal=1)
    assert outcomes(attempts(rt)) == ["lost", "ok"]
