"""Pages of a seeding: full ones, and those of a source that is slow."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline_app.control.seed import paging
from pipeline_app.errors import BadJobLineError


def lines(number: int, pause_s: float = 0.0) -> Iterator[dict[str, Any]]:
    for n in range(number):
        time.sleep(pause_s)
        yield {"job_id": f"j{n}"}


def test_full_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given seven jobs and pages of three, then the last page has one."""
    monkeypatch.setattr(paging, "PAGE", 3)

    assert [len(page) for page in paging.full(lines(7))] == [3, 3, 1]


def test_a_fast_source_fills_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a source that is never waited for, then its pages are full whether or not they go on as they come."""
    monkeypatch.setattr(paging, "PAGE", 3)
    monkeypatch.setattr(paging, "LINGER_S", 60.0)

    assert [len(page) for page in paging.as_they_come(lines(7))] == [3, 3, 1]


def test_a_steady_trickle_goes_on() -> None:
    """Given a job each 20 ms, then a page goes on when its first job has waited, not only when the source pauses."""
    sizes = [len(page) for page in paging.as_they_come(lines(100, pause_s=0.02))]

    assert sum(sizes) == 100
    assert len(sizes) > 1


def test_what_came_before_a_bad_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a line that cannot be read, then the pages before it come first."""
    monkeypatch.setattr(paging, "LINGER_S", 60.0)
    pages = paging.as_they_come([{"job_id": "a"}, {"payload": 1}])

    assert [line.job_id for line in next(pages)] == ["a"]
    with pytest.raises(BadJobLineError):
        next(pages)
