"""Celery's side of a stage: its task, and what becomes of the task's message in every case.

`StageTask.__call__` is the one place where a failed write can keep a message un-acknowledged in every pool: what is
raised later, or in a signal receiver, is too late or goes unheard. Messages end like this:

    recorded, or not ours to run any more       returns         acknowledged
    every job of it failed                      ChunkFailed     acknowledged; Flower shows the traceback
    the worker stops before the claim           Reject(requeue) back into the queue
    not understood                              returns         acknowledged after it was parked
    the child died                              StageRequest    back into the queue; its claim is given back
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar, TypeVar

from celery import Task
from celery.exceptions import Reject, TimeLimitExceeded, WorkerLostError
from celery.worker import state as worker_state
from celery.worker.request import Request

from pipeline_app.domain.hint import Hint
from pipeline_app.domain.outage import Outage
from pipeline_app.domain.outcome import AttemptOutcome, ErrorRecord, Move, Outcome
from pipeline_app.domain.pipeline import Stage
from pipeline_app.errors import PipelineError, StoreError
from pipeline_app.flow import claim, gates, handle, record
from pipeline_app.flow.board import Board
from pipeline_app.flow.closing import Closings
from pipeline_app.flow.deadline import OvertakenError, Watchdog
from pipeline_app.flow.forward import Notes, forward
from pipeline_app.flow.frames import let_go
from pipeline_app.flow.give_back import give_back
from pipeline_app.flow.group import Group
from pipeline_app.flow.later import AGAIN_S, Later
from pipeline_app.flow.slots import Slots
from pipeline_app.flow.throttling import Leave
from pipeline_app.runtime import Runtime
from pipeline_app.store import messages, partitions
from pipeline_app.store.client import Document

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

#: Jobs that are recorded in one transaction, unless a single message has more.
RECORD_JOBS = 1000
#: Pauses between two tries while the store is away: doubled up to the second.
FIRST_PAUSE_S, LAST_PAUSE_S = 0.1, 2.0


class ChunkFailedError(PipelineError):
    """Every job of the chunk failed; what became of each is recorded."""


class Flow:
    """One process's way through claim, gates, handle, record and forward, shared by its threads."""

    def __init__(
        self,
        rt: Runtime,
        when_stopping: Callable[[], bool],
        slots: int | None = None,
        *,
        leased: Callable[[], bool] = lambda: True,
        board: Board | None = None,
        give_up_slot: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.rt = rt
        self.board = board or Board()
        #: Called when a message was recorded whose handler runs past its time limit, and may run for ever.
        self._give_up_slot = give_up_slot
        self._watchdog = Watchdog()
        #: Handlers that may run at once; what waits for the store meanwhile does not keep them waiting. Where the pool
        #: itself is the bound, this is none.
        self._slots = Slots(slots)
        self.notes = Notes(rt)
        self._stopping = when_stopping
        #: Whether the worker's lease can be valid: what is claimed under one that has ended is taken away again.
        self._leased = leased
        self._closings = Closings(rt)
        self._later = Later()
        self._claims: Group[str, claim.Work | None] = Group(claim.Claims(rt))
        self._records: Group[record.Record, list[Document]] = Group(
            lambda rows: record.record_together(rt, rows), limit=RECORD_JOBS, weight=record.weight
        )
        self._forwards: Group[list[Document], bool] = Group(self._forward)

    def run(self, hint: Hint) -> str:
        """Take the hint's message through its stage, and return what happened in a few words.

        Raises ChunkFailedError; Reject, before anything was claimed.
        """
        work = self._claim(hint.message)
        if work is None:
            return "not open"
        with self._slots.one(unless=self._stopping) as is_free:
            if not is_free:
                return self._return(work)
            pipeline = self.rt.pipeline_of(work.plan)
            if pipeline is None:
                return self._await_definition(work)
            stage = pipeline.stage(work.stage)
            ready, refused = gates.sort(self.rt, work)
            chunk = self._chunk(work, stage, refused)
            try:
                outcomes = handle.handle(chunk, ready)
            except OvertakenError:
                # It was recorded. In a child of a pool nothing comes after that: its slot is given up with it.
                logger.warning("ended after its time limit: message=%s task=%s", work.message, work.task)
                _until_known("settling", work.message, chunk.leave.settle)
                return "was over its time limit"
        self._finish(chunk, outcomes)
        return summary(outcomes)

    def _chunk(self, work: claim.Work, stage: Stage, refused: Sequence[Outcome]) -> handle.Chunk:
        return handle.Chunk(
            rt=self.rt,
            work=work,
            stage=stage,
            refused=refused,
            leave=Leave(self.rt, work),
            closings=self._closings,
            watchdog=self._watchdog,
            board=self.board,
            on_overdue=self._on_overdue,
            stopping=self._stopping,
        )

    def _on_overdue(self, chunk: handle.Chunk, outcomes: Sequence[Outcome]) -> None:
        message = chunk.work.message
        try:
            self._finish(chunk, outcomes)
        except Exception as exc:
            logger.exception("our own error: message=%s", message)
            self.give_up(message, exc)
        self._give_up_slot(message)

    def _finish(self, chunk: handle.Chunk, outcomes: Sequence[Outcome]) -> None:
        """Record what became of the message's jobs, and send on what follows."""
        work = chunk.work
        _until_known("settling", work.message, chunk.leave.settle)
        # Before the jobs are recorded as held: what holds them must be there.
        _until_known("closing", work.message, self._closings.settle)
        next_messages = self._record(work, outcomes, chunk.stage.handler.code_version)
        if next_messages:
            self._forwards.submit(next_messages)
        self.board.count(sum(outcome.attempt is not None for outcome in outcomes))

    def _forward(self, batches: Sequence[list[Document]]) -> list[bool]:
        done = forward(self.rt, [row for rows in batches for row in rows], self.notes)
        return [done] * len(batches)

    def _await_definition(self, work: claim.Work) -> str:
        outcomes = [Outcome(job_id=job, move=Move.AWAIT_DEFINITION) for job in work.job_ids]
        self._record(work, outcomes, "")
        return "waits for a worker with its definition"

    def give_up(self, message: str, exc: BaseException) -> None:
        """Our own bug between claim and record: contain it as a lost attempt, so that the jobs go on or are buried."""
        self._give_up(message, ErrorRecord.of(exc))

    def _give_up(self, message: str, lost: ErrorRecord) -> None:
        try:
            _until_known("giving up", message, lambda: self._give_back(message, lost))
        except Exception:
            logger.exception("cannot give back, trying again in %.0f s: message=%s", AGAIN_S, message)
            self._later.add(message, lambda: self._give_up(message, lost))

    def _return(self, work: claim.Work) -> str:
        """The worker stops, and none of its handlers has started: others may have it at once."""
        _until_known("giving back", work.message, lambda: self._give_back(work.message, None))
        return "given back"

    def _give_back(self, message: str, lost: ErrorRecord | None) -> None:
        mine = {"worker": self.rt.incarnation(), "process": self.rt.process}
        for row in messages.claimed(self.rt.store, _id=message, **mine):
            forward(self.rt, give_back(self.rt, row, lost=lost, its_own_doing=True), self.notes)

    def _claim(self, message: str) -> claim.Work | None:
        """The claim, waiting inside the slot while the store is away: nothing spins, and the message is safe.

        It may have happened although the answer got lost: then only this process can go on with it.
        """

        def ask() -> claim.Work | None:
            if self._stopping():
                raise Reject("the worker stops", requeue=True)
            if not self._leased():
                raise StoreError("the lease has to be renewed first")
            return self._claims.submit(message)

        return _until_known("claim", message, ask)

    def _record(self, work: claim.Work, outcomes: Sequence[Outcome], code_version: str) -> list[Document]:
        """The record, tried until it is known: the handlers ran, and only this process knows how that ended."""
        entry = record.Record(work=work, outcomes=outcomes, code_version=code_version)
        return _until_known("record", work.message, lambda: self._record_or_alone(entry))

    def _record_or_alone(self, entry: record.Record) -> list[Document]:
        try:
            return self._records.submit(entry)
        except StoreError:
            raise
        except Exception:
            # One record of those that were to be committed together cannot be: it must not take the others with it.
            logger.warning("recording by itself: message=%s", entry.work.message, exc_info=True)
            return record.record_together(self.rt, [entry])[0]


def _until_known(what: str, message: str, ask: Callable[[], Answer]) -> Answer:
    """The store's answer, asked for again while it is away."""
    pause, outage = FIRST_PAUSE_S, Outage()
    while True:
        try:
            return ask()
        except StoreError as exc:
            if outage.goes_on(datetime.now(UTC)):
                logger.warning("%s waits: message=%s: %s", what, message, exc)
            time.sleep(pause)
            pause = min(pause * 2, LAST_PAUSE_S)


def summary(outcomes: Sequence[Outcome]) -> str:
    """What Flower shows as the result: `18 advance, 2 retry`.

    Raises ChunkFailedError if handlers ran and every one failed.
    """
    ran = [outcome for outcome in outcomes if outcome.attempt is not None]
    failed = [outcome for outcome in ran if outcome.attempt in (AttemptOutcome.FAILED, AttemptOutcome.LOST)]
    if ran and len(failed) == len(ran):
        error = failed[0].error
        assert error is not None
        first = error.traceback or error.message
        raise ChunkFailedError(f"{len(failed)} of {len(ran)} jobs failed; the first:\n{first}")
    counts = {str(move): sum(o.move is move for o in outcomes) for move in Move}
    return ", ".join(f"{number} {move}" for move, number in counts.items() if number)


class StageRequest(Request):  # type: ignore[misc]  # Celery ships no types
    """What the main process knows of a message in a child. A child that is killed can record nothing itself."""

    #: Called with the message id, the error and the child's pid (if known) when a child was lost; set by the worker.
    on_lost: ClassVar[Callable[[str, BaseException, int | None], None] | None] = None
    #: A message is acknowledged by the thread that handled it, or early by the main one; twice would end the worker.
    _once: ClassVar[threading.RLock] = threading.RLock()

    def acknowledge(self) -> None:
        with self._once:
            super().acknowledge()

    def reject(self, requeue: bool = False) -> None:
        with self._once:
            super().reject(requeue=requeue)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        exc = getattr(exc_info.exception, "exc", exc_info.exception)
        on_lost = type(self).on_lost
        if not isinstance(exc, (WorkerLostError, TimeLimitExceeded)) or on_lost is None:
            return super().on_failure(exc_info, send_failed_event, return_ok)
        worker_state.task_ready(self)
        on_lost(self.id, exc, self.worker_pid)
        # Back into the queue, in case it was not claimed yet; if it was, the second delivery finds it closed.
        return self.reject(requeue=True)

    def on_timeout(self, soft: bool, timeout: float) -> Any:
        # The base class would acknowledge here; on_failure has dealt with the message already.
        return super().on_timeout(soft, timeout) if soft else None


class StageTask(Task):  # type: ignore[misc]  # Celery ships no types
    """The Celery task of a stage, named `pipeline.stage`."""

    abstract = True
    Request = "pipeline_app.flow.consume:StageRequest"
    acks_late = True
    reject_on_worker_lost = True
    acks_on_failure_or_timeout = True
    ignore_result = True
    typing = False  # whatever arrives is looked at by Hint.read, and parked if it is not ours
    throws = (ChunkFailedError,)

    def __init__(self, name: str, stage: Stage, flow: Callable[[], Flow]) -> None:
        self.name = name
        self.stage = stage
        self._flow = flow

    def run(self, *args: Any, **kwargs: Any) -> str:
        """What a stage does with a message; Celery calls it by way of `__call__`."""
        hint = Hint.read(args, kwargs)
        if isinstance(hint, str):
            return self._park(args, kwargs, hint)
        return self._flow().run(hint)

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        # The next stages are published by forward, under the message ids that the record made. Celery's tracer would
        # publish the chain once more, and acknowledge if that fails.
        self.request.chain = None
        try:
            return self.run(*args, **kwargs)
        except (Reject, ChunkFailedError):
            raise
        except StoreError as exc:
            raise Reject(exc, requeue=True) from exc
        except Exception as exc:
            logger.exception("our own error: message=%s task=%s", self.request.id, self.name)
            self._flow().give_up(self.request.id, exc)
            if isinstance(exc, MemoryError):
                # Celery raises it once more in the main process, which would end.
                raise PipelineError("out of memory between claim and record") from exc
            raise

    def after_return(self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:  # noqa: ARG002
        """Celery's last word on a task that ended well or failed. Its tracer's frame keeps what the task raised."""
        if isinstance(retval, BaseException):
            # With the frame some 400 KB of Celery's copies of code would stay: workers grew by that for hours.
            let_go(retval)

    def _park(self, args: Sequence[Any], kwargs: dict[str, Any], reason: str) -> str:
        """Keep a message that is in our queue and is none of ours."""
        rt = self._flow().rt
        body = json.dumps([list(args), kwargs], default=str).encode()
        queue = (self.request.delivery_info or {}).get("routing_key") or ""
        logger.error("parked: queue=%s task=%s: %s", queue, self.name, reason)
        headers = {"task": self.name, "id": self.request.id}
        partitions.park(rt.store, queue=queue, body=body, headers=headers, reason=reason)
        return f"parked: {reason}"
