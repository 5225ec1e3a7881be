"""What keeps a job from ever going on, and what mends it. Asked by `verify.py` at one instant, by `repair.py` anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from pipeline_app.domain.plan import RunPlan
from pipeline_app.domain.states import AT_REST, JobState, MessageState, WaitReason
from pipeline_app.runtime import Runtime
from pipeline_app.store import messages, outputs, turns
from pipeline_app.store.accounts import RunFlags
from pipeline_app.store.client import Document, Session

_ALIVE = frozenset({MessageState.OPEN, MessageState.CLAIMED, MessageState.DRAFT})


class Mend(StrEnum):
    """What a repair does."""

    #: Jobs get a new message.
    ENQUEUE = "enqueued"
    #: Jobs are cancelled, as all of their run are.
    CANCEL = "cancelled"
    #: Jobs name no message any more.
    DETACH = "detached"
    #: Jobs that wait for a retry are due.
    DUE = "made_due"
    #: Jobs wait for their turn, and the turn knows.
    QUEUE = "queued"
    #: Jobs go through the last stage once more, in a new generation.
    REPLAY = "replayed"
    #: Hints are put into the broker, under the ids that they had.
    PUBLISH = "published"
    #: Counters are corrected.
    COUNT = "counts"
    #: The event log gets a line that makes its sums true.
    LOG = "events"


@dataclass(frozen=True, kw_only=True)
class Flaw:
    """What is wrong with a job."""

    row: Document
    detail: str
    #: What mends it; None if nothing does.
    mend: Mend | None
    #: The input with which it goes through the last stage once more.
    input: str | None = None


@dataclass(frozen=True, kw_only=True)
class Looked:
    """What a look at some jobs found."""

    #: `_id`s of those that run: their message is claimed.
    running: set[str]
    flaws: list[Flaw]


def look(
    rt: Runtime, plan: RunPlan, rows: Sequence[Document], flags: RunFlags, session: Session | None = None
) -> Looked:
    """Look at these jobs of a run, at their messages and their inputs."""
    named = list({row["message"] for row in rows if row["message"] is not None})
    states = messages.states(rt.store, named, session) if named else {}
    # A terminal job's `input` is its result.
    needed = {f"{row['_id']}/{row['input']}": row for row in rows if row["input"] is not None and _needs_input(row)}
    gone = {needed[name]["_id"] for name in outputs.missing(rt.store, list(needed), session)} if needed else set()
    unfinished = [row for row in rows if row["_id"] in gone and row["state"] == JobState.TERMINAL]
    replays = _replays(rt, plan, unfinished, flags)
    forgotten = _forgotten(rt, rows, flags, session)
    found: list[Flaw] = []
    for row in rows:
        flaw = _flaw(row, states.get(row["message"]), flags, is_forgotten=row["_id"] in forgotten)
        if row["_id"] in gone and (flaw is None or flaw.mend is not Mend.DETACH):
            flaw = replays.get(row["_id"]) or _without_input(row, flags)
        if flaw is not None:
            found.append(_as_far_as_possible(flaw, plan, flags))
    running = {row["_id"] for row in rows if _runs(row, states)}
    return Looked(running=running, flaws=found)


def _needs_input(row: Document) -> bool:
    return row["state"] not in (JobState.DEAD_LETTERED, JobState.CANCELLED)


def _runs(row: Document, states: Mapping[str, str]) -> bool:
    return bool(row["state"] == JobState.PENDING and states.get(row["message"]) == MessageState.CLAIMED)


def _is_queued(row: Document) -> bool:
    return bool(row["state"] == JobState.WAITING and row.get("reason") == WaitReason.ORDER and "order_key" in row)


def _forgotten(rt: Runtime, rows: Sequence[Document], flags: RunFlags, session: Session | None) -> set[str]:
    """`_id`s of jobs that wait for their turn, which will never come."""
    queued = [row for row in rows if _is_queued(row)]
    wanted = {row["queues_for"] for row in queued if "queues_for" in row}
    known = turns.by_ids(rt.store, wanted, session) if wanted else {}
    keys = {row["holder"] for row in known.values() if row["holder"] is not None}
    holders = turns.holders(rt.store, keys, session) if keys else {}
    # One that is due is looked at; one that a job has is passed on when that is at rest.
    alive = {turn for turn, row in known.items() if "due" in row or holders.get(row["holder"], {}).get("has_turn")}
    may_be_unseen = flags.hidden | flags.closing
    return {
        row["_id"]
        for row in queued
        if (row["queues_for"] not in alive if "queues_for" in row else row["batch"] not in may_be_unseen)
    }


def _flaw(row: Document, message_state: str | None, flags: RunFlags, *, is_forgotten: bool) -> Flaw | None:
    state, message = row["state"], row["message"]
    if flags.cancelling and state not in AT_REST:
        return None  # the sweep cancels it, wherever it is
    if state != JobState.PENDING and message is not None:
        return Flaw(row=row, detail=f"it is {state} and names message {message}", mend=Mend.DETACH)
    detail = _stranded(row, message_state, flags)
    if _is_queued(row):
        detail = "it waits for its turn, which nobody passes on" if is_forgotten else None
    if detail is None:
        return None
    if flags.cancelled:
        return Flaw(row=row, detail=detail, mend=Mend.CANCEL)
    if _is_queued(row):
        return Flaw(row=row, detail=detail, mend=Mend.QUEUE)
    return Flaw(row=row, detail=detail, mend=Mend.DUE if state == JobState.RETRY_WAITING else Mend.ENQUEUE)


def _without_input(row: Document, flags: RunFlags) -> Flaw | None:
    if flags.cancelling:
        return None
    return Flaw(row=row, detail=f"its input {row['input']} is not there: replay it from an earlier stage", mend=None)


def _stranded(row: Document, message_state: str | None, flags: RunFlags) -> str | None:
    """Why nothing will ever move this job on, or None."""
    state, message = row["state"], row["message"]
    if state == JobState.PENDING:
        if message_state in _ALIVE:
            return None
        return f"it is pending in message {message}, which is {message_state or 'not there'}"
    if state in AT_REST or row.get("due_at") is not None or row.get("waits_for") is not None:
        return None
    if state == JobState.RETRY_WAITING:
        return "it waits for a retry that has no time"
    if state == JobState.HELD:
        return "it is held by nothing"
    if row.get("reason") == WaitReason.DEFINITION:
        return None if flags.awaits_definition else "it waits for a definition, and nobody knows"
    return f"it waits ({row.get('reason')}) for nothing"


def _replays(rt: Runtime, plan: RunPlan, rows: Sequence[Document], flags: RunFlags) -> dict[str, Flaw]:
    """Terminal jobs without a result: they go through the last stage once more if its input is there."""
    if not rows:
        return {}
    keys = [row["_id"] for row in rows]
    names = [stage.name for stage in plan.stages]
    made = outputs.latest(rt.store, keys, names[-2]) if len(names) > 1 else {}
    edited = outputs.latest(rt.store, keys, outputs.EDIT)
    found: dict[str, Flaw] = {}
    for row in rows:
        known = [f"{names[-2]}/{made[row['_id']]}"] if row["_id"] in made else []
        if row["_id"] in edited:
            known.append(f"{outputs.EDIT}/{edited[row['_id']]}")
        # What stands behind the last "-" or "/" grows with time.
        newest = max(known, key=lambda name: name.rpartition("/")[2].rpartition("-")[2], default=None)
        detail = "it is terminal, and its result is not there"
        if flags.cancelled:
            found[row["_id"]] = Flaw(row=row, detail=f"{detail}; its run was cancelled", mend=None)
        elif newest is None and len(names) > 1:
            detail += f", nor is what stage {names[-2]} made of it: replay it from an earlier stage"
            found[row["_id"]] = Flaw(row=row, detail=detail, mend=None)
        else:
            found[row["_id"]] = Flaw(row=row, detail=detail, mend=Mend.REPLAY, input=newest)
    return found


def _as_far_as_possible(flaw: Flaw, plan: RunPlan, flags: RunFlags) -> Flaw:
    row = flaw.row
    if flaw.mend is None:
        return flaw
    if row["batch"] in flags.hidden:
        return Flaw(row=row, detail=f"{flaw.detail}; its seed batch {row['batch']} is not closed", mend=None)
    if row["stage"] not in {stage.name for stage in plan.stages}:
        return Flaw(row=row, detail=f"{flaw.detail}; the run has no stage {row['stage']}", mend=None)
    return flaw
