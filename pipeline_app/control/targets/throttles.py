"""Throttles: what all workers together may do to a target. What they keep back goes on by `throttle_release.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline_app.control.targets.naming import find_meant
from pipeline_app.domain.rates import Budget, Rate
from pipeline_app.domain.selector import check_selector
from pipeline_app.domain.target import Target
from pipeline_app.errors import UsageError
from pipeline_app.flow.announce import announce
from pipeline_app.runtime import Runtime
from pipeline_app.store import jobs, manifests, throttles
from pipeline_app.store.client import Document


def set_throttle(
    rt: Runtime,
    *,
    selector: Mapping[str, str],
    run: str | None = None,
    stage: str | None = None,
    rate: Rate | None = None,
    burst: int | None = None,
    concurrency: int | None = None,
    budget: Budget | None = None,
    reason: str = "",
    actor: str = "",
) -> dict[str, Any]:
    """Bound what all workers together do to a target; said again, the new limits replace the old ones.

    Args:
        stage: the only stage that it applies to, as `pipeline.stage`; without one a job counts in every stage.
        rate: handlers started, as a token bucket of `burst` (1 if not given) tokens.
        concurrency: messages of matching jobs that are handled at the same time.
        budget: what handlers report by `Job.spend`, per period; no handler starts when it is spent.

    Returns its row as `listing` has it. Raises UsageError, NotFoundError (no such run), StoreError.
    """
    chosen = check_selector(selector)
    if not chosen:
        raise UsageError("a throttle needs a target", hint="give a selector, such as provider=openai")
    if rate is None and concurrency is None and budget is None:
        raise UsageError("a throttle limits something", hint="give a rate, a concurrency or a budget")
    for name, number in (("burst", burst), ("concurrency", concurrency)):
        if number is not None and number < 1:
            raise UsageError(f"{name} is a whole number from 1, not {number}")
    if burst is not None and rate is None:
        raise UsageError("a burst is a burst of a rate", hint="give a rate as well")
    limits = {
        "rate_per_s": None if rate is None else rate.per_s,
        "burst": burst or 1,
        "concurrency": concurrency,
        "budget": None if budget is None else vars(budget),
    }
    run = None if run is None else manifests.get(rt.store, run)["_id"]
    target = Target(run=run, stage=check_task(stage), selector=chosen)
    row = throttles.set_limits(rt.store, target, limits, reason=reason, actor=actor)
    announce(rt)
    return _row(rt, row, jobs.count_kept_by(rt.store, [row["_id"]]))


def check_task(stage: str | None) -> str | None:
    """`pipeline.stage`, if it is one. Raises UsageError."""
    if stage is not None and (stage.count(".") != 1 or not all(stage.split("."))):
        raise UsageError(f"not a stage of a pipeline: {stage!r}", hint="write PIPELINE.STAGE, such as survey.analyze")
    return stage


def order_run(rt: Runtime, run: str, *, reason: str = "", actor: str = "") -> None:
    """Let jobs of a run go by priority: those that are not on their way yet wait in the store for their turn.

    Without it what may go on goes straight to the broker, in the order in which it comes. Raises NotFoundError.
    """
    target = Target(run=manifests.get(rt.store, run)["_id"])
    throttles.set_limits(rt.store, target, {"burst": 1, "ordered": True}, reason=reason, actor=actor)
    announce(rt)


def clear(
    rt: Runtime,
    *,
    throttle: str | None = None,
    selector: Mapping[str, str] | None = None,
    run: str | None = None,
) -> list[dict[str, Any]]:
    """Take throttles away, by id or by exactly that selector (and run); jobs that wait for them are let go.

    Returns the rows, as they were. Raises NotFoundError if there is none; UsageError; StoreError.
    """
    rows = meant(rt, throttle=throttle, selector=selector, run=run)
    kept = jobs.count_kept_by(rt.store, [row["_id"] for row in rows])
    for row in rows:
        throttles.delete(rt.store, row["_id"])
    announce(rt)
    return [_row(rt, row, kept) for row in rows]


def meant(
    rt: Runtime, *, throttle: str | None = None, selector: Mapping[str, str] | None = None, run: str | None = None
) -> list[Document]:
    """Throttles that are meant by that. Raises NotFoundError if there is none."""

    def rows() -> list[Document]:
        return throttles.all_of(rt.store)

    return find_meant(rt, "throttle", throttles.PREFIX, rows, id=throttle, selector=selector, run=run)


def listing(rt: Runtime, run: str | None = None) -> list[dict[str, Any]]:
    """Throttles, oldest first; with `run` those that concern it. Raises NotFoundError, StoreError."""
    run = None if run is None else manifests.get(rt.store, run)["_id"]
    rows = throttles.all_of(rt.store, run)
    kept = jobs.count_kept_by(rt.store, [row["_id"] for row in rows])
    return [_row(rt, row, kept) for row in rows]


def _row(rt: Runtime, row: Document, kept: Mapping[str, int]) -> dict[str, Any]:
    spent = throttles.spent_now(row, rt.store.now())
    return {
        "throttle": row["_id"],
        "run": row["run"],
        "stage": row["stage"],
        "selector": dict(row["selector"]),
        "rate_per_s": row["rate_per_s"],
        "burst": row["burst"],
        "concurrency": row["concurrency"],
        "budget": row["budget"],
        "ordered": bool(row["ordered"]),
        "reason": row["reason"],
        "actor": row["actor"],
        "created_at": row["created_at"],
        "waiting_jobs": kept[row["_id"]],
        "running": len(row["locks"]),
        "spent": None if spent is None else spent[0],
        "period_ends_at": None if spent is None else spent[1],
    }
