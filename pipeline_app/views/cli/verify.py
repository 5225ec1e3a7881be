"""`run verify`: accounting for every job, and repairing what does not add up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pipeline_app.errors import UsageError
from pipeline_app.views.cli.common import EXIT_NO, Command, connection, json_option, run_argument
from pipeline_app.views.cli.progress import counting
from pipeline_app.views.cli.render import echo_error, echo_json, echo_table, number, plural

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipeline_app.control.accounts.verify import Verification
    from pipeline_app.runtime import Runtime

#: What is counted, and what was done to it.
_REPAIRS = {
    "enqueued": ("job", "enqueued anew"),
    "cancelled": ("job", "cancelled, as the run is"),
    "detached": ("job", "taken off a message that it no longer belongs to"),
    "made_due": ("job", "made due"),
    "replayed": ("job", "replayed in the last stage, for their result"),
    "published": ("message", "published"),
    "counts": ("count", "corrected"),
    "events": ("line", "added to the event log"),
}


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  pipeline-app run verify last
  pipeline-app run verify books-1 --json | jq .problems
  pipeline-app run verify books-1 --repair --dry-run
  pipeline-app run verify books-1 --repair""",
)
@run_argument
@click.option("--repair", is_flag=True, help="Bring back what is amiss, then look once more.")
@click.option("--dry-run", is_flag=True, help="With --repair: say what it would do, and change nothing.")
@json_option
def verify(run: str, repair: bool, dry_run: bool, as_json: bool) -> int | None:
    """Account for every job of RUN.

    Exits 1 if anything does not add up. Compares jobs, counters, attempts, events, messages and results with each
    other. It may be called while the run goes on; what RabbitMQ holds can be compared exactly only while no worker
    consumes.

    --repair may be called while the run goes on as well, and again. Jobs that nothing would ever move on are enqueued
    anew, lost hints are published, counters and event log are corrected by what the jobs and attempts say. Jobs that
    somebody deleted, and stages that were recorded twice, can only be reported.
    """
    from pipeline_app.control.accounts.verify import verify as look

    if dry_run and not repair:
        raise UsageError("--dry-run goes with --repair: without it nothing is changed")
    with connection(write=repair and not dry_run) as rt:
        with counting("record", "looked at", silent=as_json) as show:
            found = look(rt, run, repair=repair, dry_run=True, progress=show)
        if repair and not dry_run:
            found = _repair(rt, found, silent=as_json)
    if as_json:
        echo_json(found.as_dict())
    else:
        echo_verification(found, dry_run=dry_run)
    return None if found.ok else EXIT_NO


def _repair(rt: Runtime, found: Verification, *, silent: bool) -> Verification:
    from pipeline_app.control.accounts.verify import repaired

    if not silent and found.repairs:
        click.echo(f"run {found.run}: {plural(found.problem_count, 'problem')}, repairing:")
        _echo_repairs(found.repairs, "to be ")
    with counting("job", "repaired and looked at once more", silent=silent) as show:
        found = repaired(rt, found, mending=show)
    if not silent and found.repairs:
        click.echo(f"repaired {plural(found.repaired, 'problem')}:")
        _echo_repairs(found.repairs)
    return found


def _echo_repairs(repairs: Mapping[str, int], before: str = "") -> None:
    for name, count in repairs.items():
        word, done = _REPAIRS[name]
        click.echo(f"  {plural(count, word)} {before}{done}")


def echo_verification(found: Verification, *, dry_run: bool = False) -> None:
    """A verification as text."""
    states = ", ".join(f"{count:,} {state}" for state, count in found.states.items() if count) or "none"
    click.echo(f"run {found.run}: {plural(found.seeded, 'job')} seeded: {states}")
    exact = "" if found.exact else "; what the broker holds was not compared, for that nothing may consume"
    if found.ok:
        click.echo(f"every job is accounted for{exact}")
        return
    rows = [[row.kind, row.job_id, row.stage, row.detail] for row in found.problems]
    echo_table(["problem", "job", "stage", "detail"], rows, shrink=["job", "detail"])
    if found.problem_count > len(rows):
        click.echo(f"and {number(found.problem_count - len(rows))} more")
    if dry_run:
        click.echo("--repair would repair:" if found.repairs else "--repair could repair none of it")
        _echo_repairs(found.repairs, "to be ")
    echo_error("problems", f"{plural(found.problem_count, 'problem')} in run {found.run}{exact}", None, as_json=False)
