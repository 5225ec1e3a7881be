"""The group `hold`: closing a target for all stages and workers, opening it again, and seeing what is closed."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from pipeline_app.domain.selector import parse_selector
from pipeline_app.domain.times import time_to_come
from pipeline_app.errors import NotFoundError, RefusedError, UsageError
from pipeline_app.views.cli.common import Group, connection, json_option
from pipeline_app.views.cli.render import clock, echo_json, echo_table, plural
from pipeline_app.views.cli.targets import (
    dry_run_option,
    echo_in_force,
    echo_jobs_meant,
    echo_nothing_changed,
    jobs_meant,
    only_run_option,
    place,
    reason_option,
    run_name,
    selector_option,
)

if TYPE_CHECKING:
    from pipeline_app.runtime import Runtime


@click.group(cls=Group)
def hold() -> None:
    """Close a target such as a provider, and open it again."""


@hold.command(
    "set",
    epilog="""\b
Examples:
  pipeline-app hold set --selector provider=openai --until +30m --reason "429 since 14:02"
  pipeline-app hold set --selector provider=openai --until 2030-03-01T14:32:00Z
  pipeline-app hold set --selector provider=openai --selector quota_pool=gpt --run books-1
  pipeline-app hold set --selector provider=openai --dry-run""",
)
@selector_option(required=True)
@only_run_option
@click.option("--until", metavar="TIME", help="+30m, or ISO 8601 in UTC; without it, until it is cleared.")
@reason_option
@dry_run_option
@json_option
def set_(
    selectors: tuple[str, ...], run: str | None, until: str | None, reason: str, dry_run: bool, as_json: bool
) -> None:
    """Close a target: no job with these tags starts any more.

    In force on every worker within a second. Jobs whose handler runs already finish it; all others become `held`,
    lose no attempt, and go on by themselves when the hold ends: a few first, to see whether the target is open. Set
    again for the same tags, it replaces the time and the reason. It does not ask: "hold clear" takes it back.
    """
    from pipeline_app.control.operators import actor
    from pipeline_app.control.targets import holds

    selector = parse_selector(selectors)
    ends = time_to_come(until, datetime.now(UTC)) if until is not None else None
    with connection(write=not dry_run) as rt:
        run = run_name(rt, run)
        matching = holds.matching(rt, selector=selector, run=run)
        if not as_json:
            when = f"until {clock(ends)}" if ends else "until it is cleared"
            echo_jobs_meant(f"closes {jobs_meant(selector, run)} {when}", matching)
        if dry_run:
            row = _would_be(rt, selector, run, until=ends, reason=reason, actor=actor())
        else:
            row = holds.set_hold(rt, selector=selector, run=run, until=ends, reason=reason, actor=actor())
    if as_json:
        echo_json({**row, "matching": matching, "dry_run": dry_run})
    elif dry_run:
        echo_nothing_changed()
    else:
        echo_in_force(row, f"hold {row['hold']}")


def _would_be(rt: Runtime, selector: dict[str, str], run: str | None, **said: Any) -> dict[str, Any]:
    """The hold that setting it would make, or the one in force that it would change."""
    from pipeline_app.control.targets import holds

    here = (row for row in holds.listing(rt, run) if row["run"] == run and row["selector"] == selector)
    nothing = {"hold": None, "held_jobs": 0, "created_at": None, "closings": 0}
    return {
        **next(here, nothing),
        **said,
        "run": run,
        "stage": None,
        "selector": selector,
        "state": "active",
        "origin": "operator",
        "ended_at": None,
        "workers": None,
        "workers_alive": None,
    }


@hold.command(
    epilog="""\b
Examples:
  pipeline-app hold clear h-3f2a90c1b4
  pipeline-app hold clear --selector provider=openai
  pipeline-app hold clear --run books-1 --dry-run
  pipeline-app hold clear --selector provider=openai --at-once""",
)
@click.argument("hold", required=False)
@selector_option(required=False)
@only_run_option
@click.option("--at-once", is_flag=True, help="Let all held jobs go now, without probing the target with a few.")
@dry_run_option
@json_option
def clear(
    hold: str | None, selectors: tuple[str, ...], run: str | None, at_once: bool, dry_run: bool, as_json: bool
) -> None:
    """Open a target again: end the hold on it.

    HOLD is an id of "hold list". --selector and --run name the hold as they did when it was set: without --run, the
    one for all runs; --run alone, all holds of that run. A few of the held jobs go first; if the target still refuses
    them it is closed again, else the others follow, more and more.
    """
    from pipeline_app.control.targets import holds

    selector = parse_selector(selectors)
    if (hold is None) == (not selector and run is None):
        raise UsageError("name what to open: either HOLD, or --selector and --run", hint="pipeline-app hold list")
    with connection(write=not dry_run) as rt:
        rows = _chosen(rt, hold, selector, run)
        for row in rows if not as_json else ():
            where = jobs_meant(row["selector"], row["run"], row["stage"])
            click.echo(f"opens {where} ({row['hold']}): {plural(row['held_jobs'], 'job')} held")
        if not dry_run:
            rows = [done for row in rows for done in holds.clear(rt, hold=row["hold"], at_once=at_once)]
    if as_json:
        echo_json({"cleared": rows, "at_once": at_once, "dry_run": dry_run})
    elif dry_run:
        echo_nothing_changed()
    else:
        how = "all jobs go on at once" if at_once else "a few jobs go first, the others follow if they succeed"
        click.echo(f"cleared {plural(len(rows), 'hold')}: {how}")


def _chosen(rt: Runtime, hold: str | None, selector: dict[str, str], run: str | None) -> list[dict[str, Any]]:
    """The holds in force that are meant. Raises NotFoundError."""
    from pipeline_app.control.targets import holds

    if hold is not None:
        if hold.startswith("p-"):
            raise RefusedError(f"{hold} is a pause, not a hold", hint="pipeline-app resume RUN ends it")
        rows = [row for row in holds.listing(rt) if row["hold"] == hold]
        meant = hold
    else:
        name = run_name(rt, run)
        rows = [row for row in holds.listing(rt, name) if row["run"] == name]
        rows = [row for row in rows if not selector or row["selector"] == selector]
        meant = jobs_meant(selector, name)
    if not rows:
        raise NotFoundError(f"no hold is in force: {meant}", hint="pipeline-app hold list shows those that are")
    return rows


@hold.command(
    "list",
    epilog="""\b
Examples:
  pipeline-app hold list
  pipeline-app hold list --run last --ended
  pipeline-app hold list --json | jq '.[] | select(.kind == "hold").hold'""",
)
@click.option("--run", metavar="RUN", help="Only what applies to RUN.")
@click.option("--ended", is_flag=True, help="Also holds that are over.")
@json_option
def list_(run: str | None, ended: bool, as_json: bool) -> None:
    """List all that is closed: holds, and what is paused.

    The oldest first, with who closed it and why. A hold is active, then probing while a few jobs see whether the
    target is open, then ended.
    """
    with connection() as rt:
        rows = _all_closed(rt, run, ended)
    if as_json:
        echo_json(rows)
        return
    if not rows:
        click.echo("nothing is closed")
        return
    lines = [
        [
            row["hold"],
            row["state"],
            _what(row),
            _end(row),
            row["held_jobs"],
            row["actor"],
            row["reason"],
        ]
        for row in rows
    ]
    headers = ["id", "state", "closes", "until", "jobs", "by", "reason"]
    echo_table(headers, lines, shrink=["closes", "by", "reason"])


def _all_closed(rt: Runtime, run: str | None, ended: bool) -> list[dict[str, Any]]:
    """Holds and pauses in one shape: whoever looks wants to know what stands still, whatever it is called."""
    from pipeline_app.control.targets import holds, pauses

    rows = [{**row, "kind": "hold", "partition": None} for row in holds.listing(rt, run, ended=ended)]
    rows += [
        {
            "hold": row["pause"],
            "run": row["run"],
            "stage": row["stage"],
            "selector": {},
            "state": "active",
            "until": None,
            "reason": row["reason"],
            "actor": row["actor"],
            "origin": "operator",
            "held_jobs": row["waiting_jobs"],
            "closings": 1,
            "created_at": row["created_at"],
            "ended_at": None,
            "kind": "pause",
            "partition": row["partition"],
        }
        for row in pauses.listing(rt, run)
    ]
    return sorted(rows, key=lambda row: row["created_at"])


def _what(row: dict[str, Any]) -> str:
    if row["kind"] == "pause":
        return place(row["run"], row["stage"], row["partition"])
    return jobs_meant(row["selector"], row["run"], row["stage"])


def _end(row: dict[str, Any]) -> str:
    if row["state"] == "ended":
        return clock(row["ended_at"])
    if row["kind"] == "pause":
        return "resumed"
    return clock(row["until"]) if row["until"] else "cleared"
