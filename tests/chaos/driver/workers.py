"""Faults of workers: killed, their children killed, stopped for longer than a lease."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.chaos.driver.faults import Fault
from tests.chaos.driver.fleet import Place

#: An aimed kill waits this long for something to happen in a handler.
AIM_S = 2.0
#: And then comes within this.
WITHIN_S = 0.03


class Kill(Fault):
    """A worker is killed, and another takes its place.

    Half of the kills come at any moment. The other half wait until a handler of the worker starts or ends, and come
    within milliseconds: there the store and the broker are written, and such moments are too short to be met by chance.
    """

    def act(self) -> bool:
        place = self.someone()
        if place is None:
            return False
        if self.chance.random() < 0.5:
            self._aim(place)
        return place.kill(with_children=self.chance.random() < 0.5)

    def _aim(self, place: Place) -> None:
        files = place.witnesses(self.scene.witness)
        before = _sizes(files)
        deadline = time.monotonic() + AIM_S
        while _sizes(files) == before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(self.chance.uniform(0, WITHIN_S))


class KillChild(Fault):
    """A process of a pool is killed, or one of a job that runs alone: its worker lives on."""

    def act(self) -> bool:
        place = self.someone()
        children = place.children() if place is not None else []
        if place is None or not children:
            return False
        child = self.chance.choice(children)
        self.scene.journal.write("kill child", worker=place.name, pid=place.pid, child=child.pid)
        _send(child, signal.SIGKILL)
        return True


class Freeze(Fault):
    """A worker is stopped, and goes on later as if nothing had been: mostly after its lease has ended."""

    def act(self) -> bool:
        place = self.someone()
        if place is None:
            return False
        seconds = self.chance.choice([3.0, 14.0, 20.0])
        frozen = place.family()
        self.scene.journal.write("freeze", worker=place.name, pid=place.pid, seconds=seconds)
        for process in frozen:
            _send(process, signal.SIGSTOP)
        self.last(seconds)
        for process in frozen:
            _send(process, signal.SIGCONT)
        self.scene.journal.write("thawed", worker=place.name)
        return True


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)  # psutil refuses if the pid was given to another process
    except psutil.NoSuchProcess:
        return


def _sizes(files: Sequence[Path]) -> list[int]:
    return [path.stat().st_size for path in files]
