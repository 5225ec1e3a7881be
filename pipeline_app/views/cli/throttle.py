"""The group `throttle`: limits that all workers on all machines keep together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from pipeline_app.domain.rates import Budget, Rate
from pipeline_app.domain.selector import parse_selector
from pipeline_app.errors import NotFoundError, UsageError
from pipeline_app.views.cli.common import Group, connection, json_option
from pipeline_app.views.cli.render import echo_json, echo_table, plural
from pipeline_app.views.cli.targets import (
    dry_run_option,
    echo_jobs_meant,
    echo_nothing_changed,
    jobs_meant,
    only_run_option,
    reason_option,
    run_name,
    selector_option,
)

if TYPE_CHECKING:
    from pipeline_app.runtime import Runtime


#: What a throttle has that is not said when it is set.
_NOTHING_YET = {
    "throttle": None,
    "created_at": None,
    "waiting_jobs": 0,
    "running": 0,
    "spent": None,
    "period_ends_at": None,
}


stage_option = click.option("--stage", metavar="PIPELINE.STAGE", help="Only in this stage; else in every one.")


@click.group(cls=Group)
def throttle() -> None:
    """Limit how much all workers together ask of a target."""


@throttle.command(
    "set",
    epilog="""\b
Examples:
  pipeline-app throttle set --selector provider=openai --rate 39/s --burst 2
  pipeline-app throttle set --selector provider=openai --stage books.ask --rate 39/s
  pipeline-app throttle set --selector provider=openai --concurrency 10 --run books-1
  pipeline-app throttle set --selector provider=openai --budget "100000 tokens/1d" --reason "free plan"
  pipeline-app throttle set --selector provider=openai --rate 100/10s --dry-run""",
)
@selector_option(required=True)
@only_run_option
@stage_option
@click.option("--rate", metavar="RATE", help="How many jobs start in a time: 39/s, 100/m, 5000/h, 20000/d, 100/10s.")
@click.option("--burst", type=click.IntRange(min=1), help="How many may start together after a pause. [default: 1]")
@click.option("--concurrency", type=click.IntRange(min=1), help="How many jobs run at a time.")
@click.option("--budget", metavar="BUDGET", help="How much handlers may spend: '100000 tokens/1d', '20 usd/h'.")
@reason_option
@dry_run_option
@json_option
def set_(
    selectors: tuple[str, ...],
    run: str | None,
    stage: str | None,
    rate: str | None,
    burst: int | None,
    concurrency: int | None,
    budget: str | None,
    reason: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Limit jobs with these tags, for all workers on all machines together.

    A job counts in every stage that it goes through: if only one of them calls the target, name that with --stage. A
    job over the limit waits in the store, not in a worker, and loses no attempt. Several limits may be given, and
    all are kept. Set again for the same tags, it replaces the limits; what is spent stays spent. A budget counts what
    handlers report by job.spend(amount, unit); its first period begins when it is set.
    """
    selector = parse_selector(selectors)
    if burst is not None and rate is None:
        raise UsageError("--burst is a part of a rate: give --rate, too")
    if rate is None and concurrency is None and budget is None:
        raise UsageError("a throttle has a limit: give --rate, --concurrency or --budget")
    limits: dict[str, Any] = {
        "rate": Rate.parse(rate) if rate is not None else None,
        "burst": burst,
        "concurrency": concurrency,
        "budget": Budget.parse(budget) if budget is not None else None,
    }
    _set(selector, run, stage, limits, reason, dry_run, as_json)


def _set(
    selector: dict[str, str],
    run: str | None,
    stage: str | None,
    limits: dict[str, Any],
    reason: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    from pipeline_app.control.operators import actor
    from pipeline_app.control.targets import holds, throttles

    throttles.check_task(stage)
    with connection(write=not dry_run) as rt:
        run = run_name(rt, run)
        matching = holds.matching(rt, selector=selector, run=run, stage=stage)
        before = next(iter(_meant(rt, selector, run, stage)), None)
        if not as_json:
            which = jobs_meant(selector, run, stage)
            echo_jobs_meant(f"limits {which} to {limits_of(_as_row(limits))}", matching)
            if before is not None:
                click.echo(f"replaces {limits_of(before)} ({before['throttle']})")
        if dry_run:
            said = {**_as_row(limits), "run": run, "stage": stage, "selector": selector, "reason": reason}
            row = {**(before or _NOTHING_YET), **said, "actor": actor()}
        else:
            about: dict[str, Any] = {"selector": selector, "run": run, "stage": stage, "reason": reason}
            row = throttles.set_throttle(rt, **about, **limits, actor=actor())
    if as_json:
        echo_json({**row, "matching": matching, "dry_run": dry_run})
    elif dry_run:
        echo_nothing_changed()
    else:
        click.echo(f"throttle {row['throttle']} is in force on every worker within a second")


def _as_row(limits: dict[str, Any]) -> dict[str, Any]:
    """Limits as the rows of a listing have them."""
    rate, budget = limits["rate"], limits["budget"]
    return {
        "rate_per_s": rate.per_s if rate else None,
        "burst": limits["burst"] or 1,
        "concurrency": limits["concurrency"],
        "budget": vars(budget) if budget else None,
        "ordered": False,
    }


def limits_of(row: dict[str, Any]) -> str:
    """`39/s (burst 2), 10 at a time, 100000 tokens/1d`."""
    parts = []
    if row["rate_per_s"]:
        parts.append(f"{Rate(row['rate_per_s']).written} (burst {row['burst']})")
    if row["concurrency"]:
        parts.append(f"{row['concurrency']:,} at a time")
    if row["budget"]:
        parts.append(Budget(**row["budget"]).written)
    if row["ordered"]:
        parts.append("by priority")
    return ", ".join(parts)


def _meant(rt: Runtime, selector: dict[str, str], run: str | None, stage: str | None) -> list[dict[str, Any]]:
    """The one for exactly this, or, without a selector, all that were set for a run; its order by priority is none."""
    from pipeline_app.control.targets import throttles

    rows = [row for row in throttles.listing(rt, run) if row["run"] == run]
    if not selector:
        return [row for row in rows if row["selector"]]
    return [row for row in rows if row["selector"] == selector and row["stage"] == stage]


@throttle.command(
    epilog="""\b
Examples:
  pipeline-app throttle clear t-3f2a90c1b4
  pipeline-app throttle clear --selector provider=openai
  pipeline-app throttle clear --run books-1 --dry-run""",
)
@click.argument("throttle", required=False)
@selector_option(required=False)
@only_run_option
@stage_option
@dry_run_option
@json_option
def clear(
    throttle: str | None, selectors: tuple[str, ...], run: str | None, stage: str | None, dry_run: bool, as_json: bool
) -> None:
    """Take a limit away; jobs that wait for it go on.

    THROTTLE is an id of "throttle list". --selector, --run and --stage name it as they did when it was set: without
    --run, the one for all runs; --run alone, all throttles of that run.
    """
    from pipeline_app.control.targets import throttles

    selector = parse_selector(selectors)
    if (throttle is None) == (not selector and run is None):
        raise UsageError(
            "name what to clear: either THROTTLE, or --selector and --run", hint="pipeline-app throttle list"
        )
    with connection(write=not dry_run) as rt:
        run = run_name(rt, run)
        if throttle is not None:
            rows = [row for row in throttles.listing(rt) if row["throttle"] == throttle]
        else:
            rows = _meant(rt, selector, run, stage)
        if not rows:
            meant = throttle or jobs_meant(selector, run, stage)
            raise NotFoundError(f"there is no throttle: {meant}", hint="pipeline-app throttle list shows what there is")
        for row in rows if not as_json else ():
            where = jobs_meant(row["selector"], row["run"], row["stage"])
            waiting = plural(row["waiting_jobs"], "job")
            click.echo(f"takes {limits_of(row)} from {where} ({row['throttle']}): {waiting} waiting")
        if not dry_run:
            rows = [done for row in rows for done in throttles.clear(rt, throttle=row["throttle"])]
    if as_json:
        echo_json({"cleared": rows, "dry_run": dry_run})
    elif dry_run:
        echo_nothing_changed()
    else:
        click.echo(f"cleared {plural(len(rows), 'throttle')}")


@throttle.command(
    "list",
    epilog="""\b
Examples:
  pipeline-app throttle list
  pipeline-app throttle list --run last --json""",
)
@click.option("--run", metavar="RUN", help="Only what applies to RUN.")
@json_option
def list_(run: str | None, as_json: bool) -> None:
    """List the throttles, with what waits for them and what is used up.

    The oldest first. Running: jobs that hold one of the places of --concurrency. Spent: of the budget, until the
    period ends.
    """
    from pipeline_app.control.targets import throttles

    with connection() as rt:
        rows = throttles.listing(rt, run)
    if as_json:
        echo_json(rows)
        return
    if not rows:
        click.echo("nothing is throttled")
        return
    lines = [
        [
            row["throttle"],
            jobs_meant(row["selector"], row["run"], row["stage"]),
            limits_of(row),
            row["waiting_jobs"],
            row["running"] if row["concurrency"] else None,
            None if row["spent"] is None else f"{row['spent']:,.15g}",
            row["period_ends_at"],
            row["actor"],
            row["reason"],
        ]
        for row in rows
    ]
    headers = ["id", "throttles", "to", "waiting", "running", "spent", "period ends", "by", "reason"]
    echo_table(headers, lines, shrink=["throttles", "to", "by", "reason"])
