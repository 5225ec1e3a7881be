"""Mistakes in MongoDB: the deployment, its clocks, our indexes."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

from pipeline_app.control.check.finding import Severity, Subject, Trouble
from pipeline_app.store import health

#: A member that was away for longer than the oplog's window is copied anew, as a whole.
SHORTEST_OPLOG = timedelta(hours=24)
#: Below this share of its size the oplog has not begun to drop anything.
FULL = 0.9
HOUR = timedelta(hours=1)
#: `run verify` of a large run looks at one instant for that long.
SHORTEST_SNAPSHOT_S = 300.0
FARTHEST_CLOCK = timedelta(seconds=1)


def indexes(subject: Subject) -> Iterator[Trouble]:
    """Indexes that are missing or different."""
    store = subject.rt.store
    if not health.is_laid_out(store):
        return
    for flaw in health.index_flaws(store):
        name = f"index {flaw.index} of {flaw.collection}"
        if flaw.instead is None:
            yield Trouble(
                what=f"{name} is missing",
                hint="start a worker, or make a run: both make it",
                severity=Severity.ERROR,
            )
        else:
            yield Trouble(
                what=f"{name} is different: {flaw.instead}",
                hint=f'drop it (db.{flaw.collection}.dropIndex("{flaw.index}")), then start a worker',
                severity=Severity.ERROR,
            )


def oplog(subject: Subject) -> Iterator[Trouble]:
    """A replica set whose members must be copied anew after a short absence."""
    found = health.oplog(subject.rt.store)
    if found.members > 1 and found.filled >= FULL and found.window < SHORTEST_OPLOG:
        yield Trouble(
            what=f"the oplog goes back {found.window / HOUR:.1f} h: a member that is away longer must be copied anew",
            hint="make it larger: db.adminCommand({replSetResizeOplog: 1, size: 51200})",
        )


def snapshot_window(subject: Subject) -> Iterator[Trouble]:
    """A server that forgets what was true before a verification has read it."""
    window = health.snapshot_window_s(subject.rt.store)
    if window < SHORTEST_SNAPSHOT_S:
        yield Trouble(
            what=f"MongoDB keeps what was true for {window:.0f} s: run verify of a large run takes longer",
            hint="set its parameter minSnapshotHistoryWindowInSeconds to 300 or more",
        )


def clocks(subject: Subject) -> Iterator[Trouble]:
    """Clocks that differ: all times are MongoDB's, and change when another member leads."""
    for member, offset in health.clocks(subject.rt.store).items():
        if abs(offset) > FARTHEST_CLOCK:
            ahead = "ahead of" if offset > timedelta() else "behind"
            yield Trouble(
                what=f"the clock of {member} is {abs(offset).total_seconds():.1f} s {ahead} this machine's",
                hint="let NTP set the clocks of both machines",
            )
