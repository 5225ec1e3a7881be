"""What the commands that close, throttle and pause have in common: their options, and how they say what they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from pipeline_app.domain.selector import written
from pipeline_app.views.cli.render import echo_warning, one_line, plural

if TYPE_CHECKING:
    from pipeline_app.runtime import Runtime

reason_option = click.option("--reason", metavar="TEXT", default="", help="Why, for whoever lists it.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what it would change, and change nothing.")
only_run_option = click.option("--run", metavar="RUN", help='Only for RUN ("last" is the newest), not for all runs.')
partition_option = click.option("--partition", metavar="PARTITION", help="Only this partition.")


def selector_option(*, required: bool) -> Callable[[Any], Any]:
    """`--selector K=V`, as often as wanted."""
    return click.option(
        "--selector",
        "selectors",
        metavar="K=V",
        multiple=True,
        required=required,
        help="Jobs with this tag; given several times, jobs with all of them.",
    )


def run_name(rt: Runtime, run: str | None) -> str | None:
    """The name of the run that is meant, also by `last`; None for all runs. Raises NotFoundError."""
    from pipeline_app.control.sight.ledger import find_plan

    return None if run is None else find_plan(rt, run).run


def jobs_meant(selector: Mapping[str, str], run: str | None, stage: str | None = None) -> str:
    """`provider=openai in books.ask for all runs`."""
    where = f" in {stage}" if stage else ""
    return f"{one_line(written(selector)) or 'all jobs'}{where} for {f'run {run}' if run else 'all runs'}"


def place(run: str, stage: str | None, partition: str | None) -> str:
    """`run books-1, stage analyze`."""
    parts = (("run", run), ("stage", stage), ("partition", partition))
    return ", ".join(f"{name} {one_line(value)}" for name, value in parts if value)


def echo_jobs_meant(what: str, counts: Mapping[str, int] | None) -> None:
    """What will be changed and for how many: `closes ...: 4,120 jobs match (3,000 pending, 1,120 waiting)`.

    A target that fits nothing may be a typing error. None: they are too many to be counted in a moment.
    """
    if counts is None:
        click.echo(f"{what}: more jobs match than can be counted in a moment")
        return
    total = sum(counts.values())
    states = ", ".join(f"{count:,} {state}" for state, count in counts.items() if count)
    click.echo(f"{what}: {plural(total, 'job')} {'matches' if total == 1 else 'match'}{states and f' ({states})'}")
    if not total:
        echo_warning("no job that is on its way matches; it applies to jobs to come")


def echo_in_force(row: Mapping[str, Any], name: str) -> None:
    """On how many of the workers that run it is in force."""
    told, alive = row["workers"], row["workers_alive"]
    if not alive:
        click.echo(f"{name} is kept")
        echo_warning("no worker runs: it is in force on each that starts")
        return
    click.echo(f"{name} is in force on {told:,} of {plural(alive, 'worker')}")
    if told < alive:
        echo_warning(f"{plural(alive - told, 'worker')} did not answer, and will see it within seconds by themselves")


def echo_nothing_changed() -> None:
    """The end of a dry run."""
    click.echo("nothing was changed: this is a dry run")
