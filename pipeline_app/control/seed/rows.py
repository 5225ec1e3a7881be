"""What seeding writes of a job: its document, and its partition's, so that workers find the queues before the message.

A job with an order key waits for its turn from the start, whether or not anybody is before it: who is the next of a key
is decided in one place only (`control/duties/ordering.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime

from pipeline_app.domain.job import JobLine, turn_id
from pipeline_app.domain.partition import job_partition, queue_name
from pipeline_app.domain.plan import RunPlan
from pipeline_app.domain.states import JobState, WaitReason
from pipeline_app.errors import BadJobLineError
from pipeline_app.flow import gates
from pipeline_app.flow.enqueue import parked_state
from pipeline_app.flow.forward import task_name
from pipeline_app.runtime import Runtime
from pipeline_app.store import jobs
from pipeline_app.store.client import Document
from pipeline_app.store.encoding import UnstorableError, encode
from pipeline_app.store.transition import JobMove


def new_row(rt: Runtime, plan: RunPlan, line: JobLine, *, batch: str, seq: int, shown: bool, now: datetime) -> Document:
    """The document of a job; `shown` is whether it may take its turn before its batch is closed."""
    row = jobs.document(
        run=plan.run,
        job_id=line.job_id,
        batch=batch,
        tags=dict(line.tags),
        partition=job_partition(line.tags, line.order_key, plan.partition_by, plan.order_partitions)[0],
        stage=plan.stages[0].name,
        payload=line.payload,
        now=now,
        expires_at=line.expiry(),
        seq=seq,
        priority=line.priority,
        order_key=line.order_key,
    )
    due_at = line.due_at(now)
    if line.order_key is None:
        return row | beginning(rt, plan, row, due_at, now)
    row |= {"state": JobState.WAITING, "reason": WaitReason.ORDER}
    if due_at is not None and due_at > now:
        row["starts_at"] = due_at
    if shown:
        row["queues_for"] = turn_id(plan.run, line.order_key)
    return row


def beginning(rt: Runtime, plan: RunPlan, row: Document, due_at: datetime | None, now: datetime) -> Document:
    """What a job's document says when it may go in its stage as far as its own time and what is closed there let it.

    Whoever finds it pending gives it a message.
    """
    if due_at is not None and due_at > now:
        return {"state": JobState.WAITING, "reason": WaitReason.DELAY, "due_at": due_at}
    keeper = gates.keeper(rt, plan.run, task_name(plan.pipeline, row["stage"]), row["partition"], row["tags"])
    return parked_state(*keeper) if keeper else {"state": JobState.PENDING}


def queue_up(rows: Sequence[Document]) -> tuple[list[JobMove], set[str]]:
    """The moves by which jobs that are to wait for their turn do so, and the turns that are woken by that."""
    turns: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        turns[turn_id(row["run"], row["order_key"])].append(row["_id"])
    guard = {"state": JobState.WAITING, "reason": WaitReason.ORDER}
    return [JobMove(keys=keys, guard=guard, set={"queues_for": turn}) for turn, keys in turns.items()], set(turns)


def size(line: JobLine, row: Document) -> int:
    """Bytes of a job's document. Raises BadJobLineError if MongoDB cannot hold it."""
    try:
        return len(encode(row).raw)
    except UnstorableError as exc:
        raise BadJobLineError(f"job {line.job_id!r}: its payload cannot be stored: {exc}") from exc


def partition_rows(plan: RunPlan, line: JobLine) -> list[Document]:
    """A job's partition in each stage, as workers look it up."""
    partition, tags = job_partition(line.tags, line.order_key, plan.partition_by, plan.order_partitions)
    return [_partition_row(plan, stage.name, partition, tags) for stage in plan.stages]


def _partition_row(plan: RunPlan, stage: str, partition: str, tags: Mapping[str, str]) -> Document:
    return {
        "_id": queue_name(plan.pipeline, stage, partition),
        "pipeline": plan.pipeline,
        "stage": stage,
        "partition": partition,
        "tags": dict(tags),
    }
