"""A run with a bound: seeders wait while so many jobs are unfinished; nothing else ever does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline_app import Pipeline, Stage
from pipeline_app.control import runs
from pipeline_app.control.changes import cancelling
from pipeline_app.control.seed import paging, seeding
from pipeline_app.control.sight.status import status
from pipeline_app.domain.pipeline import load_definition
from pipeline_app.domain.plan import RunPlan
from pipeline_app.errors import DefinitionError, RefusedError, UsageError
from pipeline_app.runtime import Runtime
from pipeline_app.store import counters, manifests
from tests.integration.helpers import as_row, double, in_threads, lines, new_run, pipeline, prove, pump
from tests.integration.proxy import MongoProxy
from tests.integration.replays import carry_out, start
from tests.integration.worker_run import STAGES
from tests.project import Project, eventually

pytestmark = pytest.mark.usefixtures("small_pages")

BOUND = 5


@pytest.fixture
def chosen() -> Pipeline:
    return pipeline(Stage(double, chunk=2), Stage(as_row, chunk=3), bound=BOUND)


@pytest.fixture
def rt(project: Project, chosen: Pipeline) -> Runtime:
    return new_run(project, chosen)


def unfinished(rt: Runtime) -> int:
    return counters.unfinished(rt.store, "r")


class Seeder:
    """A seeding under way in a thread."""

    def __init__(self, rt: Runtime, rows: Any, **options: Any) -> None:
        self.added: list[int] = []
        self.waits = threading.Event()
        self.said: list[str] = []
        self.result: seeding.Seeded | None = None
        self._thread = threading.Thread(target=self._run, args=(rt, rows), kwargs=options)
        self._thread.start()

    def _run(self, rt: Runtime, rows: Any, **options: Any) -> None:
        self.result = seeding.seed(
            rt, "r", rows, progress=self.added.append, waiting=self._note, **options
        )

    def _note(self, why: str) -> None:
        self.said.append(why)
        self.waits.set()

    def join(self) -> seeding.Seeded:
        self._thread.join(30)
        assert self.result is not None
        return self.result


def test_a_seeder_waits_for_room(rt: Runtime) -> None:
    """Given more jobs than the bound, then never more of them are unfinished, and they are added as others end."""
    seeder = Seeder(rt, lines(20))
    assert seeder.waits.wait(20)

    # It says so, and so does the status
    assert unfinished(rt) == BOUND
    assert seeder.said[0] == "5 jobs are unfinished, and the bound of run r is 5"
    now = status(rt, "r", queues=False)
    assert (now.state, now.seeded) == ("seeding", BOUND)
    assert now.warnings[0].startswith("seeding waits since ")
    assert now.warnings[0].endswith(": 5 jobs are unfinished, and that is the run's bound")

    most = BOUND
    while seeder.result is None:
        pump(rt)
        most = max(most, unfinished(rt))
    pump(rt)
    assert most == BOUND
    assert seeder.join().added == 20
    assert seeder.added[-1] == 20
    prove(rt, terminal=20)
    assert status(rt, "r", queues=False).warnings == []
    assert status(rt, "r").state == "complete"


def test_two_seeders_exceed_it_by_a_page_each_at_most(project: Project, rt: Runtime, chosen: Pipeline) -> None:
    """Given two seeders at once, then together they exceed the bound by no more than a page each."""
    both = threading.Barrier(2)
    second = project.runtime(chosen)

    def at_once(prefix: str) -> Iterator[dict[str, Any]]:
        both.wait(20)
        yield from ({"job_id": f"{prefix}{n}", "payload": n} for n in range(20))

    seeders = [Seeder(mine, at_once(name)) for mine, name in ((rt, "a"), (second, "b"))]
    assert all(seeder.waits.wait(20) for seeder in seeders)
    most = unfinished(rt)
    while any(seeder.result is None for seeder in seeders):
        pump(rt)
        most = max(most, unfinished(rt))

    assert BOUND <= most <= BOUND + 2 * paging.PAGE
    assert sum(seeder.join().added for seeder in seeders) == 40
    pump(rt)
    prove(rt, terminal=40)


def test_what_workers_make_never_waits(rt: Runtime) -> None:
    """Given a run that is full, then next stages and replays go on all the same."""
    seeding.seed(rt, "r", lines(2, payload=lambda n: "no number"))
    pump(rt)
    prove(rt, dead_lettered=2)
    seeder = Seeder(rt, lines(8)[2:])
    assert seeder.waits.wait(20)
    assert unfinished(rt) == BOUND

    carry_out(rt, start(rt)["operation"])

    assert unfinished(rt) == BOUND + 2
    while seeder.result is None:
        pump(rt)
    pump(rt)
    prove(rt, terminal=6, dead_lettered=2)


def test_jobs_that_are_there_need_no_room(rt: Runtime) -> None:
    """Given a run that is full, when the same jobs are seeded again, then they are passed over without waiting."""
    seeding.seed(rt, "r", lines(BOUND))

    done = seeding.seed(rt, "r", lines(BOUND), skip_existing=True)

    assert (done.added, done.skipped) == (0, BOUND)
    pump(rt)
    prove(rt, terminal=BOUND)


def test_a_cancelled_run_has_room(rt: Runtime) -> None:
    """Given a seeder that waits, when the run is cancelled, then it does not wait for ever."""
    seeder = Seeder(rt, lines(8))
    assert seeder.waits.wait(20)

    cancelling.cancel(rt, "r")
    while seeder.result is None:
        cancelling.sweep(rt)
    cancelling.sweep(rt)

    prove(rt, cancelled=8)


def test_a_whole_batch_is_refused(rt: Runtime) -> None:
    """Given a bound, then jobs of which none may start before all are in are refused, with the remedy."""
    with pytest.raises(RefusedError, match="run r has a bound of 5") as caught:
        seeding.seed(rt, "r", lines(2), whole=True)
    assert caught.value.hint == "seed them as a stream: whole=False"
    prove(rt)


def test_a_store_that_is_away_while_a_seeder_waits(
    project: Project, rt: Runtime, chosen: Pipeline, mongo_proxy: MongoProxy
) -> None:
    """Given a seeder that waits, when the store goes away and comes back, then it goes on."""
    cut_off = project.runtime(chosen, mongodb_url=mongo_proxy.address(project.mongodb_url))
    seeder = Seeder(cut_off, lines(8))
    assert seeder.waits.wait(20)

    mongo_proxy.cut()
    said = len(seeder.said)
    eventually(lambda: len(seeder.said) > said + 1)
    mongo_proxy.restore()

    while seeder.result is None:
        pump(rt)
    pump(rt)
    prove(rt, terminal=8)


def test_a_seeder_that_waits_is_stopped(project: Project) -> None:
    """Given a seeder that waits, when Ctrl-C stops it, then it says what is in, and the same jobs can be seeded on."""
    project.write("stages.py", STAGES.replace("CHUNK", "2"))
    assert project.json("run", "init", "r", "--pipeline", "demo", "--bound", "3")["bound"] == 3
    project.write("jobs.jsonl", "".join(json.dumps({"job_id": f"j{n}", "payload": {}}) + "\n" for n in range(10)))
    rt = project.runtime()
    command = ["pipeline-app", "run", "seed", "r", "--jobs", "jobs.jsonl"]
    with subprocess.Popen(
        command, cwd=project.folder, env=project.env, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as seeder:
        eventually(lambda: "waits_since" in (rt.store.db.seed_batches.find_one({"run": "r"}) or {}))
        assert seeder.stderr is not None
        text = next(line for line in seeder.stderr if "seeding waits" in line)
        os.kill(seeder.pid, signal.SIGINT)
        text += seeder.stderr.read()
    assert seeder.returncode == 130
    assert "seeding waits: 3 jobs are unfinished, and the bound of run r is 3" in text
    assert "interrupted: 3 jobs were added; --skip-existing goes on" in text
    assert len(status(rt, "r", queues=False).interrupted) == 1

    # A file is a stream here: its jobs start while others are not in yet
    with project.worker():
        done = project.json("run", "seed", "r", "--jobs", "jobs.jsonl", "--skip-existing", timeout=90)
        assert (done["added"], done["skipped"]) == (7, 3)
        assert project.json("run", "wait", "r", "--timeout", "60")["states"]["terminal"] == 10
    assert project.json("run", "verify", "r")["ok"]


def test_a_bad_line_in_a_file_adds_nothing(project: Project) -> None:
    """Given a bound and a file with a bad line, then nothing is added; a job that is there ends it where it stands."""
    project.json("run", "init", "r", "--pipeline", "demo", "--bound", "100")
    good = "".join(json.dumps({"job_id": f"j{n}", "payload": {"n": n}}) + "\n" for n in range(3))

    project.write("jobs.jsonl", good + "{\n")
    bad = project.cli("run", "seed", "r", "--jobs", "jobs.jsonl")
    assert (bad.returncode, "nothing of the file was added" in bad.stderr) == (1, True)
    assert project.json("run", "status", "r")["seeded"] == 0

    project.write("jobs.jsonl", good)
    project.json("run", "seed", "r", "--jobs", "jobs.jsonl")
    twice = project.cli("run", "seed", "r", "--jobs", "jobs.jsonl")
    assert (twice.returncode, "0 jobs were added before it" in twice.stderr) == (1, True)


@pytest.mark.parametrize(
    ("of_pipeline", "of_run", "bound"), [(None, None, None), (7, None, 7), (7, 3, 3), (None, 4, 4)]
)
def test_where_a_bound_comes_from(
    project: Project, of_pipeline: int | None, of_run: int | None, bound: int | None
) -> None:
    """Given a bound of the pipeline, of the run, or none, then the run's own is the word that counts."""
    made = pipeline(double, bound=of_pipeline)
    rt = project.runtime(made)

    runs.create_run(rt, "r", made, bound=of_run)

    assert RunPlan.of(manifests.get(rt.store, "r")).bound == bound
    # Workers need not know it: it may be changed while runs go on.
    assert made.hash == Pipeline(made.name, made.stages).hash


def test_a_definition_file_has_them_too(project: Project) -> None:
    text = 'name = "b"\nbound = 9\norder_partitions = 3\n[[stages]]\nhandler = "posixpath:basename"\n'
    path = project.write("bounded.toml", text)
    made = load_definition(path)
    assert (made.bound, made.order_partitions) == (9, 3)


@pytest.mark.parametrize("bound", [0, -1, True, 2.5, "7"])
def test_what_is_no_bound(project: Project, bound: Any) -> None:
    made = pipeline(double)
    rt = project.runtime(made)
    with pytest.raises(UsageError, match="a bound is a whole number from 1"):
        runs.create_run(rt, "r", made, bound=bound)
    with pytest.raises(DefinitionError, match="bound is a whole number from 1"):
        Pipeline("p", made.stages, bound=bound)


def test_unfinished_jobs_are_counted_at_one_instant(rt: Runtime) -> None:
    """Given jobs that travel from one counter to another, then every look counts each of them once."""
    place = {"run": "r", "stage": "double", "partition": "p"}
    rt.store.db.run_counters.insert_many(
        [{"_id": f"{n:05}", **place, "worker": f"w{n}", "states": {"pending": 1}} for n in range(5000)]
    )
    looks: list[int] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            looks.append(unfinished(rt))

    def travel() -> None:
        for step in range(300):
            way = (1, -1) if step % 2 else (-1, 1)
            with rt.store.session() as session, session.start_transaction():
                for name, number in zip(("00000", "04999"), way, strict=True):
                    change = {"$inc": {"states.pending": number * 1000}}
                    rt.store.db.run_counters.update_one({"_id": name}, change, session=session)
        ended.set()

    in_threads(travel, look, look)

    assert set(looks) == {5000}
