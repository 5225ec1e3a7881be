"""`cancel`, `move` and `priority`: changing jobs of a run that are not at rest, all of them or chosen ones."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from pipeline_app.domain.selection import Selection
from pipeline_app.domain.selector import parse_selector
from pipeline_app.domain.states import JobState
from pipeline_app.errors import NotFoundError, RefusedError
from pipeline_app.views.cli.common import Command, connection, json_option, run_argument, stage_option
from pipeline_app.views.cli.progress import counting
from pipeline_app.views.cli.render import echo_json, one_line, plural
from pipeline_app.views.cli.targets import dry_run_option, echo_nothing_changed, partition_option, selector_option

if TYPE_CHECKING:
    from pipeline_app.control.changes.selecting import Progress
    from pipeline_app.runtime import Runtime

#: States that a command here may choose by; `pending` are also those that run.
_STATES = [str(state) for state in (JobState.WAITING, JobState.PENDING, JobState.RETRY_WAITING, JobState.HELD)]

_jobs_option = click.option("--job", "job_ids", metavar="JOB", multiple=True, help="Only this job; as often as wanted.")
_states_option = click.option(
    "--status",
    "states",
    type=click.Choice(_STATES),
    multiple=True,
    help="Only jobs in this state; as often as wanted.",
)
yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


def _filters(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that choose jobs, in this order."""
    options = (_jobs_option, selector_option(required=False), _states_option, stage_option, partition_option)
    for option in reversed(options):
        command = option(command)
    return command


def _selection(
    *, job_ids: tuple[str, ...], selectors: tuple[str, ...], states: tuple[str, ...], stage: str | None,
    partition: str | None,
) -> Selection:  # fmt: skip
    return Selection(
        job_ids=job_ids,
        selector=parse_selector(selectors),
        states=tuple(JobState(state) for state in states),
        stage=stage,
        partition=partition,
    )


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  pipeline-app cancel books-1 --job a1 --job a2
  pipeline-app cancel books-1 --selector provider=openai --stage analyze --dry-run
  pipeline-app cancel books-1 --status held --yes --json
  pipeline-app cancel books-1""",
)
@run_argument
@_filters
@yes_option
@dry_run_option
@json_option
def cancel(run: str, yes: bool, dry_run: bool, as_json: bool, **filters: Any) -> None:
    """Cancel jobs of RUN; without any filter, all of RUN.

    Jobs that are at rest stay as they are. A cancelled job does not start any more; where its handler runs at this
    moment, what that did is not recorded, and if all jobs of its message were cancelled it is stopped once the grace
    of its stage is over. A run that was cancelled as a whole cannot be taken up again; single jobs can be replayed.
    """
    from pipeline_app.control.changes import cancelling
    from pipeline_app.control.operators import actor

    selection = _selection(**filters)
    with connection(write=not dry_run) as rt:
        name = _name(rt, run)
        found = cancelling.preview(rt, name, selection)
        if selection == Selection():
            ask = _Ask(f"cancels run {name}", f"cancel run {name}?", "cancelled", yes, dry_run, as_json)
            done = ask.carry_out(found, lambda show: cancel_run(rt, name))
        else:
            _need_some(found, name)
            question = f"cancel {plural(found['matched'], 'job')}?"
            ask = _Ask(f"cancels jobs of run {name}", question, "cancelled", yes, dry_run, as_json)
            done = ask.carry_out(
                found, lambda show: cancelling.cancel_jobs(rt, name, selection, actor=actor(), progress=show)
            )
    _tell(f"cancelled {plural(done, 'job')} of run {name}", name, found, {"cancelled": done}, dry_run, as_json)


def cancel_run(rt: Runtime, run: str) -> int:
    """Cancel a run; how many of its jobs became cancelled: the sweep of a worker moves some of them, too."""
    from pipeline_app.control.changes.cancelling import cancel as do
    from pipeline_app.control.sight.status import status

    before = status(rt, run, queues=False).states["cancelled"]
    do(rt, run)
    return status(rt, run, queues=False).states["cancelled"] - before


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  pipeline-app move books-1 --to review --stage analyze --selector language=latin
  pipeline-app move books-1 --to analyze --job a1 --job a2
  pipeline-app move last --to review --status held --dry-run""",
)
@run_argument
@click.option("--to", metavar="STAGE", required=True, help="Where they go.")
@_filters
@yes_option
@dry_run_option
@json_option
def move(run: str, to: str, yes: bool, dry_run: bool, as_json: bool, **filters: Any) -> None:
    """Move waiting jobs of RUN to another stage.

    They keep the input that they have: moved forward they pass over the stages in between, moved back an earlier stage
    gets what a later one was to get ("replay start --from-stage" begins again with that stage's own input). Jobs whose
    handler runs stay where they are. Jobs that are held or wait for a time go on waiting for the same.
    """
    from pipeline_app.control.changes import moving
    from pipeline_app.control.operators import actor

    selection = _selection(**filters)
    with connection(write=not dry_run) as rt:
        name = _name(rt, run)
        found = moving.preview_move(rt, name, selection, to)
        _need_some(found, name)
        question = f"move {plural(found['matched'], 'job')} to {one_line(to)}?"
        ask = _Ask(f"moves jobs of run {name} to {one_line(to)}", question, "moved", yes, dry_run, as_json)
        done = ask.carry_out(
            found, lambda show: moving.move_jobs(rt, name, selection, to, actor=actor(), progress=show)
        )
    text = f"moved {plural(done, 'job')} of run {name} to {one_line(to)}"
    _tell(text, name, found, {"to": to, "moved": done}, dry_run, as_json)


@click.command(
    cls=Command,
    # Negative numbers look like options.
    context_settings={"ignore_unknown_options": True},
    epilog="""\b
Examples:
  pipeline-app priority books-1 10 --job a1
  pipeline-app priority books-1 -5 --selector language=latin
  pipeline-app priority last 0 --stage analyze --dry-run""",
)
@run_argument
@click.argument("priority", metavar="NUMBER", type=click.IntRange(-1000, 1000))
@_filters
@yes_option
@dry_run_option
@json_option
def priority(run: str, priority: int, yes: bool, dry_run: bool, as_json: bool, **filters: Any) -> None:
    """Let jobs of RUN go before others, or after them.

    NUMBER is from -1000 to 1000; the highest goes first, equal ones in order of arrival, and jobs are seeded with 0
    unless they say otherwise. If any of the jobs is in a queue already, jobs of RUN wait for their turn in the store
    from then on: what is in a queue is put in order when a worker takes it.
    """
    from pipeline_app.control.changes import moving
    from pipeline_app.control.operators import actor

    selection = _selection(**filters)
    with connection(write=not dry_run) as rt:
        name = _name(rt, run)
        found = moving.preview_priority(rt, name, selection, priority)
        _need_some(found, name)
        question = f"give {plural(found['matched'], 'job')} priority {priority}?"
        ask = _Ask(f"gives jobs of run {name} priority {priority}", question, "changed", yes, dry_run, as_json)
        done = ask.carry_out(
            found, lambda show: moving.set_priority(rt, name, selection, priority, actor=actor(), progress=show)
        )
    text = f"{plural(done, 'job')} of run {name} changed to priority {priority}"
    _tell(text, name, found, {"priority": priority, "changed": done}, dry_run, as_json)


def _name(rt: Runtime, run: str) -> str:
    """The run's own name, for `last`. Raises NotFoundError."""
    from pipeline_app.control.sight.ledger import find_plan

    return find_plan(rt, run).run


def _need_some(found: Mapping[str, Any], run: str) -> None:
    if not found["matched"]:
        raise NotFoundError(
            f"no job of run {run} that can be changed matches",
            hint=f"jobs at rest are left alone; pipeline-app run status {run} shows where jobs stand",
        )


@dataclass(frozen=True)
class _Ask:
    """What is said and asked before jobs are changed."""

    what: str
    question: str
    #: `cancelled`, `moved` ...
    done: str
    yes: bool
    dry_run: bool
    as_json: bool

    def carry_out(self, found: Mapping[str, Any], do: Callable[[Progress], int]) -> int:
        """Show what will be changed, ask whoever sits at a terminal, and do it. Raises RefusedError."""
        if not self.as_json:
            _echo_found(self.what, found)
        if self.dry_run:
            return 0
        asks = not (self.yes or self.as_json) and sys.stdin.isatty()
        if asks and not click.confirm(self.question, err=True):
            raise RefusedError(f"nothing was {self.done}")
        with counting("job", self.done, silent=self.as_json) as show:
            return do(show)


def _echo_found(what: str, found: Mapping[str, Any]) -> None:
    """How many jobs will be changed, and how many of them are where."""
    click.echo(f"{what}: {plural(found['matched'], 'job')}")
    for part in ("by_stage", "by_status", "by_partition"):
        numbers = [f"{one_line(name)} {number:,}" for name, number in found[part].items()]
        if numbers:
            click.echo(f"  {part.replace('_', ' ')}: {', '.join(numbers)}")


def _tell(text: str, run: str, found: Mapping[str, Any], done: Mapping[str, Any], dry_run: bool, as_json: bool) -> None:
    if as_json:
        echo_json({"run": run, **found, **done, "dry_run": dry_run})
    elif dry_run:
        echo_nothing_changed()
    else:
        click.echo(text)
