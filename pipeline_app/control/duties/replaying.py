"""The steps of replays: a few jobs at a time, at their pace. A duty of the pacing, ten times a second.

A step is one transaction: it moves its jobs and says in the operation's document how far it came. So a replay goes on
where it was, whoever dies, and no step happens twice, however many workers believe that they lead.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipeline_app.control.replays.replay_jobs import Replay, Verdict, judge, page
from pipeline_app.domain.job import turn_id
from pipeline_app.domain.pace import Pace
from pipeline_app.domain.plan import RunPlan
from pipeline_app.domain.states import AT_REST, JobState, MessageState
from pipeline_app.errors import BrokerError, StoreError
from pipeline_app.flow.enqueue import enqueued_state, new_messages, queued_state
from pipeline_app.flow.forward import publish_or_leave
from pipeline_app.runtime import Runtime
from pipeline_app.store import counters, jobs, manifests, messages, operations, transition
from pipeline_app.store.client import Document
from pipeline_app.store.transition import JobMove, NotFittingError, OperationMovedOnError, Step, Transition

logger = logging.getLogger(__name__)

#: Jobs in one step at most, and messages: a step that takes long makes the other duties of the pacing stumble.
PAGE = 1000
MESSAGES = 200
#: Jobs that are looked at for a step at least: many of them may be left alone.
LOOK = 200
#: The same where inputs are read and edited, which may be large.
LOOK_EDITED = 20
#: Bytes of edited inputs in a step, roughly.
EDITED_BYTES = 8 * 1024 * 1024
#: A message has the jobs of this time at most, so that the target sees the pace and no bursts.
MESSAGE_S = 0.2
#: A replay steps on for so long in a round: others want theirs.
ROUND_S = 0.05


def replay_on(rt: Runtime) -> None:
    """Let each replay that is running go on as far as its pace allows."""
    for row in operations.running(rt.store):
        try:
            _round(rt, row)
        except (StoreError, BrokerError):
            raise
        except Exception as exc:
            logger.exception("replaying: operation=%s run=%s", row["_id"], row["run"])
            _end(rt, row, operations.HALTED, f"a step failed: {type(exc).__name__}: {exc}")


def _round(rt: Runtime, row: Document) -> None:
    manifest = manifests.find(rt.store, row["run"])
    if manifest is None or manifest["cancelled_at"] is not None:
        _end(rt, row, operations.CANCELLED, "its run was cancelled" if manifest else "its run is gone")
        return
    why = _failing(rt, row)
    if why is not None:
        _end(rt, row, operations.HALTED, why)
        return
    if _is_unsent(rt, row):
        return
    replay = Replay.of(RunPlan.of(manifest), row)
    until = time.monotonic() + ROUND_S
    while row["state"] == operations.RUNNING:
        due = due_at(row, rt.store.now())
        if due.jobs < 1:
            return
        after = step(rt, replay, row, due)
        # Where it left jobs alone, it may take others instead: look further, but not for long.
        if after is None or after["released"] - row["released"] == int(due.jobs) or time.monotonic() > until:
            return
        row = after


def _end(rt: Runtime, row: Document, state: str, why: str) -> None:
    logger.warning("replay %s: operation=%s run=%s: %s", state, row["_id"], row["run"], why)
    # A replay that halted may be resumed; one that was cancelled has ended.
    operations.change(
        rt.store,
        row["_id"],
        (operations.RUNNING,),
        state=state,
        why=why,
        ended_at=rt.store.now() if state == operations.CANCELLED else None,
    )


def _failing(rt: Runtime, row: Document) -> str | None:
    """Why it must stop by itself."""
    if row["halt_after"] is None:
        return None
    failed = counters.of_operation(rt.store, row["run"], row["_id"])["failed"] - row["failed_before"]
    if failed < row["halt_after"]:
        return None
    return f"{failed} attempts of replayed jobs failed again; it was to halt after {row['halt_after']}"


def _is_unsent(rt: Runtime, row: Document) -> bool:
    """Whether what was replayed last is not in the broker: more of it would come out of there in one burst."""
    if row["last_message"] is None:
        return False
    message = messages.get(rt.store, row["last_message"])
    return message is not None and message["state"] == MessageState.OPEN and message["published_at"] is None


@dataclass(frozen=True, kw_only=True)
class Due:
    """What the pace of a replay brought."""

    at: datetime
    #: Since when it goes at its pace.
    since: datetime
    #: How many may go; the part of a job is kept for later.
    jobs: float


def due_at(row: Document, now: datetime) -> Due:
    """How many jobs a replay may take now."""
    if row["rate_per_s"] is None:
        return Due(at=now, since=now, jobs=float(PAGE))
    since = row["pace_from"]
    if since is None:
        return Due(at=now, since=now, jobs=1.0)
    pace = Pace(per_s=row["rate_per_s"], ramp_s=row["ramp_s"])
    elapsed_s = (now - row["paced_at"]).total_seconds()
    return Due(at=now, since=since, jobs=pace.credit(row["credit"], elapsed_s, (now - since).total_seconds()))


def step(rt: Runtime, replay: Replay, row: Document, due: Due) -> Document | None:
    """Replay at most as many jobs as are due; the operation's document as it is then, or None if somebody else went on.

    Raises StoreError, after which it may have happened; it will not happen again.
    """
    allowed = min(int(due.jobs), PAGE, MESSAGES * min(stage.chunk for stage in replay.plan.stages))
    # Inputs that are edited are read, and may be large: few at a time, however many are due.
    limit = max(allowed, LOOK) if replay.edit is None else LOOK_EDITED
    found = page(rt, replay, row["cursor"], limit, row["_id"])
    verdicts = judge(rt, replay, found.rows, row["_id"])
    mine = _affordable(verdicts, allowed)
    cursor = found.after if len(mine) == len(verdicts) else found.behind(mine[-1].row["_id"])
    left = {verdict.row["_id"]: verdict for verdict in mine if verdict.skip is None}
    skipped = Counter(str(verdict.skip) for verdict in mine if verdict.skip is not None)
    while True:
        now = rt.store.now()
        whole = _plan(replay, row, list(left.values()), now)
        change: Document = {
            "cursor": cursor,
            # Not the time of the step: what that takes would be taken from the rate.
            "paced_at": due.at,
            "pace_from": due.since,
            "credit": due.jobs - len(left),
            "started_at": row["started_at"] or now,
            "last_message": whole.messages[-1]["_id"] if whole.messages else row["last_message"],
        }
        if cursor is None:
            change |= {"state": operations.DONE, "ended_at": now}
        steps = {"steps": 1, "released": len(left), "skipped": skipped.total()}
        guard = {"state": operations.RUNNING, "steps": row["steps"]}
        whole.step = Step(operation=row["_id"], guard=guard, set=change, inc=steps)
        try:
            with rt.counting() as whole.worker:
                transition.apply(rt.store, whole)
            break
        except OperationMovedOnError:
            return None
        except NotFittingError as exc:
            # They moved on by themselves meanwhile.
            left = {key: verdict for key, verdict in left.items() if key not in exc.jobs}
            skipped["moved_on"] += len(exc.jobs)
    if not publish_or_leave(rt, whole.messages):
        return None
    return {**row, **change, **{name: row[name] + number for name, number in steps.items()}}


def _affordable(verdicts: Sequence[Verdict], allowed: int) -> list[Verdict]:
    """As many of them, from the first, as the pace and a transaction allow."""
    mine: list[Verdict] = []
    number = size = 0
    for verdict in verdicts:
        if verdict.skip is None:
            number += 1
            size += 0 if verdict.edited is None else len(verdict.edited.raw)
            if number > allowed or (size > EDITED_BYTES and number > 1):
                break
        mine.append(verdict)
    return mine


def _plan(replay: Replay, row: Document, verdicts: Sequence[Verdict], now: datetime) -> Transition:
    whole = Transition(now=now, outputs=[verdict.edited for verdict in verdicts if verdict.edited is not None])
    run = replay.plan.run
    groups: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
    queues: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        (queues if _queues(verdict) else groups)[verdict.stage, verdict.row["partition"]].append(verdict)
    chunk = None if row["rate_per_s"] is None else max(1, int(row["rate_per_s"] * MESSAGE_S))
    for (stage, partition), group in groups.items():
        by_job = {verdict.row["job"]: verdict for verdict in group}
        for message in new_messages(replay.plan, stage, partition, list(by_job), now, chunk=chunk):
            mine = [by_job[job] for job in message["jobs"]]
            whole.messages.append(message)
            whole.moves.extend(_moves(row["_id"], [(verdict, enqueued_state(message["_id"])) for verdict in mine]))
            named = {"message": message["_id"], "operation": row["_id"], "actor": row["actor"]}
            whole.events.append(transition.event(run, stage, "replayed", jobs=message["jobs"], now=now, **named))
    for (stage, _), group in queues.items():
        whole.moves.extend(_moves(row["_id"], [(verdict, queued_state(_turn(verdict))) for verdict in group]))
        whole.wake.update(map(_turn, group))
        ids = [verdict.row["job"] for verdict in group]
        named = {"operation": row["_id"], "actor": row["actor"]}
        whole.events.append(transition.event(run, stage, "replayed", jobs=ids, now=now, **named))
    for verdict in verdicts:
        partition = verdict.row["partition"]
        whole.count((run, verdict.row["stage"], partition), JobState(verdict.row["state"]), None, 1)
        new = JobState.WAITING if _queues(verdict) else JobState.PENDING
        whole.count((run, verdict.stage, partition), None, new, 1)
    return whole


def _queues(verdict: Verdict) -> bool:
    """Whether the job goes in order and it is not its turn: then it waits for that, like any other of its key."""
    row = verdict.row
    return "order_key" in row and (row["state"] in AT_REST or not row.get("has_turn"))


def _turn(verdict: Verdict) -> str:
    return turn_id(verdict.row["run"], verdict.row["order_key"])


def _moves(operation: str, verdicts: Sequence[tuple[Verdict, Document]]) -> list[JobMove]:
    """One write for all that change alike, each to the state that is given with it."""
    alike: dict[tuple[Any, ...], list[Verdict]] = defaultdict(list)
    for verdict, goes in verdicts:
        row = verdict.row
        where = (row["state"], row["stage"], row["message"], row["generation"])
        alike[(*where, verdict.stage, verdict.input, verdict.overdue, tuple(goes.items()))].append(verdict)
    moves = []
    for (state, stood_in, named, generation, stage, input_, overdue, goes), same in alike.items():
        fresh = {"stage": stage, "input": input_, "failures": 0, "deferrals": 0, "losses": 0, "operation": operation}
        going = {**dict(goes), **fresh}
        lost = (*jobs.PARKED_FIELDS, "starts_at", "died_in", "error_group", *(("expires_at",) if overdue else ()))
        # What waits for its turn has it no more, should it be the last that had it.
        lost = (*lost, "has_turn") if "queues_for" in going else lost
        moves.append(
            JobMove(
                keys=[verdict.row["_id"] for verdict in same],
                guard={"state": state, "stage": stood_in, "message": named, "generation": generation},
                set=going,
                unset=[name for name in lost if name not in going],
                inc={"generation": 1},
            )
        )
    return moves
