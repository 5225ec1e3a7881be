"""The only place where jobs are given a message, whoever asks: seeding, forwarding, the sweep, giving back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

from pipeline_app.domain.job import idempotency_key
from pipeline_app.domain.outcome import Move
from pipeline_app.domain.partition import queue_name
from pipeline_app.domain.pipeline import MAX_CHUNK
from pipeline_app.domain.plan import RunPlan
from pipeline_app.domain.states import JobState, WaitReason
from pipeline_app.store import messages
from pipeline_app.store.client import Document


def split(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """`items` in pieces of at most `size`, in order."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def new_messages(
    plan: RunPlan,
    stage: str,
    partition: str,
    job_ids: Sequence[str],
    now: datetime,
    *,
    chunk: int | None = None,
    released_by: str | None = None,
) -> list[Document]:
    """Messages for jobs that go to a stage's partition, in chunks of the stage's size, or of `chunk` if that is less.

    `released_by` is the hold or throttle that let them go: it does not stop them once more.
    """
    size = min(chunk or MAX_CHUNK, plan.stage(stage).chunk)
    documents = [
        messages.document(
            run=plan.run,
            pipeline=plan.pipeline,
            stage=stage,
            partition=partition,
            queue=queue_name(plan.pipeline, stage, partition),
            jobs=piece,
            now=now,
        )
        for piece in split(job_ids, size)
    ]
    if released_by is not None:
        for document in documents:
            document["released_by"] = released_by
    return documents


def then_message(
    plan: RunPlan, partition: str, generations: Mapping[str, int], source: str, now: datetime
) -> Document:
    """The message that carries results of the last stage to the user's own tasks.

    `generations` are those of its jobs, `source` is the message whose outputs they are. No worker of ours claims it:
    it is closed when the broker has it.
    """
    document = messages.document(
        run=plan.run,
        pipeline=plan.pipeline,
        stage=messages.THEN,
        partition=partition,
        queue=then_queue(plan.pipeline),
        jobs=list(generations),
        now=now,
    )
    keys = [idempotency_key(plan.run, job, messages.THEN, generation) for job, generation in generations.items()]
    return {**document, "source": source, "keys": keys}


def then_queue(pipeline: str) -> str:
    """What stands for a queue in messages to the user's own tasks; Celery's routes decide where they really go."""
    return f"{pipeline}.{messages.THEN}"


def enqueued_state(message: str) -> Document:
    """What a job's document says when it is in that message."""
    return {"state": JobState.PENDING, "message": message}


def parked_state(move: Move, keeper: str | None) -> Document:
    """What a job's document says while a hold, a pause or a throttle keeps it in the store."""
    state, reason = _PARKED[move]
    return {"state": state, "reason": reason, "message": None, "waits_for": keeper}


def queued_state(turn: str) -> Document:
    """What a job's document says while it waits for its turn; whoever sets it wakes the turn."""
    return {"state": JobState.WAITING, "reason": WaitReason.ORDER, "message": None, "queues_for": turn}


_PARKED: dict[Move, tuple[JobState, str]] = {
    Move.HOLD: (JobState.HELD, "hold"),
    Move.PAUSE: (JobState.WAITING, WaitReason.PAUSE),
    Move.THROTTLE: (JobState.WAITING, WaitReason.THROTTLE),
    Move.ORDER: (JobState.WAITING, WaitReason.PRIORITY),
}
