"""Starting detached workers and seeing them ready, stopping workers and seeing them gone. For the group `stage`.

Workers are started on this machine and asked to stop on any. What was begun goes on without the command: who interrupts
it only stops waiting.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from pipeline_app.errors import PipelineError
from pipeline_app.views.cli.common import EXIT_NO, patiently, undisturbed
from pipeline_app.views.cli.render import duration, echo_error, echo_json, one_line, plural
from pipeline_app.views.cli.targets import echo_nothing_changed

if TYPE_CHECKING:
    from pipeline_app.local.workers import NewWorker, WorkerProcess
    from pipeline_app.runtime import Runtime

#: Workers that are not registered by then are left to themselves.
READY_S = 60.0
#: How often it is asked whether they are ready, or gone.
POLL_S = 0.2
#: Who waits for long is told again what for.
TELL_AGAIN_S = 10.0

Tell = Callable[[str], None]
Row = dict[str, Any]


@dataclass(kw_only=True)
class Done:
    """What a command did, or would do."""

    run: str
    stage: str
    dry_run: bool
    #: Queues that what was started consumes.
    queues: list[str] = field(default_factory=list)
    started: list[Row] = field(default_factory=list)
    stopped: list[Row] = field(default_factory=list)
    #: Asked to stop, and still running.
    left: list[Row] = field(default_factory=list)


def start(rt: Runtime, wanted: Sequence[NewWorker], tell: Tell, *, or_none: bool) -> list[Row]:
    """Start workers and wait until they are registered. If one is not, the others run on, or with `or_none` stop.

    Raises PipelineError, which shows the end of its log.
    """
    from pipeline_app.control import workforce
    from pipeline_app.local import workers

    host = socket.gethostname()
    started = workers.start_numbered(wanted, taken=workforce.names_on(rt, host))
    names = [worker.name for worker in started]
    tell(f"starting {plural(len(names), 'worker')}: {', '.join(names)}")
    try:
        return _ready(rt, host, started, tell)
    except BaseException as exc:
        if or_none:
            with undisturbed():
                workers.stop(names)
        elif isinstance(exc, KeyboardInterrupt):
            raise KeyboardInterrupt("interrupted; the workers were started: pipeline-app workers shows them") from exc
        raise


def _ready(rt: Runtime, host: str, started: Sequence[WorkerProcess], tell: Tell) -> list[Row]:
    from pipeline_app.control import workforce
    from pipeline_app.local import processes

    waiting = {worker.pid: worker for worker in started}
    ready: list[Row] = []
    deadline = time.monotonic() + READY_S
    while waiting:
        for row in workforce.registered(rt, host, list(waiting)):
            tell(f"{waiting.pop(row['pid']).name} is ready, pid {row['pid']}")
            ready.append(row)
        for worker in waiting.values():
            if processes.find(worker.process) is None:
                raise PipelineError(
                    f"worker {worker.name} ended while it started:\n{processes.tail(worker.log)}",
                    hint=f"its log is {worker.log}",
                )
        if waiting and time.monotonic() > deadline:
            late = next(iter(waiting.values()))
            raise PipelineError(
                f"{plural(len(waiting), 'worker')} of {len(started)} not ready after {READY_S:.0f} s: {late.name}",
                hint=f"it goes on starting; its log is {late.log}",
            )
        time.sleep(POLL_S if waiting else 0)
    order = [worker.pid for worker in started]
    return sorted(ready, key=lambda row: order.index(row["pid"]))


def planned(rt: Runtime, wanted: Sequence[NewWorker]) -> list[Row]:
    """What `start` would start."""
    from pipeline_app.control import workforce
    from pipeline_app.local import workers

    host = socket.gethostname()
    taken = {*workforce.names_on(rt, host), *(worker.name for worker in workers.running())}
    return [
        {
            "worker": f"{name}@{host}",
            "host": host,
            "pid": None,
            "pool": new.pool,
            "concurrency": new.concurrency,
            "select": list(new.select),
            "skip": list(new.skip),
            "state": None,
            "log": None,
        }
        for name, new in zip(workers.numbered(wanted, taken), wanted, strict=True)
    ]


def stop(rt: Runtime, rows: Sequence[Row], *, now: bool, timeout: float | None, tell: Tell) -> list[Row]:
    """Ask workers to stop and wait until they have; returns those that had not when the time was over."""
    from pipeline_app.control import workforce

    workforce.ask_to_stop(rt, rows, now=now)
    try:
        return _gone(rt, rows, now=now, timeout=timeout, tell=tell)
    except KeyboardInterrupt as exc:
        raise KeyboardInterrupt("interrupted; the workers were asked to stop, and will") from exc


def _gone(rt: Runtime, rows: Sequence[Row], *, now: bool, timeout: float | None, tell: Tell) -> list[Row]:
    from pipeline_app.control import workforce

    begin = told = time.monotonic()
    tell(f"stopping {plural(len(rows), 'worker')}: {_names(rows)}")
    left = list(rows)
    while left := patiently(lambda: workforce.still_running(rt, rows, now=now)) or _ending(rows):
        since = time.monotonic()
        if timeout is not None and since - begin >= timeout:
            return left
        if since - told >= TELL_AGAIN_S:
            told = since
            tell(f"for {duration(since - begin)} waiting for what runs on {_names(left)}")
        time.sleep(POLL_S)
    return left


def _ending(rows: Sequence[Row]) -> list[Row]:
    """Workers of this machine that have said goodbye, and whose process has still to end."""
    from pipeline_app.local import workers

    pids = {worker.pid for worker in workers.running()}
    return [row for row in rows if row["host"] == socket.gethostname() and row["pid"] in pids]


def echo(rt: Runtime, done: Done, *, as_json: bool) -> int | None:
    """Say what was done; the exit code."""
    from pipeline_app.control import workforce

    if as_json:
        known = {} if done.dry_run else {"started": workforce.as_dicts(rt, done.started)}
        answers = {name: workforce.as_dicts(rt, getattr(done, name)) for name in ("stopped", "left")}
        echo_json({**vars(done), **known, **answers})
    else:
        for word, past, rows in (("start", "started", done.started), ("stop", "stopped", done.stopped)):
            if rows:
                verb = f"would {word}" if done.dry_run else past
                click.echo(f"{verb} {plural(len(rows), 'worker')}: {_names(rows)}")
        if done.started and done.queues:
            click.echo(f"they consume {', '.join(map(one_line, done.queues))}")
        if done.dry_run:
            echo_nothing_changed()
        elif not done.started and not done.stopped and not done.left:
            click.echo("nothing to do")
        if done.left:
            text = f"{plural(len(done.left), 'worker')} did not stop in time, and will when what runs has ended"
            echo_error("error", f"{text}: {_names(done.left)}", "--now gives back what runs", as_json=False)
    return EXIT_NO if done.left else None


def _names(rows: Sequence[Row]) -> str:
    shown = [row["worker"] for row in rows[:8]]
    return ", ".join([*shown, f"and {len(rows) - 8} more"] if len(rows) > 8 else shown)
