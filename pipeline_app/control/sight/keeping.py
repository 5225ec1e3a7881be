"""What keeps a job in the store, in words: a hold, a pause, a throttle. Asked by `why`."""

from __future__ import annotations

import shlex
from typing import Any

from pipeline_app.domain.selector import written
from pipeline_app.domain.target import Target
from pipeline_app.runtime import Runtime
from pipeline_app.store import holds, jobs, throttles
from pipeline_app.store.client import Document

#: Sentence, machine-readable cause, hint.
Answer = tuple[str, dict[str, Any] | None, str | None]


def kept(rt: Runtime, row: Document) -> Answer:
    """Why a job that waits for a hold, a pause or a throttle waits, and what would let it go."""
    keeper = row["waits_for"]
    ahead = jobs.count_before(rt.store, row)
    behind = f"; {ahead:,} go before it" if ahead else "; it is the next"
    if keeper.startswith(throttles.PREFIX):
        throttle = throttles.get(rt.store, keeper)
        return _gone(keeper) if throttle is None else _throttled(rt, throttle, behind)
    hold = holds.get(rt.store, keeper)
    if hold is None or hold["state"] == holds.ENDED:
        return _gone(keeper)
    return _paused(hold) if hold["kind"] == "pause" else _held(hold, behind)


def _gone(keeper: str) -> Answer:
    what = f"{keeper}, which kept it, is over: it is let go any moment"
    return what, {"kind": "release", "keeper": keeper}, "a worker has to run for that"


def _held(row: Document, behind: str) -> Answer:
    target = Target.of(row)
    because = f" ({row['reason']})" if row["reason"] else ""
    waits_for = {"kind": "hold", "hold": row["_id"], "until": row["until"], "state": row["state"]}
    if row["state"] == holds.PROBING:
        what = f"{target} was closed{because} and is being probed with a few jobs at a time{behind}"
        return what, waits_for, f"pipeline-app hold clear {row['_id']} --at-once lets all go"
    until = "until it is cleared" if row["until"] is None else f"until {row['until']:%Y-%m-%dT%H:%M:%SZ}"
    what = f"{target} is closed {until}{because}, by {row['actor'] or row['origin']}{behind}"
    return what, waits_for, f"pipeline-app hold clear {row['_id']} opens it earlier"


def _paused(row: Document) -> Answer:
    target = Target.of(row)
    because = f" ({row['reason']})" if row["reason"] else ""
    what = f"{target} is paused since {row['created_at']:%Y-%m-%dT%H:%M:%SZ}{because}, by {row['actor'] or 'somebody'}"
    return what, {"kind": "pause", "pause": row["_id"]}, f"pipeline-app resume {paused_place(row)} lets it go on"


def paused_place(row: Document) -> str:
    """What `resume` has to be told for a pause."""
    options = f" --stage {row['stage'].partition('.')[2]}" if row["stage"] else ""
    options += f" --partition {shlex.quote(row['partition'])}" if row["partition"] else ""
    return f"{row['run']}{options}"


def _throttled(rt: Runtime, row: Document, behind: str) -> Answer:
    target = Target.of(row)
    waits_for: dict[str, Any] = {"kind": "throttle", "throttle": row["_id"]}
    if row["ordered"]:
        return f"jobs of {target} are let go by priority{behind}", {**waits_for, "kind": "priority"}, None
    limits = [f"{row['rate_per_s']:g} a second"] if row["rate_per_s"] is not None else []
    if row["concurrency"] is not None:
        limits.append(f"{row['concurrency']} at a time, {len(row['locks'])} run")
    spent = throttles.spent_now(row, rt.store.now())
    if spent is not None:
        amount, unit = row["budget"]["amount"], row["budget"]["unit"]
        limits.append(f"{amount:g} {unit} until {spent[1]:%Y-%m-%dT%H:%M:%SZ}, {spent[0]:g} are spent")
        waits_for["until"] = spent[1] if spent[0] >= amount else None
    what = f"{target} is throttled to {', '.join(limits)}{behind}"
    selectors = " ".join(f"--selector {shlex.quote(pair)}" for pair in written(target.selector).split(","))
    where = f" --run {row['run']}" if row["run"] else ""
    return what, waits_for, f"pipeline-app throttle set {selectors}{where} changes the limits"
