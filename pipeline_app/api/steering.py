"""Containing and repairing: holds, throttles, pauses, replays, cancelling, moving, priorities.

Rows are those that the commands print with `--json`. Times are `datetime` (UTC if it has no zone) or text (`"+30m"`,
ISO 8601), rates and budgets text (`"39/s"`, `"100000 tokens/1d"`). A filter that is given and empty is an error: it
would mean every job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from pipeline_app.api.connection import connected
from pipeline_app.application import prepare
from pipeline_app.control.changes import cancelling, moving
from pipeline_app.control.operators import actor
from pipeline_app.control.replays import replay as control_replay
from pipeline_app.control.sight import ledger
from pipeline_app.control.targets import holds as control_holds
from pipeline_app.control.targets import pauses
from pipeline_app.control.targets import throttles as control_throttles
from pipeline_app.domain.durations import seconds
from pipeline_app.domain.edit import Edit
from pipeline_app.domain.pace import Pace
from pipeline_app.domain.rates import Budget, Rate
from pipeline_app.domain.selection import Selection
from pipeline_app.domain.states import JobState
from pipeline_app.domain.times import point_in_time, time_to_come
from pipeline_app.errors import UsageError
from pipeline_app.runtime import Runtime

Row = dict[str, Any]

#: The input stays what it is.
KEEP: Final = object()


def hold(
    selector: Mapping[str, str], *, run: str | None = None, until: datetime | str | None = None, reason: str = ""
) -> Row:
    """Close a target for a run or for all: jobs that match are set aside until the hold is over.

    Args:
        selector: tags that all must match.
        until: when it ends by itself; without one, when it is cleared.

    Raises UsageError (no selector, a time that is over), NotFoundError (no such run), StoreError.
    """
    rt = _changing()
    at = time_to_come(until, rt.store.now()) if isinstance(until, str) else _time(rt, until)
    return control_holds.set_hold(rt, selector=selector, run=run, until=at, reason=reason, actor=actor())


def clear_hold(
    hold: str | None = None,
    *,
    selector: Mapping[str, str] | None = None,
    run: str | None = None,
    at_once: bool = False,
) -> list[Row]:
    """Open what is closed, by the hold's id or by its selector; a few jobs first, or all `at_once`.

    Raises NotFoundError if there is none in force; UsageError; StoreError.
    """
    return control_holds.clear(_changing(), hold=hold, selector=selector, run=run, at_once=at_once)


def holds(run: str | None = None, *, ended: bool = False) -> list[Row]:
    """Holds in force, oldest first; with `ended` also those that are over. Raises NotFoundError, StoreError."""
    return control_holds.listing(connected(), run, ended=ended)


def throttle(
    selector: Mapping[str, str],
    *,
    run: str | None = None,
    stage: str | None = None,
    rate: str | None = None,
    burst: int | None = None,
    concurrency: int | None = None,
    budget: str | None = None,
    reason: str = "",
) -> Row:
    """Bound what all workers together do to a target.

    Args:
        stage: the only stage that it applies to, as `"pipeline.stage"`; without one a job counts in every stage.
        rate: handlers started, such as `"39/s"`; `burst` (1) may start at once after a pause.
        concurrency: messages that are handled at the same time.
        budget: what handlers report by `Job.spend`, such as `"100000 tokens/1d"`.

    Raises UsageError, NotFoundError (no such run), StoreError.
    """
    return control_throttles.set_throttle(
        _changing(),
        selector=selector,
        run=run,
        stage=stage,
        rate=None if rate is None else Rate.parse(rate),
        burst=burst,
        concurrency=concurrency,
        budget=None if budget is None else Budget.parse(budget),
        reason=reason,
        actor=actor(),
    )


def clear_throttle(
    throttle: str | None = None, *, selector: Mapping[str, str] | None = None, run: str | None = None
) -> list[Row]:
    """Take a throttle away, by its id or by its selector. Raises NotFoundError, UsageError, StoreError."""
    return control_throttles.clear(_changing(), throttle=throttle, selector=selector, run=run)


def throttles(run: str | None = None) -> list[Row]:
    """Throttles, oldest first. Raises NotFoundError, StoreError."""
    return control_throttles.listing(connected(), run)


def pause(run: str, *, stage: str | None = None, partition: str | None = None, reason: str = "") -> Row:
    """Start nothing more of a run, a stage or a partition until it is resumed. Raises NotFoundError, StoreError."""
    return pauses.pause(_changing(), run, stage=stage, partition=partition, reason=reason, actor=actor())


def resume(run: str, *, stage: str | None = None, partition: str | None = None) -> list[Row]:
    """Let what was paused go on. Raises NotFoundError, StoreError."""
    return pauses.resume(_changing(), run, stage=stage, partition=partition)


def replay(
    run: str,
    *,
    jobs: Sequence[str] | None = None,
    selector: Mapping[str, str] | None = None,
    status: Sequence[str] | None = None,
    stage: str | None = None,
    error: str | None = None,
    since: datetime | str | None = None,
    until: datetime | str | None = None,
    from_stage: str | None = None,
    edits: Sequence[str] = (),
    payload: Any = KEEP,
    rate: str | None = None,
    ramp: str | float = 0.0,
    halt_after: int | None = None,
    force: bool = False,
    reason: str = "",
    dry_run: bool = False,
) -> Row:
    """Let jobs go through once more: dead letters, unless `status` names others. The workers carry it out.

    Args:
        error: a failure group, as `failures --grouped` names it.
        from_stage: begin there; by default where each job stands, and from the first stage what went through all.
        edits: `"a.b=value"` for the input of that stage; what earlier stages made is kept.
        payload: takes the place of that input.
        rate: jobs let go, such as `"200/s"`, growing to it within `ramp` (a duration).
        halt_after: stop by itself once so many attempts failed again.
        force: also what goes on by itself later.
        dry_run: only count.

    Returns the operation's row, or with `dry_run` what it would do. Raises NotFoundError (nothing matches),
    RefusedError (nothing of it is due, the run was cancelled), UsageError, StoreError.
    """
    rt = connected() if dry_run else _changing()
    chosen = _selection(rt, jobs, selector, status, stage, group=error, since=since, until=until)
    edit = Edit.parse(edits, replaces=payload is not KEEP, payload=None if payload is KEEP else payload)
    asked = control_replay.request(rt, run, chosen, from_stage=from_stage, edit=edit, force=force)
    if dry_run:
        return control_replay.survey(rt, asked).as_dict()
    if rate is None and seconds(ramp):
        raise UsageError("a ramp leads to a rate", hint="give a rate as well")
    pace = None if rate is None else Pace(per_s=Rate.parse(rate).per_s, ramp_s=seconds(ramp))
    return control_replay.start(rt, asked, pace=pace, halt_after=halt_after, reason=reason, actor=actor())


def replays(run: str | None = None) -> list[Row]:
    """Replays and how far they are, oldest first. Raises NotFoundError, StoreError."""
    return control_replay.listing(connected(), run)


def pause_replay(operation: str) -> Row:
    """Let a replay stand still until it is resumed. Raises NotFoundError, RefusedError, StoreError."""
    return control_replay.pause(_changing(), operation)


def resume_replay(operation: str) -> Row:
    """Let a replay that was paused, or that halted, go on. Raises NotFoundError, RefusedError, StoreError."""
    return control_replay.resume(_changing(), operation)


def stop_replay(operation: str) -> Row:
    """End a replay where it is. Raises NotFoundError, RefusedError, StoreError."""
    return control_replay.cancel(_changing(), operation)


def failure_groups(run: str, *, stage: str | None = None) -> list[Row]:
    """Dead letters and jobs that wait for a retry, grouped by what they failed of, the largest group first.

    Raises NotFoundError, StoreError.
    """
    return ledger.failure_groups(connected(), run, stage=stage)


def cancel(
    run: str,
    *,
    jobs: Sequence[str] | None = None,
    selector: Mapping[str, str] | None = None,
    status: Sequence[str] | None = None,
    stage: str | None = None,
    partition: str | None = None,
) -> int:
    """Cancel the run, or with any of the others only the jobs that match; returns how many became `cancelled`.

    Raises NotFoundError, UsageError, StoreError.
    """
    rt = _changing()
    chosen = _selection(rt, jobs, selector, status, stage, partition=partition)
    if chosen == Selection():
        return cancelling.cancel(rt, run)
    return cancelling.cancel_jobs(rt, run, chosen, actor=actor())


def move(
    run: str,
    to: str,
    *,
    jobs: Sequence[str] | None = None,
    selector: Mapping[str, str] | None = None,
    status: Sequence[str] | None = None,
    stage: str | None = None,
) -> int:
    """Move waiting jobs to stage `to`, with the input that they have; returns how many.

    Raises NotFoundError, UsageError, StoreError.
    """
    rt = _changing()
    return moving.move_jobs(rt, run, _selection(rt, jobs, selector, status, stage), to, actor=actor())


def set_priority(
    run: str,
    priority: int,
    *,
    jobs: Sequence[str] | None = None,
    selector: Mapping[str, str] | None = None,
    status: Sequence[str] | None = None,
    stage: str | None = None,
) -> int:
    """Set the priority (-1000 to 1000) of jobs that are not at rest; returns how many changed.

    Raises NotFoundError, UsageError, StoreError.
    """
    rt = _changing()
    return moving.set_priority(rt, run, _selection(rt, jobs, selector, status, stage), priority, actor=actor())


def _time(rt: Runtime, at: datetime | str | None) -> datetime | None:
    if isinstance(at, str):
        return point_in_time(at, rt.store.now())
    return at.replace(tzinfo=UTC) if at is not None and at.tzinfo is None else at


def _changing() -> Runtime:
    rt = connected()
    prepare(rt)
    return rt


def _selection(
    rt: Runtime,
    jobs: Sequence[str] | None,
    selector: Mapping[str, str] | None,
    status: Sequence[str] | None,
    stage: str | None,
    *,
    since: datetime | str | None = None,
    until: datetime | str | None = None,
    **more: str | None,
) -> Selection:
    for name, given in (("jobs", jobs), ("selector", selector), ("status", status)):
        if given is not None and not given:
            raise UsageError(f"{name} is empty, and that would mean every job", hint="leave it out to mean every job")
    try:
        states = tuple(JobState(state) for state in status or ())
    except ValueError as exc:
        raise UsageError(f"there is no such state: {exc}", hint="states are " + ", ".join(JobState)) from exc
    return Selection(
        job_ids=tuple(jobs or ()),
        selector=dict(selector or {}),
        states=states,
        stage=stage,
        partition=more.get("partition"),
        group=more.get("group"),
        since=_time(rt, since),
        until=_time(rt, until),
    )
