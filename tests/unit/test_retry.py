"""When a failed job is tried again."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_app.domain.retry import Retry
from pipeline_app.errors import DefinitionError


@pytest.mark.parametrize(
    ("attempts", "failures", "allowed"), [(1, 0, True), (1, 1, False), (3, 2, True), (3, 3, False)]
)
def test_attempts_count_the_first_execution(attempts: int, failures: int, allowed: bool) -> None:
    assert Retry(attempts=attempts).allows(failures) is allowed


def test_the_wait_doubles_up_to_the_cap() -> None:
    # Given a policy without chance
    retry = Retry(attempts=9, backoff="2s", cap="15s", jitter=0)
    # When a job fails again and again
    waits = [retry.delay_s(failures) for failures in range(1, 7)]
    # Then each wait is twice the one before, until the cap
    assert waits == [2, 4, 8, 15, 15, 15]


def test_a_cap_below_the_backoff_is_the_wait() -> None:
    assert Retry(backoff="1m", cap="1s", jitter=0).delay_s(1) == 1


def test_after_very_many_failures_the_wait_is_the_cap() -> None:
    assert Retry(attempts=10**6, backoff="1ms", cap="1h", jitter=0).delay_s(100_000) == 3600


@given(
    failures=st.integers(1, 10_000),
    backoff=st.floats(0, 1e6),
    cap=st.floats(0, 1e6),
    jitter=st.floats(0, 1),
    seed=st.integers(),
)
def test_the_wait_lies_between_its_bounds(failures: int, backoff: float, cap: float, jitter: float, seed: int) -> None:
    # Given any policy and the longest wait that it may have after so many failures
    retry = Retry(attempts=2, backoff=backoff, cap=cap, jitter=jitter)
    full = Retry(attempts=2, backoff=backoff, cap=cap, jitter=0).delay_s(failures)
    # When the wait is drawn
    wait = retry.delay_s(failures, random.Random(seed))
    # Then chance only shortens it, by no more than its share
    assert full <= cap
    assert full * (1 - jitter) * (1 - 1e-9) <= wait <= full


def test_jobs_that_failed_together_do_not_come_back_together() -> None:
    retry = Retry(backoff="10s", jitter=0.5)
    assert len({retry.delay_s(1, random.Random(seed)) for seed in range(50)}) > 40


@pytest.mark.parametrize("attempts", [0, -1, 1.0, "3", None, True])
def test_attempts_must_be_a_whole_number_from_1(attempts: Any) -> None:
    with pytest.raises(DefinitionError, match="attempts is a whole number from 1"):
        Retry(attempts=attempts)


@pytest.mark.parametrize("jitter", [-0.1, 1.1, "0.5", None, float("nan")])
def test_jitter_must_be_a_share(jitter: Any) -> None:
    with pytest.raises(DefinitionError, match="jitter is between 0 and 1"):
        Retry(jitter=jitter)


@pytest.mark.parametrize("name", ["backoff", "cap"])
@pytest.mark.parametrize("value", ["soon", "-1s", -1, None, True, "inf"])
def test_a_bad_duration_names_its_field(name: str, value: Any) -> None:
    with pytest.raises(DefinitionError, match=f"retry: {name}: "):
        Retry(**{name: value})


def test_the_definition_has_seconds_so_that_spelling_does_not_matter() -> None:
    assert Retry(backoff="2s", cap="5m").definition() == Retry(backoff=2, cap=300.0).definition()
    assert Retry(attempts=3, backoff="2s", cap="5m", jitter=0).definition() == {
        "attempts": 3,
        "backoff_s": 2.0,
        "cap_s": 300.0,
        "jitter": 0.0,
    }
