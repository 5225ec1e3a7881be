"""What went wrong in a run: `failures`, the dead letters one by one, or all that failed in groups of like errors."""

from __future__ import annotations

import shlex
from typing import Any

import click

from pipeline_app.errors import UsageError
from pipeline_app.views.cli.common import (
    Command,
    connection,
    job_option,
    json_option,
    limit_option,
    run_argument,
    stage_option,
)
from pipeline_app.views.cli.render import brief, echo_json, echo_limit, echo_table, indented, one_line, styled


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  pipeline-app failures last --grouped
  pipeline-app failures last --error 1f0c2a9be4
  pipeline-app failures books-1 --stage analyze --limit 1000 --json
  pipeline-app failures books-1 --job a1""",
)
@run_argument
@click.option(
    "--grouped", is_flag=True, help="Errors that are alike in one line, jobs that wait for a retry among them."
)
@click.option("--error", "group", metavar="GROUP", help="Only this group; --grouped shows its name.")
@job_option
@stage_option
@limit_option
@json_option
def failures(
    run: str, grouped: bool, group: str | None, job_id: str | None, stage: str | None, limit: int, as_json: bool
) -> None:
    """List the dead letters of RUN and what they died of.

    The oldest first. With --job: that job's traceback, too. With --grouped: the largest group first.

    Errors are alike if they have the same stage, type, place in the code, and message without what varies in it
    (numbers, quoted texts, ids, paths, addresses; the host of a URL counts).
    """
    from pipeline_app.control.sight import ledger

    if grouped and (job_id is not None or group is not None):
        raise UsageError("--grouped lists groups, not jobs", hint="leave out --job and --error, or --grouped")
    with connection() as rt:
        if grouped:
            found = ledger.failure_groups(rt, run, stage=stage, limit=limit)
        else:
            found = ledger.failures(rt, run, job_id=job_id, stage=stage, group=group, limit=limit)
    if as_json:
        echo_json(found)
    elif grouped:
        _echo_groups(run, found, limit)
    else:
        _echo_failures(found, limit, traceback=job_id is not None)


def _echo_failures(found: list[dict[str, Any]], limit: int, *, traceback: bool) -> None:
    if not found:
        click.echo("no dead letters")
        return
    rows = [
        [row["job_id"], row["stage"], row["kind"], row["attempts"], row["group"], brief(row["error"])] for row in found
    ]
    echo_table(["job", "stage", "kind", "attempts", "group", "error"], rows, shrink=["job", "error"])
    if traceback and found[0]["error"]["traceback"]:
        click.echo()
        for line in indented(found[0]["error"]["traceback"]):
            click.echo(line)
    echo_limit(found, limit)


def _echo_groups(run: str, found: list[dict[str, Any]], limit: int) -> None:
    if not found:
        click.echo("no failures")
        return
    rows = [
        [
            row["group"],
            row["stage"],
            row["count"],
            row["dead_lettered"],
            row["retrying"],
            brief(row),
            row["frame"],
            row["last_at"],
            row["sample_job"],
        ]
        for row in found
    ]
    headers = ["group", "stage", "jobs", "dead", "retrying", "error", "where", "last seen", "sample job"]
    echo_table(headers, rows, shrink=["error", "where", "sample job"])
    echo_limit(found, limit)
    click.echo()
    for what, command in _next_steps(run, found[0]).items():
        click.echo(styled(f"{what}:", dim=True) + f"  {one_line(command)}")


def _next_steps(run: str, group: dict[str, Any]) -> dict[str, str]:
    """What to do about a group, as commands that can be copied."""
    steps = {"one of them": f"pipeline-app job {run} {shlex.quote(group['sample_job'])}"}
    if group["dead_lettered"]:
        steps["its dead letters"] = f"pipeline-app failures {run} --error {group['group']}"
        # The group's name says nothing of the stage.
        which = f"--stage {group['stage']} --error {group['group']}"
        steps["run them again"] = f"pipeline-app replay start {run} {which} --dry-run"
    return steps
