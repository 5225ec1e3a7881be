"""How an attempt ended, and what that makes of the job. Decisions are data; the record step carries them out."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from types import TracebackType
from typing import Any

from pipeline_app.domain.fingerprint import frame_of, group_of
from pipeline_app.domain.redaction import redact
from pipeline_app.domain.states import DeadKind

#: Longer texts of errors are cut: a ledger line is not a log file.
MAX_ERROR_TEXT = 2_000
MAX_TRACEBACK = 8_000


class AttemptOutcome(StrEnum):
    """How one execution of a handler ended, as the ledger has it."""

    OK = "ok"
    FAILED = "failed"
    DEFERRED = "deferred"
    LOST = "lost"
    REFUSED = "refused"


class Move(StrEnum):
    """What becomes of a job after its attempt, or instead of one."""

    #: To the next stage, or terminal after the last.
    ADVANCE = "advance"
    #: Tried again later.
    RETRY = "retry"
    #: Dead-lettered.
    BURY = "bury"
    #: Its run or the job itself was cancelled.
    CANCEL = "cancel"
    #: Its target is closed: held until the hold is over.
    HOLD = "hold"
    #: Its stage, partition or run is paused.
    PAUSE = "pause"
    #: Not its turn under a throttle.
    THROTTLE = "throttle"
    #: Not its turn in the order of priorities.
    ORDER = "order"
    #: Its process died: it goes on alone, in a process of its own.
    LOSE = "lose"
    #: Its message ended before its turn came: at once in another one.
    AGAIN = "again"
    #: Waits until a worker that knows its run's definition is there.
    AWAIT_DEFINITION = "await_definition"
    #: Not this message's job any more: leave it alone.
    SKIP = "skip"


@dataclass(frozen=True, kw_only=True)
class ErrorRecord:
    """An exception as the ledger keeps it."""

    type: str
    message: str
    traceback: str
    #: Where it came from in the user's code: `module:function`.
    frame: str | None = None
    #: Names errors of this kind: the same for the same type, message but for its varying parts, and frame.
    group: str = ""
    #: What is known of the end of a process that died under the job.
    evidence: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        # Here, so that an error that was made without an exception has its group, too.
        if not self.group:
            object.__setattr__(self, "group", group_of(self.type, self.message, self.frame))

    @classmethod
    def of(cls, exc: BaseException) -> ErrorRecord:
        """The record of `exc`; its traceback starts below the framework's own frames."""
        frames = _below_framework(exc.__traceback__)
        text = "".join(traceback.format_exception(type(exc), exc, frames))
        name, message, frame = _type_name(exc), _clean(_message(exc)), frame_of(frames)
        return cls(
            type=name,
            message=message[:MAX_ERROR_TEXT],
            traceback=clean_text(text),
            frame=frame,
            group=group_of(name, message, frame),
        )

    def as_dict(self) -> dict[str, Any]:
        """For documents and JSON."""
        row: dict[str, Any] = {"type": self.type, "message": self.message, "traceback": self.traceback}
        more = {"frame": self.frame, "group": self.group, "evidence": self.evidence and dict(self.evidence)}
        return row | {name: value for name, value in more.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The verdict on one job of a message."""

    job_id: str
    move: Move
    #: How the attempt ended; None if the handler was not run.
    attempt: AttemptOutcome | None = None
    #: The encoded output document (BSON); only when the attempt is ok.
    output: Any = None
    error: ErrorRecord | None = None
    #: Only for BURY.
    kind: DeadKind | None = None
    #: Only for RETRY.
    due_at: datetime | None = None
    #: Only for HOLD, PAUSE, THROTTLE and ORDER: the id of what keeps it.
    waits_for: str | None = None
    started_at: datetime | None = None
    duration_s: float = 0.0


def _below_framework(frames: TracebackType | None) -> TracebackType | None:
    """The part of a traceback that begins where the framework called somebody else's code."""
    while frames is not None and frames.tb_frame.f_globals.get("__name__", "").startswith("pipeline_app."):
        frames = frames.tb_next
    return frames


def _type_name(exc: BaseException) -> str:
    cls = type(exc)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def _message(exc: BaseException) -> str:
    try:
        return str(exc)
    except Exception:  # noqa: BLE001 - an exception whose __str__ fails is still an outcome
        return "(its message cannot be read)"


def clean_text(text: str) -> str:
    """A traceback as the ledger keeps it: what is too long is cut in the middle."""
    text = _clean(text)
    if len(text) > MAX_TRACEBACK:
        text = text[: MAX_TRACEBACK // 2] + "\n  [...]\n" + text[-MAX_TRACEBACK // 2 :]
    return text


def _clean(text: str) -> str:
    """Text that BSON can hold and people may see: a lone surrogate becomes `?`, the password of an address `***`."""
    return redact(text.encode("utf-8", "replace").decode("utf-8").replace("\x00", "\\x00"))
