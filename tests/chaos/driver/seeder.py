"""Adds the jobs of a chaos run as it goes on: the workers stay busy until the last fault is done."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

from pipeline_app.control.seed import seeding
from pipeline_app.control.sight.status import status
from pipeline_app.errors import PipelineError
from pipeline_app.runtime import Runtime
from pipeline_app.store import manifests
from tests.chaos.driver.journal import Journal
from tests.chaos.driver.load import RUN, job_line

#: Jobs that are added together, in a batch of their own.
PAGE = 100
#: As many are on their way at most: more than wait for the leases of killed workers.
BACKLOG = 2000


class Seeder:
    """A thread that adds jobs; `share` says how much of the run is over."""

    def __init__(
        self, rt: Runtime, journal: Journal, share: Callable[[], float], *, number: int, pause_s: float, seed: int
    ) -> None:
        self._rt = rt
        self._journal = journal
        self._share = share
        self._number = number
        self._pause_s = pause_s
        self._chance = random.Random(seed)
        self._end = threading.Event()
        self._is_enough = False
        self.seeded = 0
        self.at_rest = 0
        #: Whether all are added, and every batch is closed.
        self.is_done = False
        self._thread = threading.Thread(target=self._run, name="chaos-seeder", daemon=True)
        self._thread.start()

    def enough(self) -> None:
        """Add no further page: the time is up."""
        self._is_enough = True

    def close(self) -> None:
        """Add no more."""
        self._end.set()
        self._thread.join(60)

    def look(self) -> None:
        """Count those that are at rest. Raises PipelineError while a service is away."""
        self.at_rest = status(self._rt, RUN, queues=False).at_rest

    def _run(self) -> None:
        while not self._end.wait(0.2) and not self.is_done:
            try:
                self.look()
                while self._may_add():
                    self._add()
                self.is_done = (self._is_enough or self.seeded == self._number) and self._are_closed()
            except PipelineError:
                continue  # a service is away: that is what this is about

    def _may_add(self) -> bool:
        due = PAGE + self._share() * self._number
        return not self._is_enough and self.seeded < min(self._number, due) and self.seeded - self.at_rest < BACKLOG

    def _are_closed(self) -> bool:
        """Whether all batches are closed; one that a service went away from is closed as an operator does it."""
        if all(row["state"] == "closed" for row in manifests.batches(self._rt.store, RUN)):
            return True
        seeding.seed(self._rt, RUN, [], skip_existing=True)
        return False

    def _add(self) -> None:
        numbers = range(self.seeded, min(self.seeded + PAGE, self._number))
        # Whatever became of an earlier try: who is there already is passed over.
        seeding.seed(self._rt, RUN, [job_line(n, self._pause_s, self._chance) for n in numbers], skip_existing=True)
        self._journal.write("seeded", first=numbers[0], last=numbers[-1])
        self.seeded = numbers.stop
