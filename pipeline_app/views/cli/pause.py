"""`pause` and `resume`: a run, a stage or a partition stands still and goes on. `hold list` shows what is paused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from pipeline_app.errors import NotFoundError
from pipeline_app.views.cli.common import Command, connection, json_option, run_argument, stage_option
from pipeline_app.views.cli.render import echo_json, echo_warning, plural
from pipeline_app.views.cli.targets import (
    dry_run_option,
    echo_in_force,
    echo_jobs_meant,
    echo_nothing_changed,
    partition_option,
    place,
    reason_option,
)

if TYPE_CHECKING:
    from pipeline_app.runtime import Runtime


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  pipeline-app pause books-1
  pipeline-app pause last --stage analyze --reason "bug in analyze"
  pipeline-app pause books-1 --stage enrich --partition provider__openai
  pipeline-app pause books-1 --dry-run""",
)
@run_argument
@stage_option
@partition_option
@reason_option
@dry_run_option
@json_option
def pause(run: str, stage: str | None, partition: str | None, reason: str, dry_run: bool, as_json: bool) -> None:
    """Let RUN, or a stage or partition of it, stand still.

    No job there starts any more; one whose handler runs already finishes it. Jobs wait in the store, also over
    restarts of everything, until "resume" names the same place. "hold list" shows what is paused. It does not ask:
    nothing is lost.
    """
    from pipeline_app.control.operators import actor
    from pipeline_app.control.sight.standing import standing
    from pipeline_app.control.targets import pauses

    with connection(write=not dry_run) as rt:
        run = _name(rt, run, stage)
        matching = standing(rt, run, stage=stage, partition=partition)
        if not as_json:
            echo_jobs_meant(f"pauses {place(run, stage, partition)}", matching)
        if dry_run:
            row = _would_be(rt, run, stage, partition, reason=reason, actor=actor())
        else:
            row = pauses.pause(rt, run, stage=stage, partition=partition, reason=reason, actor=actor())
    if as_json:
        echo_json({**row, "matching": matching, "dry_run": dry_run})
    elif dry_run:
        echo_nothing_changed()
    else:
        echo_in_force(row, f"pause {row['pause']}")


def _name(rt: Runtime, run: str, stage: str | None) -> str:
    """The run's own name, for `last`. Raises NotFoundError, also if it has no such stage."""
    from pipeline_app.control.sight.ledger import find_plan

    return find_plan(rt, run, stage).run


def _would_be(rt: Runtime, run: str, stage: str | None, partition: str | None, **said: str) -> dict[str, Any]:
    """The pause that pausing would make, or the one in force that it would change."""
    nothing = {"pause": None, "created_at": None, "waiting_jobs": 0}
    row = next(iter(_paused_there(rt, run, stage, partition)), nothing)
    where = {"run": run, "stage": stage, "partition": partition}
    return {**row, **where, **said, "workers": None, "workers_alive": None}


def _paused_there(rt: Runtime, run: str, stage: str | None, partition: str | None) -> list[dict[str, Any]]:
    from pipeline_app.control.targets import pauses

    return [row for row in pauses.listing(rt, run) if (row["stage"], row["partition"]) == (stage, partition)]


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  pipeline-app resume books-1
  pipeline-app resume last --stage analyze
  pipeline-app resume books-1 --dry-run""",
)
@run_argument
@stage_option
@partition_option
@dry_run_option
@json_option
def resume(run: str, stage: str | None, partition: str | None, dry_run: bool, as_json: bool) -> None:
    """Let RUN, or a stage or partition of it, go on.

    It ends the pause of exactly that place: a stage that was paused by itself is resumed by itself. What is still
    paused in RUN is said. Jobs that a hold keeps stay held.
    """
    from pipeline_app.control.targets import pauses

    with connection(write=not dry_run) as rt:
        run = _name(rt, run, stage)
        rows = _paused_there(rt, run, stage, partition)
        if not rows:
            raise NotFoundError(f"not paused: {place(run, stage, partition)}", hint=_paused_hint(rt, run))
        if not as_json:
            waiting = plural(sum(row["waiting_jobs"] for row in rows), "job")
            click.echo(f"resumes {place(run, stage, partition)}: {waiting} waiting")
        ended = {row["pause"] for row in rows}
        if not dry_run:
            rows = pauses.resume(rt, run, stage=stage, partition=partition)
        left = [row for row in pauses.listing(rt, run) if row["pause"] not in ended]
    if as_json:
        echo_json({"resumed": rows, "still_paused": left, "dry_run": dry_run})
        return
    if dry_run:
        echo_nothing_changed()
    else:
        click.echo(f"resumed {place(run, stage, partition)}")
    for row in left:
        echo_warning(f"still paused: {place(row['run'], row['stage'], row['partition'])}")


def _paused_hint(rt: Runtime, run: str) -> str:
    from pipeline_app.control.targets import pauses

    rows = pauses.listing(rt, run)
    if not rows:
        return f"nothing of run {run} is paused; pipeline-app run status {run} says what it waits for"
    return "paused are: " + "; ".join(place(row["run"], row["stage"], row["partition"]) for row in rows)
