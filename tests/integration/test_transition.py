"""The one transaction that moves jobs: whole or not at all, refused by name, and once however often it is asked for."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest

from pipeline_app.application import prepare
from pipeline_app.domain.job import job_key
from pipeline_app.domain.states import JobState
from pipeline_app.errors import StoreError
from pipeline_app.runtime import Runtime
from pipeline_app.store import client, counters, jobs, messages, outputs, transition
from pipeline_app.store.client import Document
from pipeline_app.store.transition import DuplicateKeyFoundError, JobMove, NotFittingError, Transition
from tests.integration.helpers import everything, in_threads
from tests.integration.proxy import MongoProxy
from tests.project import Project

RUN = "r"


@pytest.fixture
def rt(project: Project) -> Runtime:
    made = project.runtime()
    prepare(made)
    return made


def add_jobs(rt: Runtime, *job_ids: str) -> str:
    """Jobs in one message that is claimed by token `mine`; its id."""
    now = rt.store.now()
    message = messages.document(
        run=RUN, pipeline="p", stage="first", partition="default", queue="p.first", jobs=job_ids, now=now
    )
    rows = [
        {
            **jobs.document(
                seq=0,
                run=RUN, job_id=job, batch="b", tags={}, partition="default", stage="first", payload=1, now=now,
                expires_at=None,
            ),
            "state": JobState.PENDING,
            "message": message["_id"],
        }
        for job in job_ids
    ]  # fmt: skip
    plan = Transition(now=now, new_jobs=rows, messages=[message], worker="w")
    plan.count((RUN, "first", "default"), None, JobState.PENDING, len(rows))
    transition.apply(rt.store, plan)
    messages.claim(rt.store, [message["_id"]], worker="w", process="w", token="mine")
    return str(message["_id"])


def record(rt: Runtime, message: str, *job_ids: str, token: str = "mine") -> Transition:
    """A plan with something for every collection: the jobs become terminal."""
    now = rt.store.now()
    plan = Transition(now=now, worker="w", close=[(message, token)])
    keys = [job_key(RUN, job) for job in job_ids]
    plan.moves.append(JobMove(keys=keys, guard={"message": message}, set={"state": JobState.TERMINAL, "message": None}))
    plan.messages.append(
        messages.document(
            run=RUN, pipeline="p", stage="second", partition="default", queue="p.second", jobs=job_ids, now=now
        )
    )
    plan.outputs.extend(outputs.encode_output(RUN, job, "first", message, job) for job in job_ids)
    plan.attempts.extend({"_id": f"{key}/first/{message}", "run": RUN, "outcome": "ok"} for key in keys)
    plan.events.append(transition.event(RUN, "first", "recorded", jobs=job_ids, now=now))
    plan.count((RUN, "first", "default"), JobState.PENDING, JobState.TERMINAL, len(keys))
    plan.manifest_flags[RUN] = {"seen": True}
    return plan


def count(rt: Runtime) -> dict[str, int]:
    return counters.totals(rt.store, RUN)["first"]


def state(rt: Runtime, job_id: str) -> str:
    found: Document | None = jobs.get(rt.store, RUN, job_id)
    assert found is not None
    return str(found["state"])


def test_a_plan_that_fits_is_carried_out_whole(rt: Runtime) -> None:
    """Given a claimed message, when a plan closes it, then every collection has its part."""
    message = add_jobs(rt, "a", "b")
    rt.store.db.run_manifests.insert_one({"_id": RUN})

    transition.apply(rt.store, record(rt, message, "a", "b"))

    found = everything(rt)
    assert [row["state"] for row in found["messages"]] == ["closed", "open"]
    assert [row["state"] for row in found["job_states"]] == ["terminal", "terminal"]
    assert [row["value"] for row in found["job_outputs"]] == ["a", "b"]
    assert len(found["job_attempts"]) == 2
    assert found["pipeline_events"][-1]["jobs"] == ["a", "b"]
    assert found["run_manifests"][0]["seen"]
    assert count(rt) == {"states.pending": 0, "states.terminal": 2}


def test_a_job_that_moved_on_is_named_and_nothing_is_done(rt: Runtime) -> None:
    """Given one of three jobs names another message, when all are to be moved, then it is named and nothing happens."""
    message = add_jobs(rt, "a", "b", "c")
    rt.store.db.job_states.update_one({"_id": job_key(RUN, "b")}, {"$set": {"message": "another"}})
    before = everything(rt)

    with pytest.raises(NotFittingError) as refused:
        transition.apply(rt.store, record(rt, message, "a", "b", "c"))

    assert (refused.value.jobs, refused.value.messages) == ({job_key(RUN, "b")}, frozenset())
    assert everything(rt) == before


def test_a_claim_that_was_taken_is_named_and_nothing_is_done(rt: Runtime) -> None:
    """Given two messages, one of them claimed by another token, when both are to be closed, then that one is named."""
    mine, taken = add_jobs(rt, "a"), add_jobs(rt, "b")
    rt.store.db.messages.update_one({"_id": taken}, {"$set": {"token": "theirs"}})
    plan = record(rt, mine, "a")
    plan.merge(record(rt, taken, "b"))
    before = everything(rt)

    with pytest.raises(NotFittingError) as refused:
        transition.apply(rt.store, plan)

    assert (refused.value.messages, refused.value.jobs) == ({taken}, frozenset())
    assert everything(rt) == before


@pytest.mark.parametrize("kind", ["new_jobs", "messages", "outputs", "attempts"])
def test_a_key_that_is_there_is_named_and_nothing_is_done(rt: Runtime, kind: str) -> None:
    """Given a document with the same `_id`, when a plan inserts another, then it is refused with that key, whole."""
    message = add_jobs(rt, "a")
    plan = record(rt, message, "a")
    plan.new_jobs.append({"_id": job_key(RUN, "new"), "run": RUN})
    collection = {"new_jobs": "job_states", "outputs": "job_outputs", "attempts": "job_attempts"}.get(kind, kind)
    key = getattr(plan, kind)[0]["_id"]
    rt.store.db[collection].insert_one({"_id": key})
    before = everything(rt)

    with pytest.raises(DuplicateKeyFoundError) as refused:
        transition.apply(rt.store, plan)

    assert refused.value.key == key
    assert everything(rt) == before


def test_the_answer_to_the_commit_is_lost(project: Project, rt: Runtime, mongo_proxy: MongoProxy) -> None:
    """Given a commit that happened and was not answered, then the plan was carried out, once."""
    message = add_jobs(rt, "a")
    worker = project.runtime(mongodb_url=mongo_proxy.address(project.mongodb_url))
    mongo_proxy.lose_answers("commitTransaction")

    transition.apply(worker.store, record(rt, message, "a"))

    assert state(rt, "a") == JobState.TERMINAL
    assert count(rt) == {"states.pending": 0, "states.terminal": 1}


def test_the_store_goes_away_with_the_answer(
    project: Project, rt: Runtime, mongo_proxy: MongoProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a commit that happened before the store went away, when the plan is asked for again, then it is refused.

    And "closed by my token" says that it was carried out the first time.
    """
    message = add_jobs(rt, "a")
    monkeypatch.setattr(client, "CALL_TIMEOUT_S", 3.0)
    worker = project.runtime(mongodb_url=mongo_proxy.address(project.mongodb_url))
    plan = record(rt, message, "a")

    def cut_after_commit(when: str, command: Document) -> bool:
        if when == "after" and "commitTransaction" in command:
            mongo_proxy.cut()
        return False

    mongo_proxy.hook = cut_after_commit
    with pytest.raises(StoreError):
        transition.apply(worker.store, plan)
    mongo_proxy.restore()

    with pytest.raises(NotFittingError) as refused:
        transition.apply(worker.store, plan)

    assert refused.value.messages == {message}
    assert messages.closed_by(worker.store, [message], "mine") == {message}
    assert messages.closed_by(worker.store, [message], "theirs") == set()
    assert count(rt) == {"states.pending": 0, "states.terminal": 1}


def test_transactions_that_meet_on_a_document_all_happen(rt: Runtime) -> None:
    """Given plans that count in one document at the same time, then each is counted: none is lost, none refused."""
    place = (RUN, "first", "default")

    def add() -> None:
        for _ in range(25):
            plan = Transition(now=rt.store.now(), worker="shared")
            plan.count(place, None, JobState.PENDING, 1)
            transition.apply(rt.store, plan)

    in_threads(*[add] * 4)

    assert count(rt) == {"states.pending": 100}


def test_folding_keeps_the_sums_while_others_count(rt: Runtime) -> None:
    """Given processes that count, when all counters are folded again and again meanwhile, then the sums are right."""
    places = [(RUN, stage, part) for stage in ("first", "second") for part in ("a", "b")]
    counting = threading.Event()

    def add(name: str) -> None:
        for number in range(30):
            plan = Transition(now=rt.store.now(), worker=f"{name}.{number % 3}")
            for place in places:
                plan.count(place, JobState.RETRY_WAITING, JobState.PENDING, 2)
                plan.counts[place]["completed"] += 1
            transition.apply(rt.store, plan)

    def fold() -> None:
        while not counting.is_set():
            counters.fold(rt.store, counters.idle(rt.store, rt.store.now() + timedelta(hours=1)))

    folder = threading.Thread(target=fold)
    folder.start()
    in_threads(lambda: add("x"), lambda: add("y"))
    counting.set()
    folder.join()

    want = {"states.retry_waiting": -240, "states.pending": 240, "completed": 120}
    assert counters.totals(rt.store, RUN) == {"first": want, "second": want}
    counters.fold(rt.store, counters.idle(rt.store, rt.store.now() + timedelta(hours=1)))
    assert rt.store.db.run_counters.distinct("worker") == [counters.FOLDED]
    assert counters.totals(rt.store, RUN) == {"first": want, "second": want}
