"""Who works: `workers`."""

from __future__ import annotations

from typing import Any

import click

from pipeline_app.views.cli.common import Command, connection, json_option
from pipeline_app.views.cli.render import clock, echo_json, echo_table, size


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  pipeline-app workers
  pipeline-app workers --json | jq '.[] | select(.state == "running").pid'""",
)
@json_option
def workers(as_json: bool) -> None:
    """List the workers.

    Those that run, on all machines, and those that ended within the last hour. Where their logs are is in --json.
    """
    from pipeline_app.control.sight import listing

    with connection() as rt:
        found = listing.workers(rt)
    if as_json:
        echo_json(found)
        return
    if not found:
        click.echo("no workers; start one: celery -A pipeline_app worker, or pipeline-app stage start")
        return
    rows = [
        [
            row["worker"],
            str(row["pid"]),
            row["state"],
            row["pool"],
            row["concurrency"],
            row["running_jobs"],
            size(row["rss_bytes"]),
            clock(row["heartbeat_at"]),
            _served(row),
        ]
        for row in found
    ]
    headers = ["worker", "pid", "state", "pool", "slots", "running jobs", "memory", "last seen", "queues"]
    echo_table(headers, rows, shrink=["worker", "queues"])


def _served(row: dict[str, Any]) -> str:
    """`survey.load only kind=test, not lang=de`."""
    parts = [", ".join(row["queues"]), *(f"only {item}" for item in row["select"]), *(f"not {s}" for s in row["skip"])]
    return " ".join(parts)
