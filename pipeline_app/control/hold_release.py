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
import time
from collections.abc import Sequence

from pipeline_app.control.release import enqueue_parked
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
SPELL_S = 0.5


def probe_held(rt: Runtime) -> None:
    """Begin probing holds whose time is over, and go on with those that are being probed."""
    for row in holds.over(rt.store):
        if holds.begin_probing(rt.store, row["_id"]):
            _forget_bursts(rt, Target.of(row))
            logger.info("probing: hold=%s", row["_id"])
    for row in holds.probed(rt.store):
        _probe(rt, row)


def _probe(rt: Runtime, row: Document) -> None:
    probe = row["probe"]
    if probe is None:
        _begin_round(rt, row, PROBES)
        return
    states = messages.states(rt.store, probe["messages"])
    under_way = sum(state in (MessageState.OPEN, MessageState.CLAIMED) for state in states.values())
    # The first few are waited for; later rounds follow each other closely, so that nothing stands idle.
    if under_way > (len(probe["messages"]) // 2 if probe["size"] > PROBES else 0):
        return
    verdict = _verdict(rt, probe)
    if verdict is False:
        if holds.close_again(rt.store, row["_id"]):
            logger.warning("closed again, the probes failed: hold=%s", row["_id"])
    elif verdict is None:
        # Nothing was learned: the jobs were cancelled, or something else stopped them.
        _begin_round(rt, row, probe["size"])
    elif probe["size"] >= LAST_ROUND or not _begin_round(rt, row, probe["size"] * 2):
        _open(rt, row)


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
    """Whether the target is open, by what became of the probes; None if none of them ran.

    A job may fail for reasons of its own: only if all fail is the target not open.
    """
    found = attempts.of_messages(rt.store, probe["run_jobs"])
    ran = [row["outcome"] for row in found if row["outcome"] != AttemptOutcome.REFUSED]
    if not ran:
        return None
    return AttemptOutcome.OK in ran and AttemptOutcome.DEFERRED not in ran


def _begin_round(rt: Runtime, row: Document, size: int) -> bool:
    """Let go of so many jobs; False if there is none that nothing else keeps."""
    rows = jobs.kept_by(rt.store, row["_id"], LOOKED_AT)
    if not rows:
        _open(rt, row)
        return True
    free = _kept_by_nothing_else(rt, row["_id"], rows)[:size]
    if not free:
        return False
    # One by one at first: a chunk of probes would be one request after the other, and one lost worker all of them.
    made = enqueue_parked(rt, free, "probe", chunk=max(1, size // PROBES), released_by=holds.pass_of(row))
    run_jobs = [[m["run"], m["stage"], m["_id"], job] for m in made for job in m["jobs"]]
    ids = [m["_id"] for m in made]
    # Should this be lost, a leader that follows begins another round: some more probes than meant.
    probe = {"size": size, "messages": ids, "run_jobs": run_jobs, "goes_well": size > PROBES}
    holds.note_probe(rt.store, row["_id"], row["probe"], probe)
    logger.info("let go: hold=%s jobs=%d", row["_id"], len(run_jobs))
    return True


def _open(rt: Runtime, row: Document) -> None:
    if holds.end(rt.store, row["_id"], expected=(holds.PROBING,)):
        logger.info("open: hold=%s", row["_id"])
        announce(rt)


def _kept_by_nothing_else(rt: Runtime, hold: str, rows: Sequence[Document]) -> list[Document]:
    """Those that no other hold or pause would stop at once."""
    others = Table((Target.of(row), row["_id"]) for row in holds.in_force(rt.store) if row["_id"] != hold)
    if not others.entries:
        return list(rows)
    return [row for row in rows if not _is_stopped(rt, others, row)]


def _is_stopped(rt: Runtime, closures: Table[str], row: Document) -> bool:
    task = f"{rt.memory.need_plan(row['run']).pipeline}.{row['stage']}"
    return any(True for _ in closures.at(row["run"], task, row["partition"]).matching(row["tags"]))


def release_kept_by_nothing(rt: Runtime) -> None:
    """Let go of jobs whose hold, pause or throttle is not in force, or not there, any more."""
    keepers = jobs.keepers(rt.store)
    if not keepers:
        return
    in_force = holds.still_in_force(rt.store, keepers) | throttles.existing(rt.store, keepers)
    deadline = time.monotonic() + SPELL_S
    for keeper in keepers:
        while keeper not in in_force and time.monotonic() < deadline:
            rows = jobs.kept_by(rt.store, keeper, PAGE)
            if not enqueue_parked(rt, rows, "released") or len(rows) < PAGE:
                break
