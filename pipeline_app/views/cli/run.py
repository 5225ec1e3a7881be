"""The group `run`: making runs, adding jobs, and asking about runs as a whole."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline_app.domain.outage import Outage
from pipeline_app.errors import BadJobLineError, DuplicateJobError, RefusedError, StoreError, UsageError
from pipeline_app.views.cli import jobfile
from pipeline_app.views.cli.common import Group, connection, json_option, run_argument
from pipeline_app.views.cli.jobs import cancel_run
from pipeline_app.views.cli.progress import Count, counting, is_watched, reading
from pipeline_app.views.cli.render import (
    compact,
    cut,
    echo_json,
    echo_json_line,
    echo_table,
    echo_warning,
    number,
    one_line,
    plural,
    width,
)
from pipeline_app.views.cli.targets import dry_run_option, echo_nothing_changed
from pipeline_app.views.cli.verify import verify
from pipeline_app.views.cli.watch import status, wait, watch

if TYPE_CHECKING:
    from pipeline_app.control.seed.seeding import Seeded
    from pipeline_app.runtime import Runtime


@click.group(cls=Group)
def run() -> None:
    """Make runs, add jobs to them, look at them."""


@run.command(
    epilog="""\b
Examples:
  pipeline-app run init books-1 --pipeline survey
  pipeline-app run init books-2 --definition books.toml
  pipeline-app run init books-3 --pipeline survey --bound 10000""",
)
@click.argument("run")
@click.option("--pipeline", metavar="NAME", help="A pipeline of celeryconfig.py.")
@click.option("--definition", metavar="FILE", help="A TOML or JSON file that defines a pipeline.")
@click.option(
    "--bound",
    metavar="N",
    type=click.IntRange(min=1),
    help="Seeders wait while N jobs are not done. Default: what the pipeline says; without a bound nobody waits.",
)
@json_option
def init(run: str, pipeline: str | None, definition: str | None, bound: int | None, as_json: bool) -> None:
    """Make a run of a pipeline.

    Jobs are added by "run seed". RUN has letters, digits, ".", "_" and "-". The run keeps the pipeline's definition;
    only workers that have exactly the same one take its jobs. So a FILE must also stand in `pipelines` of the workers'
    celeryconfig.py: pipelines = ["books.toml"].

    With a bound "run seed" adds jobs only as others come to rest; a file is then added as it is read, not in one go.
    What workers make of jobs (next stages, retries, replays) is never kept waiting.
    """
    from pipeline_app.control.runs import create_run
    from pipeline_app.domain.pipeline import load_definition

    if (pipeline is None) == (definition is None):
        raise UsageError("give either --pipeline NAME or --definition FILE")
    with connection(pipelines=True) as rt:
        chosen = load_definition(Path(definition)) if definition else pipeline or ""
        manifest = create_run(rt, run, chosen, bound=bound)
        known = rt.pipelines.get(manifest["pipeline"])
    stages = [stage["name"] for stage in manifest["definition"]["stages"]]
    warnings = []
    if known is None or known.hash != manifest["hash"]:
        warnings.append(f"workers of this project do not have this definition: add {definition} to celeryconfig.py")
    if as_json:
        made = {"run": run, "pipeline": manifest["pipeline"], "stages": stages, "hash": manifest["hash"]}
        echo_json({**made, "bound": manifest["bound"], "created_at": manifest["created_at"], "warnings": warnings})
        return
    bounded = "" if manifest["bound"] is None else f", at most {plural(manifest['bound'], 'unfinished job')}"
    click.echo(f"made run {run} of pipeline {manifest['pipeline']}: {' -> '.join(stages)}{bounded}")
    for text in warnings:
        echo_warning(text)


@run.command(
    epilog="""\b
Examples:
  pipeline-app run seed books-1 --jobs books.jsonl
  python -m handlers.survey ~/src | pipeline-app run seed last --jobs -
  pipeline-app run seed books-1 --jobs books.jsonl --skip-existing

\b
A line of FILE:
  {"job_id": "a1", "payload": {"isbn": "0-19-853453-1"}, "tags": {"provider": "openai"}}
and, if need be, "delay_s": 60 (or "5m"), "not_before" and "expires_at" (ISO 8601), "priority": 5, and
"order_key": "user-7": jobs of one key go through the whole pipeline one at a time, in the order of the file.""",
)
@run_argument
@click.option("--jobs", "path", metavar="FILE", required=True, help='JSON lines; "-" is standard input.')
@click.option("--skip-existing", is_flag=True, help="Pass over jobs that RUN has already: goes on after a stop.")
@json_option
def seed(run: str, path: str, skip_existing: bool, as_json: bool) -> None:
    """Add the jobs of FILE to RUN.

    A file is read twice: first for mistakes, so that one with a bad line or a job id that RUN has already adds nothing.
    Standard input is added as it comes. So is a file if RUN has a bound: a bad line still adds nothing, but a job id
    that RUN has already ends it there.
    """
    from pipeline_app.control.sight.ledger import find_plan

    with connection(write=True) as rt:
        plan = find_plan(rt, run)  # a run that is not there is said before a large file is read
        twice = jobfile.can_be_read_twice(path)
        if twice:
            _check(path, silent=as_json)
        # Of a whole batch nothing starts before all of it is in: under a bound that would be never.
        seeded = _seed(rt, plan.run, path, twice and plan.bound is None, skip_existing, as_json)
    if as_json:
        echo_json(vars(seeded))
        return
    skipped = f", {number(seeded.skipped)} were there already" if skip_existing else ""
    click.echo(f"added {plural(seeded.added, 'job')} to run {seeded.run}{skipped}")
    if not seeded.published:
        echo_warning("the broker does not answer: the jobs are safe, and workers publish them when it does")


def _check(path: str, *, silent: bool) -> None:
    with reading(f"checking {path}", Path(path).stat().st_size, silent=silent) as show:
        try:
            jobfile.check(path, show)
        except BadJobLineError as exc:
            raise BadJobLineError(exc.message, hint="nothing of the file was added") from exc


def _seed(rt: Runtime, run: str, path: str, whole: bool, skip_existing: bool, as_json: bool) -> Seeded:
    from pipeline_app.control.seed import seeding

    tally = _Tally()
    with counting("job", "added", silent=as_json) as show, _with_what_became_of_it(tally, whole):

        def note(added: int) -> None:
            tally.added = added
            show(added)

        return seeding.seed(
            rt,
            run,
            jobfile.read(path),
            whole=whole,
            skip_existing=skip_existing,
            progress=note,
            waiting=_saying(show, silent=as_json),
        )


def _saying(show: Count, *, silent: bool) -> Callable[[str], None]:
    """Says what the seeder waits for: on a terminal all the time, in a log at growing intervals."""
    wait = Outage()

    def waits(why: str) -> None:
        show.waits(why)
        if not silent and not is_watched() and wait.goes_on(datetime.now(UTC)):
            echo_warning(f"seeding waits: {why}")

    return waits


class _Tally:
    """How many jobs are in."""

    added = 0


@contextmanager
def _with_what_became_of_it(tally: _Tally, whole: bool) -> Iterator[None]:
    """Says in errors of seeding what is left of it, and how to go on."""
    try:
        yield
    except (BadJobLineError, DuplicateJobError) as exc:
        if whole:
            hint = "nothing of the file was added" + (f"; {exc.hint}" if exc.hint else "")
        else:
            hint = f"{_were(tally)} added before it; mend it, and seed the same input again with --skip-existing"
        raise type(exc)(exc.message, hint=hint) from exc
    except StoreError as exc:
        hint = "when MongoDB answers, seed the same jobs again with --skip-existing"
        raise StoreError(f"{exc.message} ({_were(tally)} added)", hint=hint) from exc
    except KeyboardInterrupt as exc:
        left = "nothing was added" if whole else f"{_were(tally)} added; --skip-existing goes on"
        raise KeyboardInterrupt(f"interrupted: {left}") from exc


def _were(tally: _Tally) -> str:
    return f"{plural(tally.added, 'job')} {'was' if tally.added == 1 else 'were'}"


run.add_command(status)
run.add_command(wait)
run.add_command(watch)


@run.command(
    "list",
    epilog="""\b
Examples:
  pipeline-app run list
  pipeline-app run list --limit 5 --json""",
)
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="How many of the newest.")
@json_option
def list_(limit: int, as_json: bool) -> None:
    """List the newest runs, the newest last."""
    from pipeline_app.control.sight.listing import runs

    with connection() as rt:
        found = runs(rt, limit)
    if as_json:
        echo_json(found)
        return
    if not found:
        click.echo("there are no runs yet; make one: pipeline-app run init RUN --pipeline NAME")
        return
    rows = [
        [
            row["run"],
            row["pipeline"],
            row["state"],
            row["created_at"],
            row["seeded"],
            row["states"]["terminal"],
            row["states"]["dead_lettered"],
        ]
        for row in found
    ]
    echo_table(["run", "pipeline", "state", "created", "jobs", "terminal", "dead_lettered"], rows, shrink=["run"])


@run.command(
    epilog="""\b
Examples:
  pipeline-app run results last --json > results.jsonl
  pipeline-app run results books-1 --json | jq .result.lines""",
)
@run_argument
@json_option
def results(run: str, as_json: bool) -> None:
    """Print what the last stage made of each job.

    Only jobs that went through all stages have a result. With --json: {"job_id", "result", "tags"} in a line for each
    job, in constant memory.
    """
    from pipeline_app.control.results import results as ask

    with connection() as rt:
        for row in ask(rt, run):
            if as_json:
                echo_json_line(row)
            else:
                click.echo(cut(f"{one_line(row['job_id'])}  {compact(row['result'])}", width()))


run.add_command(verify)


@run.command(
    epilog="""\b
Examples:
  pipeline-app run cancel books-1
  pipeline-app run cancel books-1 --dry-run
  pipeline-app run cancel last --yes --json""",
)
@run_argument
@click.option("--yes", is_flag=True, help="Do not ask.")
@dry_run_option
@json_option
def cancel(run: str, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Cancel RUN: no job of it starts any more.

    Jobs that went through all stages stay as they are, and so do dead letters. What a handler does that runs at this
    moment is not recorded; it is stopped once the grace of its stage is over. A cancelled run cannot be taken up
    again. The command "cancel" can choose jobs of it.
    """
    from pipeline_app.control.sight.status import status as ask

    with connection(write=not dry_run) as rt:
        found = ask(rt, run, queues=False)
        open_jobs = found.seeded - found.at_rest
        if not as_json:
            click.echo(f"cancels run {found.run}: {plural(open_jobs, 'job')} not done")
        question = f"cancel run {found.run} with {plural(open_jobs, 'job')} that are not done?"
        asks = not (yes or as_json or dry_run) and sys.stdin.isatty()
        if asks and not click.confirm(question, err=True):
            raise RefusedError("nothing was cancelled")
        moved = 0 if dry_run else cancel_run(rt, found.run)
    if as_json:
        echo_json({"run": found.run, "matched": open_jobs, "cancelled": moved, "dry_run": dry_run})
    elif dry_run:
        echo_nothing_changed()
    else:
        click.echo(f"cancelled run {found.run}: {plural(moved, 'job')}")
