"""Which partitions a worker consumes: `-Q`, `--stage`, `--select`, `--skip`, and how its record can stop it."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from pipeline_app import Pipeline, Stage
from pipeline_app.control import workforce
from pipeline_app.control.seed import seeding
from pipeline_app.domain.selector import Selectors
from pipeline_app.errors import UsageError
from pipeline_app.runtime import Runtime
from pipeline_app.store import workers
from pipeline_app.transport.topology import IDLE_QUEUE
from pipeline_app.worker.options import selection
from tests.integration.helpers import as_row, double
from tests.project import Project, eventually

SURVEY = Pipeline("survey", [Stage(double, name="load"), Stage(as_row, name="analyze")])
PIPELINES = {"survey": SURVEY}


def partition(stage: str, **tags: str) -> dict[str, Any]:
    """A partition's document."""
    key = "".join(f".{name}__{value}" for name, value in tags.items())
    return {"_id": f"survey.{stage}{key}", "pipeline": "survey", "stage": stage, "tags": tags}


ROWS = [partition(stage, **tags) for stage in ("load", "analyze") for tags in ({}, {"kind": "a"}, {"kind": "b"})]


def wanted(names: list[str] | None = None, **options: Any) -> set[str]:
    """What a worker consumes when all partitions are there."""
    return selection(names, PIPELINES, options).wanted(ROWS)


def test_what_is_named_is_consumed() -> None:
    everything = {row["_id"] for row in ROWS}
    load = {name for name in everything if name.startswith("survey.load")}

    # Without a word: all stages; and the stages alone as long as there are no partitions
    assert wanted() == everything
    assert selection(None, PIPELINES, {}).wanted([]) == {"survey.load", "survey.analyze"}
    # A stage brings its partitions, however it is named, and several add up
    assert wanted(["survey.load"]) == wanted(stage=("survey.load",)) == load
    assert wanted(["survey.load"], stage=("survey.analyze",)) == everything
    # A partition is that one
    assert wanted(["survey.load.kind__a"]) == {"survey.load.kind__a"}
    # What is none of ours is left to Celery, and the idle queue is nobody's
    chosen = selection(["celery", "survey.load.kind__a", IDLE_QUEUE], PIPELINES, {})
    assert (chosen.others, chosen.exact, chosen.stages) == ({"celery"}, {"survey.load.kind__a"}, set())
    assert [selection(None, PIPELINES, {}).everything, selection([], PIPELINES, {}).everything] == [True, False]


def test_selectors_choose_among_the_partitions_of_the_stages() -> None:
    load = {"stage": ("survey.load",)}
    assert wanted(**load, select=("kind=a",)) == {"survey.load.kind__a"}
    assert wanted(**load, skip=("kind=a",)) == {"survey.load", "survey.load.kind__b"}
    assert wanted(**load, skip=("kind=a", "kind=b")) == {"survey.load"}
    assert wanted(**load, select=("kind=a", "lang=en")) == set()
    assert wanted(**load, select=("kind=a",), skip=("kind=a",)) == set()
    assert wanted(select=("kind=b",)) == {"survey.load.kind__b", "survey.analyze.kind__b"}
    # What was named one by one was meant
    assert wanted(["survey.load.kind__b"], select=("kind=a",)) == {"survey.load.kind__b"}


def test_selectors_are_kept_as_they_can_be_given_again() -> None:
    given = Selectors.parse(["b=1", "a=x=y"], ["d=2", "c=3", "d=4"])
    select, skip = given.written()
    assert (select, skip) == (["a=x=y", "b=1"], ["c=3", "d=2", "d=4"])
    assert Selectors.parse(select, skip) == given
    assert not Selectors.parse([], [])
    with pytest.raises(UsageError, match="no job has both"):
        Selectors.parse(["a=1", "a=2"], [])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--stage", "demo.fist"), "there is no stage 'demo.fist': the stages are demo.first, demo.second, demo.third"),
        (("--select", "kind"), "not a selector: 'kind'"),
        (("--select", "kind=a", "--select", "kind=b"), "no job has both kind=a and kind=b"),
        (("--skip", "=a"), "not a selector: '=a'"),
    ],
)
def test_a_worker_that_would_consume_nothing_by_a_typing_error(
    project: Project, arguments: tuple[str, ...], says: str
) -> None:
    done = project.run("celery", "-A", "pipeline_app", "worker", *arguments)
    assert done.returncode == 2
    assert says in " ".join(done.stderr.split())


def test_new_partitions_are_followed_if_they_are_selected(project: Project) -> None:
    """Given workers with selectors, when partitions come, each has its own within a second or so."""
    project.seed("r", [{"job_id": "a0", "payload": {"n": 0}, "tags": {"kind": "a"}}])
    rt = project.runtime()
    with (
        project.worker("--stage", "demo.first", "--skip", "kind=b") as most,
        project.worker("--stage", "demo.first", "--select", "kind=b") as some,
    ):
        eventually(lambda: len(project.calls()) == 1)

        # When jobs of new partitions come
        begin = time.monotonic()
        tags = {"b0": "b", "c0": "c"}
        lines = [{"job_id": job, "payload": {"n": 0}, "tags": {"kind": kind}} for job, kind in tags.items()]
        seeding.seed(rt, "r", lines)

        # Then those workers run them that were started for them
        eventually(lambda: len(project.calls()) == 3)
        took = time.monotonic() - begin
        ran = {line.split()[1]: int(line.split()[3]) for line in project.calls()}
        assert ran == {"a0": most.process.pid, "b0": some.process.pid, "c0": most.process.pid}
        assert took < 10  # a second on a machine that has time

        # and their records say what they were started for
        rows = {row["pid"]: row for row in workers.alive(rt.store)}
        assert (rows[most.process.pid]["select"], rows[most.process.pid]["skip"]) == ([], ["kind=b"])
        assert (rows[some.process.pid]["select"], rows[some.process.pid]["skip"]) == (["kind=b"], [])
        assert {tuple(row["stages"]) for row in rows.values()} == {("demo.first",)}


def test_a_worker_that_was_frozen_when_it_was_asked_to_stop(project: Project) -> None:
    """Given a worker that does not move for longer than its lease, then it stops when it is back.

    Another worker ended its record meanwhile: what was asked of it was meant for the process.
    """
    rt = project.runtime()
    with project.worker("--stage", "demo.second"), project.worker("--stage", "demo.first") as frozen:
        (row,) = workforce.of_stage(rt, "demo.first")
        os.kill(frozen.process.pid, signal.SIGSTOP)
        workforce.ask_to_stop(rt, [row], now=False)
        assert workforce.still_running(rt, [row], now=False)
        eventually(lambda: workers.by_ids(rt.store, [row["_id"]])[row["_id"]]["state"] == "stale", timeout=40)
        assert workforce.still_running(rt, [row], now=False) == []

        os.kill(frozen.process.pid, signal.SIGCONT)

        assert frozen.process.wait(30) == 0
        assert "asked to stop (warm)" in frozen.text


def test_a_worker_that_has_begun_anew_is_asked_again(rt: Runtime) -> None:
    """Given a process that has another incarnation since it was asked, then the new one is asked, too."""
    shown = {"worker": "w@h", "host": "h", "pid": 7, "queues": ["survey.load"]}
    workers.register(rt.store, "one", {**shown, "state": "running", "ended_at": None})
    (row,) = workforce.of_stage(rt, "survey.load")
    workforce.ask_to_stop(rt, [row], now=False)
    workers.end(rt.store, "one", "stopped")
    workers.register(rt.store, "two", {**shown, "state": "running", "ended_at": None})
    workers.register(rt.store, "other", {**shown, "pid": 8, "state": "running", "ended_at": None})

    assert [left["_id"] for left in workforce.still_running(rt, [row], now=True)] == ["two"]

    assert [workers.stop_wanted(rt.store, name) for name in ("one", "two", "other")] == ["warm", "now", None]
    # What was asked to go at once is not told to take its time
    workforce.ask_to_stop(rt, workforce.of_stage(rt, "survey.load"), now=False)
    assert [workers.stop_wanted(rt.store, name) for name in ("two", "other")] == ["now", "warm"]


@pytest.fixture
def rt(project: Project) -> Runtime:
    """A runtime that knows the survey."""
    return project.runtime(SURVEY)
