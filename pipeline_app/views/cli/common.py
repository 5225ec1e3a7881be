"""What all commands share: options, the connection, and how an error becomes a message and an exit code.

    0 done   1 the answer is no   2 wrong usage   3 a service is unreachable   4 our own bug   130 Ctrl-C

Every error ends in `_Reporting`, whether the command was called as `pipeline-app` or under `celery`.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline_app.domain.outage import Outage
from pipeline_app.errors import PipelineError, StoreError, UsageError
from pipeline_app.views.cli.render import duration, echo_error, echo_warning, iso, one_line

if TYPE_CHECKING:
    from pipeline_app.runtime import Runtime

Answer = TypeVar("Answer")

#: Set it to any text to see the traceback of an error.
TRACEBACK = "PIPELINE_TRACEBACK"
#: Where a context keeps the words that our command was called with.
_WORDS = "pipeline_app.words"

#: Signals by which people, terminals and service managers end a command.
_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

#: Pauses between two questions to a store that is away: doubled up to the second.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 5.0

EXIT_NO = 1
EXIT_USAGE = 2
EXIT_BUG = 4
EXIT_INTERRUPTED = 130

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

run_argument = click.argument("run")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs, and nothing else.")
stage_option = click.option("--stage", metavar="STAGE", help="Only this stage.")
job_option = click.option("--job", "job_id", metavar="JOB", help="Only this job.")
limit_option = click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, help="How many to show."
)


class _Reporting(click.Command):
    """Turns whatever a command raises into a message on standard error and an exit code."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options["context_settings"] = {**CONTEXT_SETTINGS, **(options.get("context_settings") or {})}
        super().__init__(*args, **options)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta.setdefault(_WORDS, list(args))
        with _reported(ctx):
            return super().parse_args(ctx, args)
        raise AssertionError  # not reached: an error that was reported ends the program

    def invoke(self, ctx: click.Context) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # Names that the terminal's encoding lacks are no reason to fail.
            sys.stdout.reconfigure(errors="backslashreplace")
        with _reported(ctx):
            _check_celery_app(ctx)
            code = super().invoke(ctx)
            sys.stdout.flush()
            if isinstance(code, int) and code:
                ctx.exit(code)


class Command(_Reporting):
    """A command; its function returns an exit code, or None for 0."""


class Group(_Reporting, click.Group):
    """A group of commands, listed in the order in which they were added."""

    command_class = Command
    group_class = type

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - the signature is click's
        return list(self.commands)


@contextmanager
def _reported(ctx: click.Context) -> Iterator[None]:
    as_json = "--json" in ctx.meta[_WORDS]
    try:
        yield
    except click.exceptions.Exit:
        raise
    except PipelineError as exc:
        echo_error(exc.code, exc.message, exc.hint, as_json=as_json)
        _show_traceback()
        ctx.exit(exc.exit_code)
    except click.ClickException as exc:
        if as_json:
            echo_error("usage", exc.format_message(), f"{ctx.command_path} --help", as_json=True)
        else:
            exc.show()
        ctx.exit(exc.exit_code)
    except (KeyboardInterrupt, click.Abort) as exc:
        # Whoever was interrupted in something may have said in what.
        echo_error("interrupted", str(exc) or "interrupted", None, as_json=as_json)
        ctx.exit(EXIT_INTERRUPTED)
    except OSError as exc:
        if exc.errno != errno.EPIPE:
            _report_bug(ctx, exc, as_json=as_json)
        # Whoever read our output has all that it wanted.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        ctx.exit(0)
    except Exception as exc:  # noqa: BLE001 - the last resort of the program
        _report_bug(ctx, exc, as_json=as_json)


def _report_bug(ctx: click.Context, exc: BaseException, *, as_json: bool) -> None:
    from pipeline_app.settings import redact

    last = traceback.extract_tb(exc.__traceback__)[-1]
    place = f"{os.path.basename(last.filename)}:{last.lineno}"
    text = " ".join(redact(str(exc)).split())[:300]
    hint = f"run it again with {TRACEBACK}=1 and report what it shows"
    echo_error("bug", f"this should not happen: {type(exc).__name__}: {text} ({place})", hint, as_json=as_json)
    _show_traceback()
    ctx.exit(EXIT_BUG)


def _show_traceback() -> None:
    if os.environ.get(TRACEBACK):
        traceback.print_exc()


def _check_celery_app(ctx: click.Context) -> None:
    """Under `celery` the commands mean the app of `-A`, which may be another one, or missing."""
    app = getattr(ctx.find_root().obj, "app", None)
    if app is not None and app.main != "pipeline_app":
        raise UsageError(
            "this command belongs to pipeline_app, and the Celery app is another one",
            hint=f"call it as: celery -A pipeline_app {ctx.command.name} ...",
        )


@contextmanager
def interrupted_once() -> Iterator[None]:
    """For commands that must clean up: the first Ctrl-C interrupts them, and an impatient second one is ignored.

    A terminal that is closed, or a plain `kill`, is the same to them.
    """

    def interrupt(number: int, frame: Any) -> None:  # noqa: ARG001 - the signature is Python's
        _set_all(dict.fromkeys(_ENDINGS, signal.SIG_IGN))
        name = signal.Signals(number).name
        raise KeyboardInterrupt("interrupted" if number == signal.SIGINT else f"interrupted by {name}")

    # What the caller ignores (nohup) stays ignored.
    before = _set_all({n: interrupt for n in _ENDINGS if signal.getsignal(n) is not signal.SIG_IGN})
    try:
        yield
    finally:
        _set_all(before)


@contextmanager
def undisturbed() -> Iterator[None]:
    """While this runs, nothing interrupts it: it is the cleaning up itself."""
    before = _set_all(dict.fromkeys(_ENDINGS, signal.SIG_IGN))
    try:
        yield
    finally:
        _set_all(before)


def _set_all(handlers: Mapping[signal.Signals, Any]) -> dict[signal.Signals, Any]:
    return {number: signal.signal(number, handler) for number, handler in handlers.items()}


class _Warnings(logging.Handler):
    """Shows what the framework warns of as the commands show their own warnings, also beside live bars."""

    def emit(self, record: logging.LogRecord) -> None:
        echo_warning(one_line(record.getMessage()))


@contextmanager
def connection(*, write: bool = False, pipelines: bool = False, contact: bool = True) -> Iterator[Runtime]:
    """A runtime for one command; it connects at first use.

    Args:
        write: the command changes something: the store must have transactions and be laid out.
        contact: the store must answer.
        pipelines: it needs the application's pipelines; without, broken handlers don't keep anybody from looking.
    """
    from pipeline_app import settings
    from pipeline_app.application import client_runtime, prepare

    logging.basicConfig(handlers=[_Warnings()], level=logging.WARNING)
    # It would say for every page of jobs what the command says once.
    logging.getLogger("pipeline_app.flow.forward").setLevel(logging.ERROR)
    chosen = settings.current()
    rt = client_runtime(chosen if pipelines else chosen.model_copy(update={"pipelines": ()}))
    try:
        if write:
            prepare(rt)
        elif contact:
            rt.store.synchronise()
        yield rt
    finally:
        rt.close()


def patiently(ask: Callable[[], Answer], *, deadline: float | None = None) -> Answer:
    """The store's answer, asked for again while it is away; what is waited for is said, at growing intervals.

    For commands that look on for long: whoever started one in the evening wants to find it in the morning.

    Raises StoreError if it is still away at `deadline`, a time of the monotonic clock.
    """
    outage, pause = Outage(), FIRST_PAUSE_S
    while True:
        try:
            found = ask()
        except StoreError as exc:
            if deadline is not None and time.monotonic() >= deadline:
                raise
            if outage.goes_on(datetime.now(UTC)) and outage.since is not None:
                echo_warning(f"waiting since {iso(outage.since)}: {exc.message}")
            left = pause if deadline is None else max(0.0, deadline - time.monotonic())
            time.sleep(min(pause, left))
            pause = min(pause * 2, LONGEST_PAUSE_S)
            continue
        away = outage.ends(datetime.now(UTC))
        if away is not None:
            echo_warning(f"MongoDB answers again, after {duration(away.total_seconds())}")
        return found
