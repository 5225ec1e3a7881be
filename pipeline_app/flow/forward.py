"""Publish what was recorded. From the commit on nothing may un-acknowledge the message: what fails here is the sweep's.

Also used by seeding and by the sweep, which publish the same documents.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from pipeline_app.domain.hint import Hint
from pipeline_app.domain.plan import RunPlan
from pipeline_app.errors import BrokerError, StoreError
from pipeline_app.runtime import Runtime
from pipeline_app.store import messages, outputs
from pipeline_app.store.client import Document
from pipeline_app.transport.publisher import Envelope
from pipeline_app.transport.topology import Queue, named_queue

logger = logging.getLogger(__name__)

#: Notes that a hint was published are written together, this often.
NOTE_EVERY_S = 0.25


def forward(rt: Runtime, documents: Sequence[Document], notes: Notes) -> bool:
    """Publish hints and note it. False if the broker or store is away: then the sweep does it."""
    if not documents:
        return True
    try:
        publish(rt, documents)
    except (BrokerError, StoreError) as exc:
        logger.warning("not published: messages=%d: %s; the sweep will", len(documents), exc)
        return False
    notes.add([row["_id"] for row in documents if row["stage"] != messages.THEN])
    return True


def publish(rt: Runtime, documents: Sequence[Document]) -> None:
    """Put the hints into the broker, confirmed; results for the user's own tasks are closed by that.

    Raises BrokerError, StoreError: then any of them may be there already, which is harmless.
    """
    hints = [row for row in documents if row["stage"] != messages.THEN]
    rt.publisher.publish([_envelope(rt, rt.memory.need_plan(row["run"]), row) for row in hints])
    for row in documents:
        if row["stage"] != messages.THEN:
            continue
        try:
            _call_then(rt, rt.memory.need_plan(row["run"]), row)
        except (BrokerError, StoreError):
            raise
        except Exception:
            # The user's own signature is at fault: it must not stand in the way of everything behind it.
            logger.exception("cannot send results: message=%s run=%s", row["_id"], row["run"])
            messages.postpone(rt.store, [row["_id"]], messages.FORGOTTEN_AFTER_S)


def publish_or_leave(rt: Runtime, documents: Sequence[Document]) -> bool:
    """Publish messages and note it, outside of the hot path; False if the broker is away: then the sweep does it.

    Raises StoreError.
    """
    try:
        publish_and_note(rt, documents)
    except BrokerError as exc:
        logger.warning("not published: messages=%d: %s; the sweep will", len(documents), exc)
        return False
    return True


def publish_and_note(rt: Runtime, documents: Sequence[Document]) -> None:
    """Publish messages and note it. Raises BrokerError, StoreError."""
    if documents:
        publish(rt, documents)
        messages.note_published(rt.store, [row["_id"] for row in documents if row["stage"] != messages.THEN])


def task_name(pipeline: str, stage: str) -> str:
    """Name of a stage's Celery task."""
    return f"{pipeline}.{stage}"


def chain_after(plan: RunPlan, stage: str) -> list[Document]:
    """The rest of the Celery chain behind a stage, the next task last: our stages, then the user's own tasks."""
    names = [task_name(plan.pipeline, following.name) for following in plan.rest(stage)]
    ours: list[Document] = [{"task": name, "args": [], "kwargs": {}, "options": {}} for name in names]
    return [*reversed(plan.then), *reversed(ours)]


def _envelope(rt: Runtime, plan: RunPlan, row: Document) -> Envelope:
    hint = Hint(run=row["run"], stage=row["stage"], partition=row["partition"], message=row["_id"])
    queue: Queue = named_queue(row["queue"], rt.settings.queue_type)
    jobs = len(row["jobs"])
    return Envelope(
        queue=queue,
        task=task_name(row["pipeline"], row["stage"]),
        id=row["_id"],
        args=[hint.as_dict()],
        chain=chain_after(plan, row["stage"]),
        # Never the payload: it would stand in every log and event.
        shown=f"(run={row['run']!r}, jobs={jobs})",
    )


def _call_then(rt: Runtime, plan: RunPlan, row: Document) -> None:
    """Send results to the user's first task, with the rest of their chain behind it. At least once."""
    last = plan.stages[-1].name
    ids = {job: outputs.output_id(plan.run, job, last, row["source"]) for job in row["jobs"]}
    values = outputs.read(rt.store, list(ids.values()))
    results = [
        {"job_id": job, "result": values[ids[job]], "key": key}
        for job, key in zip(row["jobs"], row["keys"], strict=True)
    ]
    rt.publisher.call(plan.then[0], results, task_id=row["_id"], chain=list(reversed(plan.then[1:])))
    messages.close_delivered(rt.store, [row["_id"]])


class Notes:
    """Notes `published_at` of many messages in one write, from a thread of its own; losing some is harmless."""

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt
        self._lock = threading.Lock()
        self._ids: list[str] = []
        self._thread: threading.Thread | None = None

    def add(self, ids: Sequence[str]) -> None:
        """Note these soon."""
        with self._lock:
            self._ids.extend(ids)
            if ids and self._thread is None:
                self._thread = threading.Thread(target=self._flush_until_idle, name="pipeline-notes", daemon=True)
                self._thread.start()

    def flush(self) -> None:
        """Write what has gathered, now."""
        with self._lock:
            ids, self._ids = self._ids, []
        if not ids:
            return
        try:
            messages.note_published(self._rt.store, ids)
        except StoreError as exc:
            logger.info("not noted: messages=%d: %s; the sweep will publish them again", len(ids), exc)

    def _flush_until_idle(self) -> None:
        while True:
            time.sleep(NOTE_EVERY_S)
            self.flush()
            with self._lock:
                if not self._ids:
                    self._thread = None
                    return
