"""Options of the commands of the group `stage`; those that belong together arrive as one argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import click

from pipeline_app.domain.selector import Selectors

POOLS = ("prefork", "threads", "gevent", "solo")

run_option = click.option("--run", metavar="RUN", required=True, help='The run ("last" is the newest).')
stage_option = click.option("--stage", metavar="STAGE", required=True, help="A stage of its pipeline.")


@dataclass(frozen=True, kw_only=True)
class Slots:
    """How new workers run; None is as the project's settings, or Celery, have it."""

    pool: str | None
    concurrency: int | None


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How workers are stopped."""

    now: bool
    timeout: float | None


def workers_option(text: str, *, least: int = 1, **options: Any) -> Callable[[Any], Any]:
    """`--workers N`, which the command gets as `number`; `text` says what it means there."""
    return click.option("--workers", "number", type=click.IntRange(min=least), metavar="N", help=text, **options)


def slots_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--pool` and `--concurrency`, which the command gets as `slots`."""

    @click.option("--pool", type=click.Choice(POOLS), help="Default: what celeryconfig.py says, or prefork.")
    @click.option("--concurrency", type=click.IntRange(min=1), metavar="SLOTS", help="Handlers at once in each worker.")
    @wraps(command)
    def called(*, pool: str | None, concurrency: int | None, **others: Any) -> Any:
        return command(slots=Slots(pool=pool, concurrency=concurrency), **others)

    return called


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
