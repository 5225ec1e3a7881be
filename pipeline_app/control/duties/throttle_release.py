"""How throttled jobs go on: let go in order, a moment before their turn, so that they wait here and not in a worker.

How many may go is read from the throttle itself, which says when its next free slot is: what was let go too early or
not used corrects itself. Workers ask for leave all the same (`flow/throttling.py`); here is only the runway.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from pipeline_app.control.changes.release import enqueue_parked
from pipeline_app.control.contained import contained
from pipeline_app.control.seed import seeding
from pipeline_app.domain.pipeline import MAX_CHUNK
from pipeline_app.domain.target import Target
from pipeline_app.runtime import Runtime
from pipeline_app.store import jobs, messages, throttles
from pipeline_app.store.client import Document
from pipeline_app.store.transition import Place

logger = logging.getLogger(__name__)

#: Jobs are let go so much before their slot.
AHEAD_S = 0.5
#: Jobs of one message come at most from so much of the rate: slow handlers need many messages to keep it.
CHUNK_S = 0.05
#: Messages of a throttle without a rate that are on their way to one stage's partition.
RUNWAY = 50
#: Jobs that are looked at in one go.
PAGE = 1000
#: What nobody has claimed after this is not on its way: its queue has no worker, and must not hold up the others.
STUCK_AFTER = timedelta(seconds=5)


def release_throttled(rt: Runtime) -> None:
    """Let go of jobs whose turn comes."""
    waiting = [keeper for keeper in jobs.keepers(rt.store) if keeper.startswith(throttles.PREFIX)]
    rows = throttles.in_use(rt.store, waiting)
    hidden = seeding.hidden_batches(rt) if rows else []
    for row in rows:
        with contained("letting go", row["_id"]):
            _look_at(rt, row, row["_id"] in waiting, hidden)


def _look_at(rt: Runtime, row: Document, waits: bool, hidden: Sequence[str]) -> None:
    if waits is not row["backlog"]:
        # While jobs wait, those that come later go behind them; when nobody does, they need not.
        throttles.set_backlog(rt.store, row["_id"], waits)
    target = Target.of(row)
    # What would be held at once waits here as well: so it keeps its turn, and the hold has few to probe with.
    if waits and not any(closed.includes(target) for closed, _ in rt.memory.flags().closures.entries):
        _release(rt, row, hidden)


def _release(rt: Runtime, row: Document, hidden: Sequence[str]) -> None:
    on_their_way = messages.released(rt.store, row["_id"])
    late = rt.store.now() - STUCK_AFTER
    stuck = {_place(m) for m in on_their_way if m["created_at"] < late}
    moving = [m for m in on_their_way if _place(m) not in stuck]
    room = _room(rt, row, moving)
    if room.jobs <= 0 or room.messages <= 0:
        return
    full = {place for place in map(_place, moving) if _left(rt, row, place, moving) <= 0}
    rows = jobs.kept_by(rt.store, row["_id"], room.jobs, not_in=sorted(stuck | full), skip_batches=hidden)
    chosen = _with_runway(rt, rows, moving, row, room.messages)
    enqueue_parked(rt, chosen, "throttle", chunk=_chunk(row), released_by=row["_id"])


@dataclass(frozen=True, kw_only=True)
class Room:
    """What may be let go now."""

    jobs: int
    messages: int


def _place(row: Document) -> Place:
    return row["run"], row["stage"], row["partition"]


def _chunk(row: Document) -> int | None:
    return None if row["rate_per_s"] is None else max(1, int(row["rate_per_s"] * CHUNK_S))


def _room(rt: Runtime, row: Document, moving: Sequence[Document]) -> Room:
    number, documents = PAGE, PAGE
    if row["rate_per_s"] is not None:
        now = rt.store.now()
        ahead_s = now.timestamp() + AHEAD_S - throttles.next_slot(row, now)
        under_way = sum(len(m["jobs"]) for m in moving)
        number = min(PAGE, math.floor(ahead_s * row["rate_per_s"]) + 1 - under_way)
    if row["concurrency"] is not None:
        documents = row["concurrency"] - len(row["locks"]) - len(moving)
    spent = throttles.spent_now(row, rt.store.now())
    if spent is not None and spent[0] >= row["budget"]["amount"]:
        number = 0
    return Room(jobs=number, messages=documents)


def _left(rt: Runtime, row: Document, place: Place, moving: Sequence[Document]) -> int:
    """How many jobs more keep a place's queue busy."""
    if row["rate_per_s"] is not None:
        return PAGE
    chunk = rt.memory.need_plan(place[0]).stage(place[1]).chunk
    return RUNWAY * chunk - sum(len(m["jobs"]) for m in moving if _place(m) == place)


def _with_runway(
    rt: Runtime, rows: Sequence[Document], moving: Sequence[Document], row: Document, documents: int
) -> list[Document]:
    """The first of `rows`: as many for each queue as keep it busy, in so many messages at most."""
    left: dict[Place, int] = {}
    begun: dict[Place, int] = {}
    chosen = []
    for job in rows:
        place = _place(job)
        if place not in left:
            left[place] = _left(rt, row, place, moving)
            begun[place] = 0
        if left[place] <= 0:
            continue
        size = min(_chunk(row) or MAX_CHUNK, rt.memory.need_plan(place[0]).stage(place[1]).chunk)
        if begun[place] % size == 0:
            if documents <= 0:
                continue
            documents -= 1
        begun[place] += 1
        left[place] -= 1
        chosen.append(job)
    return chosen


def unlock_ended(rt: Runtime) -> None:
    """Take back locks whose worker is gone: a lock holds only while its message is claimed."""
    locked = [row for row in throttles.all_of(rt.store) if row["locks"]]
    if not locked:
        return
    held = {message["_id"]: message["token"] for message in messages.claimed(rt.store)}
    for row in locked:
        number = throttles.unlock_ended(rt.store, row, held)
        if number:
            logger.warning("took back locks: throttle=%s locks=%d", row["_id"], number)
