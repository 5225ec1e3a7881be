"""Trying a pipeline without services: what each stage would make of a job, judged as a worker judges it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from pipeline_app import Job, JobLine, PermanentError, Pipeline, RateLimited, Retry, Stage
from pipeline_app.control import trial
from pipeline_app.errors import BadJobLineError


class Item(BaseModel):
    n: int


def double(item: Item, job: Job) -> dict[str, Any]:
    return {"n": item.n * 2, "attempt": job.attempt, "kind": job.tags.get("kind")}


def fail(item: dict[str, Any]) -> dict[str, Any]:
    if item["n"] == 2:
        raise PermanentError("two")
    if item["n"] == 4:
        raise ValueError("four")
    if item["n"] == 6:
        raise SystemExit("six")
    if item["n"] == 8:
        return {"handle": object()}
    if item["n"] == 10:
        return {"text": "x" * 16 * 1024 * 1024}
    return item


PIPELINE = Pipeline("p", [Stage(double), Stage(fail, retry=Retry(attempts=2, backoff="10s", jitter=0))])


def tried(pipeline: Pipeline = PIPELINE, **line: Any) -> list[trial.Step]:
    return list(trial.run(pipeline, [JobLine(job_id="a", **line)]))


def test_a_job_that_goes_through() -> None:
    first, last = tried(payload={"n": 50}, tags={"kind": "x"})
    assert (first.stage, first.outcome, first.partition) == ("double", "ok", "kind__x")
    assert first.result == {"n": 100, "attempt": 1, "kind": "x"}
    assert (last.stage, last.outcome, last.result) == ("fail", "ok", first.result)


@pytest.mark.parametrize(
    ("n", "kind", "type_"),
    [
        (1, "permanent", "pipeline_app.errors.PermanentError"),
        (4, "invalid_result", "pipeline_app.errors.InvalidResultError"),
        (5, "invalid_result", "pipeline_app.errors.InvalidResultError"),
    ],
)
def test_what_no_second_attempt_mends_would_be_dead(n: int, kind: str, type_: str) -> None:
    last = tried(payload={"n": n})[-1]
    assert (last.stage, last.outcome, last.kind) == ("fail", "dead_lettered", kind)
    assert last.error is not None
    assert last.error["type"] == type_
    assert last.retry_in_s is None


@pytest.mark.parametrize("n", [2, 3])
def test_other_errors_would_be_tried_again(n: int) -> None:
    last = tried(payload={"n": n})[-1]
    assert (last.outcome, last.kind, last.retry_in_s) == ("would_retry", None, 10.0)


def test_a_rate_limit_would_hold_the_job() -> None:
    def limited(n: int) -> int:
        raise RateLimited(retry_after=5)

    last = tried(Pipeline("p", [Stage(limited, retry=Retry(attempts=1))]), payload=1)[-1]
    assert (last.outcome, last.kind, last.retry_in_s) == ("would_hold", None, None)
    assert last.error is not None


def test_without_another_attempt_it_is_exhausted() -> None:
    once = Pipeline("p", [Stage(double), Stage(fail, retry=Retry(attempts=1))])
    last = tried(once, payload={"n": 2})[-1]
    assert (last.outcome, last.kind) == ("dead_lettered", "exhausted")


def test_an_input_that_does_not_fit() -> None:
    (only,) = tried(payload={"n": "many"})
    assert (only.stage, only.outcome, only.kind) == ("double", "dead_lettered", "invalid_input")


def test_a_job_past_its_time() -> None:
    (only,) = tried(payload={"n": 1}, expires_at="2020-01-01")
    assert (only.outcome, only.kind, only.error) == ("dead_lettered", "expired", None)


def test_a_payload_that_seeding_would_refuse() -> None:
    with pytest.raises(BadJobLineError, match="job 'a': its payload cannot be stored"):
        tried(payload=2**70)


def test_steps_come_as_they_are_made() -> None:
    # Given more jobs than anybody would wait for
    def endless() -> Iterator[JobLine]:
        number = 0
        while True:
            number += 1
            yield JobLine(job_id=number, payload={"n": 50})  # type: ignore[arg-type]  # numbers are taken as ids

    # Then the first steps are there at once
    steps = trial.run(PIPELINE, endless())
    assert [next(steps).job_id for _ in range(4)] == ["1", "1", "2", "2"]


HANDLERS = '''
from pipeline_app import Job, Pipeline, Stage


def shout(text: str, job: Job) -> str:
    print("printed by the handler")
    job.log.info("logged by the handler")
    return text.upper()


loud = Pipeline("loud", [Stage(shout)])
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project with one pipeline, and a file of jobs."""
    (tmp_path / "celeryconfig.py").write_text('pipelines = ["words:loud"]\n')
    (tmp_path / "words.py").write_text(HANDLERS)
    (tmp_path / "loud.toml").write_text('name = "again"\n[[stages]]\nhandler = "words:shout"\n')
    (tmp_path / "jobs.jsonl").write_text('{"job_id": "a", "payload": "hello"}\n')
    return tmp_path


def command(folder: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`pipeline-app try ARGUMENTS` where no service answers."""
    nowhere = {"AMQP_URL": "amqp://127.0.0.1:1//", "MONGODB_URL": "mongodb://127.0.0.1:1/x"}
    return subprocess.run(
        [sys.executable, "-m", "pipeline_app.views.cli.main", "try", *arguments],
        cwd=folder,
        env=nowhere,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


@pytest.mark.parametrize("pipeline", ["loud", "loud.toml"])
def test_the_command_needs_no_service_and_prints_nothing_but_json(folder: Path, pipeline: str) -> None:
    done = command(folder, pipeline, "jobs.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    (step,) = json.loads(done.stdout)
    assert (step["job_id"], step["outcome"], step["result"]) == ("a", "ok", "HELLO")
    assert "printed by the handler" in done.stderr
    assert "logged by the handler" in done.stderr


def test_the_command_takes_standard_input_and_says_no_if_a_job_fails(folder: Path) -> None:
    done = command(folder, "loud", "-", input='{"job_id": "a", "payload": 5}\n')
    assert done.returncode == 1
    assert "would be dead-lettered (invalid_input)" in done.stdout
    assert "1 job tried, 1 failed" in done.stdout


def test_an_unknown_pipeline_names_those_that_are_known(folder: Path) -> None:
    done = command(folder, "quiet", "jobs.jsonl", "--json")
    assert done.returncode == 1
    assert json.loads(done.stderr)["error"] == {
        "code": "not_found",
        "message": "there is no pipeline 'quiet'",
        "hint": "known pipelines: loud",
    }
