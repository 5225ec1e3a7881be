"""Replays, as people ask for them: how many jobs it would be, start, list, pause, resume, cancel.

A replay is a recorded operation: the workers carry it out (`replaying.py`), and whoever started it may go. A few
fields of its document that are not plain:

    before       jobs that changed at this time or later are not what it was started for
    cursor       how far it came: the place (state and stage) and the last job; None at the end
    steps        how many it made; a step is refused if another was made meanwhile
    pace_from    since when it goes at its pace, for the ramp; None before its first step and after a pause
    credit       jobs that it may replay at `paced_at`, beside those that time brings
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from pipeline_app.control.changes.selecting import find_run
from pipeline_app.control.replays.replay_jobs import START, Replay, Skip, judge, page
from pipeline_app.domain.edit import Edit
from pipeline_app.domain.pace import Pace
from pipeline_app.domain.selection import Selection
from pipeline_app.domain.states import JobState
from pipeline_app.errors import NotFoundError, RefusedError, UsageError
from pipeline_app.runtime import Runtime
from pipeline_app.store import counters, jobs, manifests, messages, operations, workers
from pipeline_app.store.client import Document
from pipeline_app.store.encoding import UnstorableError, encode

#: Jobs that a survey reads at a time; fewer where it reads their inputs, too.
PAGE = 2000
PAGE_EDITED = 100

#: States from which a replay may go on.
_STOPPED = (operations.PAUSED, operations.HALTED)


@dataclass(kw_only=True)
class Survey:
    """What a replay would do, counted; where nothing is changed."""

    matched: int = 0
    not_due: int = 0
    would_replay: int = 0
    no_input: int = 0
    not_editable: int = 0
    #: Of those that would be replayed: by the stage, the state and the partition that they stand in.
    by_stage: dict[str, int] = field(default_factory=Counter)
    by_status: dict[str, int] = field(default_factory=Counter)
    by_partition: dict[str, int] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        """The shape that `replay start --dry-run --json` prints."""
        return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(self).items()}


def check(selection: Selection) -> None:
    """What can be seen without the store. Raises UsageError."""
    if JobState.RUNNING in selection.states:
        raise UsageError(
            "jobs that run cannot be replayed", hint="wait until they are done, or replay those that are pending"
        )
    if selection.since is not None and selection.until is not None and selection.since >= selection.until:
        raise UsageError("--since is not before --until", hint="jobs between them are meant")


def request(
    rt: Runtime,
    run: str,
    selection: Selection,
    *,
    from_stage: str | None = None,
    edit: Edit | None = None,
    force: bool = False,
) -> Replay:
    """What is to be replayed, checked; `last` is the newest run.

    Raises NotFoundError (no such run, stage or job), RefusedError (the run was cancelled), UsageError.
    """
    check(selection)
    plan = find_run(rt, run, selection)
    if from_stage is not None:
        plan.stage(from_stage)
    _refuse_cancelled(rt, plan.run)
    return Replay(
        plan=plan,
        selection=selection,
        # Jobs of this very millisecond are meant.
        before=rt.store.now() + timedelta(milliseconds=1),
        from_stage=from_stage,
        edit=edit,
        force=force,
    )


def survey(rt: Runtime, asked: Replay, *, progress: Callable[[int], None] = lambda looked_at: None) -> Survey:
    """Count what a replay would do; looks at every job that matches. `progress` is called with their number so far."""
    found = Survey()
    cursor: Document | None = START
    while cursor is not None:
        here = page(rt, asked, cursor, PAGE if asked.edit is None else PAGE_EDITED)
        for verdict in judge(rt, asked, here.rows):
            if verdict.skip is not None:
                setattr(found, verdict.skip, getattr(found, verdict.skip) + 1)
                continue
            found.would_replay += 1
            found.by_stage[verdict.row["stage"]] += 1
            found.by_status[verdict.row["state"]] += 1
            found.by_partition[verdict.row["partition"]] += 1
        found.matched += len(here.rows)
        progress(found.matched)
        cursor = here.after
    return found


def refuse_nothing(rt: Runtime, asked: Replay, found: Survey) -> None:
    """Raises NotFoundError if no job matches, RefusedError if none of those that do would be replayed."""
    run = asked.plan.run
    if found.matched == 0:
        hint = "dead letters are meant unless --status says otherwise" if not asked.selection.states else None
        standing = _standing(rt, asked) if asked.selection.job_ids else ""
        raise NotFoundError(f"no job of run {run} matches", hint=standing or hint)
    if found.would_replay:
        return
    counts = {Skip.NOT_DUE: "not due", Skip.NO_INPUT: "without that input", Skip.NOT_EDITABLE: "not to be edited so"}
    why = ", ".join(f"{getattr(found, skip):,} {words}" for skip, words in counts.items() if getattr(found, skip))
    raise RefusedError(
        f"none of the {found.matched:,} jobs that match would be replayed: {why}",
        hint="--force replays what is not due; jobs that run stay" if found.not_due else None,
    )


def _standing(rt: Runtime, asked: Replay) -> str:
    """Where the jobs stand that were named and do not match."""
    named = replace(Selection(), job_ids=asked.selection.job_ids)
    counts: Counter[str] = Counter()
    for (_, state, _), number in jobs.count_selected(rt.store, asked.plan.run, named).items():
        counts[state] += number
    there = ", ".join(f"{number} {state} (--status {state})" for state, number in sorted(counts.items()))
    return f"of the jobs named: {there}" if there else "the run has none of the jobs named"


def start(
    rt: Runtime,
    asked: Replay,
    found: Survey | None = None,
    *,
    pace: Pace | None = None,
    halt_after: int | None = None,
    reason: str = "",
    actor: str = "",
) -> Document:
    """Record the replay: from now on the workers carry it out; returns its row as in `listing`.

    Args:
        found: the survey of it, if it was made before.
        pace: without one, as fast as it goes.
        halt_after: it stops by itself once so many attempts of replayed jobs failed again.

    Raises NotFoundError (nothing matches), RefusedError (nothing of it is due), UsageError, StoreError.
    """
    if halt_after is not None and halt_after < 1:
        raise UsageError(f"a replay halts after 1 failure or more, not {halt_after}")
    if found is None:
        found = survey(rt, asked)
    refuse_nothing(rt, asked, found)
    now = rt.store.now()
    row: Document = {
        "_id": operations.REPLAY + messages.new_id(),
        "kind": "replay",
        "run": asked.plan.run,
        "state": operations.RUNNING,
        "selection": asked.selection.as_dict(),
        "before": asked.before,
        "from_stage": asked.from_stage,
        "edits": None if asked.edit is None else asked.edit.as_dict(),
        "force": asked.force,
        "rate_per_s": None if pace is None else pace.per_s,
        "ramp_s": 0.0 if pace is None else pace.ramp_s,
        "halt_after": halt_after,
        "failed_before": 0,
        "reason": reason,
        "actor": actor,
        "created_at": now,
        "started_at": None,
        "ended_at": None,
        "why": None,
        "matched": found.matched,
        "released": 0,
        "skipped": 0,
        "steps": 0,
        "cursor": START,
        "pace_from": None,
        "paced_at": None,
        "credit": 0.0,
        "last_message": None,
    }
    try:
        encode(row)
    except UnstorableError as exc:
        raise UsageError(f"the edit cannot be stored: {exc}") from exc
    operations.create(rt.store, row)
    return _row(rt, row)


def listing(rt: Runtime, run: str | None = None) -> list[Document]:
    """All replays, or those of a run (`last` is the newest), oldest first. Raises NotFoundError, StoreError."""
    chosen = None if run is None else manifests.get(rt.store, run)["_id"]
    return [_row(rt, row) for row in operations.listing(rt.store, chosen)]


def show(rt: Runtime, operation: str) -> Document:
    """One of them. Raises NotFoundError, StoreError."""
    return _row(rt, operations.get(rt.store, operation))


def _row(rt: Runtime, row: Document) -> Document:
    became = counters.of_operation(rt.store, row["run"], row["_id"])
    plain = ("run", "state", "selection", "from_stage", "rate_per_s", "halt_after", "matched", "released", "skipped")
    last = ("actor", "reason", "created_at", "ended_at", "why")
    return {
        "operation": row["_id"],
        **{name: row[name] for name in plain},
        "failed": became["failed"],
        "terminal": became["terminal"],
        **{name: row[name] for name in last},
    }


def pause(rt: Runtime, operation: str) -> Document:
    """Nothing more is replayed until it is resumed; what was, goes on. Raises NotFoundError, RefusedError."""
    row = operations.get(rt.store, operation)
    if row["state"] != operations.PAUSED:
        _change(rt, row, (operations.RUNNING,), state=operations.PAUSED)
    return show(rt, operation)


def resume(rt: Runtime, operation: str) -> Document:
    """Go on with one that was paused or halted; failures and the ramp begin anew.

    Raises NotFoundError, RefusedError (it has ended, or its run was cancelled).
    """
    row = operations.get(rt.store, operation)
    _refuse_cancelled(rt, row["run"])
    if row["state"] != operations.RUNNING:
        failed = counters.of_operation(rt.store, row["run"], operation)["failed"]
        _change(rt, row, _STOPPED, state=operations.RUNNING, why=None, failed_before=failed, pace_from=None)
    return show(rt, operation)


def cancel(rt: Runtime, operation: str) -> Document:
    """End it; what was replayed so far goes on. Raises NotFoundError, RefusedError (it has ended)."""
    row = operations.get(rt.store, operation)
    if row["state"] != operations.CANCELLED:
        stopped_or_not = (operations.RUNNING, *_STOPPED)
        _change(rt, row, stopped_or_not, state=operations.CANCELLED, ended_at=rt.store.now())
    return show(rt, operation)


def _refuse_cancelled(rt: Runtime, run: str) -> None:
    if manifests.get(rt.store, run)["cancelled_at"] is not None:
        raise RefusedError(f"run {run} was cancelled: its jobs stay where they are", hint="make another run")


def _change(rt: Runtime, row: Document, expected: tuple[str, ...], **fields: Any) -> None:
    if not operations.change(rt.store, row["_id"], expected, **fields):
        now = operations.get(rt.store, row["_id"])["state"]
        raise RefusedError(f"replay {row['_id']} is {now}", hint="pipeline-app replay list shows what goes on")


def warnings(rt: Runtime, *, pace: Pace | None = None, halt_after: int | None = None) -> list[str]:
    """What keeps a replay from doing what its operator expects."""
    found = []
    if not workers.alive(rt.store):
        found.append("no worker runs, and workers carry it out: start one (celery -A pipeline_app worker)")
    if halt_after is not None and pace is None:
        found.append("without --rate most of the jobs may be on their way before the first of them fails")
    return found
