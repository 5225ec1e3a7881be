"""What is done to a run: each kind of fault comes again and again, at random moments, beside all the others.

`workers.py`, `network.py`, `stops.py` and `queues.py` have the kinds; a run's schedule says how many of each, and how
often. Each kind has a thread of its own, so that one that lasts keeps no other from happening.
"""

from __future__ import annotations

import random
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from pipeline_app.runtime import Runtime
from tests.chaos.driver.fleet import Fleet, Place
from tests.chaos.driver.journal import Journal
from tests.chaos.driver.services import Services


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What faults may be done to."""

    fleet: Fleet
    journal: Journal
    #: A runtime of the driver's own, which no fault is done to but those of the services.
    rt: Runtime
    #: Where handlers write.
    witness: Path
    #: None where they are not this run's own.
    services: Services | None = None


class Fault(ABC):
    """One kind of fault. What it does is written into the journal before it is done."""

    def __init__(self, scene: Scene, seed: str, *, number: int | None, every_s: float) -> None:
        self.scene = scene
        self.chance = random.Random(f"{seed} {type(self).__name__}")
        #: How many in all; None for as many as come until the end.
        self.number = number
        self.every_s = every_s
        self.done = 0
        self._last = time.monotonic()
        #: What went wrong with the fault itself: the run is worth nothing then.
        self.error: BaseException | None = None
        self.end = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"chaos-{type(self).__name__}", daemon=True)

    @abstractmethod
    def act(self) -> bool:
        """Do it once, and undo it if it lasts; false if there was nobody to do it to."""

    def start(self) -> None:
        """From here on it happens."""
        self._thread.start()

    def close(self) -> None:
        """It happens no more, and what lasts is undone."""
        self.end.set()
        self._thread.join(120)
        assert not self._thread.is_alive(), f"{self._thread.name} does not end"

    @property
    def is_done(self) -> bool:
        """Whether as many as there are to be were done; where no number was given, always."""
        return self.number is None or self.done >= self.number

    @property
    def share(self) -> float:
        """How much of it is done, in the mean: between two of them there is work, too."""
        if self.number is None or self.is_done:
            return 1.0
        return (self.done + min(1.0, (time.monotonic() - self._last) / self.every_s)) / self.number

    def last(self, seconds: float) -> None:
        """Let what was done last so long, or until the end of the run."""
        self.end.wait(seconds)

    def someone(self) -> Place | None:
        """A worker that consumes."""
        ready = [place for place in self.scene.fleet.places if place.ready_at is not None]
        return self.chance.choice(ready) if ready else None

    def _run(self) -> None:
        try:
            while self.number is None or not self.is_done:
                if self.end.wait(self.chance.expovariate(1 / self.every_s)):
                    return
                while not self.act():
                    if self.end.wait(0.1):
                        return
                self.done += 1
                self._last = time.monotonic()
        except BaseException as exc:  # it is raised again by whoever asks how it goes
            self.error = exc
