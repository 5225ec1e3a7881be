"""`try`: run jobs through a pipeline in this process, without any service."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from pipeline_app.errors import NotFoundError
from pipeline_app.views.cli import jobfile
from pipeline_app.views.cli.common import EXIT_NO, Command, json_option
from pipeline_app.views.cli.render import (
    brief,
    compact,
    cut,
    duration,
    echo_json_array,
    indented,
    one_line,
    plural,
    styled,
    width,
)

if TYPE_CHECKING:
    from pipeline_app.control.trial import Step
    from pipeline_app.domain.pipeline import Pipeline


@click.command(
    "try",
    cls=Command,
    epilog="""\b
Examples:
  pipeline-app try survey books.jsonl
  pipeline-app try books.toml books.jsonl --json
  echo '{"job_id": "a1", "payload": "setup.py"}' | pipeline-app try survey -""",
)
@click.argument("pipeline")
@click.argument("file")
@json_option
def try_(pipeline: str, file: str, as_json: bool) -> int | None:
    """Run jobs here and now, without services.

    Takes the jobs of FILE through the stages of PIPELINE and shows what each stage makes of them. PIPELINE is one of
    celeryconfig.py, or a definition file. FILE has job lines, as for "run seed"; "-" is standard input. Neither
    MongoDB nor RabbitMQ is needed, and nothing is kept. What handlers print and log is shown on standard error. Exits
    1 if any job failed.
    """
    from pipeline_app.control import trial

    chosen = _pipeline(pipeline)
    logging.basicConfig(level=logging.INFO, format="log: %(message)s", stream=sys.stderr)
    tally = _Tally()
    steps = tally.of(_with_output_aside(trial.run(chosen, jobfile.read(file))))
    if as_json:
        echo_json_array(vars(step) for step in steps)
    else:
        for step in steps:
            _echo_step(step)
        click.echo(f"{plural(tally.jobs, 'job')} tried, {tally.failed:,} failed")
    return EXIT_NO if tally.failed else None


def _pipeline(name: str) -> Pipeline:
    from pipeline_app import settings
    from pipeline_app.application import load_pipelines

    if name.endswith((".toml", ".json")):
        return next(iter(load_pipelines([name]).values()))
    found = load_pipelines(settings.current().pipelines)
    if name not in found:
        known = ", ".join(sorted(found)) or "none: set `pipelines` in celeryconfig.py"
        raise NotFoundError(f"there is no pipeline {name!r}", hint=f"known pipelines: {known}")
    return found[name]


def _with_output_aside(steps: Iterator[Step]) -> Iterator[Step]:
    """The steps, made while whatever handlers print goes to standard error."""
    while True:
        with contextlib.redirect_stdout(sys.stderr):
            step = next(steps, None)
        if step is None:
            return
        yield step


class _Tally:
    """Counts jobs and failures while steps go by."""

    def __init__(self) -> None:
        self.failed = 0
        self._last: Any = None
        self.jobs = 0

    def of(self, steps: Iterator[Step]) -> Iterator[Step]:
        for step in steps:
            self.jobs += step.job_id != self._last
            self._last = step.job_id
            self.failed += step.outcome != "ok"
            yield step


def _echo_step(step: Step) -> None:
    where = f"{styled(one_line(step.job_id), bold=True)}  {step.stage}"
    took = duration(step.duration_s)
    if step.outcome == "ok":
        click.echo(cut(f"{where}  ok in {took}  {compact(step.result)}", width()))
        return
    what = f"would be dead-lettered ({step.kind})"
    if step.outcome == "would_retry":
        what = f"would be tried again in {duration(step.retry_in_s)}"
    elif step.outcome == "would_hold":
        what = "would close its target, and be held until that is open"
    click.echo(f"{where}  {styled('failed', fg='red')} in {took}, {what}: {brief(step.error) or step.kind}")
    if step.error is not None and step.kind != "invalid_input":  # there the message says it all
        for line in indented(step.error["traceback"]):
            click.echo(line)
