"""The group `replay`: failed, held, cancelled or finished jobs once more, at a pace, carried out by the workers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from pipeline_app.domain.durations import seconds
from pipeline_app.domain.edit import Edit
from pipeline_app.domain.pace import Pace
from pipeline_app.domain.rates import Rate
from pipeline_app.domain.selection import Selection
from pipeline_app.domain.selector import parse_selector
from pipeline_app.domain.states import JobState
from pipeline_app.domain.times import point_in_time
from pipeline_app.errors import RefusedError, UsageError
from pipeline_app.views.cli.common import EXIT_NO, Group, connection, json_option, run_argument, stage_option
from pipeline_app.views.cli.progress import counting
from pipeline_app.views.cli.render import echo_json, echo_table, echo_warning, plural
from pipeline_app.views.cli.replay_shown import echo_end, echo_survey, follow, numbers
from pipeline_app.views.cli.targets import dry_run_option, echo_nothing_changed, reason_option, selector_option

if TYPE_CHECKING:
    from pipeline_app.runtime import Runtime


@click.group(cls=Group)
def replay() -> None:
    """Run jobs once more, at a pace."""


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What the options of `replay start` ask for."""

    selection: Selection
    from_stage: str | None
    edit: Edit | None
    pace: Pace | None
    halt_after: int | None
    force: bool
    reason: str


@replay.command(
    epilog="""\b
Examples:
  pipeline-app replay start books-1 --dry-run
  pipeline-app replay start books-1 --stage analyze --since -2h --rate 200/s --ramp 60s --halt-after 20
  pipeline-app replay start books-1 --error 3f2a90c1b4 --selector provider=openai
  pipeline-app replay start books-1 --job a1 --set model=small --set limits.tokens=2000
  pipeline-app replay start books-1 --status terminal --from-stage enrich --wait""",
)
@run_argument
@selector_option(required=False)
@click.option("--status", "statuses", metavar="S", multiple=True, help="Jobs in this state. [default: dead_lettered]")
@click.option("--job", "job_ids", metavar="JOB", multiple=True, help="This job.")
@stage_option
@click.option("--error", "group", metavar="GROUP", help='Jobs of this group of "failures --grouped".')
@click.option("--since", metavar="TIME", help="Jobs that came there at TIME or later: -2h, or ISO 8601 in UTC.")
@click.option("--until", metavar="TIME", help="Jobs that came there before TIME.")
@click.option("--from-stage", metavar="STAGE", help="Start in this stage, with what the one before it recorded.")
@click.option("--set", "edits", metavar="K=V", multiple=True, help="Set a field of the input: a.b=JSON, or a text.")
@click.option("--payload", type=click.File(encoding="utf-8"), help="Another input instead: a file with JSON.")
@click.option("--rate", metavar="RATE", help="No faster than this: 200/s, 100/m, 5000/h.")
@click.option("--ramp", metavar="TIME", help="Grow from a tenth of the rate to the whole in this time: 60s.")
@click.option("--halt-after", type=click.IntRange(min=1), metavar="N", help="Stop when N attempts failed again.")
@click.option("--force", is_flag=True, help="Also jobs that are not due. What is held, paused or on its way stays so.")
@reason_option
@click.option("--wait", is_flag=True, help="Wait until all were replayed; exit 1 if it halted before.")
@dry_run_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def start(
    run: str,
    selectors: tuple[str, ...],
    statuses: tuple[str, ...],
    job_ids: tuple[str, ...],
    stage: str | None,
    group: str | None,
    since: str | None,
    until: str | None,
    from_stage: str | None,
    edits: tuple[str, ...],
    payload: Any,
    rate: str | None,
    ramp: str | None,
    halt_after: int | None,
    force: bool,
    reason: str,
    wait: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> int | None:
    """Run jobs of RUN once more: its dead letters, or those that the options choose.

    Each starts where it stands (one that went through all stages: in the first) with the input that it had. The
    workers carry it out, so it goes on without this command. What earlier stages recorded is kept, also where an
    input is edited; every job begins a new generation, with all its attempts.

    \b
    States: dead_lettered, held, terminal, cancelled, waiting, retry_waiting.
    """
    now = datetime.now(UTC)
    asked = _Request(
        selection=Selection(
            job_ids=job_ids,
            selector=parse_selector(selectors),
            states=tuple(_state(name) for name in dict.fromkeys(statuses)),
            stage=stage,
            group=group,
            since=None if since is None else point_in_time(since, now),
            until=None if until is None else point_in_time(until, now),
        ),
        from_stage=from_stage,
        edit=Edit.parse(edits, replaces=payload is not None, payload=_payload(payload)),
        pace=_pace(rate, ramp),
        halt_after=halt_after,
        force=force,
        reason=reason,
    )
    return _start(run, asked, wait=wait, dry_run=dry_run, yes=yes, as_json=as_json)


def _state(name: str) -> JobState:
    try:
        return JobState(name)
    except ValueError as exc:
        raise UsageError(f"there is no state {name!r}", hint=f"states are {', '.join(JobState)}") from exc


def _payload(file: Any) -> Any:
    if file is None:
        return None
    try:
        return json.load(file)
    except ValueError as exc:
        raise UsageError(f"{file.name} is not JSON: {exc}") from exc


def _pace(rate: str | None, ramp: str | None) -> Pace | None:
    if rate is None:
        if ramp is not None:
            raise UsageError("--ramp is a part of a rate: give --rate, too")
        return None
    return Pace(per_s=Rate.parse(rate).per_s, ramp_s=0.0 if ramp is None else seconds(ramp))


def _start(run: str, asked: _Request, *, wait: bool, dry_run: bool, yes: bool, as_json: bool) -> int | None:
    from pipeline_app.control.operators import actor
    from pipeline_app.control.replays import replay as control

    control.check(asked.selection)
    with connection(write=not dry_run) as rt:
        wanted = control.request(
            rt, run, asked.selection, from_stage=asked.from_stage, edit=asked.edit, force=asked.force
        )
        with counting("job", "looked at", silent=as_json) as show:
            found = control.survey(rt, wanted, progress=show)
        if not as_json:
            echo_survey(
                wanted.plan.run, found, from_stage=asked.from_stage, pace=asked.pace, halt_after=asked.halt_after
            )
        if dry_run:
            if as_json:
                echo_json(found.as_dict())
            else:
                echo_nothing_changed()
            return None if found.would_replay else EXIT_NO
        control.refuse_nothing(rt, wanted, found)
        question = f"replay {plural(found.would_replay, 'job')} of run {wanted.plan.run}?"
        if not (yes or as_json) and sys.stdin.isatty() and not click.confirm(question, err=True):
            raise RefusedError("nothing was replayed")
        row = control.start(
            rt,
            wanted,
            found,
            pace=asked.pace,
            halt_after=asked.halt_after,
            reason=asked.reason,
            actor=actor(),
        )
        warnings = control.warnings(rt, pace=asked.pace, halt_after=asked.halt_after)
        if not as_json:
            click.echo(f"started replay {row['operation']}")
            for text in warnings:
                echo_warning(text)
        if wait:
            row = follow(rt, row["operation"], found.would_replay, silent=as_json)
    if as_json:
        echo_json({**found.as_dict(), **row, "warnings": warnings})
    elif wait:
        echo_end(row)
    return EXIT_NO if wait and row["state"] != "done" else None


@replay.command(
    "list",
    epilog="""\b
Examples:
  pipeline-app replay list
  pipeline-app replay list last --json""",
)
@click.argument("run", required=False)
@json_option
def list_(run: str | None, as_json: bool) -> None:
    """List the replays, or those of RUN: how far each is, and what became of its jobs.

    The oldest first. Failed: attempts of its jobs that failed again. Terminal: its jobs that went through all stages.
    """
    from pipeline_app.control.replays import replay as control

    with connection() as rt:
        rows = control.listing(rt, run)
    if as_json:
        echo_json(rows)
        return
    if not rows:
        click.echo("nothing was replayed yet")
        return
    lines = [
        [
            row["operation"],
            row["run"],
            row["state"],
            row["matched"],
            row["released"],
            row["skipped"],
            row["failed"],
            row["terminal"],
            None if row["rate_per_s"] is None else Rate(row["rate_per_s"]).written,
            row["created_at"],
            row["actor"],
            row["why"] or row["reason"],
        ]
        for row in rows
    ]
    headers = ["replay", "run", "state", "matched", "released", "left", "failed", "terminal"]
    headers += ["rate", "created", "by", "reason"]
    echo_table(headers, lines, shrink=["run", "by", "reason"])


@replay.command(
    epilog="""\b
Examples:
  pipeline-app replay pause r-69d2f0a1c4b5e6f708192a3b""",
)
@click.argument("operation", metavar="REPLAY")
@dry_run_option
@json_option
def pause(operation: str, dry_run: bool, as_json: bool) -> None:
    """Stop REPLAY for now.

    Jobs that it released already go on; "replay resume" lets it go on with the others.
    """
    from pipeline_app.control.replays import replay as control

    _change("paused", control.show if dry_run else control.pause, operation, dry_run, as_json)


@replay.command(
    epilog="""\b
Examples:
  pipeline-app replay resume r-69d2f0a1c4b5e6f708192a3b""",
)
@click.argument("operation", metavar="REPLAY")
@dry_run_option
@json_option
def resume(operation: str, dry_run: bool, as_json: bool) -> None:
    """Let REPLAY go on that was paused or that halted.

    Its ramp begins anew, and so does the count of failures after which it halts.
    """
    from pipeline_app.control.replays import replay as control

    _change("resumed", control.show if dry_run else control.resume, operation, dry_run, as_json)


@replay.command(
    epilog="""\b
Examples:
  pipeline-app replay cancel r-69d2f0a1c4b5e6f708192a3b""",
)
@click.argument("operation", metavar="REPLAY")
@dry_run_option
@json_option
def cancel(operation: str, dry_run: bool, as_json: bool) -> None:
    """End REPLAY before its end.

    Jobs that it released already go on; the others stay as they are.
    """
    from pipeline_app.control.replays import replay as control

    _change("cancelled", control.show if dry_run else control.cancel, operation, dry_run, as_json)


def _change(
    done: str, do: Callable[[Runtime, str], dict[str, Any]], operation: str, dry_run: bool, as_json: bool
) -> None:
    with connection(write=not dry_run) as rt:
        row = do(rt, operation)
    if as_json:
        echo_json({**row, "dry_run": dry_run})
        return
    left = max(0, row["matched"] - row["released"] - row["skipped"])
    what = f"would be {done}: replay" if dry_run else f"{done} replay"
    click.echo(f"{what} {row['operation']} of run {row['run']}: {numbers(row)}; {plural(left, 'job')} not yet")
    if dry_run:
        echo_nothing_changed()
