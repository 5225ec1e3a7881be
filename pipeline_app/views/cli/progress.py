"""Live views where a person waits: bars for each stage of a run with rate and time to go, and counters.

They are drawn on standard error, so that answers can be piped, and only if that is a terminal; else they stay silent.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline_app.domain.states import AT_REST, JobState
from pipeline_app.views.cli.render import number, one_line, plural

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.progress import Progress, TaskID

    from pipeline_app.control.sight.status import StageStatus, Status

#: Below this many columns only bars and counts fit; below the second, what stands in a stage is left out.
NARROW, MIDDLE = 60, 100

#: The width of a bar: the rest of the line has numbers.
BAR, NARROW_BAR = 30, 10

Show = Callable[["Status"], None]


def is_watched() -> bool:
    """Whether a person sees standard error."""
    return sys.stderr.isatty()


@contextmanager
def run_progress(*, silent: bool = False) -> Iterator[Show]:
    """Bars for the stages of a run, drawn anew with every status that is shown; they stay when it ends."""
    if silent or not is_watched():
        yield lambda status: None
        return
    from rich.console import Console
    from rich.live import Live

    bars = _Bars(Console(stderr=True, highlight=False))
    with Live(console=bars.console, get_renderable=bars.render, refresh_per_second=4):
        yield bars.show


class _Bars:
    """A bar for each stage and one for the run."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = _make_progress(console)
        self._tasks: dict[str, TaskID] = {}
        self._status: Status | None = None

    def show(self, status: Status) -> None:
        """Bring the bars up to date."""
        self._status = status
        before = 0
        for row in status.stages:
            ended = row.states[JobState.DEAD_LETTERED] + row.states[JobState.CANCELLED]
            # Jobs that ended in an earlier stage never get here.
            self._update(row.stage, row.completed + ended, status.seeded - before, standing(row))
            before += ended
        self._update("all", status.at_rest, status.seeded, "")

    def render(self) -> Group:
        """What is on the screen."""
        from rich.console import Group
        from rich.text import Text

        status = self._status
        if status is None:
            return Group(Text("connecting"))
        seeding = ", seeding" if status.seeding and status.state != "seeding" else ""
        head = Text.assemble((f"run {status.run}", "bold"), f"  {status.pipeline}  {status.state}{seeding}")
        warnings = [Text(f"warning: {one_line(text)}", style="yellow") for text in status.warnings]
        return Group(head, self._progress, *warnings)

    def _update(self, name: str, done: int, total: int, standing: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, count="", standing="")
        count = f"{done:>{len(number(total))},} / {total:,}"
        # A bar of nothing would pulse.
        self._progress.update(
            self._tasks[name], completed=done, total=max(total, 1), count=count, standing=standing
        )


def _make_progress(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        """How many a second, lately."""

        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:,.0f}/s", justify="right")

    class Left(ProgressColumn):
        """Time to go at that rate."""

        def render(self, task: Task) -> Text:
            left = task.time_remaining
            if task.finished or not left:
                return Text("")
            hours, seconds = divmod(int(left), 3600)
            return Text(f"{hours}:{seconds // 60:02d}:{seconds % 60:02d} to go", justify="right")

    bar = BarColumn(bar_width=BAR if console.width >= NARROW else NARROW_BAR)
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), bar, TextColumn("{task.fields[count]}")]
    if console.width < NARROW:
        return Progress(*columns, console=console, auto_refresh=False)
    columns += [Rate(), Left()]
    if console.width >= MIDDLE:
        columns.append(TextColumn("{task.fields[standing]}", style="dim"))
    return Progress(*columns, console=console, auto_refresh=False)


def standing(row: StageStatus) -> str:
    """What stands in a stage: `12 running, 3 retry_waiting, 9 dead_lettered`."""
    order = [JobState.RUNNING, *(state for state in JobState if state != JobState.RUNNING)]
    return ", ".join(
        f"{row.states[state]:,} {state}" for state in order if state != JobState.TERMINAL and row.states[state]
    )


def unfinished(status: Status) -> str:
    """What is not at rest: `12 running, 3 retry_waiting`."""
    return ", ".join(
        f"{count:,} {state}" for state, count in status.states.items() if state not in AT_REST and count
    )


class Count:
    """A number that grows, and why it does not at the moment."""

    def __init__(self, word: str, done: str, update: Callable[[str], None]) -> None:
        self._word = word
        self._done = done
        self._update = update
        self._count = 0

    def __call__(self, count: int) -> None:
        """So many by now."""
        self._count = count
        self._update(f"{plural(count, self._word)} {self._done}")

    def waits(self, why: str) -> None:
        """Nothing is done at the moment."""
        self._update(f"{plural(self._count, self._word)} {self._done}; waiting: {why}")


@contextmanager
def counting(word: str, done: str, *, silent: bool = False) -> Iterator[Count]:
    """A number that grows: `1,790 jobs added`."""
    if silent or not is_watched():
        yield Count(word, done, lambda text: None)
        return
    from rich.console import Console

    with Console(stderr=True, highlight=False).status("") as status:
        yield Count(word, done, status.update)


@contextmanager
def reading(what: str, total_bytes: int, *, silent: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar for a file that is read; called with the bytes read so far."""
    if silent or not is_watched():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=BAR), TaskProgressColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True, highlight=False), transient=True) as progress:
        task = progress.add_task(what, total=total_bytes)
        yield lambda done: progress.update(task, completed=done)
