"""Looking at a run while it goes on: `run status`, `run wait`, `run watch`."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from pipeline_app.domain.states import JobState
from pipeline_app.views.cli.common import EXIT_NO, Command, connection, json_option, patiently, run_argument
from pipeline_app.views.cli.progress import Show, is_watched, run_progress, unfinished
from pipeline_app.views.cli.render import (
    echo_error,
    echo_json,
    echo_json_line,
    echo_table,
    echo_warning,
    iso,
    number,
    plural,
    styled,
)

if TYPE_CHECKING:
    from pipeline_app.control.sight.status import Status
    from pipeline_app.runtime import Runtime

#: How often `watch` looks.
LOOK_EVERY_S = 1.0


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  pipeline-app run status last
  pipeline-app run status last --watch
  pipeline-app run status books-1 --json | jq .states""",
)
@run_argument
@click.option("--watch", "live", is_flag=True, help='Go on until RUN is done, as "run watch" does.')
@json_option
def status(run: str, live: bool, as_json: bool) -> None:
    """Show where the jobs of RUN stand.

    RUN is a run's name, or "last" for the newest. Counts come from counters: it is as fast for ten million jobs as for
    ten. Problems, such as a queue with work that nothing consumes, are shown as warnings.
    """
    from pipeline_app.control.sight.status import status as ask

    if live:
        _watch(run, as_json)
        return
    with connection() as rt:
        found = ask(rt, run)
    if as_json:
        echo_json(found.as_dict())
    else:
        echo_status(found)


def echo_status(found: Status) -> None:
    """A status as text."""
    click.echo(f"{styled(f'run {found.run}', bold=True)}  pipeline {found.pipeline}  {found.state}")
    click.echo(f"{plural(found.seeded, 'job')}: {_counts(found)}")
    click.echo()
    present = [state for state in JobState if found.states[state] and state != JobState.TERMINAL]
    headers = ["stage", "completed", *map(str, present), "workers", "concurrency"]
    echo_table(
        headers,
        [
            [row.stage, row.completed, *(row.states[state] for state in present), row.workers, row.concurrency]
            for row in found.stages
        ],
    )
    queues = [part for row in found.stages for part in row.partitions if part.ready]
    if queues:
        click.echo()
        rows = [[part.queue, part.ready, part.consumers] for part in queues]
        echo_table(["queue", "messages ready", "consumers"], rows, shrink=["queue"])
    for text in found.warnings:
        echo_warning(text)


def _counts(found: Status) -> str:
    return ", ".join(f"{count:,} {state}" for state, count in found.states.items() if count) or "none"


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  pipeline-app run wait last
  pipeline-app run wait books-1 --timeout 600 --strict && ./next-step""",
)
@run_argument
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0), metavar="S", help="Give up after S seconds.")
@click.option("--stage", metavar="STAGE", help="Wait only until every job is past this stage.")
@click.option("--strict", is_flag=True, help="Dead letters count as a failure.")
@json_option
def wait(run: str, timeout_s: float | None, stage: str | None, strict: bool, as_json: bool) -> int | None:
    """Wait until RUN is done.

    That is when every job is terminal, dead-lettered or cancelled. With --stage: until every job is past that stage.
    Exits 0 when that is so, and 1 when the time is over or when a seed batch was interrupted: then nobody knows
    whether all jobs are in. With --strict also if there are dead letters. While MongoDB is away it goes on waiting.
    """
    from pipeline_app.control.sight.status import status as ask

    with connection() as rt:
        with run_progress(silent=as_json) as show:
            found = _wait(rt, run, timeout_s, stage, show)
        outcome = _outcome(found, stage, strict)
        # Once more, with what the broker says: that may be why it is not done.
        warnings = ask(rt, found.run).warnings if outcome == "timeout" else []
    if as_json:
        echo_json({**found.as_dict(), "done": outcome is None, "outcome": outcome or "done", "warnings": warnings})
    elif outcome is None:
        click.echo(f"run {found.run}: {plural(found.seeded, 'job')}: {_counts(found)}")
    else:
        for text in warnings:
            echo_warning(text)
        echo_error(outcome, *_explained(found, outcome, timeout_s), as_json=False)
    return None if outcome is None else EXIT_NO


def _wait(rt: Runtime, run: str, timeout_s: float | None, stage: str | None, show: Show) -> Status:
    from pipeline_app.control.runs import wait as wait_for

    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    name = run

    def note(found: Status) -> None:
        nonlocal name
        name = found.run  # "last" stays the run that it was at first
        show(found)

    def ask() -> Status:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        return wait_for(rt, name, timeout_s=left, stage=stage, progress=note)

    return patiently(ask, deadline=deadline)


def _outcome(found: Status, stage: str | None, strict: bool) -> str | None:
    """Why the answer is no: interrupted, timeout or dead_letters; None if it is yes."""
    if found.interrupted:
        return "interrupted"
    if not found.is_past(stage):
        return "timeout"
    names = [row.stage for row in found.stages]
    looked_at = found.stages if stage is None else found.stages[: names.index(stage) + 1]
    dead = sum(row.states[JobState.DEAD_LETTERED] for row in looked_at)
    return "dead_letters" if strict and dead else None


def _explained(found: Status, outcome: str, timeout_s: float | None) -> tuple[str, str | None]:
    if outcome == "interrupted":
        what = f"seed batch {', '.join(found.interrupted)} of run {found.run} was interrupted"
        return what, f"seed the same jobs again: pipeline-app run seed {found.run} --jobs FILE --skip-existing"
    if outcome == "timeout":
        open_batches = f"; seed batch {', '.join(found.seeding)} is still open" if found.seeding else ""
        left = unfinished(found) or "no jobs left"
        return f"run {found.run} is not done after {timeout_s or 0:g} s: {left}{open_batches}", None
    dead = number(found.states[JobState.DEAD_LETTERED])
    return f"{dead} jobs are dead-lettered", f"pipeline-app failures {found.run} shows why"


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  pipeline-app run watch last
  pipeline-app run watch last --json | jq --unbuffered .states.pending""",
)
@run_argument
@json_option
def watch(run: str, as_json: bool) -> None:
    """Watch RUN live until it is done.

    A bar for each stage, with rate and time to go. Ctrl-C stops watching; the run goes on. With --json: the status in
    a line, whenever it changed, at most once a second. While MongoDB is away it goes on watching.
    """
    _watch(run, as_json)


def _watch(run: str, as_json: bool) -> None:
    from pipeline_app.control.sight.status import status as ask

    before: dict[str, Any] | None = None
    with connection() as rt, run_progress(silent=as_json) as show:
        while True:
            found = patiently(partial(ask, rt, run))
            run = found.run  # "last" stays the run that it was at first
            show(found)
            now = {**found.as_dict(), "as_of": None}
            if now != before:
                _tell(found, as_json)
            before = now
            if not found.seeding and found.at_rest == found.seeded:
                return
            time.sleep(LOOK_EVERY_S)


def _tell(found: Status, as_json: bool) -> None:
    """A line for a status that changed, where no bars are drawn."""
    if as_json:
        echo_json_line(found.as_dict())
    elif not is_watched():
        click.echo(f"{iso(found.as_of)}  {found.state}  {plural(found.seeded, 'job')}: {_counts(found)}")
