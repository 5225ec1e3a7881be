"""From a hint to the jobs and their inputs, owned by this worker. Called by consume, first thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline_app.domain.job import job_key
from pipeline_app.domain.plan import RunPlan
from pipeline_app.runtime import Runtime
from pipeline_app.store import jobs, messages, outputs
from pipeline_app.store.client import Document


@dataclass(frozen=True, kw_only=True)
class Work:
    """A message that this process has claimed."""

    plan: RunPlan
    stage: str
    partition: str
    message: str
    token: str
    #: Ids of the message's jobs, in its order.
    job_ids: Sequence[str]
    #: Job id -> its document, for those that exist.
    jobs: dict[str, Document]
    #: Job id -> what the handler gets.
    inputs: dict[str, Any]


def claim(rt: Runtime, message_ids: Sequence[str]) -> list[Work | None]:
    """The work behind each message; None if it is not open: done, cancelled, or running elsewhere.

    Raises StoreError; then some may be claimed, and the sweep gives them back if nobody asks again.
    """
    token = rt.token()
    rows = messages.claim(rt.store, message_ids, worker=rt.incarnation(), process=rt.process, token=token)
    claimed = {row["_id"]: row for row in rows}
    found = jobs.for_claim(rt.store, [job_key(row["run"], job) for row in claimed.values() for job in row["jobs"]])
    wanted = [
        f"{key}/{job['input']}" for key, job in found.items() if job["input"] and job["message"] in claimed
    ]
    values = outputs.read(rt.store, wanted) if wanted else {}
    return [
        _work(rt.memory.need_plan(claimed[message]["run"]), claimed[message], token, found, values)
        if message in claimed
        else None
        for message in message_ids
    ]


def _work(
    plan: RunPlan, row: Document, token: str, found: dict[str, Document], values: dict[str, Any]
) -> Work:
    keys = {job: job_key(plan.run, job) for job in row["jobs"]}
    present = {job: found[key] for job, key in keys.items() if key in found}
    return Work(
        plan=plan,
        stage=row["stage"],
        partition=row["partition"],
        message=row["_id"],
        token=token,
        job_ids=row["jobs"],
        jobs=present,
        inputs={
            job: values.get(f"{keys[job]}/{document['input']}") if document["input"] else document.get("payload")
            for job, document in present.items()
        },
    )
