"""`check`: mistakes in settings, services and topology."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pipeline_app.views.cli.common import EXIT_NO, Command, connection, json_option
from pipeline_app.views.cli.render import echo_json, echo_table, styled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline_app.control.check.finding import Finding

@click.command(
    cls=Command,
    epilog="""\b
Examples:
  pipeline-app check
  pipeline-app check --json | jq '.findings[] | select(.severity != "ok")'""",
)
@json_option
def check(as_json: bool) -> int | None:
    """Find mistakes in settings, services and topology.

    Queues that were declared otherwise or that nobody consumes, limits of RabbitMQ that take messages away, missing
    indexes, clocks that differ, workers of other versions. Changes nothing. Exits 1 if anything is an error.

    Some of it only RabbitMQ's management API can tell (PIPELINE_MANAGEMENT_URL, by default beside AMQP_URL); without it
    that is "unknown".
    """
    from pipeline_app.control.check.checks import check as look
    from pipeline_app.local.rabbitmq import consumer_timeout_s

    with connection(pipelines=True, contact=False) as rt:
        found = look(rt, consumer_timeout_s=lambda: consumer_timeout_s(rt.settings.amqp_url))
    ok = not any(row.severity == "error" for row in found)
    if as_json:
        echo_json({"ok": ok, "findings": [vars(row) for row in found]})
    else:
        echo_findings(found)
    return None if ok else EXIT_NO


def echo_findings(found: Sequence[Finding]) -> None:
    """Findings as text: a table, then what is to be done."""
    rows = [[row.check, row.severity, row.what] for row in found]
    echo_table(["check", "severity", "what"], rows, shrink=["what"])
    hints: dict[str, list[str]] = {}
    for row in found:
        if row.hint and row.check not in hints.setdefault(row.hint, []):
            hints[row.hint].append(row.check)
    if hints:
        click.echo()
    for hint, checks in hints.items():
        click.echo(f"{styled(', '.join(checks), bold=True)}: {hint}")
