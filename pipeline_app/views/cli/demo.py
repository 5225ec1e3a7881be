"""`demo`: everything at once, on real files. What a newcomer types first.

Services that are missing, a worker for each stage, a run, its jobs, live progress, an account of all of it. However it
ends, no worker is left; if it is interrupted, neither are the services that it started.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline_app.errors import PipelineError, RefusedError, UsageError
from pipeline_app.views.cli.common import (
    EXIT_NO,
    Command,
    connection,
    interrupted_once,
    json_option,
    undisturbed,
)
from pipeline_app.views.cli.progress import run_progress
from pipeline_app.views.cli.render import brief, duration, echo_json, echo_table, plural, styled
from pipeline_app.views.cli.services import Provided, provide
from pipeline_app.views.cli.verify import echo_verification

if TYPE_CHECKING:
    from pipeline_app.control.accounts.verify import Verification
    from pipeline_app.control.sight.status import Status
    from pipeline_app.domain.pipeline import Pipeline
    from pipeline_app.runtime import Runtime

#: The pipeline that is shown.
PIPELINE = "survey"
#: Threads of each worker.
CONCURRENCY = 4
#: Dead letters that the summary lists.
LISTED = 20

Jobs = Callable[[Path | None], Iterator[dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class _Result:
    """What the demo did."""

    status: Status
    verification: Verification
    failures: list[dict[str, Any]]
    duration_s: float

    @property
    def ok(self) -> bool:
        return self.verification.ok and self.status.is_past(None)


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  pipeline-app demo
  pipeline-app demo ~/src/my-project
  pipeline-app demo --json | jq .states""",
)
@click.argument("path", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@json_option
def demo(path: Path | None, as_json: bool) -> int | None:
    """See it work: survey all Python files below PATH.

    PATH is a folder; without it, the standard library of this Python is taken. Starts the services that are missing and
    a worker for each stage, takes a job for each file through the three stages of the pipeline "survey", and accounts
    for every one. The workers are stopped at the end; services and run are left to be looked at. Files that are not
    Python end as dead letters: that is no failure of the demo.
    """
    survey, jobs = _application()
    if next(_readable(jobs(path)), None) is None:
        raise UsageError(f"there is no Python file below {path}")

    def tell(text: str) -> None:
        if not as_json:
            click.echo(text, err=True)

    provided: Provided | None = None
    try:
        with interrupted_once():
            provided = provide(tell)
            with connection(write=True, pipelines=True) as rt:
                result = _survey(rt, survey, _readable(jobs(path)), tell, silent=as_json)
    except KeyboardInterrupt as exc:
        with undisturbed():
            left = _clear_away(provided, tell)
        raise KeyboardInterrupt(f"{exc}; {left}") from exc
    if as_json:
        echo_json(_as_dict(result, provided))
    else:
        _echo_summary(result, provided)
    return None if result.ok else EXIT_NO


def _application() -> tuple[Pipeline, Jobs]:
    """The survey of this project: its pipeline, and what makes its jobs."""
    from pipeline_app import settings
    from pipeline_app.application import load_pipelines

    survey = load_pipelines(settings.current().pipelines).get(PIPELINE)
    module = None if survey is None else importlib.import_module(survey.first.handler.path.partition(":")[0])
    jobs = getattr(module, "jobs", None)
    if survey is None or jobs is None:
        raise UsageError(
            f"the demo shows the pipeline {PIPELINE!r}, which this project does not have",
            hint="call it in a clone of pipeline_app's own repository",
        )
    return survey, jobs


def _readable(jobs: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    try:
        yield from jobs
    except OSError as exc:
        raise UsageError(f"cannot read {exc.filename}: {exc.strerror}") from exc


def _survey(
    rt: Runtime, survey: Pipeline, jobs: Iterator[dict[str, Any]], tell: Callable[[str], None], *, silent: bool
) -> _Result:
    from pipeline_app.control import runs
    from pipeline_app.control.accounts.verify import verify
    from pipeline_app.control.seed import seeding
    from pipeline_app.control.sight import ledger
    from pipeline_app.control.sight.status import status as ask

    run = f"demo-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    with _workers(survey, tell) as check:
        runs.create_run(rt, run, survey)
        begin = time.monotonic()
        with run_progress(silent=silent) as show:

            def look(status: Status) -> None:
                check()
                show(status)

            seeding.seed(rt, run, jobs, progress=lambda _: look(ask(rt, run, queues=False)))
            status = runs.wait(rt, run, progress=look)
        took = time.monotonic() - begin
        tell("stopping the workers")
    # Now that nothing consumes, the broker can be compared, too.
    return _Result(
        status=status,
        verification=verify(rt, run),
        failures=ledger.failures(rt, run, limit=LISTED),
        duration_s=took,
    )


@contextmanager
def _workers(survey: Pipeline, tell: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """A worker for each stage; yields a check that all of them live, and stops them however the block is left."""
    from pipeline_app.local import processes, workers

    names = [f"demo.{stage.name}" for stage in survey.stages]
    ours = True

    def check() -> None:
        alive = {worker.name for worker in workers.running()}
        for worker in started:
            if worker.name not in alive:
                raise PipelineError(f"worker {worker.name} ended:\n{processes.tail(worker.log)}", hint=worker.log)

    try:
        tell(f"starting {plural(len(names), 'worker')}")
        try:
            stages = [f"{survey.name}.{stage.name}" for stage in survey.stages]
            started = workers.start(stages, names=names, pool="threads", concurrency=CONCURRENCY)
        except RefusedError:
            ours = False  # another demo's workers have these names
            raise
        yield check
    finally:
        if ours:
            with undisturbed():
                workers.stop(names)


def _clear_away(provided: Provided | None, tell: Callable[[str], None]) -> str:
    """After an interruption: services that this demo started go, too. Says what is left."""
    from pipeline_app.local import services

    if provided is None:
        return "nothing was left running"
    if not provided.started:
        return "no worker is left, the services run on"
    services.down(tell)
    return "nothing was left running; the run is kept: pipeline-app up brings it back"


def _as_dict(result: _Result, provided: Provided) -> dict[str, Any]:
    status, found = result.status, result.verification
    return {
        "run": status.run,
        "ok": result.ok,
        "seeded": found.seeded,
        "states": found.states,
        "stages": [{"stage": row.stage, "completed": row.completed} for row in status.stages],
        "duration_s": round(result.duration_s, 3),
        "jobs_per_s": round(found.seeded / result.duration_s, 1),
        "failures": result.failures,
        "verification": found.as_dict(),
        "services": vars(provided),
    }


def _echo_summary(result: _Result, provided: Provided) -> None:
    status, found = result.status, result.verification
    executions = sum(row.completed for row in status.stages)
    rate = f"{found.seeded / result.duration_s:,.0f} files/s, {executions / result.duration_s:,.0f} stage executions/s"
    click.echo()
    click.echo(styled(f"{plural(found.seeded, 'file')} in {duration(result.duration_s)}", bold=True) + f"  ({rate})")
    echo_verification(found)
    if result.failures:
        click.echo()
        rows = [[row["job_id"], row["stage"], row["kind"], brief(row["error"])] for row in result.failures]
        echo_table(["dead letter", "stage", "kind", "error"], rows, shrink=["dead letter", "error"])
        more = found.states["dead_lettered"] - len(rows)
        if more > 0:
            click.echo(f"and {more:,} more")
    click.echo()
    click.echo(styled("look further", bold=True))
    hints = [
        ("pipeline-app run status last", "where the jobs stand"),
        ("pipeline-app run results last --json", "what came out, a line for each file"),
        ("pipeline-app failures last", "what was refused, and why"),
        ("pipeline-app events last", "what happened"),
    ]
    if provided.embedded:
        hints.append(("pipeline-app down", "stop the services; their data stay in .pipeline/"))
    for command, what in hints:
        click.echo(f"  {command:<38}{what}")
