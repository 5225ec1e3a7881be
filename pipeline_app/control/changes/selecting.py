"""The jobs of a selection: how many there are, before they are changed, and all of them, page by page, to change them.

Who calls: cancelling and moving. Each page is one small guarded transition, so that whoever is killed in the middle
only has to be called again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

from pipeline_app.control.seed import seeding
from pipeline_app.domain.job import job_key
from pipeline_app.domain.plan import RunPlan
from pipeline_app.domain.selection import Selection
from pipeline_app.domain.selector import check_selector
from pipeline_app.domain.states import JobState
from pipeline_app.errors import NotFoundError
from pipeline_app.runtime import Runtime
from pipeline_app.store import jobs, manifests, messages
from pipeline_app.store.client import Document

#: Stored states of jobs that are not at rest, in the order in which a job is likely to leave one for the next.
UNFINISHED = (JobState.WAITING, JobState.HELD, JobState.RETRY_WAITING, JobState.PENDING)
#: Jobs in one transaction.
PAGE = 2000
#: A job that goes from one place to another while it is looked for is met the next time; those that come to match
#: later are not meant, and looking for them would have no end.
PASSES = 3

#: (stage, state as people see it, partition)
Place = tuple[str, str, str]
#: Changes some jobs and returns how many it did change.
Change = Callable[[list[Document]], int]
Progress = Callable[[int], None]


def silent(done: int) -> None:
    """No progress is shown."""


def find_run(rt: Runtime, run: str, selection: Selection) -> RunPlan:
    """The run (`last` is the newest), which has the stage and the jobs that the selection names.

    Raises NotFoundError, UsageError (the selector), StoreError.
    """
    plan = RunPlan.of(manifests.get(rt.store, run))
    check_selector(selection.selector)
    if selection.stage is not None:
        plan.stage(selection.stage)
    keys = {job_key(plan.run, job_id): job_id for job_id in selection.job_ids}
    missing = sorted(keys.keys() - jobs.existing(rt.store, list(keys)).keys()) if keys else []
    if missing:
        others = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise NotFoundError(f"run {plan.run} has no job {keys[missing[0]]!r}{others}")
    return plan


def places(rt: Runtime, plan: RunPlan, selection: Selection) -> dict[Place, int]:
    """How many jobs of the selection that are not at rest stand where; looks at each. Raises StoreError."""
    states = _states(selection)
    if not states:
        return {}
    with rt.store.unhurried():
        counts = Counter(jobs.count_selected(rt.store, plan.run, replace(selection, states=states)))
        running = _running(rt, plan, selection)
        if running and JobState.PENDING in states:
            chosen = replace(selection, states=(JobState.PENDING,), job_ids=running)
            for (stage, state, partition), number in jobs.count_selected(rt.store, plan.run, chosen).items():
                counts[stage, state, partition] -= number
                counts[stage, JobState.RUNNING, partition] += number
    return {place: number for place, number in counts.items() if number > 0}


def _running(rt: Runtime, plan: RunPlan, selection: Selection) -> tuple[str, ...]:
    """The jobs in messages that workers hold: as many messages as the cluster has slots."""
    found = {job_id for row in messages.claimed(rt.store, run=plan.run) for job_id in row["jobs"]}
    return tuple(sorted(found & set(selection.job_ids) if selection.job_ids else found))


def summary(found: Mapping[Place, int]) -> dict[str, Any]:
    """`{"matched", "by_stage", "by_status", "by_partition"}`."""
    parts: dict[str, Counter[str]] = {"by_stage": Counter(), "by_status": Counter(), "by_partition": Counter()}
    for place, number in found.items():
        for part, name in zip(parts.values(), place, strict=True):
            part[str(name)] += number
    return {"matched": sum(found.values()), **{name: dict(sorted(part.items())) for name, part in parts.items()}}


def change_all(
    rt: Runtime, plan: RunPlan, selection: Selection, change: Change, progress: Progress = silent, *, once: bool = False
) -> int:
    """Let `change` have every job of the selection that is not at rest, in pages; returns how many it changed.

    Where the selection tells places, only jobs that stand there now are meant; else also those that travel meanwhile.
    With `once` nothing is looked for again: a change that sends jobs on would meet them once more.

    Raises StoreError: then some are changed, and asking again changes the others.
    """
    if selection.until is None and (once or selection.states or selection.stage or selection.group):
        # Jobs of this very millisecond are meant.
        selection = replace(selection, until=rt.store.now() + timedelta(milliseconds=1))
    changed = 0
    for _ in range(1 if once else PASSES):
        before = changed
        for page in _pages(rt, plan, selection):
            changed += change(page)
            progress(changed)
        if changed == before:
            break
    return changed


def _pages(rt: Runtime, plan: RunPlan, selection: Selection) -> Iterator[list[Document]]:
    for stage in plan.stages:
        if selection.stage not in (None, stage.name):
            continue
        for state in _states(selection):
            after: str | None = ""
            while after is not None:
                rows, after = jobs.walk(
                    rt.store, plan.run, selection, state=state, stage=stage.name, after=after, limit=PAGE
                )
                # Asked after the jobs: a batch is there before they are. What may be taken back takes its counters
                # with it, and what it has in them must still be true.
                hidden = seeding.hidden_batches(rt) if rows else []
                shown = [row for row in rows if row["batch"] not in hidden]
                if shown:
                    yield shown


def _states(selection: Selection) -> tuple[JobState, ...]:
    return tuple(state for state in UNFINISHED if not selection.states or state in selection.states)
