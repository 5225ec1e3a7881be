"""Holds: closing a target for a run or for all, until a time or until cleared.

Setting one makes it true in MongoDB first, then tells the workers. What a hold keeps it lets go by itself when it is
over: see `hold_release.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from pipeline_app.control.targets.naming import find_meant
from pipeline_app.domain.rate_limit import LONGEST_S
from pipeline_app.domain.selection import Selection
from pipeline_app.domain.selector import check_selector
from pipeline_app.domain.states import AT_REST, JobState
from pipeline_app.domain.target import Target
from pipeline_app.errors import StoreError, UsageError
from pipeline_app.flow.announce import announce
from pipeline_app.runtime import Runtime
from pipeline_app.store import holds, jobs, manifests
from pipeline_app.store.client import Document

#: Counting what a hold would stop takes at most so many seconds.
COUNT_S = 2.0
#: Stored states of jobs that a hold can stop.
_OPEN = tuple(state for state in JobState if state not in AT_REST and state is not JobState.RUNNING)


def set_hold(
    rt: Runtime,
    *,
    selector: Mapping[str, str],
    run: str | None = None,
    until: datetime | None = None,
    reason: str = "",
    actor: str = "",
) -> dict[str, Any]:
    """Close a target; said again, the new time and reason replace the old ones.

    Returns its row as `listing` has it, with how many `workers` have heard of it and how many are alive. Those that
    have not see it within a second.

    Raises UsageError (no selector, a time that is over), NotFoundError (no such run), StoreError.
    """
    target = _target(rt, selector, run)
    if until is not None and until > rt.store.now() + timedelta(seconds=LONGEST_S):
        raise UsageError("a hold ends within ten years, or when it is cleared", hint="leave the time out")
    if until is not None and until <= rt.store.now():
        raise UsageError(f"a hold until {until:%Y-%m-%dT%H:%M:%SZ} would be over: it is {rt.store.now():%H:%M:%SZ}")
    row = holds.close(rt.store, holds.HOLD, target, until=until, reason=reason, actor=actor)
    told, alive = announce(rt, count=True)
    return {**_row(row, jobs.count_kept_by(rt.store, [row["_id"]])), "workers": told, "workers_alive": alive}


def clear(
    rt: Runtime,
    *,
    hold: str | None = None,
    selector: Mapping[str, str] | None = None,
    run: str | None = None,
    at_once: bool = False,
) -> list[dict[str, Any]]:
    """Open what is closed: a hold by its id, or those with exactly that selector (and run).

    What they keep is let go a few jobs at a time first, to see whether the target is open; `at_once` trusts that it is.
    Returns the rows, as they are now. Raises NotFoundError if there is none; UsageError; StoreError.
    """
    cleared = []
    for row in in_force(rt, hold=hold, selector=selector, run=run):
        if at_once:
            holds.end(rt.store, row["_id"])
        else:
            holds.begin_probing(rt.store, row["_id"])
        cleared.append(holds.get(rt.store, row["_id"]) or row)
    announce(rt)
    kept = jobs.count_kept_by(rt.store, [row["_id"] for row in cleared])
    return [_row(row, kept) for row in cleared]


def in_force(
    rt: Runtime, *, hold: str | None = None, selector: Mapping[str, str] | None = None, run: str | None = None
) -> list[Document]:
    """Holds that are in force and meant by that. Raises NotFoundError if there is none."""

    def rows() -> list[Document]:
        return holds.listing(rt.store, kind="hold", run=None, ended=False)

    return find_meant(rt, "hold", holds.HOLD, rows, id=hold, selector=selector, run=run, where=" in force")


def listing(rt: Runtime, run: str | None = None, *, ended: bool = False) -> list[dict[str, Any]]:
    """Holds, oldest first; with `run` those that concern it; with `ended` also those that are over.

    Raises NotFoundError, StoreError.
    """
    run = None if run is None else manifests.get(rt.store, run)["_id"]
    rows = holds.listing(rt.store, kind="hold", run=run, ended=ended)
    kept = jobs.count_kept_by(rt.store, [row["_id"] for row in rows])
    return [_row(row, kept) for row in rows]


def matching(
    rt: Runtime, *, selector: Mapping[str, str], run: str | None = None, stage: str | None = None
) -> dict[str, int] | None:
    """Stored state -> jobs that are not at rest and that a hold on this would stop, in all stages or one.

    None if there are too many to be looked at in COUNT_S: closing a target must not wait for a count.
    Raises UsageError, NotFoundError, StoreError.
    """
    target = _target(rt, selector, run)
    pipeline, _, name_of_stage = (stage or "").partition(".")
    which: dict[str, Any] = {"cancel_done": False} | ({"_id": target.run} if target.run else {})
    which |= {"pipeline": pipeline} if pipeline else {}
    runs = [row["_id"] for row in manifests.matching(rt.store, which)]
    sums = {str(state): 0 for state in _OPEN}
    chosen = Selection(selector=target.selector, states=_OPEN, stage=name_of_stage or None)
    try:
        with rt.store.limited(COUNT_S):
            for name in runs:
                for (_, state, _), number in jobs.count_selected(rt.store, name, chosen).items():
                    sums[state] += number
    except StoreError:
        # Should the store be away, whatever comes next says so.
        return None
    return sums


def _target(rt: Runtime, selector: Mapping[str, str], run: str | None) -> Target:
    chosen = check_selector(selector)
    if not chosen:
        raise UsageError("a hold closes a target", hint="give a selector; `pause RUN` stops a whole run or stage")
    return Target(run=None if run is None else manifests.get(rt.store, run)["_id"], selector=chosen)


def _row(row: Document, kept: Mapping[str, int]) -> dict[str, Any]:
    return {
        "hold": row["_id"],
        "run": row["run"],
        "stage": row["stage"],
        "selector": dict(row["selector"]),
        "state": row["state"],
        "until": row["until"],
        "reason": row["reason"],
        "actor": row["actor"],
        "origin": row["origin"],
        "held_jobs": kept[row["_id"]],
        "closings": row["closings"],
        "created_at": row["created_at"],
        "ended_at": row["ended_at"],
    }
