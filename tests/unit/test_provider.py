"""What the measurements of the tests' own provider rest on: its window, and rates read from arrival times."""

from __future__ import annotations

import pytest

from tests.provider import Window, closings, middle, per_second, rate, window_rates


def test_only_requests_of_the_last_second_use_up_the_limit() -> None:
    # Given a limit of two requests a second, used up at 0.0 and 0.5
    window = Window()
    assert window.admits(0.0, 2, count_refused=False)
    assert window.admits(0.5, 2, count_refused=False)
    # When others ask, then each is refused until one of those is a second old
    assert not window.admits(0.75, 2, count_refused=False)
    assert not window.admits(0.999, 2, count_refused=False)
    assert window.admits(1.0, 2, count_refused=False)
    assert not window.admits(1.25, 2, count_refused=False)
    assert window.admits(1.5, 2, count_refused=False)


def test_who_keeps_knocking_stays_outside_where_refused_requests_count() -> None:
    # Given a provider that counts refused requests, and one that does not
    for count_refused, admitted in ((True, 1), (False, 3)):
        window = Window()
        # When somebody asks every 0.4 s, where one request a second is allowed
        answers = [window.admits(n * 0.4, 1, count_refused=count_refused) for n in range(7)]
        # Then only the second lets in more than the first request
        assert sum(answers) == admitted


def test_rate_is_of_the_gaps_between_requests() -> None:
    assert rate([0.0, 0.5, 1.0]) == 2.0


def test_middle_leaves_out_as_many_at_both_ends() -> None:
    assert middle([float(n) for n in range(10)]) == [float(n) for n in range(1, 9)]


def test_seconds_count_from_the_first_request_and_only_whole_ones() -> None:
    assert per_second([10.5, 10.75, 11.25, 11.5, 13.0, 13.75]) == [3, 1, 1]


def test_window_rates_find_the_pause_and_the_burst() -> None:
    # Given ten requests a second for ten seconds
    steady = [n / 10 for n in range(101)]
    assert window_rates(steady, 2.0) == pytest.approx((9.5, 10.0), abs=0.51)
    # When there is a burst of ten and afterwards a pause of a second
    uneven = sorted(at for at in [*steady, *[5.01] * 10] if not 5.05 < at < 6.05)
    # Then both are seen, wherever a window would begin
    lowest, highest = window_rates(uneven, 1.0)
    assert lowest == 0
    assert highest >= 19


def test_window_rates_need_a_whole_window() -> None:
    with pytest.raises(AssertionError, match="shorter than"):
        window_rates([0.0, 1.0], 2.0)


def test_closings_are_parted_by_silence() -> None:
    assert closings([1.0, 1.1, 1.2, 2.3, 5.0, 5.4], gap_s=0.5) == [3, 1, 2]
