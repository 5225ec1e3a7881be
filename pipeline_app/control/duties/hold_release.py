"""How held jobs go on when their hold is over: a few probes first, then more and more, all by themselves.

    active --its time is over, or it was cleared--> probing --a round of probes went well--> probing, twice as many
                                                       |--the last round went well, or nothing waits--> ended
                                                       '--they failed--> active, for twice as long as before

A round is over when all its messages are recorded; what became of them stands in the ledger. A probe that is rate
limited closes the hold by itself (`flow/closing.py`). Jobs whose hold, pause or throttle is not in force any more are
let go whatever else happened: the look is at what is, not at what was done.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence
from datetime import timedelta

from pipeline_app.control.changes.release import enqueue_parked
from pipeline_app.control.contained import contained
from pipeline_app.control.seed import seeding
from pipeline_app.domain.outcome import AttemptOutcome
from pipeline_app.domain.states import MessageState
from pipeline_app.domain.target import Table, Target
from pipeline_app.flow.announce import announce
from pipeline_app.runtime import Runtime
from pipeline_app.store import attempts, holds, jobs, messages, throttles
from pipeline_app.store.client import Document

logger = logging.getLogger(__name__)

#: Jobs in the first round.
PROBES = 3
#: A round of so many that went well opens the target.
LAST_ROUND = 200
#: Jobs that are looked at to find those that nothing else keeps.
LOOKED_AT = 2000
#: Jobs that are let go in one transaction when nothing keeps them any more.
PAGE = 1000
#: A duty does not take longer than this at a time: others wait for it.
SPELL_S = 0.2
#: A probe that nobody has claimed after this has no worker, and is not waited for.
STUCK_AFTER = timedelta(seconds=5)
#: When some probes went well, the others are waited for so long: one of them may hang.
PATIENCE = timedelta(seconds=10)


def probe_held(rt: Runtime) -> None:
    """Begin probing holds whose time is over, and go on with those that are being probed."""
    deadline = time.monotonic() + SPELL_S
    changed = False
    for row in holds.over(rt.store):
        if holds.begin_probing(rt.store, row["_id"]):
            _forget_bursts(rt, Target.of(row))
            logger.info("probing: hold=%s", row["_id"])
    rows = holds.probed(rt.store)
    in_force = holds.in_force(rt.store) if rows else []
    # In any order: when there are more than one spell is long enough for, each has its turn.
    for row in random.sample(rows, len(rows)):
        with contained("probing", row["_id"]):
            changed |= _probe(rt, row, in_force)
        if time.monotonic() > deadline:
            break
    if changed:
        announce(rt)


def _probe(rt: Runtime, row: Document, in_force: Sequence[Document]) -> bool:
    """One step with a hold; True if workers have to hear of what it became."""
    probe = row["probe"]
    if probe is None:
        return _begin_round(rt, row, PROBES, in_force)
    verdict = _verdict(rt, probe)
    if _is_under_way(rt, probe, verdict):
        return False
    if verdict is False:
        if holds.close_again(rt.store, row["_id"]):
            logger.warning("closed again, the probes failed: hold=%s", row["_id"])
            # What it let go until now does not pass any more; what it lets go next has to.
            return True
        return False
    if verdict and probe["size"] >= LAST_ROUND:
        return _open(rt, row)
    # Also if nothing was learned (the jobs were cancelled, or something else stopped them): with more it may be.
    return _begin_round(rt, row, min(probe["size"] * 2, LAST_ROUND), in_force)


def _is_under_way(rt: Runtime, probe: Document, verdict: bool | None) -> bool:
    """Whether the round is to be waited for."""
    now = rt.store.now()
    left = messages.among(rt.store, probe["messages"], MessageState.OPEN, MessageState.CLAIMED)
    left = [m for m in left if m["state"] == MessageState.CLAIMED or m["created_at"] > now - STUCK_AFTER]
    if verdict and probe["at"] < now - PATIENCE:
        return False
    # The first few are waited for; later rounds follow each other closely, so that nothing stands idle.
    return len(left) > (len(probe["messages"]) // 2 if probe["size"] > PROBES else 0)


def _forget_bursts(rt: Runtime, target: Target) -> None:
    """A provider that has just closed is not asked twice at one moment, whatever its throttle has saved up."""
    shared = [
        throttle.id
        for limited, throttle in rt.memory.flags().throttles.entries
        if limited.includes(target) or target.includes(limited)
    ]
    if shared:
        throttles.forget_burst(rt.store, shared)


def _verdict(rt: Runtime, probe: Document) -> bool | None:
    """Whether the target is open, by what became of the probes; None if none of them tells.

    A job may fail for reasons of its own: only if all fail is the target not open. Who lost its worker says nothing.
    """
    found = attempts.of_messages(rt.store, probe["run_jobs"])
    ran = [row["outcome"] for row in found if row["outcome"] not in (AttemptOutcome.REFUSED, AttemptOutcome.LOST)]
    if not ran:
        return None
    return AttemptOutcome.OK in ran and AttemptOutcome.DEFERRED not in ran


def _begin_round(rt: Runtime, row: Document, size: int, in_force: Sequence[Document]) -> bool:
    """Let go of so many jobs; True if there were none and the hold was ended instead."""
    hidden = seeding.hidden_batches(rt)
    rows = jobs.kept_by(rt.store, row["_id"], LOOKED_AT, skip_batches=hidden)
    free = _kept_by_nothing_else(rt, row["_id"], rows, in_force)[:size]
    if not free:
        # Nobody waits, or something else keeps all that do: they are let go, and kept by that.
        return _open(rt, row)
    # One by one at first: a chunk of probes would be one request after the other, and one lost worker all of them.
    made = enqueue_parked(rt, free, "probe", chunk=max(1, size // PROBES), released_by=holds.pass_of(row))
    if not made:
        return False
    run_jobs = [[m["run"], m["stage"], m["_id"], job] for m in made for job in m["jobs"]]
    probe = {
        "size": size,
        "messages": [m["_id"] for m in made],
        "run_jobs": run_jobs,
        "goes_well": size > PROBES,
        "at": rt.store.now(),
    }
    # Should this be lost, a leader that follows begins another round: some more probes than meant.
    holds.note_probe(rt.store, row["_id"], row["probe"], probe)
    logger.info("let go: hold=%s jobs=%d", row["_id"], len(run_jobs))
    return False


def _open(rt: Runtime, row: Document) -> bool:
    ended = holds.end(rt.store, row["_id"], expected=(holds.PROBING,))
    if ended:
        logger.info("open: hold=%s", row["_id"])
    return ended


def _kept_by_nothing_else(
    rt: Runtime, hold: str, rows: Sequence[Document], in_force: Sequence[Document]
) -> list[Document]:
    """Those that no other hold or pause would stop at once.

    Of two that are probed and keep the same jobs one goes first, or each would wait for the other.
    """
    stopping = [
        row for row in in_force if row["_id"] != hold and (row["state"] != holds.PROBING or row["_id"] < hold)
    ]
    others = Table((Target.of(row), row["_id"]) for row in stopping)
    return [row for row in rows if not _is_stopped(rt, others, row)] if stopping else list(rows)


def _is_stopped(rt: Runtime, closures: Table[str], row: Document) -> bool:
    task = f"{rt.memory.need_plan(row['run']).pipeline}.{row['stage']}"
    return any(True for _ in closures.at(row["run"], task, row["partition"]).matching(row["tags"]))


def release_kept_by_nothing(rt: Runtime) -> None:
    """Let go of jobs whose hold, pause or throttle is not in force, or not there, any more."""
    keepers = jobs.keepers(rt.store)
    if not keepers:
        return
    in_force = holds.still_in_force(rt.store, keepers) | throttles.existing(rt.store, keepers)
    hidden = seeding.hidden_batches(rt)
    deadline = time.monotonic() + SPELL_S
    for keeper in random.sample(keepers, len(keepers)):
        while keeper not in in_force and time.monotonic() < deadline:
            rows = jobs.kept_by(rt.store, keeper, PAGE, skip_batches=hidden)
            if not enqueue_parked(rt, rows, "released") or len(rows) < PAGE:
                break
