"""The group `stage`: detached workers for a stage of a run, here; stopping workers of it, anywhere."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING

import click

from pipeline_app.domain.selector import Selectors
from pipeline_app.errors import NotFoundError, UsageError
from pipeline_app.views.cli import detached
from pipeline_app.views.cli.common import Group, connection, json_option
from pipeline_app.views.cli.detached import Done, Row, Tell
from pipeline_app.views.cli.render import echo_warning, plural
from pipeline_app.views.cli.stage_options import (
    Manner,
    Slots,
    manner_options,
    run_option,
    selectors_options,
    slots_options,
    stage_option,
    workers_option,
)
from pipeline_app.views.cli.targets import dry_run_option

if TYPE_CHECKING:
    from pipeline_app.local.workers import NewWorker
    from pipeline_app.runtime import Runtime


@click.group(cls=Group)
def stage() -> None:
    """Start and stop workers for a stage of a run.

    They are started on this machine, in the background: they outlive the terminal, and write to .pipeline/logs. Those
    that are stopped may run anywhere, and may have been started in any way.
    """


@stage.command(
    epilog="""\b
Examples:
  pipeline-app stage start --run last --stage load --workers 2
  pipeline-app stage start --run books-1 --stage ask --workers 4 --pool threads --concurrency 20
  pipeline-app stage start --run books-1 --stage ask --select provider=openai
  pipeline-app stage start --run books-1 --stage ask --max-jobs 100000 --max-memory 2GB
  pipeline-app stage start --run books-1 --stage ask --skip provider=openai --dry-run""",
)
@run_option
@stage_option
@workers_option("How many.", default=1, show_default=True)
@slots_options
@selectors_options
@dry_run_option
@json_option
def start(
    run: str,
    stage: str,
    number: int,
    slots: Slots,
    selectors: Selectors,
    dry_run: bool,
    as_json: bool,
) -> int | None:
    """Start workers for a stage, in the background.

    Returns when they are ready. They consume all partitions of the stage that the selectors admit, also those that come
    later, of all runs of the pipeline. If no partition fits the selectors, nothing is started. They are called
    survey.load-1@HOST and so on, with the next numbers that are free.
    """
    with connection(write=not dry_run, pipelines=True) as rt:
        done = _begin(rt, run, stage, dry_run=dry_run)
        _start_new(rt, done, number, selectors, slots, _tell(as_json))
        return detached.echo(rt, done, as_json=as_json)


@stage.command(
    epilog="""\b
Examples:
  pipeline-app stage stop --run last --stage load
  pipeline-app stage stop --run books-1 --stage ask --workers 2
  pipeline-app stage stop --run books-1 --stage ask --worker books.ask-1@host --now
  pipeline-app stage stop --run books-1 --stage ask --select provider=openai --timeout 60""",
)
@run_option
@stage_option
@workers_option("Only so many, the newest first.")
@click.option("--worker", "names", metavar="NAME", multiple=True, help="Only this one; the host may be left out.")
@selectors_options
@manner_options
@dry_run_option
@json_option
def stop(
    run: str,
    stage: str,
    number: int | None,
    names: tuple[str, ...],
    selectors: Selectors,
    manner: Manner,
    dry_run: bool,
    as_json: bool,
) -> int | None:
    """Stop workers of a stage, wherever they run.

    They take nothing new, finish what runs, and give back the rest; this waits until they have. With selectors, only
    those that were started with exactly these. One that runs other stages, too, is stopped only by its name.
    """
    if names and (number is not None or selectors):
        raise UsageError("--worker names the workers: --workers, --select and --skip have no place beside it")
    with connection(write=not dry_run) as rt:
        done = _begin(rt, run, stage, dry_run=dry_run)
        rows = _named(rt, done.stage, names) if names else _dedicated(rt, done.stage, selectors or None)
        if not rows:
            raise NotFoundError(_nobody(done.stage, selectors), hint="pipeline-app workers shows who runs what")
        rows = rows if number is None else _running(rows)[-number:]
        _stop(rt, done, rows, manner, _tell(as_json))
        return detached.echo(rt, done, as_json=as_json)


@stage.command(
    epilog="""\b
Examples:
  pipeline-app stage replace --run last --stage load
  pipeline-app stage replace --run books-1 --stage ask --concurrency 40
  pipeline-app stage replace --run books-1 --stage ask --select provider=openai --dry-run""",
)
@run_option
@stage_option
@workers_option("How many new ones, instead of as many as run.")
@slots_options
@selectors_options
@manner_options
@dry_run_option
@json_option
def replace(
    run: str,
    stage: str,
    number: int | None,
    slots: Slots,
    selectors: Selectors,
    manner: Manner,
    dry_run: bool,
    as_json: bool,
) -> int | None:
    """Start new workers for a stage, and when they are ready stop those that ran: new code, and no pause.

    Only workers of this machine. The new ones have the pool, slots and selectors of the old ones, and their --max-jobs,
    --max-age and --max-memory, if they were started by "stage", too. With selectors, only those that were started with
    exactly these. If a new one does not become ready, all new ones are stopped, and the old ones go on.
    """
    with connection(write=not dry_run, pipelines=True) as rt:
        done = _begin(rt, run, stage, dry_run=dry_run)
        _check_pipeline(rt, done)
        rows = _here(_running(_dedicated(rt, done.stage, selectors or None, whole=True)))
        if not rows:
            text = f"{_nobody(done.stage, selectors)} on this machine"
            raise NotFoundError(text, hint="pipeline-app stage start starts some")
        limits = _limits()
        wanted = [_like(row, done.stage, slots, limits) for row in islice(cycle(rows), number or len(rows))]
        _start(rt, done, wanted, _tell(as_json), or_none=True)
        _stop(rt, done, rows, manner, _tell(as_json))
        return detached.echo(rt, done, as_json=as_json)


@stage.command(
    epilog="""\b
Examples:
  pipeline-app stage scale --run last --stage load --workers 4
  pipeline-app stage scale --run books-1 --stage ask --select provider=openai --workers 0""",
)
@run_option
@stage_option
@workers_option("How many are to run.", least=0, required=True)
@slots_options
@selectors_options
@manner_options
@dry_run_option
@json_option
def scale(
    run: str,
    stage: str,
    number: int,
    slots: Slots,
    selectors: Selectors,
    manner: Manner,
    dry_run: bool,
    as_json: bool,
) -> int | None:
    """Let that many workers run a stage: start or stop the difference.

    Workers on all machines are counted, those that were started with exactly these selectors (or without any). New ones
    are started here; the newest are stopped first.
    """
    with connection(write=not dry_run, pipelines=True) as rt:
        done = _begin(rt, run, stage, dry_run=dry_run)
        rows = _running(_dedicated(rt, done.stage, selectors, whole=True))
        if number > len(rows):
            _start_new(rt, done, number - len(rows), selectors, slots, _tell(as_json))
        elif number < len(rows):
            _stop(rt, done, rows[number:], manner, _tell(as_json))
        return detached.echo(rt, done, as_json=as_json)


def _tell(as_json: bool) -> Tell:
    """How people are told what happens; programs are not."""
    return lambda text: None if as_json else click.echo(text, err=True)


def _begin(rt: Runtime, run: str, stage: str, *, dry_run: bool) -> Done:
    """What is meant. Raises NotFoundError for a run or stage that is not there."""
    from pipeline_app.control import workforce
    from pipeline_app.control.sight.ledger import find_plan

    plan = find_plan(rt, run)
    return Done(run=plan.run, stage=workforce.stage_name(plan, stage), dry_run=dry_run)


def _check_pipeline(rt: Runtime, done: Done) -> None:
    from pipeline_app.control import workforce
    from pipeline_app.control.sight.ledger import find_plan

    if not workforce.check_pipeline(rt, find_plan(rt, done.run)):
        echo_warning(f"the pipeline was changed since run {done.run} was made: its jobs wait for workers that know it")


def _start_new(rt: Runtime, done: Done, number: int, selectors: Selectors, slots: Slots, tell: Tell) -> None:
    from pipeline_app.control import workforce
    from pipeline_app.local.workers import NewWorker

    _check_pipeline(rt, done)
    done.queues = workforce.queues(rt, done.stage, selectors)
    select, skip = map(tuple, selectors.written())
    _start(rt, done, [NewWorker(stage=done.stage, select=select, skip=skip, **vars(slots))] * number, tell)


def _limits() -> dict[int, Mapping[str, str]]:
    """Process -> options of recycling that it was started with, of this project's detached workers."""
    from pipeline_app.local import workers

    return {worker.pid: worker.limits for worker in workers.running()}


def _like(row: Row, stage: str, slots: Slots, limits: Mapping[int, Mapping[str, str]]) -> NewWorker:
    """A new worker in the place of that one."""
    from pipeline_app.local.workers import NewWorker

    return NewWorker(
        stage=stage,
        pool=slots.pool or row["pool"],
        concurrency=slots.concurrency or row["concurrency"],
        select=tuple(row["select"]),
        skip=tuple(row["skip"]),
        limits={**limits.get(row["pid"], {}), **slots.limits},
    )


def _start(rt: Runtime, done: Done, wanted: Sequence[NewWorker], tell: Tell, *, or_none: bool = False) -> None:
    if done.dry_run:
        done.started = detached.planned(rt, wanted)
    else:
        done.started = detached.start(rt, wanted, tell, or_none=or_none)


def _stop(rt: Runtime, done: Done, rows: Sequence[Row], manner: Manner, tell: Tell) -> None:
    if not done.dry_run:
        done.left = detached.stop(rt, rows, now=manner.now, timeout=manner.timeout, tell=tell)
    left = {(row["worker"], row["pid"]) for row in done.left}
    done.stopped = [row for row in rows if (row["worker"], row["pid"]) not in left]


def _named(rt: Runtime, stage: str, names: Sequence[str]) -> list[Row]:
    """Workers of the stage by name. Raises NotFoundError if one is not there."""
    from pipeline_app.control import workforce

    rows = workforce.of_stage(rt, stage)
    for name in names:
        if not any(_is_called(row, name) for row in rows):
            hint = "they are " + ", ".join(row["worker"] for row in rows) if rows else "no worker runs it"
            raise NotFoundError(f"no worker {name!r} runs {stage}", hint=hint)
    return [row for row in rows if any(_is_called(row, name) for name in names)]


def _is_called(row: Row, name: str) -> bool:
    return name in (row["worker"], row["worker"].partition("@")[0])


def _dedicated(rt: Runtime, stage: str, selectors: Selectors | None, *, whole: bool = False) -> list[Row]:
    """Workers that run only this stage, and with exactly these selectors if given; oldest first.

    With `whole` not those of partitions that were named one by one: no other worker is like them.
    """
    from pipeline_app.control import workforce

    found = []
    for row in workforce.of_stage(rt, stage):
        others = workforce.runs_others(row, stage)
        if others:
            echo_warning(f"{row['worker']} runs {', '.join(others)}, too, and is left alone")
        elif whole and not workforce.runs_all(row, stage):
            echo_warning(f"{row['worker']} runs only {', '.join(row['queues'])}, and is left alone")
        elif selectors is None or workforce.has_selectors(row, selectors):
            found.append(row)
    return found


def _nobody(stage: str, selectors: Selectors) -> str:
    return f"no worker runs {stage}" + (" with exactly these selectors" if selectors else "")


def _running(rows: Sequence[Row]) -> list[Row]:
    """Those that nobody has told to stop."""
    return [row for row in rows if row["state"] == "running"]


def _here(rows: Sequence[Row]) -> list[Row]:
    """Those of this machine."""
    host = socket.gethostname()
    elsewhere = sum(row["host"] != host for row in rows)
    if elsewhere:
        echo_warning(f"{plural(elsewhere, 'worker')} of other machines: replace them there")
    return [row for row in rows if row["host"] == host]
