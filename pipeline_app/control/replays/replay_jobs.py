"""Which jobs a replay takes, in which stage each starts, with which input. Asked before a replay and by its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from pipeline_app.control.seed.seeding import hidden_batches
from pipeline_app.domain.edit import Edit, NotEditableError
from pipeline_app.domain.plan import RunPlan
from pipeline_app.domain.selection import Selection
from pipeline_app.domain.states import JobState
from pipeline_app.errors import InvalidResultError
from pipeline_app.runtime import Runtime
from pipeline_app.store import holds, jobs, outputs
from pipeline_app.store.client import Document

#: States that a replay takes jobs from; the first is meant where none is given.
REPLAYABLE = (
    JobState.DEAD_LETTERED,
    JobState.HELD,
    JobState.TERMINAL,
    JobState.CANCELLED,
    JobState.WAITING,
    JobState.RETRY_WAITING,
    JobState.PENDING,
)
#: What a walk through a replay's jobs begins with.
START: Document = {"place": 0, "after": ""}


class Skip(StrEnum):
    """Why a job that matches is left alone."""

    #: It goes on by itself, or its time is over; `force` takes it all the same (a hold in force keeps it once more).
    NOT_DUE = "not_due"
    #: The stage before has no recorded output of it.
    NO_INPUT = "no_input"
    #: The edit cannot be made in its input.
    NOT_EDITABLE = "not_editable"


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What is to be replayed, from where, and how it is changed."""

    plan: RunPlan
    selection: Selection
    #: What changes at this time or later is not meant: it was not counted either.
    before: datetime
    from_stage: str | None = None
    edit: Edit | None = None
    #: Take also what is not due.
    force: bool = False

    @classmethod
    def of(cls, plan: RunPlan, document: Mapping[str, Any]) -> Replay:
        """The replay in an operation's document."""
        return cls(
            plan=plan,
            selection=Selection.of(document["selection"]),
            before=document["before"],
            from_stage=document["from_stage"],
            edit=None if document["edits"] is None else Edit.of(document["edits"]),
            force=document["force"],
        )

    @property
    def matching(self) -> Selection:
        """The selection, as it was when the replay was asked for."""
        return replace(self.selection, until=min(self.selection.until or self.before, self.before))

    @property
    def places(self) -> list[tuple[JobState, str]]:
        """(state, stage) where its jobs may stand, in the order in which they are looked for."""
        stages = [stage.name for stage in self.plan.stages if self.selection.stage in (None, stage.name)]
        return [(state, stage) for state in self.selection.states or REPLAYABLE[:1] for stage in stages]

    def start_of(self, row: Document) -> str:
        """The stage that a job is replayed from."""
        if self.from_stage is not None:
            return self.from_stage
        return self.plan.stages[0].name if row["state"] == JobState.TERMINAL else str(row["stage"])


@dataclass(frozen=True, kw_only=True)
class Page:
    """Some jobs that match, all of them in one place."""

    rows: list[Document]
    place: int
    #: Where the walk goes on behind all of them; None at its end.
    after: Document | None

    def behind(self, key: str) -> Document:
        """Where the walk goes on behind that job."""
        return {"place": self.place, "after": key}


def page(rt: Runtime, replay: Replay, cursor: Document, limit: int, operation: str | None = None) -> Page:
    """The next jobs that match; none of `operation`'s own. Looks at a bounded number of jobs, so may have none."""
    places = replay.places
    place, after = cursor["place"], cursor["after"]
    while place < len(places):
        state, stage = places[place]
        rows, last = jobs.walk(
            rt.store,
            replay.plan.run,
            replay.matching,
            state=state,
            stage=stage,
            after=after,
            limit=limit,
            not_by=operation,
        )
        if rows or last is not None:
            # Asked afterwards: a batch is there before its jobs are.
            hidden = hidden_batches(rt)
            goes_on = {"place": place, "after": last} if last is not None else {"place": place + 1, "after": ""}
            ended = last is None and place + 1 == len(places)
            shown = [row for row in rows if row["batch"] not in hidden]
            return Page(rows=shown, place=place, after=None if ended else goes_on)
        place, after = place + 1, ""
    return Page(rows=[], place=place, after=None)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a replay does with a job."""

    row: Document
    #: Why it is left alone; None if it is replayed.
    skip: Skip | None = None
    #: Where it starts.
    stage: str = ""
    #: What it starts with, as the job's document names it.
    input: str | None = None
    #: The encoded document of its edited input.
    edited: Any = None
    #: Its time is over, and must not stop it once more.
    overdue: bool = False


def judge(rt: Runtime, replay: Replay, rows: Sequence[Document], operation: str = "") -> list[Verdict]:
    """A verdict on each job, in order."""
    if not rows:
        return []
    found = _due(rt, replay, rows)
    found = _with_inputs(rt, replay, found)
    return found if replay.edit is None else _edited(rt, replay, replay.edit, found, operation)


def _due(rt: Runtime, replay: Replay, rows: Sequence[Document]) -> list[Verdict]:
    held = [row["waits_for"] for row in rows if row["state"] == JobState.HELD and row.get("waits_for")]
    in_force = holds.still_in_force(rt.store, list(set(held))) if held else set()
    now = rt.store.now()
    found = []
    for row in rows:
        is_kept = row["state"] == JobState.HELD and row.get("waits_for") in in_force
        expires_at = row.get("expires_at")
        overdue = expires_at is not None and expires_at < now
        due = not is_kept and not overdue and _is_due(row, now)
        # What is on its way, or runs, is nobody's to take, by force neither: a worker may claim it at any moment, and
        # would run it beside the replay.
        on_its_way = row["state"] == JobState.PENDING
        skip = Skip.NOT_DUE if on_its_way or not (due or replay.force) else None
        found.append(Verdict(row=row, skip=skip, stage=replay.start_of(row), overdue=overdue))
    return found


def _is_due(row: Document, now: datetime) -> bool:
    """Whether nothing but the operator brings the job on, or its time has come."""
    if row["state"] in (JobState.WAITING, JobState.RETRY_WAITING):
        return "due_at" in row and bool(row["due_at"] <= now)
    return True


def _with_inputs(rt: Runtime, replay: Replay, verdicts: list[Verdict]) -> list[Verdict]:
    stages = [stage.name for stage in replay.plan.stages]
    before = dict(zip(stages[1:], stages, strict=False))
    moved: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.skip is None and not _stays(verdict) and verdict.stage in before:
            moved.setdefault(before[verdict.stage], []).append(verdict.row["_id"])
    made = {stage: outputs.latest(rt.store, keys, stage) for stage, keys in moved.items()}
    found = []
    for verdict in verdicts:
        if verdict.skip is not None:
            found.append(verdict)
        elif _stays(verdict):
            found.append(replace(verdict, input=verdict.row["input"]))
        elif verdict.stage not in before:
            found.append(verdict)  # the first stage gets the payload
        else:
            stage = before[verdict.stage]
            message = made[stage].get(verdict.row["_id"])
            known = {"skip": Skip.NO_INPUT} if message is None else {"input": f"{stage}/{message}"}
            found.append(replace(verdict, **known))
    return found


def _stays(verdict: Verdict) -> bool:
    """Whether the job starts where it stands, with the input that it had; a terminal job's is its own result."""
    return bool(verdict.row["stage"] == verdict.stage and verdict.row["state"] != JobState.TERMINAL)


def _edited(rt: Runtime, replay: Replay, edit: Edit, verdicts: list[Verdict], operation: str) -> list[Verdict]:
    taken = [verdict for verdict in verdicts if verdict.skip is None]
    values: dict[str, Any] = {}
    if not edit.replaces:
        stored = [f"{verdict.row['_id']}/{verdict.input}" for verdict in taken if verdict.input is not None]
        values = outputs.read(rt.store, stored) if stored else {}
        first = [verdict.row["_id"] for verdict in taken if verdict.input is None]
        values |= jobs.payloads(rt.store, first) if first else {}
    found = []
    for verdict in verdicts:
        if verdict.skip is None:
            key = verdict.row["_id"]
            value = values.get(key if verdict.input is None else f"{key}/{verdict.input}")
            try:
                encoded = outputs.encode_output(
                    replay.plan.run, verdict.row["job"], outputs.EDIT, operation, edit.apply(value)
                )
                verdict = replace(verdict, edited=encoded, input=f"{outputs.EDIT}/{operation}")
            except (NotEditableError, InvalidResultError):
                verdict = replace(verdict, skip=Skip.NOT_EDITABLE)
        found.append(verdict)
    return found
