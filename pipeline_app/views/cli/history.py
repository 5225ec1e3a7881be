"""What happened in a run, one thing after another: `attempts` and `events`."""

from __future__ import annotations

from typing import Any

import click

from pipeline_app.views.cli.common import (
    Command,
    connection,
    job_option,
    json_option,
    limit_option,
    run_argument,
    stage_option,
)
from pipeline_app.views.cli.render import brief, duration, echo_json, echo_json_line, echo_limit, echo_table


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  pipeline-app attempts last --job a1
  pipeline-app attempts books-1 --stage analyze --json""",
)
@run_argument
@job_option
@stage_option
@limit_option
@json_option
def attempts(run: str, job_id: str | None, stage: str | None, limit: int, as_json: bool) -> None:
    """List the executions of handlers in RUN.

    The last ones, the oldest of them first: how each ended, how long it took, where, with which error.
    """
    from pipeline_app.control.sight import ledger

    with connection() as rt:
        found = ledger.attempts(rt, run, job_id=job_id, stage=stage, limit=limit)
    if as_json:
        echo_json(found)
        return
    if not found:
        click.echo("no attempts")
        return
    rows = [
        [
            row["started_at"],
            row["job_id"],
            row["stage"],
            row["attempt"],
            row["outcome"],
            duration(row["duration_s"]),
            row["worker"],
            brief(row["error"]),
        ]
        for row in found
    ]
    headers = ["started", "job", "stage", "attempt", "outcome", "took", "worker", "error"]
    echo_table(headers, rows, shrink=["job", "worker", "error"])
    echo_limit(found, limit)


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  pipeline-app events last
  pipeline-app events books-1 --job a1 --json""",
)
@run_argument
@job_option
@stage_option
@limit_option
@json_option
def events(run: str, job_id: str | None, stage: str | None, limit: int, as_json: bool) -> None:
    """List the events of RUN.

    The last ones, the oldest of them first: one for each message and step, with the jobs that it concerned. With
    --json: an object in a line for each.
    """
    from pipeline_app.control.sight import ledger

    with connection() as rt:
        found = ledger.events(rt, run, job_id=job_id, stage=stage, limit=limit)
    if as_json:
        for row in found:
            echo_json_line(row)
        return
    if not found:
        click.echo("no events")
        return
    rows = [[row["at"], row["stage"], row["event"], row["job_count"], _jobs(row), event_details(row)] for row in found]
    echo_table(["at", "stage", "event", "jobs", "which", "details"], rows, shrink=["which", "details"])
    echo_limit(found, limit)


def _jobs(row: dict[str, Any]) -> str:
    shown = ", ".join(row["jobs"][:3])
    return shown + (", …" if len(row["jobs"]) > 3 else "")


def event_details(row: dict[str, Any]) -> str:
    """What an event says besides its jobs: `18 advanced, 2 retry`."""
    details = row["details"]
    words = [f"{details['advanced']:,} advanced"] if details.get("advanced") else []
    words += [f"{count:,} {move}" for move, count in details.get("moves", {}).items()]
    words += [str(details[name]) for name in ("why",) if details.get(name)]
    return ", ".join(words)
