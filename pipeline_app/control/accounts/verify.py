"""Accounting: is every job of a run where it says it is, and do the counters, the ledger and the event log agree?

The store is read as it was at one instant, so that a run may go on meanwhile. What RabbitMQ holds can only be compared
exactly while nothing consumes; otherwise `exact` is false. What is amiss is mended by `repair.py`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipeline_app.control.accounts import flaws, hints
from pipeline_app.control.accounts.repair import Todo, written
from pipeline_app.control.accounts.repair import repair as mend
from pipeline_app.domain.plan import RunPlan
from pipeline_app.domain.states import JobState
from pipeline_app.runtime import Runtime
from pipeline_app.store import accounts, manifests
from pipeline_app.store.accounts import RunFlags
from pipeline_app.store.client import Session

#: Problems that are listed one by one; beyond it they are only counted.
LISTED = 100

Progress = Callable[[int], None]


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
    exact: bool = False
    seeded: int = 0
    #: State -> jobs; all of them are there.
    states: dict[str, int] = field(default_factory=dict)
    counters_agree: bool = True
    problem_count: int = 0
    problems: list[Problem] = field(default_factory=list)
    #: Problems that were repaired before this look.
    repaired: int = 0
    #: What was done for that (or, in a dry run, would be): enqueued, detached, replayed, published ... -> how many.
    repairs: dict[str, int] = field(default_factory=dict)
    #: What can be repaired of what was found.
    todo: Todo = field(default_factory=Todo)

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
            "repairs": self.repairs,
            "problems": [vars(problem) for problem in self.problems],
        }


def verify(
    rt: Runtime,
    run: str,
    *,
    repair: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda looked_at: None,
) -> Verification:
    """Look at every job of a run; costs a few seconds for each hundred thousand.

    Args:
        repair: bring back what is amiss, then look once more: what that finds is the answer.
        dry_run: with `repair`, only say in `repairs` what it would do.
        progress: called with the number of records looked at.

    Raises NotFoundError, StoreError; with `repair` BrokerError. Else a broker that is away makes the answer inexact.
    """
    found = _look(rt, RunPlan.of(manifests.get(rt.store, run)), progress)
    if not repair:
        return found
    if dry_run:
        found.repairs = found.todo.planned()
        return found
    return repaired(rt, found, progress=progress)


def repaired(
    rt: Runtime,
    found: Verification,
    *,
    mending: Progress = lambda mended: None,
    progress: Progress = lambda looked_at: None,
) -> Verification:
    """Repair what a look found, and look once more. Harmless while the run goes on, again, and by two at once.

    Raises StoreError, BrokerError.
    """
    if not found.todo.planned():
        return found
    plan = RunPlan.of(manifests.get(rt.store, found.run))
    done = mend(rt, plan, found.todo, mending)
    left = _look(rt, plan, progress)
    left.repaired, left.repairs = done.problems, written(done.done)
    return left


def _look(rt: Runtime, plan: RunPlan, progress: Progress) -> Verification:
    found = Verification(run=plan.run)
    with rt.store.unhurried(), rt.store.snapshot() as session:
        flags = accounts.flags(rt.store, plan.run, session)
        found.todo.corrections = flags.corrections
        counted = accounts.counted(rt.store, plan.run, flags.leaving, session)
        logged = accounts.logged(rt.store, plan.run, flags.leaving, session)
        recorded, looked_at = _look_at_ledger(rt, found, session, progress)
        stored = _look_at_jobs(rt, found, plan, flags, session, lambda number: progress(looked_at + number))
        stages = list(dict.fromkeys([stage.name for stage in plan.stages] + [stage for stage, _ in stored]))
        _compare_seeded(found, plan, stored, counted, logged)
        for stage in stages:
            _compare_states(found, stage, stored, counted.get(stage, {}))
            _compare_completed(found, stage, recorded[stage], counted.get(stage, {}), logged.get(stage, {}))
        if sum(found.states.values()) < found.seeded:
            _name_the_gone(rt, found, flags, session)
    found.counters_agree = not found.todo.counts
    _compare_broker(rt, found, plan)
    return found


def _look_at_ledger(rt: Runtime, found: Verification, session: Session, progress: Progress) -> tuple[Counter[str], int]:
    """Stage -> attempts that ended ok; and how many attempts there are."""
    recorded: Counter[str] = Counter()
    size = 0
    for part in accounts.ledger(rt.store, found.run, session):
        recorded.update(part.ok)
        for row in part.twice:
            detail = f"recorded as done {row['n']} times in generation {row['generation']}: that cannot be undone"
            found.add("recorded_twice", detail, job_id=row["job"], stage=row["stage"])
        size += part.size
        progress(size)
    return recorded, size


def _look_at_jobs(
    rt: Runtime, found: Verification, plan: RunPlan, flags: RunFlags, session: Session, progress: Progress
) -> Counter[tuple[str, str]]:
    """(stage, stored state) -> jobs; notes states and flaws."""
    stored: Counter[tuple[str, str]] = Counter()
    running = looked_at = 0
    for page in accounts.job_pages(rt.store, plan.run, leaving=flags.leaving, session=session):
        stored.update((row["stage"], row["state"]) for row in page)
        looked = flaws.look(rt, plan, page, flags, session)
        running += len(looked.running)
        for flaw in looked.flaws:
            found.add("lost", flaw.detail, job_id=flaw.row["job"], stage=flaw.row["stage"])
            if flaw.mend is not None:
                found.todo.jobs[flaw.mend] += 1
        looked_at += len(page)
        progress(looked_at)
    found.states = dict.fromkeys(map(str, JobState), 0)
    for (_, state), number in stored.items():
        found.states[state] += number
    found.states[JobState.RUNNING] += running
    found.states[JobState.PENDING] -= running
    return stored


def _compare_seeded(
    found: Verification,
    plan: RunPlan,
    stored: Counter[tuple[str, str]],
    counted: dict[str, dict[str, int]],
    logged: dict[str, dict[str, int]],
) -> None:
    """How many jobs were seeded: counters, event log and the jobs themselves say it, and one of them may be wrong."""
    there = sum(stored.values())
    in_counters = sum(numbers.get("seeded", 0) for numbers in counted.values())
    in_log = sum(numbers["seeded"] for numbers in logged.values())
    # Nobody removes lines of the log; where it lacks some all the same, the counters know better.
    found.seeded = in_log if in_log >= there else max(there, in_counters)
    first = plan.stages[0].name
    if in_counters != found.seeded:
        found.add("counter", f"{found.seeded} jobs were seeded, the counters say {in_counters}", stage=first)
        found.todo.counts[first]["seeded"] = found.seeded - in_counters
    if in_log != found.seeded:
        found.add("event", f"{found.seeded} jobs were seeded, the events say {in_log}", stage=first)
        found.todo.events[first]["seeded"] = found.seeded - in_log


def _compare_states(found: Verification, stage: str, stored: Counter[tuple[str, str]], counted: dict[str, int]) -> None:
    for state in map(str, JobState):
        there, kept = stored[stage, state], counted.get(f"states.{state}", 0)
        if there != kept:
            found.add("counter", f"{there} jobs are {state}, the counters say {kept}", stage=stage)
            found.todo.counts[stage][f"states.{state}"] = there - kept


def _compare_completed(
    found: Verification, stage: str, recorded: int, counted: dict[str, int], logged: dict[str, int]
) -> None:
    """The ledger is the truth: it has a line of its own for each job."""
    in_counters, in_log = counted.get("completed", 0), logged.get("advanced", 0)
    if in_counters != recorded:
        found.add("counter", f"{recorded} jobs completed it, the counters say {in_counters}", stage=stage)
        found.todo.counts[stage]["completed"] = recorded - in_counters
    if in_log != recorded:
        found.add("event", f"{recorded} jobs completed it, the events say {in_log}", stage=stage)
        found.todo.events[stage]["advanced"] = recorded - in_log


def _name_the_gone(rt: Runtime, found: Verification, flags: RunFlags, session: Session) -> None:
    """Jobs are gone: which, the log knows."""
    there = sum(found.states.values())
    detail = f"it is gone: {found.seeded} jobs were seeded, {there} are there; no command deletes jobs, so it was done"
    detail += " in MongoDB, and only a backup of that brings it back"
    unnamed = found.seeded - there
    for page in accounts.seeded_pages(rt.store, found.run, flags.leaving, session):
        for job_id in accounts.absent(rt.store, found.run, page, session):
            found.add("lost", detail, job_id=job_id)
            unnamed -= 1
    for _ in range(unnamed):
        found.add("lost", detail)


def _compare_broker(rt: Runtime, found: Verification, plan: RunPlan) -> None:
    compared = hints.compare(rt, plan)
    found.exact = compared.exact
    stages: dict[str, str | None] = defaultdict(lambda: None, hints.stage_of_queue(rt, plan))
    for queue, number in compared.unpublished.items():
        detail = f"{number} messages for {queue} were not published, and no worker does it"
        found.add("unpublished", detail, stage=stages[queue])
        found.todo.unpublished[queue] = number
    for queue, (ready, number) in compared.gone.items():
        found.add("message_gone", f"{queue} has {ready} hints for {number} open messages", stage=stages[queue])
        found.todo.gone[queue] = number
