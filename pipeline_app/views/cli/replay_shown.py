"""How the commands of `replay` show what a replay would do, how far it is, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from pipeline_app.domain.pace import Pace
from pipeline_app.domain.rates import Rate
from pipeline_app.views.cli.progress import BAR, is_watched
from pipeline_app.views.cli.render import echo_error, one_line, plural

if TYPE_CHECKING:
    from pipeline_app.control.replays.replay import Survey
    from pipeline_app.runtime import Runtime

#: How often `--wait` looks.
LOOK_EVERY_S = 0.5
#: States of a replay in which it goes on no further by itself.
_ENDED = {"done", "halted", "cancelled", "paused"}


def echo_survey(
    run: str, found: Survey, *, from_stage: str | None, pace: Pace | None, halt_after: int | None
) -> None:
    """What will be changed, and how many of them."""
    one = found.matched == 1
    click.echo(f"run {run}: {plural(found.matched, 'job')} {'matches' if one else 'match'}")
    left = {
        "not due": found.not_due,
        "with no recorded input for that stage": found.no_input,
        "whose input cannot be edited so": found.not_editable,
    }
    for words, number in left.items():
        if number:
            click.echo(f"leaves {plural(number, 'job')} {words}")
    start = f"from {from_stage}" if from_stage else "each from its stage"
    speed = f"at {Rate(pace.per_s).written}" if pace else "as fast as it goes"
    halt = f", halts after {plural(halt_after, 'failure')}" if halt_after else ""
    click.echo(f"replays {plural(found.would_replay, 'job')}, {start}, {speed}{halt}")
    for title, counts in (("stage", found.by_stage), ("status", found.by_status), ("partition", found.by_partition)):
        if counts:
            click.echo(f"  by {title}: " + ", ".join(f"{one_line(name)} {number:,}" for name, number in counts.items()))


def follow(rt: Runtime, operation: str, total: int, *, silent: bool) -> dict[str, Any]:
    """Wait until it goes on no further. Ctrl-C ends the waiting; the replay goes on."""
    from pipeline_app.control.replays import replay as control

    with _bar(total, silent=silent) as show:
        while True:
            row = control.show(rt, operation)
            show(row)
            if row["state"] in _ENDED:
                return row
            time.sleep(LOOK_EVERY_S)


@contextmanager
def _bar(total: int, *, silent: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    if silent or not is_watched():
        yield lambda row: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("replayed"), BarColumn(bar_width=BAR), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=Console(stderr=True, highlight=False)) as progress:
        task = progress.add_task("", total=max(total, 1), text="")
        yield lambda row: progress.update(task, completed=row["released"], text=numbers(row))


def numbers(row: Mapping[str, Any]) -> str:
    """`300 of 1,000 jobs, 2 attempts failed again, paused`."""
    parts = [f"{row['released']:,} of {plural(row['matched'], 'job')}"]
    if row["skipped"]:
        parts.append(f"{row['skipped']:,} left as they are")
    if row["failed"]:
        parts.append(f"{plural(row['failed'], 'attempt')} failed again")
    return ", ".join([*parts, row["state"]])


def echo_end(row: Mapping[str, Any]) -> None:
    if row["state"] == "done":
        click.echo(f"replayed {numbers(row)}; \"run wait {row['run']}\" waits for what becomes of them")
        return
    hint = f"pipeline-app replay resume {row['operation']}" if row["state"] == "halted" else None
    why = f": {one_line(row['why'])}" if row["why"] else ""
    echo_error(row["state"], f"replay {row['operation']}: {numbers(row)}{why}", hint, as_json=False)
