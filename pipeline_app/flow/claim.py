"""From a hint to the jobs and their inputs, owned by this worker. Called by consume, first thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline_app.domain.job import job_key
from pipeline_app.domain.plan import RunPlan
from pipeline_app.errors import StoreError
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
    #: Name of the stage's Celery task.
    task: str
    #: The hold or throttle that let these jobs go, if one did.
    released_by: str | None = None


class Claims:
    """The claims of one process. They come one after the other: it is the work of a Group.

    A claim whose answer was lost may have happened. Nobody takes it away from a worker that lives, so it must be known
    again when it is asked for again.
    """

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt
        #: Message -> tokens that it may be claimed with, for all that is known.
        self._doubtful: dict[str, list[str]] = {}

    def __call__(self, message_ids: Sequence[str]) -> list[Work | None]:
        """The work behind each message; None if it is not open: done, cancelled, or running elsewhere.

        Raises StoreError; then ask again until it is known.
        """
        token = self._rt.token()
        doubtful = {message: self._doubtful[message] for message in message_ids if message in self._doubtful}
        try:
            works = claim(self._rt, message_ids, token, doubtful)
        except StoreError:
            for message in message_ids:
                self._doubtful.setdefault(message, []).append(token)
            raise
        for message in doubtful:
            del self._doubtful[message]
        return works


def claim(
    rt: Runtime, message_ids: Sequence[str], token: str, doubtful: Mapping[str, Sequence[str]] | None = None
) -> list[Work | None]:
    """The work behind each message, claimed with `token`, or before with one of its `doubtful` ones; or None.

    Raises StoreError; then some may be claimed.
    """
    tokens = {message: {token, *(doubtful or {}).get(message, ())} for message in message_ids}
    rows = messages.claim(
        rt.store,
        message_ids,
        worker=rt.incarnation(),
        process=rt.process,
        token=token,
        doubtful=set().union(*tokens.values()),
    )
    works = {work.message: work for work in of(rt, [row for row in rows if row["token"] in tokens[row["_id"]]])}
    # Taken out one by one: of two deliveries of one message that came together, one has it.
    return [works.pop(message, None) for message in message_ids]


def of(rt: Runtime, claimed: Sequence[Document]) -> list[Work]:
    """The work behind claimed messages. Raises StoreError."""
    ids = {row["_id"] for row in claimed}
    found = jobs.for_claim(rt.store, [job_key(row["run"], job) for row in claimed for job in row["jobs"]])
    wanted = [f"{key}/{job['input']}" for key, job in found.items() if job["input"] and job["message"] in ids]
    values = outputs.read(rt.store, wanted) if wanted else {}
    return [_work(rt.memory.need_plan(row["run"]), row, found, values) for row in claimed]


def _work(plan: RunPlan, row: Document, found: dict[str, Document], values: dict[str, Any]) -> Work:
    keys = {job: job_key(plan.run, job) for job in row["jobs"]}
    present = {job: found[key] for job, key in keys.items() if key in found}
    return Work(
        plan=plan,
        stage=row["stage"],
        partition=row["partition"],
        message=row["_id"],
        token=row["token"],
        job_ids=row["jobs"],
        jobs=present,
        inputs={
            job: values.get(f"{keys[job]}/{document['input']}") if document["input"] else document.get("payload")
            for job, document in present.items()
        },
        task=f"{plan.pipeline}.{row['stage']}",
        released_by=row.get("released_by"),
    )
