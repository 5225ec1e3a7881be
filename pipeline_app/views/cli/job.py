"""One job: `job` tells its story, `why` says what it waits for."""

from __future__ import annotations

from typing import Any

import click

from pipeline_app.views.cli.common import Command, connection, json_option, run_argument
from pipeline_app.views.cli.history import event_details
from pipeline_app.views.cli.render import (
    brief,
    compact,
    duration,
    echo_fields,
    echo_json,
    echo_table,
    indented,
    one_line,
    styled,
)

#: Longer payloads and outputs are cut for people; `--json` has all of them.
LONGEST_VALUE = 2_000


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  pipeline-app job last a1
  pipeline-app job books-1 a1 --json | jq .outputs""",
)
@run_argument
@click.argument("job_id", metavar="JOB")
@json_option
def job(run: str, job_id: str, as_json: bool) -> None:
    """Show all that is known of a job.

    Where it stands, its timeline, what each stage made of it, and its last error.
    """
    from pipeline_app.control.sight import ledger

    with connection() as rt:
        found = ledger.job(rt, run, job_id)
    if as_json:
        echo_json(found)
        return
    _echo_job(found)


def _echo_job(found: dict[str, Any]) -> None:
    state = found["state"] + (f" ({found['reason']})" if found["reason"] else "")
    click.echo(styled(f"job {one_line(found['job_id'])} of run {found['run']}", bold=True) + f"  {state}")
    echo_fields(
        {
            "stage": found["stage"],
            "tags": ", ".join(f"{key}={value}" for key, value in found["tags"].items()) or None,
            "partition": found["partition"],
            "failures": found["failures"] or None,
            "losses": found["losses"] or None,
            "due": found["due_at"],
            "expires": found["expires_at"],
            "message": found["message"],
            "batch": found["batch"],
            "payload": _shortened(found["payload"]),
        }
    )
    click.echo()
    rows = _timeline(found)
    echo_table(["at", "stage", "what", "took", "details"], rows, shrink=["details"])
    for output in found["outputs"]:
        click.echo()
        click.echo(styled(f"output of {output['stage']}", bold=True))
        click.echo(f"  {_shortened(output['value'])}")
    last = next((row for row in reversed(found["attempts"]) if row["error"]), None)
    if last is not None and last["error"]["traceback"]:
        click.echo()
        click.echo(styled(f"last error, in {last['stage']}", bold=True))
        for line in indented(last["error"]["traceback"]):
            click.echo(line)


def _timeline(found: dict[str, Any]) -> list[list[Any]]:
    """Events and attempts in one list; the record of an attempt that is there adds nothing for one job."""
    ran = [
        (
            row["started_at"],
            [
                row["started_at"],
                row["stage"],
                f"attempt {row['attempt']}: {row['outcome']}",
                duration(row["duration_s"]),
                ", ".join(filter(None, [brief(row["error"]), row["worker"]])),
            ],
        )
        for row in found["attempts"]
    ]
    stages_run = {row["stage"] for row in found["attempts"]}
    happened = [
        (
            row["at"],
            [row["at"], row["stage"], row["event"], None, _company(row)],
        )
        for row in found["events"]
        if row["event"] not in {"recorded", "lost"} or row["stage"] not in stages_run
    ]
    return [row for _, row in sorted([*happened, *ran], key=lambda pair: pair[0])]


def _company(row: dict[str, Any]) -> str:
    with_others = f"with {row['job_count'] - 1:,} others" if row["job_count"] > 1 else ""
    return ", ".join(filter(None, [event_details(row), with_others]))


def _shortened(value: Any) -> str | None:
    if value is None:
        return None
    text = compact(value)
    more = len(text) - LONGEST_VALUE
    return text if more <= 0 else f"{text[:LONGEST_VALUE]}… ({more:,} more characters; --json has them)"


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  pipeline-app why last a1
  pipeline-app why books-1 a1 --json | jq .waits_for""",
)
@run_argument
@click.argument("job_id", metavar="JOB")
@json_option
def why(run: str, job_id: str, as_json: bool) -> None:
    """Say what a job waits for.

    In words: why JOB in RUN is where it is, and what to do if anything is to be done.
    """
    from pipeline_app.control.sight.why import why as ask

    with connection() as rt:
        found = ask(rt, run, job_id)
    if as_json:
        echo_json(found)
        return
    click.echo(f"{styled('job ' + one_line(found['job_id']), bold=True)}  {found['state']}")
    click.echo(one_line(found["reason"]))
    if found["hint"]:
        click.echo(f"hint:  {one_line(found['hint'])}")
