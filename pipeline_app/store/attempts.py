"""`job_attempts`: the ledger. Every execution of a handler, how it ended, under which code, where."""

from __future__ import annotations

from collections.abc import Sequence

from pymongo.errors import BulkWriteError

from pipeline_app.domain.job import job_key
from pipeline_app.store.client import Document, Store, translated


def attempt_id(run: str, job_id: str, stage: str, message: str) -> str:
    """`_id` of the attempt that counts for this message; one that was refused has its token behind it."""
    return f"{job_key(run, job_id)}/{stage}/{message}"


def insert_refused(store: Store, rows: Sequence[Document]) -> None:
    """Keep what a worker did that had lost its claim: all that is left of it."""
    if not rows:
        return
    with translated(store):
        try:
            store.db.job_attempts.insert_many(rows, ordered=False)
        except BulkWriteError as exc:  # told twice: once is enough
            if any(error["code"] != 11000 for error in exc.details["writeErrors"]):
                raise


def of_job(store: Store, run: str, job_id: str) -> list[Document]:
    """A job's attempts, oldest first."""
    prefix = job_key(run, job_id) + "/"
    with translated(store):
        # "0" is the character after "/".
        rows = list(store.db.job_attempts.find({"_id": {"$gte": prefix, "$lt": prefix[:-1] + "0"}}))
    return sorted(rows, key=lambda row: (row["started_at"], row["_id"]))


def by_ids(store: Store, ids: Sequence[str]) -> dict[str, Document]:
    """`_id` -> attempt."""
    with translated(store):
        return {row["_id"]: row for row in store.db.job_attempts.find({"_id": {"$in": list(ids)}})}


def of_messages(store: Store, rows: Sequence[Sequence[str]]) -> list[Document]:
    """The attempts that count of `(run, stage, message, job)`, as far as there are any."""
    return list(by_ids(store, [attempt_id(run, job, stage, message) for run, stage, message, job in rows]).values())


def errors_of(store: Store, run: str, failed: Sequence[tuple[str, str, str]]) -> dict[str, Document]:
    """Each job of `(job, stage, failure group)` -> its last error of that group in that stage, if it had one."""
    if not failed:
        return {}
    either = []
    for job, stage, group in failed:
        prefix = attempt_id(run, job, stage, "")
        # "0" is the character after "/".
        either.append({"_id": {"$gte": prefix, "$lt": prefix[:-1] + "0"}, "error.group": group})
    with translated(store):
        rows = store.db.job_attempts.find({"$or": either}, {"job": 1, "started_at": 1, "error": 1})
        found = sorted(rows, key=lambda row: (row["started_at"], row["_id"]))
    return {row["job"]: row["error"] for row in found}


def of_run(store: Store, run: str, *, stage: str | None, limit: int) -> list[Document]:
    """The last `limit` attempts of a run, oldest first.

    Found by way of the event log, whose end is cheap to read however long the run: an index on attempts for it would
    cost every record something.
    """
    query: Document = {"run": run, "event": {"$in": ["recorded", "lost"]}}
    if stage is not None:
        query["stage"] = stage
    ids: list[str] = []
    with translated(store):
        for row in store.db.pipeline_events.find(query).sort("_id", -1).limit(limit):
            ids.extend(attempt_id(run, job, row["stage"], row["message"]) for job in row["jobs"])
            if len(ids) >= limit:
                break
    rows = list(by_ids(store, ids).values())
    return sorted(rows, key=lambda row: (row["started_at"], row["_id"]))[-limit:]
