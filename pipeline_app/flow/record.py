"""Make outcomes durable: jobs, outputs, attempts, event, counters, the message closed and the next ones made, at once.

The heart of the promise: nothing is acknowledged or forwarded before this has returned. Records of messages that end
at the same time in one process are committed together (`record_together` is the work of a Group).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from pipeline_app.domain.job import job_key
from pipeline_app.domain.outcome import AttemptOutcome, Move, Outcome
from pipeline_app.domain.states import JobState, WaitReason
from pipeline_app.flow import gates
from pipeline_app.flow.claim import Work
from pipeline_app.flow.enqueue import enqueued_state, new_messages, parked_state, then_message
from pipeline_app.runtime import Runtime
from pipeline_app.store import attempts, messages, transition
from pipeline_app.store.client import Document
from pipeline_app.store.transition import JobMove, NotFittingError, Transition

logger = logging.getLogger(__name__)

#: Outputs up to this size count as one job each in a transaction.
BYTES_PER_JOB = 16 * 1024
#: Rounds of leaving out what does not fit before something must be wrong with the plan itself.
MAX_ROUNDS = 10


@dataclass(kw_only=True)
class Record:
    """A message's outcomes on their way into the store, and the plan that they make."""

    work: Work
    outcomes: Sequence[Outcome]
    code_version: str
    #: `_id`s of jobs that turned out to be somebody else's by now.
    refused: set[str] = field(default_factory=set)
    plan: Transition | None = None
    #: What is to be published once it is recorded.
    next_messages: list[Document] = field(default_factory=list)


def weight(record: Record) -> int:
    """Jobs in the record, or how many its outputs weigh as much as: a transaction is bounded by both."""
    size = sum(len(outcome.output.raw) for outcome in record.outcomes if outcome.output is not None)
    return max(len(record.outcomes), size // BYTES_PER_JOB)


def record_together(rt: Runtime, records: Sequence[Record]) -> list[list[Document]]:
    """Record all and give each one's next messages; a record that lost its claim has none.

    Raises StoreError: then ask again with the same records, until it is known.
    """
    left = list(records)
    rounds = 0
    while left:
        rounds += 1
        if rounds > MAX_ROUNDS:
            raise RuntimeError(f"a record of {len(records)} messages kept being refused in part")
        now = rt.store.now()
        whole = Transition(now=now)
        for record in left:
            if record.plan is None:
                _plan(rt, record, now)
            assert record.plan is not None
            whole.merge(record.plan)
        try:
            with rt.counting() as whole.worker:
                transition.apply(rt.store, whole)
            break
        except NotFittingError as exc:
            left = _without_refused(rt, left, exc)
    _keep_refused(rt, records)
    return [record.next_messages for record in records]


def _without_refused(rt: Runtime, left: Sequence[Record], exc: NotFittingError) -> list[Record]:
    """The records that are worth asking again with."""
    again: list[Record] = []
    for record in left:
        unfit = {job_key(record.work.plan.run, o.job_id) for o in record.outcomes} & exc.jobs
        if record.work.message not in exc.messages:
            if unfit:
                record.refused |= unfit
                record.plan = None
            again.append(record)
        elif not messages.closed_by(rt.store, [record.work.message], record.work.token):
            logger.warning("refused: message=%s stage=%s: its claim was taken", record.work.message, record.work.stage)
            record.refused = {job_key(record.work.plan.run, o.job_id) for o in record.outcomes}
            record.next_messages = []
        # else: it was recorded the last time, only the answer got lost; its next messages are as planned then.
    return again


def _keep_refused(rt: Runtime, records: Sequence[Record]) -> None:
    rows = [
        {
            **_attempt(rt, record, outcome),
            "_id": f"{_attempt_id(record.work, outcome)}/{record.work.token}",
            "outcome": AttemptOutcome.REFUSED,
        }
        for record in records
        if record.refused
        for outcome in record.outcomes
        if outcome.attempt is not None and job_key(record.work.plan.run, outcome.job_id) in record.refused
    ]
    attempts.insert_refused(rt.store, rows)


def _plan(rt: Runtime, record: Record, now: datetime) -> None:
    """Fill in `plan` and `next_messages`. The ids of new messages are made here, once: asking again repeats them."""
    work = record.work
    plan = Transition(now=now, close=[(work.message, work.token)])
    mine = [o for o in record.outcomes if job_key(work.plan.run, o.job_id) not in record.refused]
    record.next_messages = []
    for move, make in _MAKERS.items():
        group = [outcome for outcome in mine if outcome.move is move]
        if group:
            make(rt, record, plan, group, now)
    plan.messages.extend(record.next_messages)
    plan.outputs.extend(o.output for o in mine if o.output is not None)
    plan.attempts.extend(_attempt(rt, record, o) for o in mine if o.attempt is not None)
    plan.events.append(_event(rt, record, mine, now))
    _count_replayed(work, plan, mine)
    record.plan = plan


def _count_replayed(work: Work, plan: Transition, outcomes: Sequence[Outcome]) -> None:
    """What became of jobs that an operation replayed: it stops by itself when they fail again."""
    place = (work.plan.run, work.stage, work.partition)
    last = work.plan.stages[-1].name
    for outcome in outcomes:
        operation = work.jobs[outcome.job_id].get("operation") if outcome.job_id in work.jobs else None
        if operation is None:
            continue
        if outcome.attempt in (AttemptOutcome.FAILED, AttemptOutcome.LOST) or outcome.move is Move.BURY:
            plan.counts[place][f"operations.{operation}.failed"] += 1
        elif outcome.move is Move.ADVANCE and work.stage == last:
            plan.counts[place][f"operations.{operation}.terminal"] += 1


def _advance(rt: Runtime, record: Record, plan: Transition, group: Sequence[Outcome], now: datetime) -> None:
    work = record.work
    job_ids = [outcome.job_id for outcome in group]
    following = work.plan.after(work.stage)
    given = {"input": f"{work.stage}/{work.message}"}
    place = (work.plan.run, work.stage, work.partition)
    plan.counts[place]["completed"] += len(group)
    if following is None:
        plan.moves.append(_move(work, job_ids, {"state": JobState.TERMINAL, "message": None, **given}))
        plan.count(place, JobState.PENDING, JobState.TERMINAL, len(group))
        if work.plan.then:
            generations = {job_id: work.jobs[job_id]["generation"] for job_id in job_ids}
            record.next_messages.append(then_message(work.plan, work.partition, generations, work.message, now))
        return
    fresh = {"stage": following.name, "failures": 0, "deferrals": 0, "losses": 0, **given}
    plan.count(place, JobState.PENDING, None, len(group))
    there = (work.plan.run, following.name, work.partition)
    free, kept = _by_keeper(rt, work, following.name, job_ids)
    for message in new_messages(work.plan, following.name, work.partition, free, now):
        plan.moves.append(_move(work, message["jobs"], {**enqueued_state(message["_id"]), **fresh}))
        record.next_messages.append(message)
    plan.count(there, None, JobState.PENDING, len(free))
    for (move, keeper), ids in kept.items():
        state = parked_state(move, keeper)
        plan.moves.append(_move(work, ids, {**state, **fresh}))
        plan.count(there, None, state["state"], len(ids))


def _by_keeper(
    rt: Runtime, work: Work, stage: str, job_ids: Sequence[str]
) -> tuple[list[str], dict[tuple[Move, str], list[str]]]:
    """The jobs that may go straight on to the next stage, and those that something keeps from it."""
    task = f"{work.plan.pipeline}.{stage}"
    if gates.is_open(rt, work.plan.run, task, work.partition):
        return list(job_ids), {}
    free: list[str] = []
    kept: dict[tuple[Move, str], list[str]] = {}
    for job_id in job_ids:
        keeper = gates.keeper(rt, work.plan.run, task, work.partition, work.jobs[job_id]["tags"])
        if keeper is None:
            free.append(job_id)
        else:
            kept.setdefault(keeper, []).append(job_id)
    return free, kept


def _retry(rt: Runtime, record: Record, plan: Transition, group: Sequence[Outcome], now: datetime) -> None:  # noqa: ARG001
    work = record.work
    # One write for all that failed as often, in the same way: they come back together.
    alike: dict[tuple[int, str], list[Outcome]] = {}
    for outcome in group:
        alike.setdefault((work.jobs[outcome.job_id]["failures"], _group(outcome)), []).append(outcome)
    for (_, error_group), same in alike.items():
        state: Document = {"state": JobState.RETRY_WAITING, "message": None, "due_at": same[0].due_at}
        state["error_group"] = error_group
        plan.moves.append(_move(work, [o.job_id for o in same], state, failures=1))
    _count_leaving(record, plan, JobState.RETRY_WAITING, len(group))


def _bury(rt: Runtime, record: Record, plan: Transition, group: Sequence[Outcome], now: datetime) -> None:  # noqa: ARG001
    alike: dict[tuple[str, AttemptOutcome | None, str], list[str]] = {}
    for outcome in group:
        alike.setdefault((str(outcome.kind), outcome.attempt, _group(outcome)), []).append(outcome.job_id)
    for (kind, attempt, error_group), job_ids in alike.items():
        state = {"state": JobState.DEAD_LETTERED, "reason": kind, "message": None, "died_in": record.work.message}
        state["error_group"] = error_group
        plan.moves.append(_move(record.work, job_ids, state, **_spent(attempt)))
    _count_leaving(record, plan, JobState.DEAD_LETTERED, len(group))


def _group(outcome: Outcome) -> str:
    """The failure group; what died without an error of its own is grouped by its kind."""
    return str(outcome.kind) if outcome.error is None else outcome.error.group


def _spent(attempt: AttemptOutcome | None) -> dict[str, int]:
    """Which of the three budgets an attempt was taken from."""
    budget = _BUDGETS.get(attempt) if attempt is not None else None
    return {} if budget is None else {budget: 1}


_BUDGETS = {
    AttemptOutcome.FAILED: "failures",
    AttemptOutcome.DEFERRED: "deferrals",
    AttemptOutcome.LOST: "losses",
}


def _park(rt: Runtime, record: Record, plan: Transition, group: Sequence[Outcome], now: datetime) -> None:  # noqa: ARG001
    """Into the store's keeping, until what keeps them lets them go."""
    alike: dict[tuple[str | None, AttemptOutcome | None], list[str]] = {}
    for outcome in group:
        alike.setdefault((outcome.waits_for, outcome.attempt), []).append(outcome.job_id)
    for (waits_for, attempt), job_ids in alike.items():
        fields = parked_state(group[0].move, waits_for)
        plan.moves.append(_move(record.work, job_ids, fields, **_spent(attempt)))
        _count_leaving(record, plan, fields["state"], len(job_ids))


def _lose(rt: Runtime, record: Record, plan: Transition, group: Sequence[Outcome], now: datetime) -> None:  # noqa: ARG001
    """Once more in the same stage, each in a message of its own."""
    _enqueue(record, plan, [o.job_id for o in group], now, chunk=1, losses=1)


def _again(rt: Runtime, record: Record, plan: Transition, group: Sequence[Outcome], now: datetime) -> None:  # noqa: ARG001
    """In the same stage, as if nothing had happened."""
    _enqueue(record, plan, [o.job_id for o in group], now)


def _enqueue(
    record: Record, plan: Transition, job_ids: Sequence[str], now: datetime, *, chunk: int | None = None, **inc: int
) -> None:
    work = record.work
    for message in new_messages(work.plan, work.stage, work.partition, job_ids, now, chunk=chunk):
        plan.moves.append(_move(work, message["jobs"], enqueued_state(message["_id"]), **inc))
        record.next_messages.append(message)


def _cancel(rt: Runtime, record: Record, plan: Transition, group: Sequence[Outcome], now: datetime) -> None:  # noqa: ARG001
    state = {"state": JobState.CANCELLED, "message": None}
    plan.moves.append(_move(record.work, [outcome.job_id for outcome in group], state))
    _count_leaving(record, plan, JobState.CANCELLED, len(group))


def _await_definition(rt: Runtime, record: Record, plan: Transition, group: Sequence[Outcome], now: datetime) -> None:  # noqa: ARG001
    state = {"state": JobState.WAITING, "reason": WaitReason.DEFINITION, "message": None}
    plan.moves.append(_move(record.work, [outcome.job_id for outcome in group], state))
    _count_leaving(record, plan, JobState.WAITING, len(group))
    # Seen by the sweep not before the jobs themselves: it is the same transaction. The message makes it unlike any
    # other, so that the sweep takes back only the flag that it has served.
    plan.manifest_flags[record.work.plan.run] = {"awaits_definition": record.work.message}


Maker = Callable[[Runtime, Record, Transition, Sequence[Outcome], datetime], None]

_MAKERS: dict[Move, Maker] = {
    Move.ADVANCE: _advance,
    Move.RETRY: _retry,
    Move.BURY: _bury,
    Move.CANCEL: _cancel,
    Move.HOLD: _park,
    Move.PAUSE: _park,
    Move.THROTTLE: _park,
    Move.ORDER: _park,
    Move.LOSE: _lose,
    Move.AGAIN: _again,
    Move.AWAIT_DEFINITION: _await_definition,
}


def _move(work: Work, job_ids: Sequence[str], state: Document, **inc: int) -> JobMove:
    """Jobs that still name this message; nothing else may be moved by its outcome."""
    keys = [job_key(work.plan.run, job_id) for job_id in job_ids]
    return JobMove(keys=keys, guard={"message": work.message}, set=state, inc=inc)


def _count_leaving(record: Record, plan: Transition, new: JobState, number: int) -> None:
    work = record.work
    plan.count((work.plan.run, work.stage, work.partition), JobState.PENDING, new, number)


def _attempt_id(work: Work, outcome: Outcome) -> str:
    return attempts.attempt_id(work.plan.run, outcome.job_id, work.stage, work.message)


def _attempt(rt: Runtime, record: Record, outcome: Outcome) -> Document:
    work = record.work
    job = work.jobs[outcome.job_id]
    row: Document = {
        "_id": _attempt_id(work, outcome),
        "run": work.plan.run,
        "job": outcome.job_id,
        "stage": work.stage,
        "generation": job["generation"],
        "attempt": job["failures"] + 1,
        "outcome": outcome.attempt,
        "started_at": outcome.started_at,
        "duration_s": round(outcome.duration_s, 6),
        "worker": rt.incarnation(),
        "code_version": record.code_version,
    }
    if outcome.error is not None:
        row["error"] = outcome.error.as_dict()
    return row


def _event(rt: Runtime, record: Record, mine: Sequence[Outcome], now: datetime) -> Document:
    work = record.work
    numbers = {str(move): sum(o.move is move for o in mine) for move in Move}
    return transition.event(
        work.plan.run,
        work.stage,
        "recorded",
        jobs=[outcome.job_id for outcome in mine if outcome.move is not Move.SKIP],
        now=now,
        message=work.message,
        worker=rt.incarnation(),
        advanced=numbers.pop(Move.ADVANCE),
        moves={move: number for move, number in numbers.items() if number},
        next=[message["_id"] for message in record.next_messages],
    )
