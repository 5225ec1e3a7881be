"""Adding jobs to a run: each once, in constant memory, all or as they come, and gone on with after any stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline_app import Pipeline, Stage
from pipeline_app.control.changes import cancelling
from pipeline_app.control.duties import sweep
from pipeline_app.control.results import results
from pipeline_app.control.seed import seeding
from pipeline_app.control.sight.status import status
from pipeline_app.domain.partition import queue_name
from pipeline_app.domain.states import MessageState
from pipeline_app.errors import BadJobLineError, DuplicateJobError, NotFoundError, RefusedError
from pipeline_app.runtime import Runtime
from pipeline_app.store import manifests
from tests.integration.helpers import (
    backdate,
    by_state,
    double,
    everything,
    in_broker,
    in_threads,
    lines,
    new_run,
    pipeline,
    prove,
    pump,
)
from tests.project import REPOSITORY, Project, eventually


@pytest.fixture
def chosen() -> Pipeline:
    return pipeline(Stage(double, chunk=2))


@pytest.fixture
def rt(project: Project, chosen: Pipeline) -> Runtime:
    return new_run(project, chosen)


def hinted(rt: Runtime, chosen: Pipeline) -> int:
    """Hints in the broker; they are taken out."""
    return len(in_broker(rt, queue_name(chosen.name, "double", "default")))


@pytest.mark.usefixtures("small_pages")
def test_a_stream_is_published_as_it_comes(rt: Runtime, chosen: Pipeline) -> None:
    """Given a slow source, when some of its jobs came, then they run before the next are there."""
    more = threading.Event()

    def slowly() -> Iterator[dict[str, Any]]:
        yield from lines(3)
        assert more.wait(30)
        yield {"job_id": "last", "payload": 9}

    seeder = threading.Thread(target=seeding.seed, args=(rt, "r", slowly()))
    seeder.start()
    try:
        eventually(lambda: pump(rt) and by_state(rt) == {"terminal": 3}, timeout=20)
        assert status(rt, "r").state == "seeding"
    finally:
        more.set()
        seeder.join()
    pump(rt)
    prove(rt, terminal=4)
    assert status(rt, "r").state == "complete"


@pytest.mark.usefixtures("small_pages")
def test_a_whole_batch_shows_nothing_before_it_is_closed(rt: Runtime, chosen: Pipeline) -> None:
    """Given a whole batch, then none of its hints is in the broker, and no delayed job is due, before all are in."""
    looks: list[tuple[int, int, int]] = []

    def slowly() -> Iterator[dict[str, Any]]:
        yield from lines(4)
        yield {"job_id": "delayed", "payload": 4, "delay_s": 60}
        yield {"job_id": "last", "payload": 5}
        backdate(rt, "job_states", 3600, "due_at")
        backdate(rt, "messages", 3600, "check_at")
        sweep.release_due(rt)
        sweep.publish_unpublished(rt)
        sweep.publish_forgotten(rt)
        open_messages = rt.store.db.messages.count_documents({"state": MessageState.OPEN})
        looks.append((rt.store.db.job_states.count_documents({}), open_messages, hinted(rt, chosen)))

    done = seeding.seed(rt, "r", slowly(), whole=True)

    assert looks == [(6, 0, 0)]
    assert (done.added, done.published) == (6, True)
    sweep.release_due(rt)
    pump(rt)
    prove(rt, terminal=6)


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize(
    ("numbers", "where"), [([0, 0, 1, 2, 3], "in a page"), ([0, 1, 2, 3, 0], "in pages"), ([0, 1, 2, 3, 7], "in store")]
)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "stream"])
def test_a_duplicate_is_refused(rt: Runtime, chosen: Pipeline, numbers: list[int], where: str, whole: bool) -> None:
    """Given a job that is there already, then a whole batch goes entirely; of a stream, what came before it stays."""
    seeding.seed(rt, "r", [{"job_id": "j7", "payload": 7}])
    before = everything(rt)
    rows = [{"job_id": f"j{n}", "payload": n} for n in numbers]

    with pytest.raises(DuplicateJobError, match="j7" if where == "in store" else "j0"):
        seeding.seed(rt, "r", rows, whole=whole)

    if whole:
        assert everything(rt) == before
        pump(rt)
        prove(rt, terminal=1)
        return
    assert not manifests.batches(rt.store, "r", "open", "interrupted", "closing")
    pump(rt)
    prove(rt, terminal=1 + {"in a page": 0, "in pages": 4, "in store": 4}[where])


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize(
    ("line", "text"),
    [
        ({"job_id": "x", "payloads": 1}, "payloads: Extra inputs"),
        ({"payload": 1}, "job_id: Field required"),
        ({"job_id": "x" * 201}, "at most 200"),
        ({"job_id": "x", "payload": {"n": 2**70}}, "cannot be stored"),
        ({"job_id": "x", "payload": "y" * 16 * 1024 * 1024}, "keep it elsewhere"),
        ({"job_id": "x", "delay_s": -1}, "not negative"),
    ],
    ids=["unknown field", "no id", "long id", "large int", "large payload", "negative delay"],
)
def test_a_bad_job_takes_its_whole_batch_back(rt: Runtime, line: dict[str, Any], text: str) -> None:
    """Given a job that cannot be added, then it is named with the reason, and nothing of its batch stays."""
    before = everything(rt)

    with pytest.raises(BadJobLineError, match=text):
        seeding.seed(rt, "r", [*lines(5), line], whole=True)

    assert everything(rt) == {**before, "partitions": everything(rt)["partitions"]}
    prove(rt)


def test_large_payloads_go_in_several_transactions(rt: Runtime) -> None:
    """Given jobs that together are larger than a transaction may be, then all of them are added."""
    seeding.seed(rt, "r", lines(5, payload=lambda n: "x" * 10 * 1024 * 1024))

    assert rt.store.db.pipeline_events.count_documents({"event": "seeded"}) == 3
    assert by_state(rt) == {"pending": 5}


def test_two_seeders_at_once(project: Project, rt: Runtime, chosen: Pipeline) -> None:
    """Given two that seed the same jobs at the same time, then each job is in the run once."""
    second = project.runtime(chosen)

    in_threads(
        *[
            lambda mine=mine: (
                seeding.seed(mine, "r", lines(3000), skip_existing=True)
                if mine is rt
                else seeding.seed(mine, "r", ({"job_id": f"k{n}", "payload": n} for n in range(3000)))
            )
            for mine in (rt, second)
        ]
    )

    assert by_state(rt) == {"pending": 6000}
    assert status(rt, "r").seeded == 6000


SEEDER = """
import json, sys, time
from pipeline_app.control.seed import paging, seeding
from tests.integration.test_seeding import seeder_runtime

paging.PAGE = 10
rt = seeder_runtime(*sys.argv[1:3])

def lines():
    for n in range(400):
        if n == 105:
            print("under way", flush=True)
            time.sleep(60)
        yield {"job_id": f"j{n}", "payload": n}

seeding.seed(rt, "r", lines(), whole=json.loads(sys.argv[3]))
"""


def seeder_runtime(amqp_url: str, mongodb_url: str) -> Runtime:
    """A runtime that seeds but knows no pipeline, as a client elsewhere may."""
    from pipeline_app.application import client_runtime
    from pipeline_app.settings import Settings

    return client_runtime(Settings(amqp_url=amqp_url, mongodb_url=mongodb_url, pipelines=()))


def test_a_seeder_that_is_stopped_while_it_publishes(rt: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given Ctrl-C after jobs are in and before they are published, then how many are in has been told."""
    told: list[int] = []

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rt.publisher, "publish", stop)
    with pytest.raises(KeyboardInterrupt):
        seeding.seed(rt, "r", lines(3), progress=told.append)

    assert told == [3]
    assert rt.store.db.job_states.count_documents({}) == 3


@pytest.mark.parametrize("whole", [False, True], ids=["stream", "whole"])
def test_a_seeder_that_was_killed_is_gone_on_with(project: Project, rt: Runtime, whole: bool) -> None:
    """Given a seeder that was killed, when the same jobs are seeded with `skip_existing`, then each is there once."""
    arguments = [project.amqp_url, project.mongodb_url, json.dumps(whole)]
    with subprocess.Popen(
        [sys.executable, "-c", SEEDER, *arguments], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as seeder:
        assert seeder.stdout is not None
        assert seeder.stdout.readline() == "under way\n"
        eventually(lambda: rt.store.db.job_states.count_documents({}) >= 100)
        os.kill(seeder.pid, signal.SIGKILL)
    backdate(rt, "seed_batches", 60, "lease_until")
    seeding.sweep(rt)
    assert len(status(rt, "r").interrupted) == 1
    there = rt.store.db.job_states.count_documents({})
    assert 100 <= there < 110
    # It may have been killed before its last page was published; the sweep publishes it, as in a worker.
    backdate(rt, "messages", 60, "check_at")
    sweep.publish_unpublished(rt)
    pump(rt)
    assert by_state(rt) == ({"pending": there} if whole else {"terminal": there})

    done = seeding.seed(rt, "r", lines(400), whole=whole, skip_existing=True)

    assert (done.added, done.skipped) == (400 - there, there)
    assert len(manifests.batches(rt.store, "r", "closed")) == 2
    pump(rt)
    prove(rt, terminal=400)
    assert status(rt, "r").state == "complete"
    assert sorted(row["result"] for row in results(rt, "r")) == [2 * n for n in range(400)]


def test_a_cancelled_run_takes_no_jobs(rt: Runtime) -> None:
    """Given a run that was cancelled, when jobs are seeded, then that is refused; as it is for a run that is not."""
    seeding.seed(rt, "r", lines(2))
    cancelling.cancel(rt, "r")

    with pytest.raises(RefusedError, match="r was cancelled"):
        seeding.seed(rt, "r", [{"job_id": "x"}])
    with pytest.raises(NotFoundError, match="no run 'other'"):
        seeding.seed(rt, "other", [{"job_id": "x"}])

    pump(rt)
    prove(rt, cancelled=2)


def test_a_run_is_cancelled_over_an_open_stream(rt: Runtime) -> None:
    """Given a run that is cancelled while it is seeded, then what comes later is cancelled, too."""

    def slowly() -> Iterator[dict[str, Any]]:
        yield from lines(3)
        eventually(lambda: rt.store.db.job_states.count_documents({}) == 3)
        cancelling.cancel(rt, "r")
        yield {"job_id": "late", "payload": 1}

    seeding.seed(rt, "r", slowly())
    cancelling.sweep(rt)
    cancelling.sweep(rt)

    prove(rt, cancelled=4)
    assert manifests.get(rt.store, "r")["cancel_done"]
    assert set(pump(rt)) <= {"not open"}
    prove(rt, cancelled=4)


def test_a_broker_that_is_away_does_not_stop_seeding(project: Project, rt: Runtime, chosen: Pipeline) -> None:
    """Given a broker that is away, when jobs are seeded, then they are in the run, and the sweep publishes them."""
    cut_off = project.runtime(chosen, amqp_url="amqp://guest:guest@127.0.0.1:1/")

    done = seeding.seed(cut_off, "r", lines(4), whole=True)

    assert (done.added, done.published) == (4, False)
    backdate(rt, "messages", 60, "check_at")
    sweep.publish_unpublished(rt)
    pump(rt)
    prove(rt, terminal=4)
