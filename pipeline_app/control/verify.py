"""Accounting: is every job of a run where it says it is, and do the counters, the ledger and the event log agree?

The store is read as it was at one instant, so that a run may go on meanwhile. What RabbitMQ holds can only be compared
exactly while nothing consumes; otherwise `exact` is false.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline_app.domain.plan import RunPlan
from pipeline_app.domain.states import JobState, MessageState
from pipeline_app.errors import BrokerError
from pipeline_app.runtime import Runtime
from pipeline_app.store import attempts, counters, events, jobs, manifests, messages, outputs, partitions
from pipeline_app.store.client import Document, Session
from pipeline_app.transport.depth import Depth, depths

#: Problems that are listed one by one; beyond it they are only counted.
LISTED = 100

_ALIVE = frozenset({MessageState.OPEN, MessageState.CLAIMED, MessageState.DRAFT})


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that should not be. Kinds: lost, recorded_twice, counter, unpublished, message_gone, event."""

    kind: str
    job_id: str | None
    stage: str | None
    detail: str


@dataclass(kw_only=True)
class Verification:
    """What a look at a run found."""

    run: str
    #: Whether the broker could be compared exactly: nothing consumed meanwhile.
    exact: bool
    seeded: int
    states: dict[str, int]
    counters_agree: bool = True
    problem_count: int = 0
    problems: list[Problem] = field(default_factory=list)
    repaired: int = 0

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return self.problem_count == 0

    def add(self, kind: str, detail: str, *, job_id: str | None = None, stage: str | None = None) -> None:
        """Note a problem."""
        self.problem_count += 1
        if len(self.problems) < LISTED:
            self.problems.append(Problem(kind=kind, job_id=job_id, stage=stage, detail=detail))

    def as_dict(self) -> dict[str, Any]:
        """The shape that `run verify --json` prints."""
        return {
            "run": self.run,
            "ok": self.ok,
            "exact": self.exact,
            "seeded": self.seeded,
            "states": self.states,
            "counters_agree": self.counters_agree,
            "problem_count": self.problem_count,
            "repaired": self.repaired,
            "problems": [vars(problem) for problem in self.problems],
        }


def verify(rt: Runtime, run: str, *, progress: Callable[[int], None] = lambda looked_at: None) -> Verification:
    """Look at every job of a run; costs a few seconds for each hundred thousand.

    Args:
        progress: called with the number of jobs looked at.

    Raises NotFoundError, StoreError. A broker that is away makes the answer inexact.
    """
    plan = RunPlan.of(manifests.get(rt.store, run))
    with rt.store.unhurried(), rt.store.snapshot() as session:
        stored = jobs.count_by_state(rt.store, plan.run, session)
        totals = counters.totals(rt.store, plan.run, session)
        found = Verification(run=plan.run, exact=False, seeded=_seeded(totals), states=_by_state(stored))
        _compare_counts(found, plan, stored, totals)
        _compare_ledger(rt, found, plan, totals, session)
        looked_at = 0
        for page in jobs.stream(rt.store, plan.run, session=session):
            _look_at(rt, found, page, session)
            looked_at += len(page)
            progress(looked_at)
    _compare_broker(rt, found, plan)
    return found


def _seeded(totals: dict[str, dict[str, int]]) -> int:
    return sum(stage.get("seeded", 0) for stage in totals.values())


def _by_state(stored: dict[tuple[str, str], int]) -> dict[str, int]:
    states = dict.fromkeys(map(str, JobState), 0)
    for (_, state), number in stored.items():
        states[state] += number
    return states


def _compare_counts(
    found: Verification, plan: RunPlan, stored: dict[tuple[str, str], int], totals: dict[str, dict[str, int]]
) -> None:
    if sum(stored.values()) != found.seeded:
        found.add("lost", f"{found.seeded} jobs were seeded, {sum(stored.values())} are there")
    for stage, state in itertools.product((stage.name for stage in plan.stages), map(str, JobState)):
        counted, kept = stored.get((stage, state), 0), totals.get(stage, {}).get(f"states.{state}", 0)
        if counted != kept:
            found.counters_agree = False
            found.add("counter", f"{counted} jobs are {state}, the counters say {kept}", stage=stage)


def _compare_ledger(
    rt: Runtime, found: Verification, plan: RunPlan, totals: dict[str, dict[str, int]], session: Session
) -> None:
    recorded = attempts.count_ok(rt.store, plan.run, session)
    logged = events.recorded_jobs(rt.store, plan.run, session)
    for stage in plan.stages:
        completed = totals.get(stage.name, {}).get("completed", 0)
        numbers = {"counters": completed, "ledger": recorded.get(stage.name, 0), "events": logged.get(stage.name, 0)}
        if len(set(numbers.values())) > 1:
            detail = ", ".join(f"{name} say {number}" for name, number in numbers.items())
            found.add("event", f"completed jobs: {detail}", stage=stage.name)
    for row in attempts.recorded_twice(rt.store, plan.run, session):
        detail = f"recorded as done {row['n']} times in generation {row['generation']}"
        found.add("recorded_twice", detail, job_id=row["job"], stage=row["stage"])


def _look_at(rt: Runtime, found: Verification, page: list[Document], session: Session) -> None:
    named = [row["message"] for row in page if row["message"] is not None]
    states = messages.states(rt.store, named, session) if named else {}
    results = {f"{row['_id']}/{row['input']}": row for row in page if row["state"] == JobState.TERMINAL}
    missing = outputs.missing(rt.store, list(results), session) if results else set()
    for key in missing:
        row = results[key]
        found.add("lost", "it is terminal, and its result is not there", job_id=row["job"], stage=row["stage"])
    for row in page:
        detail = _stranded(row, states)
        if detail is not None:
            found.add("lost", detail, job_id=row["job"], stage=row["stage"])


def _stranded(row: Document, states: dict[str, str]) -> str | None:
    """Why nothing will ever move this job on, or None."""
    state, message = row["state"], row["message"]
    if state == JobState.PENDING and states.get(message) not in _ALIVE:
        return f"it is pending in message {message}, which is {states.get(message, 'not there')}"
    if state != JobState.PENDING and message is not None:
        return f"it is {state} and names message {message}"
    if state == JobState.RETRY_WAITING and "due_at" not in row:
        return "it waits for a retry that has no time"
    if state == JobState.WAITING and "due_at" not in row and row.get("reason") != "definition":
        return f"it waits ({row.get('reason')}) for no time"
    return None


def _compare_broker(rt: Runtime, found: Verification, plan: RunPlan) -> None:
    names = {stage.name for stage in plan.stages}
    rows = [row for row in partitions.of_pipelines(rt.store, [plan.pipeline]) if row["stage"] in names]
    queues = {row["_id"]: row["stage"] for row in rows}
    try:
        held: dict[str, Depth] = depths(rt.settings.amqp_url, list(queues))
    except BrokerError:
        return
    found.exact = all(depth.consumers == 0 for depth in held.values())
    if not found.exact:
        return
    for queue, number in _open_messages(rt, queues):
        if number > held[queue].ready:
            detail = f"{queue} has {held[queue].ready} hints for {number} open messages; the sweep publishes them"
            found.add("message_gone", detail, stage=queues[queue])


def _open_messages(rt: Runtime, queues: dict[str, str]) -> Iterator[tuple[str, int]]:
    for queue in queues:
        yield queue, messages.count_published(rt.store, queue)
