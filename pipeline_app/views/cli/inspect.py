"""Looking closely: `failures`, `attempts`, `events`, `job`, `why`, and who works: `workers`."""

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
from pipeline_app.views.cli.render import (
    clock,
    compact,
    duration,
    echo_fields,
    echo_json,
    echo_json_line,
    echo_table,
    indented,
    one_line,
    plural,
    size,
    styled,
)

#: Longer payloads and outputs are cut for people; `--json` has all of them.
LONGEST_VALUE = 2_000


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  pipeline-app failures last
  pipeline-app failures books-1 --stage analyze --limit 1000 --json
  pipeline-app failures books-1 --job a1""",
)
@run_argument
@job_option
@stage_option
@limit_option
@json_option
def failures(run: str, job_id: str | None, stage: str | None, limit: int, as_json: bool) -> None:
    """List the dead letters of RUN and what they died of.

    The oldest first. With --job: that job's traceback, too.
    """
    from pipeline_app.control import ledger

    with connection() as rt:
        found = ledger.failures(rt, run, job_id=job_id, stage=stage, limit=limit)
    if as_json:
        echo_json(found)
        return
    if not found:
        click.echo("no dead letters")
        return
    rows = [[row["job_id"], row["stage"], row["kind"], row["attempts"], brief(row["error"])] for row in found]
    echo_table(["job", "stage", "kind", "attempts", "error"], rows, shrink=["job", "error"])
    if job_id is not None and found[0]["error"]["traceback"]:
        click.echo()
        for line in indented(found[0]["error"]["traceback"]):
            click.echo(line)
    _note_limit(found, limit)


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
    from pipeline_app.control import ledger

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
    _note_limit(found, limit)


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
    from pipeline_app.control import ledger

    with connection() as rt:
        found = ledger.events(rt, run, job_id=job_id, stage=stage, limit=limit)
    if as_json:
        for row in found:
            echo_json_line(row)
        return
    if not found:
        click.echo("no events")
        return
    rows = [[row["at"], row["stage"], row["event"], row["job_count"], _jobs(row), _details(row)] for row in found]
    echo_table(["at", "stage", "event", "jobs", "which", "details"], rows, shrink=["which", "details"])
    _note_limit(found, limit)


def _jobs(row: dict[str, Any]) -> str:
    shown = ", ".join(row["jobs"][:3])
    return shown + (", …" if len(row["jobs"]) > 3 else "")


def _details(row: dict[str, Any]) -> str:
    """What an event says besides its jobs: `18 advanced, 2 retry`."""
    details = row["details"]
    words = [f"{details['advanced']:,} advanced"] if details.get("advanced") else []
    words += [f"{count:,} {move}" for move, count in details.get("moves", {}).items()]
    words += [str(details[name]) for name in ("why",) if details.get(name)]
    return ", ".join(words)


def _note_limit(found: list[Any], limit: int) -> None:
    if len(found) == limit:
        click.echo(styled(f"{plural(limit, 'line')} at most; --limit shows more", dim=True))


def brief(error: dict[str, Any] | None) -> str:
    """An error in a line; its type without the module."""
    if error is None:
        return ""
    name = error["type"].rpartition(".")[2]
    return one_line(f"{name}: {error['message']}" if error["message"] else name)


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
    from pipeline_app.control import ledger

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
    return ", ".join(filter(None, [_details(row), with_others]))


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
    from pipeline_app.control.why import why as ask

    with connection() as rt:
        found = ask(rt, run, job_id)
    if as_json:
        echo_json(found)
        return
    click.echo(f"{styled('job ' + one_line(found['job_id']), bold=True)}  {found['state']}")
    click.echo(one_line(found["reason"]))
    if found["hint"]:
        click.echo(f"hint:  {one_line(found['hint'])}")


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

    Those that run, and those that ended within the last hour.
    """
    from pipeline_app.control import listing

    with connection() as rt:
        found = listing.workers(rt)
    if as_json:
        echo_json(found)
        return
    if not found:
        click.echo("no workers; start one: celery -A pipeline_app worker")
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
            ", ".join(row["queues"]),
        ]
        for row in found
    ]
    headers = ["worker", "pid", "state", "pool", "slots", "running jobs", "memory", "last seen", "queues"]
    echo_table(headers, rows, shrink=["worker", "queues"])
