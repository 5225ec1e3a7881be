"""Accounting: counters, events and hints that do not add up are named and corrected, once, whoever else is at it."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from pipeline_app import PermanentError, Stage
from pipeline_app.control.accounts import hints as hints_module
from pipeline_app.control.accounts.verify import Verification, repaired, verify
from pipeline_app.control.duties import sweep
from pipeline_app.domain.states import MessageState
from pipeline_app.errors import BrokerError
from pipeline_app.flow.forward import publish
from pipeline_app.runtime import Runtime
from pipeline_app.store import counters
from tests.integration.broken import (
    break_everything,
    close_message,
    doubled,
    events_of,
    named,
    pump_some,
)
from tests.integration.helpers import (
    as_row,
    backdate,
    begin,
    double,
    everything,
    hints,
    in_broker,
    in_threads,
    lines,
    open_ids,
    pipeline,
    prove,
    pump,
    register,
)
from tests.integration.proxy import Proxy
from tests.project import Project

# Counters and events


@pytest.mark.parametrize("key", ["states.pending", "states.terminal", "completed", "seeded"])
def test_a_counter_is_corrected(project: Project, key: str) -> None:
    """Given a counter that somebody changed, when repaired, then the sums are right; and they stay so."""
    rt, _ = doubled(project)
    pump_some(rt, hints(rt)[:1])
    rt.store.db.run_counters.update_one({"completed": {"$exists": True}}, {"$inc": {key: 5}})

    found = verify(rt, "r")
    assert (found.counters_agree, {kind for kind, _ in named(found)}) == (False, {"counter"})
    found = repaired(rt, found)

    assert (found.ok, found.counters_agree, found.repaired, found.repairs) == (True, True, 1, {"counts": 1})
    backdate(rt, "run_counters", 3600, "at")
    sweep.fold_counters(rt)
    pump(rt)
    prove(rt, terminal=6)
    assert counters.totals(rt.store, "r")["as_row"]["states.terminal"] == 6


def test_counters_that_are_gone_are_made_anew(project: Project) -> None:
    """Given a run whose counters somebody deleted, when repaired, then they say what the jobs and the ledger say."""
    rt, _ = doubled(project)
    pump(rt)
    rt.store.db.run_counters.delete_many({})

    found = verify(rt, "r", repair=True)

    assert (found.ok, found.repairs) == (True, {"counts": 4})
    assert counters.totals(rt.store, "r")["double"] == {"completed": 6, "seeded": 6}


def test_the_event_log_gets_a_line_with_the_difference(project: Project) -> None:
    """Given events that somebody deleted, when repaired, then a line carries what they said, and nothing is lost."""
    rt, _ = doubled(project)
    pump(rt)
    rt.store.db.pipeline_events.delete_one({"event": "recorded", "stage": "double"})
    rt.store.db.pipeline_events.delete_one({"event": "seeded"})

    found = verify(rt, "r")
    assert named(found) == {("event", None)}
    found = repaired(rt, found)

    assert (found.ok, found.repaired, found.repairs) == (True, 2, {"events": 2})
    (line,) = events_of(rt, event="repaired")
    assert (line["stage"], line["advanced"], line["seeded"]) == ("double", 2, 6)


def test_a_ledger_that_lacks_lines_is_believed(project: Project) -> None:
    """Given attempts that somebody deleted, when repaired, then counters and events say what is left."""
    rt, _ = doubled(project)
    pump(rt)
    rt.store.db.job_attempts.delete_one({"job": "j0", "stage": "double"})

    found = verify(rt, "r", repair=True)

    assert (found.ok, found.repairs) == (True, {"counts": 1, "events": 1})
    assert counters.totals(rt.store, "r")["double"]["completed"] == 5


def test_two_who_found_the_same_difference_correct_it_once(project: Project) -> None:
    """Given two looks at the same wrong counter, when both are followed by a repair, then it is added only once."""
    rt, _ = doubled(project)
    rt.store.db.run_counters.update_one({}, {"$inc": {"states.pending": -3}})
    one, other = verify(rt, "r"), verify(rt, "r")

    assert (repaired(rt, one).repaired, repaired(rt, other).repaired) == (1, 0)

    prove(rt, pending=6)


# Hints


def test_hints_that_were_never_published(project: Project) -> None:
    """Given messages that nobody published for long, when repaired, then they are in the broker."""
    rt, chosen = doubled(project)
    in_broker(rt, f"{chosen.name}.double")
    rt.store.db.messages.update_many({}, {"$set": {"published_at": None}})
    assert verify(rt, "r").ok, "they may be published any moment"
    backdate(rt, "messages", 600, "check_at")

    found = verify(rt, "r")
    assert [(problem.kind, problem.stage) for problem in found.problems] == [("unpublished", "double")]
    found = repaired(rt, found)

    assert (found.ok, found.exact, found.repaired, found.repairs) == (True, True, 1, {"published": 3})
    pump(rt)
    prove(rt, terminal=6)


def test_hints_that_the_broker_lost(project: Project) -> None:
    """Given a queue that was purged, when repaired, then the hints are there again under their ids."""
    rt, chosen = doubled(project)
    ids = open_ids(rt)
    assert prove(rt, pending=6).exact
    in_broker(rt, f"{chosen.name}.double")

    found = verify(rt, "r")
    assert [(problem.kind, problem.stage) for problem in found.problems] == [("message_gone", "double")]
    assert "has 0 hints for 3 open messages" in found.problems[0].detail
    found = repaired(rt, found)

    assert (found.ok, found.exact, found.repaired, found.repairs) == (True, True, 1, {"published": 3})
    assert open_ids(rt) == ids
    assert pump(rt).count("not open") == 0
    prove(rt, terminal=6)


def test_hints_that_are_there_at_the_second_look(project: Project) -> None:
    """Given hints that a broker under load does not show at once, when looked at again, then nothing is amiss."""
    rt, chosen = doubled(project)
    in_broker(rt, f"{chosen.name}.double")
    late = threading.Timer(hints_module.LOOK_AGAIN_S / 2, publish, (rt, list(rt.store.db.messages.find())))

    late.start()
    found = verify(rt, "r")
    late.join()

    assert (found.ok, found.exact) == (True, True)


def test_hints_are_compared_over_all_runs_of_a_queue(project: Project) -> None:
    """Given two runs in one queue of which one hint is gone, then either run says so, and one repair mends both."""
    rt, chosen = doubled(project, 2)
    begin(rt, chosen, lines(4), run="other")
    in_broker(rt, f"{chosen.name}.double")
    publish(rt, list(rt.store.db.messages.find({"run": "other"})))

    assert [problem.kind for problem in verify(rt, "r").problems] == ["message_gone"]
    assert [problem.kind for problem in verify(rt, "other").problems] == ["message_gone"]
    assert verify(rt, "other", repair=True).repairs == {"published": 3}

    assert pump(rt).count("not open") == 2, "which hint was gone could not be known"
    prove(rt, terminal=2)
    prove(rt, "other", terminal=4)


def test_nothing_is_exact_while_a_worker_may_hold_hints(project: Project) -> None:
    """Given a purged queue, when a worker of it lives, it may have the hints reserved: nothing is said of them."""
    rt, chosen = doubled(project)
    in_broker(rt, f"{chosen.name}.double")
    register(rt, "w")

    found = verify(rt, "r", repair=True)

    assert (found.ok, found.exact, found.repaired) == (True, False, 0)
    backdate(rt, "workers", 60, "lease_until")
    assert not verify(rt, "r").ok


def test_repairing_without_a_broker(project: Project, amqp_proxy: Proxy) -> None:
    """Given a broker that is away, when repaired, then all but the hints is mended, and the error says so."""
    chosen = pipeline(Stage(double, chunk=2))
    rt = project.runtime(chosen, amqp_url=amqp_proxy.address(project.amqp_url))
    begin(rt, chosen, lines(4))
    rt.store.db.messages.update_many({}, {"$set": {"published_at": None}})
    backdate(rt, "messages", 600, "check_at")
    close_message(rt)
    rt.store.db.run_counters.update_one({}, {"$inc": {"states.pending": 1}})
    amqp_proxy.cut()

    assert not verify(rt, "r").exact
    with pytest.raises(BrokerError) as raised:
        verify(rt, "r", repair=True)

    assert raised.value.hint is not None
    assert raised.value.hint.startswith("3 problems were repaired")
    found = verify(rt, "r")
    assert [problem.kind for problem in found.problems] == ["unpublished"]


# All at once


@pytest.mark.usefixtures("tiny_pages")
def test_two_repair_at_once(project: Project) -> None:
    """Given something of each kind, when two repair at once, then it is done once, and all jobs get through."""
    rt, chosen = doubled(project, 40)
    second = project.runtime(chosen)
    break_everything(rt)
    assert verify(rt, "r").problem_count > 25
    found: list[Verification] = []
    begin_at = threading.Barrier(2)

    def mend(mine: Runtime) -> None:
        begin_at.wait()
        found.append(verify(mine, "r", repair=True))

    in_threads(lambda: mend(rt), lambda: mend(second))

    assert verify(rt, "r", repair=True).ok
    generations = {row["job"]: row["generation"] for row in rt.store.db.job_states.find()}
    assert set(generations.values()) == {0, 1}, "none was replayed twice"
    assert sum(row.repairs.get("replayed", 0) for row in found) == 5
    sweep.release_due(rt)
    pump(rt)
    prove(rt, terminal=40)


@pytest.mark.usefixtures("tiny_pages")
def test_repairing_again_changes_nothing(project: Project) -> None:
    """Given a run that was repaired, when it is repaired again, then nothing changes; nor by a dry run before it."""
    rt, _ = doubled(project, 40)
    break_everything(rt)

    before = everything(rt)
    planned = verify(rt, "r", repair=True, dry_run=True)
    assert everything(rt) == before
    first = verify(rt, "r", repair=True)
    assert (planned.ok, planned.repaired, first.ok) == (False, 0, True)
    assert (first.repairs, first.repaired) == (planned.repairs, planned.problem_count)
    before = everything(rt)
    again = verify(rt, "r", repair=True)

    assert (again.ok, again.repaired, again.repairs) == (True, 0, {})
    assert everything(rt) == before


def test_repairing_while_the_run_goes_on(project: Project) -> None:
    """Given workers that record, when somebody breaks and repairs meanwhile, then every job gets through once."""

    def some(n: int) -> int:
        if n % 10 == 0:
            raise PermanentError("it says so")
        return n

    chosen = pipeline(Stage(some, chunk=3), Stage(double, chunk=2), as_row)
    rt, mender = project.runtime(chosen), project.runtime(chosen)
    begin(rt, chosen, lines(100))
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            pump(rt)

    def harm_and_mend() -> None:
        try:
            for _ in range(8):
                closing = rt.store.db.messages.find_one({"state": MessageState.OPEN})
                if closing is not None:
                    query = {"_id": closing["_id"], "state": MessageState.OPEN}
                    rt.store.db.messages.update_one(query, {"$set": {"state": "closed"}})
                rt.store.db.run_counters.update_one({}, {"$inc": {"completed": 1, "states.pending": 2}})
                found = verify(mender, "r", repair=True)
                assert {problem.kind for problem in found.problems} <= {"lost", "counter"}, found.problems
        finally:
            ended.set()

    in_threads(work, harm_and_mend)
    assert verify(rt, "r", repair=True).ok
    pump(rt)
    prove(rt, terminal=90, dead_lettered=10)


def test_looking_while_the_run_goes_on_finds_nothing(project: Project) -> None:
    """Given workers that record all the time, when the run is looked at meanwhile, then nothing seems amiss."""
    rt, _ = doubled(project, 200)
    looker = project.runtime()
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            found = verify(looker, "r")
            problems.extend(found.problems)

    def work() -> None:
        try:
            pump(rt)
        finally:
            ended.set()

    problems: list[Any] = []
    in_threads(look, work)
    assert problems == []
