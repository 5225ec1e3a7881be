"""`job_outputs`: what each stage made of each job, written once under the message that made it.

A worker that lost its claim writes under its own message, so it can overwrite nothing. The job names the message whose
output is its input (`input`), so the next stage's inputs need no write of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bson.raw_bson import RawBSONDocument

from pipeline_app.domain.job import job_key
from pipeline_app.errors import InvalidResultError
from pipeline_app.store.client import Document, Session, Store, translated
from pipeline_app.store.encoding import UnstorableError, encode

#: Stands in the place of the stage in inputs that were edited for a replay; no stage can be called that.
EDIT = "(edit)"
#: Ranges of ids in one question.
RANGES = 200


def output_id(run: str, job_id: str, stage: str, message: str) -> str:
    """`_id` of an output: it tells job, stage and message."""
    return f"{job_key(run, job_id)}/{stage}/{message}"


def encode_output(run: str, job_id: str, stage: str, message: str, value: Any) -> RawBSONDocument:
    """The output as it is stored, encoded once.

    Raises InvalidResultError if MongoDB cannot hold it.
    """
    try:
        return encode({"_id": output_id(run, job_id, stage, message), "value": value})
    except UnstorableError as exc:
        raise InvalidResultError(f"the result cannot be stored: {exc}") from exc


def read(store: Store, ids: Sequence[str]) -> dict[str, Any]:
    """`_id` -> value."""
    with translated(store):
        return {row["_id"]: row["value"] for row in store.db.job_outputs.find({"_id": {"$in": list(ids)}})}


def missing(store: Store, ids: Sequence[str], session: Session | None = None) -> set[str]:
    """Those of `ids` that are not there."""
    with translated(store):
        rows = store.db.job_outputs.find({"_id": {"$in": list(ids)}}, {"_id": 1}, session=session)
        return set(ids) - {row["_id"] for row in rows}


def latest(store: Store, keys: Sequence[str], stage: str) -> dict[str, str]:
    """`_id` of a job -> the message of its last output of a stage; without those that have none."""
    found: dict[str, str] = {}
    for start in range(0, len(keys), RANGES):
        # "0" is the character after "/".
        ranges: list[Document] = [
            {"_id": {"$gt": f"{key}/{stage}/", "$lt": f"{key}/{stage}0"}} for key in keys[start : start + RANGES]
        ]
        with translated(store):
            for row in store.db.job_outputs.find({"$or": ranges}, {"_id": 1}):
                key, _, message = row["_id"].rsplit("/", 2)
                # Ids of messages grow with time.
                found[key] = max(message, found.get(key, ""))
    return found


def of_job(store: Store, run: str, job_id: str) -> list[dict[str, Any]]:
    """`{_id, value}` of every output of a job."""
    prefix = job_key(run, job_id) + "/"
    with translated(store):
        return list(store.db.job_outputs.find({"_id": {"$gte": prefix, "$lt": prefix[:-1] + "0"}}).sort("_id", 1))
