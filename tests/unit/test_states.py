"""The states of a job and the moves between them."""

from __future__ import annotations

import pytest

from pipeline_app.domain.states import AT_REST, MOVES, PARKED, JobState, may_move

W, P, R, RW, H, T, D, C = (
    JobState.WAITING,
    JobState.PENDING,
    JobState.RUNNING,
    JobState.RETRY_WAITING,
    JobState.HELD,
    JobState.TERMINAL,
    JobState.DEAD_LETTERED,
    JobState.CANCELLED,
)

#: Every move that is allowed, written out once more by hand.
ALLOWED = {
    *((W, new) for new in (P, W, H, D, C)),
    *((P, new) for new in (P, W, RW, H, T, D, C)),
    *((RW, new) for new in (P, D, C)),
    *((H, new) for new in (P, D, C)),
    *((old, new) for old in (T, D, C) for new in (P, W)),
}
STORED = [state for state in JobState if state is not JobState.RUNNING]


@pytest.mark.parametrize("old", STORED)
@pytest.mark.parametrize("new", list(JobState))
def test_a_move_is_allowed_exactly_if_the_table_has_it(old: JobState, new: JobState) -> None:
    assert may_move(old, new) is ((old, new) in ALLOWED)


def test_running_is_never_stored_so_nothing_moves_from_or_to_it() -> None:
    assert JobState.RUNNING not in MOVES
    assert all(JobState.RUNNING not in targets for targets in MOVES.values())


def test_a_job_at_rest_leaves_only_by_a_replay() -> None:
    replayed = {JobState.PENDING, JobState.WAITING}
    assert {state for state, targets in MOVES.items() if targets == replayed} == AT_REST


def test_from_everywhere_else_a_job_can_come_to_rest() -> None:
    for state in set(MOVES) - AT_REST:
        assert {JobState.DEAD_LETTERED, JobState.CANCELLED} <= MOVES[state]


def test_only_a_pending_job_is_completed() -> None:
    assert [state for state in MOVES if JobState.TERMINAL in MOVES[state]] == [JobState.PENDING]


def test_a_job_that_waits_for_a_time_or_a_hold_is_parked_for_nothing_else() -> None:
    assert not (MOVES[JobState.RETRY_WAITING] | MOVES[JobState.HELD]) & PARKED


def test_a_parked_job_goes_on_through_pending() -> None:
    assert all(JobState.PENDING in MOVES[state] for state in PARKED)


def test_the_names_are_those_of_the_status_output() -> None:
    assert [state.value for state in JobState] == [
        "waiting",
        "pending",
        "running",
        "retry_waiting",
        "held",
        "terminal",
        "dead_lettered",
        "cancelled",
    ]
