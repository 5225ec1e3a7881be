"""The states of a job, and which may follow which."""

from __future__ import annotations

from enum import StrEnum


class JobState(StrEnum):
    """Where a job stands in its stage.

    `running` is never stored: a job is running while the message that it names is claimed. So claiming a message
    of two hundred jobs is one small write.
    """

    WAITING = "waiting"
    PENDING = "pending"
    RUNNING = "running"
    RETRY_WAITING = "retry_waiting"
    HELD = "held"
    TERMINAL = "terminal"
    DEAD_LETTERED = "dead_lettered"
    CANCELLED = "cancelled"


class DeadKind(StrEnum):
    """Why a job is dead-lettered."""

    PERMANENT = "permanent"
    EXHAUSTED = "exhausted"
    INVALID_INPUT = "invalid_input"
    INVALID_RESULT = "invalid_result"
    EXPIRED = "expired"
    WORKER_LOST = "worker_lost"


class WaitReason(StrEnum):
    """What a waiting job waits for."""

    DELAY = "delay"
    DEFINITION = "definition"
    THROTTLE = "throttle"
    PAUSE = "pause"
    PRIORITY = "priority"
    ORDER = "order"


class MessageState(StrEnum):
    """Where a message stands: a draft belongs to a seed batch that is not closed yet."""

    DRAFT = "draft"
    OPEN = "open"
    CLAIMED = "claimed"
    CLOSED = "closed"


#: States that a job leaves only by a replay.
AT_REST = frozenset({JobState.TERMINAL, JobState.DEAD_LETTERED, JobState.CANCELLED})

#: States that are stored and that nothing in the broker stands for; the sweep or an operator moves such a job on.
PARKED = frozenset({JobState.WAITING, JobState.RETRY_WAITING, JobState.HELD})

_ENDS = frozenset({JobState.DEAD_LETTERED, JobState.CANCELLED})

#: The moves that the store may make. `pending -> pending` is the step to the next stage, or a message made anew; what
#: is at rest becomes pending by a replay, or waits for its turn again. A job whose turn comes may find something else
#: that keeps it: a time, a hold.
MOVES: dict[JobState, frozenset[JobState]] = {
    JobState.WAITING: frozenset({JobState.PENDING, JobState.WAITING, JobState.HELD}) | _ENDS,
    JobState.PENDING: frozenset({JobState.PENDING, JobState.TERMINAL}) | PARKED | _ENDS,
    JobState.RETRY_WAITING: frozenset({JobState.PENDING}) | _ENDS,
    JobState.HELD: frozenset({JobState.PENDING}) | _ENDS,
    JobState.TERMINAL: frozenset({JobState.PENDING, JobState.WAITING}),
    JobState.DEAD_LETTERED: frozenset({JobState.PENDING, JobState.WAITING}),
    JobState.CANCELLED: frozenset({JobState.PENDING, JobState.WAITING}),
}


def may_move(old: JobState, new: JobState) -> bool:
    """Whether a job in state `old` may be moved to `new`."""
    return new in MOVES[old]
