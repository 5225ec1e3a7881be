"""Backpressure: a run that has a bound takes new jobs only while fewer than that are unfinished.

Who calls: seeding, before each page. Nothing else asks: what workers make of jobs (next stages, retries, replays) is
never kept waiting, so the room always comes. Two seeders may see the same room: each exceeds the bound by at most a
page then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence

from pipeline_app.domain.job import JobLine
from pipeline_app.domain.outage import Outage
from pipeline_app.domain.plan import RunPlan
from pipeline_app.errors import StoreError
from pipeline_app.runtime import Runtime
from pipeline_app.store import counters, manifests

logger = logging.getLogger(__name__)

#: How often a seeder that waits looks for room.
LOOK_EVERY_S = 0.25

#: Called with what is waited for, again and again while there is no room.
Waiting = Callable[[str], None]


class Room:
    """How many jobs a run takes now, for one seed batch."""

    def __init__(self, rt: Runtime, plan: RunPlan, batch: str, waiting: Waiting) -> None:
        self._rt = rt
        self._plan = plan
        self._batch = batch
        self._waiting = waiting
        self._outage = Outage()

    def parts(self, lines: Sequence[JobLine]) -> Iterator[Sequence[JobLine]]:
        """All of `lines`, in parts for which there is room when they are given; waits for it in between."""
        if self._plan.bound is None:
            if lines:
                yield lines
            return
        while lines:
            room = self._wait(self._plan.bound)
            yield lines[:room]
            lines = lines[room:]

    def _wait(self, bound: int) -> int:
        """The room there is, as soon as there is any. Raises StoreError, unless it waits already."""
        unfinished = counters.unfinished(self._rt.store, self._plan.run)
        if unfinished < bound:
            return bound - unfinished
        self._note(waits=True)
        try:
            while unfinished >= bound:
                self._waiting(f"{unfinished:,} jobs are unfinished, and the bound of run {self._plan.run} is {bound:,}")
                time.sleep(LOOK_EVERY_S)
                unfinished = self._look(unfinished)
        finally:
            self._note(waits=False)
        return bound - unfinished

    def _look(self, before: int) -> int:
        """How many are unfinished; as many as before while the store is away: who waits has nothing to lose."""
        try:
            found = counters.unfinished(self._rt.store, self._plan.run)
        except StoreError as exc:
            if self._outage.goes_on(self._rt.store.now()):
                logger.warning("seeding waits for the store: run=%s: %s", self._plan.run, exc)
            return before
        self._outage.ends(self._rt.store.now())
        return found

    def _note(self, *, waits: bool) -> None:
        try:
            manifests.note_waiting(self._rt.store, self._batch, self._rt.store.now() if waits else None)
        except StoreError as exc:
            logger.info("not noted that the seeder waits: %s", exc)
