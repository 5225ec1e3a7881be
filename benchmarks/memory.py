"""Memory of processes over time, and whether it grows. Used by the soak.

A process's RSS has what it shares with others, its USS only what would be free if it ended. Either may be what a leak
shows in: children of a prefork pool begin with their parent's pages.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil

MEBIBYTE = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One look at a process."""

    #: Seconds since the soak began.
    at: float
    rss: int
    uss: int


@dataclass(kw_only=True)
class Track:
    """One process, from when it was first seen."""

    name: str
    pid: int
    #: Whether it is one of ours, or a server with all its helpers.
    ours: bool
    samples: list[Sample] = field(default_factory=list)
    ended: bool = False

    def growth(self, warm_up_s: float, window_s: float) -> float | None:
        """Share by which it grew since the warm-up: the larger of RSS and USS, medians of the first window behind the
        warm-up and of the last one. None if there are no two windows yet, or if it was not there all the time.
        """
        if not self.samples or self.samples[0].at > warm_up_s:
            return None
        until = self.samples[-1].at
        before = [s for s in self.samples if warm_up_s <= s.at <= warm_up_s + window_s]
        after = [s for s in self.samples if s.at >= until - window_s]
        if len(before) < 2 or len(after) < 2 or before[-1].at >= after[0].at:
            return None
        return max(
            statistics.median(s.rss for s in after) / statistics.median(s.rss for s in before) - 1,
            statistics.median(s.uss for s in after) / statistics.median(s.uss for s in before) - 1,
        )


class Memory:
    """Tracks of processes and their descendants: each of ours by itself, a server together with its helpers."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._roots: list[tuple[str, psutil.Process, bool]] = []
        self._tracks: dict[tuple[int, float], Track] = {}

    def follow(self, name: str, pid: int, *, ours: bool) -> None:
        """Look at this process and its descendants from now on."""
        self._roots.append((name, psutil.Process(pid), ours))

    @property
    def tracks(self) -> Sequence[Track]:
        """Of all processes that were ever seen, in the order in which they were."""
        return list(self._tracks.values())

    def look(self) -> None:
        """One sample of each process that runs."""
        at = self._clock()
        seen = set()
        for name, root, ours in self._roots:
            sizes = _sizes(root)
            if sizes and not ours:
                sizes = {root: (sum(rss for rss, _ in sizes.values()), sum(uss for _, uss in sizes.values()))}
            for process, (rss, uss) in sizes.items():
                key = (process.pid, process.create_time())
                label = name if process == root else f"{name} child"
                track = self._tracks.setdefault(key, Track(name=label, pid=process.pid, ours=ours))
                track.samples.append(Sample(at=at, rss=rss, uss=uss))
                seen.add(key)
        for key, track in self._tracks.items():
            track.ended = key not in seen


def _sizes(root: psutil.Process) -> dict[psutil.Process, tuple[int, int]]:
    """RSS and USS of a process and its descendants, those that run."""
    found: dict[psutil.Process, tuple[int, int]] = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in (root, *sorted(root.children(recursive=True), key=lambda child: child.pid)):
            with contextlib.suppress(psutil.NoSuchProcess):
                info = process.memory_full_info()
                found[process] = (info.rss, info.uss)
    return found
