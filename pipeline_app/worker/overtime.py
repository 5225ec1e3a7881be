"""Ends children of a pool whose handler is past its time limit and lets no other thread of its process run.

Normally a child notices that itself, and records all that is known (`flow/deadline.py`). It cannot while its handler is
in code that keeps Python's lock: a regular expression that goes astray, a library in C. So the main process looks at
the board on which children write until when they may run.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

from pipeline_app.errors import StoreError
from pipeline_app.flow import claim, handle, record
from pipeline_app.flow.board import Board, Overdue
from pipeline_app.flow.forward import publish_or_leave
from pipeline_app.runtime import Runtime, process_id
from pipeline_app.store import messages
from pipeline_app.store.client import Document
from pipeline_app.worker.ending import end_tree

logger = logging.getLogger(__name__)

LOOK_S = 0.5
#: A child has so long to notice by itself, counted from when it was seen: the whole machine may have stood still.
PATIENCE_S = 3.0


class Overtime:
    """The thread of the main process that looks."""

    def __init__(self, board: Board, runtime: Callable[[], Runtime]) -> None:
        self._board = board
        self._runtime = runtime
        #: Since when each is seen to be overdue.
        self._seen: dict[Overdue, float] = {}

    def start(self) -> None:
        """Look from now on, for as long as the process lives."""
        threading.Thread(target=self._run, name="pipeline-overtime", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(LOOK_S)
            try:
                self._look()
            except StoreError as exc:
                logger.warning("a handler past its time limit waits to be recorded: %s", exc)
            except Exception:
                logger.exception("looking for handlers past their time limit")

    def _look(self) -> None:
        now = time.monotonic()
        self._seen = {one: self._seen.get(one, now) for one in self._board.overdue()}
        for one, since in self._seen.items():
            if now - since >= PATIENCE_S:
                logger.warning("ending a child that is stuck in its handler: pid=%d message=%s", one.pid, one.message)
                # First, so that nobody takes its end for a loss of the job.
                self._record(one)
                # It may have come back meanwhile, and run something else by now.
                if one in self._board.overdue():
                    end_tree(one.pid, parent=os.getpid())
                    self._board.clear(one)

    def _record(self, one: Overdue) -> None:
        rt = self._runtime()
        for row in messages.claimed(rt.store, _id=one.message, worker=rt.incarnation()):
            if process_id(row["process"]) == one.pid:
                publish_or_leave(rt, _record(rt, row, one.position))


def _record(rt: Runtime, row: Document, position: int) -> list[Document]:
    """Record a message whose handler hangs: which of its jobs were done before only the child knows, so they run again.

    Raises StoreError.
    """
    (work,) = claim.of(rt, [row])
    pipeline = rt.pipeline_of(work.plan)
    assert pipeline is not None  # its child knew it
    stage = pipeline.stage(work.stage)
    mine = [job_id for job_id in work.job_ids if work.jobs.get(job_id, {}).get("message") == work.message]
    late = work.job_ids[position]
    outcomes = handle.again([job_id for job_id in mine if job_id != late])
    if late in mine:
        outcomes.append(handle.time_out(rt, work, stage, late, row["claimed_at"]))
    entry = record.Record(work=work, outcomes=outcomes, code_version=stage.handler.code_version)
    return record.record_together(rt, [entry])[0]
