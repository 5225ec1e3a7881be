"""Options of the commands of the group `stage`; those that belong together arrive as one argument."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import click

from pipeline_app.domain.recycling import LIMITS, Limit
from pipeline_app.domain.selector import Selectors
from pipeline_app.errors import UsageError

POOLS = ("prefork", "threads", "gevent", "solo")

run_option = click.option("--run", metavar="RUN", required=True, help='The run ("last" is the newest).')
stage_option = click.option("--stage", metavar="STAGE", required=True, help="A stage of its pipeline.")


@dataclass(frozen=True, kw_only=True)
class Slots:
    """How new workers run; None is as the project's settings, or Celery, have it."""

    pool: str | None
    concurrency: int | None
    #: Option -> value as it was written, of those at which they begin anew.
    limits: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How workers are stopped."""

    now: bool
    timeout: float | None


def workers_option(text: str, *, least: int = 1, **options: Any) -> Callable[[Any], Any]:
    """`--workers N`, which the command gets as `number`; `text` says what it means there."""
    return click.option("--workers", "number", type=click.IntRange(min=least), metavar="N", help=text, **options)


def slots_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--pool`, `--concurrency` and those of recycling, which the command gets as `slots`."""

    @click.option("--pool", type=click.Choice(POOLS), help="Default: what celeryconfig.py says, or prefork.")
    @click.option("--concurrency", type=click.IntRange(min=1), metavar="SLOTS", help="Handlers at once in each worker.")
    @_limits_options
    @wraps(command)
    def called(*, pool: str | None, concurrency: int | None, limits: Mapping[str, str], **others: Any) -> Any:
        return command(slots=Slots(pool=pool, concurrency=concurrency, limits=limits), **others)

    return called


def _limits_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of recycling, which the command gets as `limits`."""

    @wraps(command)
    def called(**given: Any) -> Any:
        limits = {limit.option: value for limit in LIMITS if (value := given.pop(limit.name)) is not None}
        return command(limits=limits, **given)

    found: Callable[..., Any] = called
    for limit in reversed(LIMITS):
        found = click.option(limit.option, metavar=limit.metavar, help=limit.help, callback=_read_by(limit))(found)
    return found


def _read_by(limit: Limit) -> Callable[[Any, Any, str | None], str | None]:
    """A callback that refuses what a worker could not read, before any is started."""

    def callback(ctx: Any, param: Any, value: str | None) -> str | None:  # noqa: ARG001 - the signature is click's
        try:
            if value is not None:
                limit.read(value)
        except (UsageError, ValueError) as exc:
            raise click.BadParameter(str(exc)) from exc
        return value

    return callback


def selectors_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--select` and `--skip`, which the command gets as `selectors`."""

    @click.option(
        "--select", metavar="K=V", multiple=True, help="Only partitions with this tag; of several, with all of them."
    )
    @click.option(
        "--skip", metavar="K=V", multiple=True, help="No partitions with this tag; of several, with any of them."
    )
    @wraps(command)
    def called(*, select: tuple[str, ...], skip: tuple[str, ...], **others: Any) -> Any:
        return command(selectors=Selectors.parse(select, skip), **others)

    return called


def manner_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--now` and `--timeout`, which the command gets as `manner`."""

    @click.option("--now", is_flag=True, help="Give back what runs, instead of letting it end.")
    @click.option(
        "--timeout", type=click.FloatRange(min=0), metavar="S", help="Wait no longer than that; they go on stopping."
    )
    @wraps(command)
    def called(*, now: bool, timeout: float | None, **others: Any) -> Any:
        return command(manner=Manner(now=now, timeout=timeout), **others)

    return called
