"""How throttled jobs go on: let go in order, a moment before their turn, so that they wait here and not in a worker.

How many may go is read from the throttle itself, which says when its next free slot is: what was let go too early or
not used corrects itself. Workers ask for leave all the same (`flow/throttling.py`); here is only the runway.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from datetime import timedelta

from pipeline_app.control.release import enqueue_parked
from pipeline_app.domain.target import Target
from pipeline_app.runtime import Runtime
from pipeline_app.store import jobs, messages, throttles
from pipeline_app.store.client import Document

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
    for row in throttles.in_use(rt.store, waiting):
        if (row["_id"] in waiting) is not row["backlog"]:
            # While jobs wait, those that come later go behind them; when nobody does, they need not.
            throttles.set_backlog(rt.store, row["_id"], row["_id"] in waiting)
        if row["_id"] not in waiting:
            continue
        target = Target.of(row)
        # What would be held at once waits here as well: so it keeps its turn, and the hold has few to probe with.
        if not any(closed.includes(target) for closed, _ in rt.memory.flags().closures.entries):
            _release(rt, row)


def _release(rt: Runtime, row: Document) -> None:
    on_their_way = messages.released(rt.store, row["_id"])
    late = rt.store.now() - STUCK_AFTER
    stuck = {(m["stage"], m["partition"]) for m in on_their_way if m["created_at"] < late}
    moving = [m for m in on_their_way if (m["stage"], m["partition"]) not in stuck]
    room = _room(rt, row, moving)
    if room <= 0:
        return
    rows = jobs.kept_by(rt.store, row["_id"], room, not_in=sorted(stuck))
    enqueue_parked(rt, _with_runway(rt, rows, moving, row), "throttle", chunk=_chunk(row), released_by=row["_id"])


def _chunk(row: Document) -> int | None:
    return None if row["rate_per_s"] is None else max(1, int(row["rate_per_s"] * CHUNK_S))


def _room(rt: Runtime, row: Document, moving: Sequence[Document]) -> int:
    """How many jobs may be let go now."""
    under_way = sum(len(m["jobs"]) for m in moving)
    rooms = [PAGE]
    if row["rate_per_s"] is not None:
        interval = 1.0 / row["rate_per_s"]
        now = rt.store.now().timestamp()
        earliest = max(row["next_at"] / 1000, now - (row["burst"] - 1) * interval)
        rooms.append(math.floor((now + AHEAD_S - earliest) / interval) + 1 - under_way)
    if row["concurrency"] is not None:
        rooms.append(row["concurrency"] - len(row["locks"]) - len(moving))
    spent = throttles.spent_now(row, rt.store.now())
    if spent is not None and spent[0] >= row["budget"]["amount"]:
        rooms.append(0)
    return min(rooms)


def _with_runway(
    rt: Runtime, rows: Sequence[Document], moving: Sequence[Document], row: Document
) -> list[Document]:
    """The first of `rows`, as many for each queue as keep it busy."""
    if row["rate_per_s"] is not None:
        return list(rows)
    left: dict[tuple[str, str, str], int] = {}
    for job in rows:
        place = (job["run"], job["stage"], job["partition"])
        if place not in left:
            left[place] = RUNWAY * rt.memory.need_plan(job["run"]).stage(job["stage"]).chunk
            left[place] -= sum(len(m["jobs"]) for m in moving if (m["run"], m["stage"], m["partition"]) == place)
    chosen = []
    for job in rows:
        place = (job["run"], job["stage"], job["partition"])
        left[place] -= 1
        if left[place] >= 0:
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
