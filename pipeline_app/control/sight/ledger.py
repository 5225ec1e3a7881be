"""What happened to the jobs of a run: dead letters, attempts, events, and all of it for one job.

Only questions, each bounded by a limit; the answers are plain dicts in the shape that `--json` prints. The command
line and the web view ask these functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline_app.domain.plan import RunPlan
from pipeline_app.domain.states import DeadKind, JobState, MessageState
from pipeline_app.errors import NotFoundError
from pipeline_app.runtime import Runtime
from pipeline_app.store import attempts as store_attempts
from pipeline_app.store import events as store_events
from pipeline_app.store import jobs, manifests, messages, outputs
from pipeline_app.store.client import Document

#: Events of one job that are shown with it.
JOB_EVENTS = 1000

#: Dead letters whose handler was not run, and what stands in the place of its error.
_WITHOUT_ATTEMPT: dict[str, Document] = {
    DeadKind.EXPIRED: {
        "type": "expired",
        "message": "its expires_at passed before it was started",
        "traceback": "",
    },
}


def failures(
    rt: Runtime,
    run: str,
    *,
    job_id: str | None = None,
    stage: str | None = None,
    group: str | None = None,
    limit: int = 100,
) -> list[Document]:
    """Dead-lettered jobs with the error that ended them, the longest dead first.

    Args:
        group: only those of this failure group, which may be of several stages.

    Raises NotFoundError (run, stage or job), StoreError.
    """
    plan = find_plan(rt, run, stage)
    if job_id is not None:
        find_job(rt, plan.run, job_id)
    with rt.store.unhurried():
        rows = jobs.dead_letters(rt.store, plan.run, stage=stage, job_id=job_id, group=group, limit=limit)
    errors = last_errors(rt, plan.run, rows)
    return [
        {
            "job_id": row["job"],
            "stage": row["stage"],
            "partition": row["partition"],
            "attempts": row["failures"] + row["losses"],
            "at": row["updated_at"],
            "kind": row["reason"],
            "group": row.get("error_group"),
            "error": errors[row["_id"]],
        }
        for row in rows
    ]


def failure_groups(rt: Runtime, run: str, *, stage: str | None = None, limit: int = 100) -> list[Document]:
    """Dead-lettered jobs and those that wait for a retry, by stage and failure group; the largest group first.

    Type, message and frame are those of the sample, a job that failed lately, a dead one if there is one.

    Raises NotFoundError (run or stage), StoreError.
    """
    plan = find_plan(rt, run, stage)
    with rt.store.unhurried():
        rows = jobs.failure_groups(rt.store, plan.run, stage=stage, limit=limit)
    samples = [(row["sample"]["job"], row["_id"]["stage"], row["_id"]["group"]) for row in rows]
    errors = store_attempts.errors_of(rt.store, plan.run, samples)
    return [_failure_group(row, errors.get(row["sample"]["job"])) for row in rows]


def _failure_group(row: Document, error: Document | None) -> Document:
    error = error or _nothing_kept(row["sample"]["kind"])
    return {
        "group": row["_id"]["group"],
        "stage": row["_id"]["stage"],
        "type": error["type"],
        "message": error["message"],
        "frame": error.get("frame"),
        "count": row["count"],
        "dead_lettered": row["dead_lettered"],
        "retrying": row["count"] - row["dead_lettered"],
        "first_at": row["first_at"],
        "last_at": row["last_at"],
        "sample_job": row["sample"]["job"],
    }


def last_errors(rt: Runtime, run: str, rows: Iterable[Document]) -> dict[str, Document]:
    """`_id` of a dead-lettered job -> the error that it died of."""
    ids = {
        row["_id"]: store_attempts.attempt_id(run, row["job"], row["stage"], row["died_in"])
        for row in rows
        if row["reason"] not in _WITHOUT_ATTEMPT
    }
    found = store_attempts.by_ids(rt.store, list(ids.values())) if ids else {}
    return {row["_id"]: _error(row, found.get(ids.get(row["_id"], ""))) for row in rows}


def _error(row: Document, attempt: Document | None) -> Document:
    if attempt is not None and attempt.get("error"):
        return dict(attempt["error"])
    return _nothing_kept(row["reason"])


def _nothing_kept(kind: str) -> Document:
    """What stands in the place of the error of a job that died without an attempt."""
    return _WITHOUT_ATTEMPT.get(kind) or {"type": kind, "message": "the ledger has no attempt of it", "traceback": ""}


def attempts(
    rt: Runtime, run: str, *, job_id: str | None = None, stage: str | None = None, limit: int = 100
) -> list[Document]:
    """The last executions of handlers, oldest first. Raises NotFoundError (run, stage or job), StoreError."""
    plan = find_plan(rt, run, stage)
    if job_id is None:
        return [_attempt(row) for row in store_attempts.of_run(rt.store, plan.run, stage=stage, limit=limit)]
    find_job(rt, plan.run, job_id)
    rows = [row for row in store_attempts.of_job(rt.store, plan.run, job_id) if stage in (None, row["stage"])]
    return [_attempt(row) for row in rows[-limit:]]


def _attempt(row: Document) -> Document:
    return {
        "job_id": row["job"],
        "stage": row["stage"],
        "generation": row["generation"],
        "attempt": row["attempt"],
        "outcome": row["outcome"],
        "started_at": row["started_at"],
        "duration_s": row["duration_s"],
        "worker": row["worker"],
        "code_version": row["code_version"],
        "error": row.get("error"),
    }


def events(
    rt: Runtime, run: str, *, job_id: str | None = None, stage: str | None = None, limit: int = 100
) -> list[Document]:
    """The last events, oldest first: one for each message and step, with the jobs that it concerned.

    With `job_id`, only those of this job, and only it is named in them. Raises NotFoundError (run, stage or job),
    StoreError.
    """
    plan = find_plan(rt, run, stage)
    if job_id is not None:
        find_job(rt, plan.run, job_id)
    return _events(rt, plan.run, job_id, stage, limit)


def _events(rt: Runtime, run: str, job_id: str | None, stage: str | None, limit: int) -> list[Document]:
    rows = store_events.of_run(rt.store, run, job_id=job_id, stage=stage, limit=limit)
    # Ids that different processes made within a second are in no order.
    return [_event(row, job_id) for row in sorted(rows, key=lambda row: row["at"])]


def _event(row: Document, job_id: str | None) -> Document:
    named = {"_id", "run", "at", "stage", "event", "message", "worker", "jobs"}
    return {
        "at": row["at"],
        "stage": row["stage"],
        "event": row["event"],
        "job_count": len(row["jobs"]),
        "jobs": row["jobs"] if job_id is None else [job_id],
        "message": row.get("message"),
        "worker": row.get("worker"),
        "details": {key: value for key, value in row.items() if key not in named},
    }


def job(rt: Runtime, run: str, job_id: str) -> Document:
    """All that is kept of a job: where it stands, its attempts, outputs and events, each oldest first.

    Raises NotFoundError, StoreError.
    """
    plan = find_plan(rt, run)
    row = find_job(rt, plan.run, job_id)
    return {
        "run": plan.run,
        "job_id": row["job"],
        "state": shown_state(rt, row),
        "stage": row["stage"],
        "reason": row.get("reason"),
        "partition": row["partition"],
        "tags": row["tags"],
        "generation": row["generation"],
        "failures": row["failures"],
        "deferrals": row["deferrals"],
        "losses": row["losses"],
        "due_at": row.get("due_at"),
        "expires_at": row.get("expires_at"),
        "message": row["message"],
        "batch": row["batch"],
        "created_at": row["created_at"],
        "updated_at": row["updated_at"],
        "payload": row.get("payload"),
        "attempts": [_attempt(attempt) for attempt in store_attempts.of_job(rt.store, plan.run, row["job"])],
        "outputs": _outputs(rt, plan, row["job"]),
        "events": _events(rt, plan.run, row["job"], None, JOB_EVENTS),
    }


def _outputs(rt: Runtime, plan: RunPlan, job_id: str) -> list[Document]:
    found = []
    for row in outputs.of_job(rt.store, plan.run, job_id):
        stage, message = row["_id"].rsplit("/", 2)[1:]
        found.append({"stage": stage, "message": message, "value": row["value"]})
    # Inputs that were edited for a replay come first.
    order = [outputs.EDIT, *(stage.name for stage in plan.stages)]
    return sorted(found, key=lambda output: order.index(output["stage"]))


def shown_state(rt: Runtime, row: Mapping[str, Any]) -> str:
    """A job's state as people see it: it runs while the message that it names is claimed."""
    if row["state"] == JobState.PENDING and row["message"] is not None:
        state = messages.states(rt.store, [row["message"]]).get(row["message"])
        if state == MessageState.CLAIMED:
            return JobState.RUNNING
    return str(row["state"])


def find_plan(rt: Runtime, run: str, stage: str | None = None) -> RunPlan:
    """The plan of a run (`last` is the newest). Raises NotFoundError, also if it has no such stage."""
    plan = RunPlan.of(manifests.get(rt.store, run))
    if stage is not None:
        plan.stage(stage)
    return plan


def find_job(rt: Runtime, run: str, job_id: str) -> Document:
    """The document of a job. Raises NotFoundError."""
    row = jobs.get(rt.store, run, job_id)
    if row is None:
        raise NotFoundError(f"run {run} has no job {job_id!r}", hint="job ids are those of the seed file")
    return row
