"""Close a claim that will not be recorded, and enqueue its jobs anew at once.

Who calls: the worker's main process for a child that died, at shutdown and for revoked messages; the sweep for workers
whose lease has ended. Nobody waits for a lease if the worker could still say goodbye.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from pipeline_app.domain.job import job_key
from pipeline_app.domain.outcome import AttemptOutcome, ErrorRecord
from pipeline_app.domain.plan import RunPlan, StagePlan
from pipeline_app.domain.states import DeadKind, JobState
from pipeline_app.flow.enqueue import enqueued_state, new_messages
from pipeline_app.runtime import Runtime
from pipeline_app.store import attempts, jobs, messages, transition
from pipeline_app.store.client import Document
from pipeline_app.store.transition import JobMove, NotFittingError, Place, Transition

#: A job that takes its whole worker down each time must end, too; one whose workers are killed from outside should not.
UNSURE_LOSSES = 4


def give_back(
    rt: Runtime, message: Document, *, lost: ErrorRecord | None, its_own_doing: bool = False
) -> list[Document]:
    """Close the claimed `message` and give its jobs new ones, which are to be published.

    With `lost`, the worker died under it: that is an attempt `lost` of each job, and counts. Any of them may have been
    the cause, or none: from here on each goes alone, in a message and a process of its own (`alone.py`), and is
    dead-lettered for such losses only when they are UNSURE_LOSSES times the stage's `losses`. With `its_own_doing` a
    message of one job is known to have been the cause: then the stage's `losses` are the limit.

    Raises StoreError; asking again is harmless.
    """
    plan = rt.memory.need_plan(message["run"])
    stage = plan.stage(message["stage"])
    sure = its_own_doing and len(message["jobs"]) == 1
    limit = stage.losses if sure else stage.losses * UNSURE_LOSSES
    if message["process"] != rt.process:
        # Killed in the middle of its record, it holds these very documents. (Ours would be other threads' records.)
        rt.store.end_transactions(message["process"])
    while True:
        keys = [job_key(plan.run, job) for job in message["jobs"]]
        found = {k: row for k, row in jobs.for_claim(rt.store, keys).items() if row["message"] == message["_id"]}
        now = rt.store.now()
        whole = Transition(now=now, close=[(message["_id"], message["token"])], given_back=True)
        doomed = [k for k, row in found.items() if lost and row["losses"] + 1 >= limit]
        onward = [row["job"] for key, row in found.items() if key not in doomed]
        fresh = new_messages(plan, stage.name, message["partition"], onward, now, chunk=1 if lost else None)
        _move(plan, stage, message, whole, doomed, fresh, lost)
        if lost:
            whole.attempts.extend(_lost_attempts(message, found, lost, now))
            _count_replayed(whole, (plan.run, stage.name, message["partition"]), found.values())
        whole.events.append(_event(message, [row["job"] for row in found.values()], fresh, lost, now))
        try:
            with rt.counting() as whole.worker:
                transition.apply(rt.store, whole)
            return fresh
        except NotFittingError as exc:
            if exc.messages:
                return []  # recorded or given back by somebody else meanwhile
            # else some of its jobs moved on (cancelled): look again


def _count_replayed(whole: Transition, place: Place, rows: Iterable[Document]) -> None:
    """Count one more failed attempt for each of these jobs that a replay let go: it halts by that."""
    for row in rows:
        if row.get("operation") is not None:
            whole.counts[place][f"operations.{row['operation']}.failed"] += 1


def take_open(rt: Runtime, message_id: str) -> Document | None:
    """Claim an open message only to give it back: its id is no good any more (its Celery task was revoked)."""
    mine = {"worker": rt.incarnation(), "process": rt.process, "token": rt.token()}
    rows = messages.claim(rt.store, [message_id], **mine)
    return rows[0] if rows else None


def _move(
    plan: RunPlan,
    stage: StagePlan,
    message: Document,
    whole: Transition,
    doomed: Sequence[str],
    fresh: Sequence[Document],
    lost: ErrorRecord | None,
) -> None:
    guard = {"message": message["_id"]}
    inc = {"losses": 1} if lost else {}
    for new in fresh:
        keys = [job_key(plan.run, job) for job in new["jobs"]]
        whole.moves.append(JobMove(keys=keys, guard=guard, set=enqueued_state(new["_id"]), inc=inc))
        whole.messages.append(new)
    if doomed:
        state = {
            "state": JobState.DEAD_LETTERED,
            "reason": DeadKind.WORKER_LOST,
            "message": None,
            "died_in": message["_id"],
            "error_group": lost.group if lost else None,
        }
        whole.moves.append(JobMove(keys=doomed, guard=guard, set=state, inc=inc))
        place = (plan.run, stage.name, message["partition"])
        whole.count(place, JobState.PENDING, JobState.DEAD_LETTERED, len(doomed))


def _lost_attempts(
    message: Document, found: Mapping[str, Document], lost: ErrorRecord, now: datetime
) -> list[Document]:
    started_at = message["claimed_at"]
    return [
        {
            "_id": attempts.attempt_id(message["run"], row["job"], message["stage"], message["_id"]),
            "run": message["run"],
            "job": row["job"],
            "stage": message["stage"],
            "generation": row["generation"],
            "attempt": row["failures"] + 1,
            "outcome": AttemptOutcome.LOST,
            "started_at": started_at,
            "duration_s": max(0.0, (now - started_at).total_seconds()),
            "worker": message["worker"],
            "code_version": None,
            "error": lost.as_dict(),
        }
        for row in found.values()
    ]


def _event(
    message: Document, job_ids: Sequence[str], fresh: Sequence[Document], lost: ErrorRecord | None, now: datetime
) -> Document:
    return transition.event(
        message["run"],
        message["stage"],
        "lost" if lost else "given_back",
        jobs=job_ids,
        now=now,
        message=message["_id"],
        worker=message["worker"],
        next=[row["_id"] for row in fresh],
    )
