"""Edits of what a job is given, and the pace at which jobs are replayed."""

from __future__ import annotations

from typing import Any

import bson
import pytest

from pipeline_app.domain.edit import Edit, NotEditableError
from pipeline_app.domain.pace import BURST_S, Pace
from pipeline_app.errors import UsageError


def edit(*items: str, **options: Any) -> Edit:
    made = Edit.parse(items, **options)
    assert made is not None
    return made


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("n=2", {"n": 2, "deep": {"x": 1}}),
        ("n=", {"n": "", "deep": {"x": 1}}),
        ("n=two", {"n": "two", "deep": {"x": 1}}),
        ('n="2"', {"n": "2", "deep": {"x": 1}}),
        ("n=null", {"n": None, "deep": {"x": 1}}),
        ("n=[1, {}]", {"n": [1, {}], "deep": {"x": 1}}),
        ("n=a=b", {"n": "a=b", "deep": {"x": 1}}),
        ("n=NaN", {"n": "NaN", "deep": {"x": 1}}),
        ("deep.x=2", {"n": 1, "deep": {"x": 2}}),
        ("deep.y.z=2", {"n": 1, "deep": {"x": 1, "y": {"z": 2}}}),
        ("deep=2", {"n": 1, "deep": 2}),
    ],
)
def test_a_field_is_set(item: str, expected: Any) -> None:
    # Given an input
    value = {"n": 1, "deep": {"x": 1}}

    # When a field of it is set, then it is, and the input itself stays as it was
    assert edit(item).apply(value) == expected
    assert value == {"n": 1, "deep": {"x": 1}}


def test_fields_are_set_in_their_order_and_in_another_payload() -> None:
    assert edit("a=1", "b.c=2").apply({}) == {"a": 1, "b": {"c": 2}}
    assert edit("a={}", "a.b=1").apply({"a": 5}) == {"a": {"b": 1}}
    assert edit("b=2", replaces=True, payload={"a": 1}).apply("anything") == {"a": 1, "b": 2}
    assert edit(replaces=True, payload=None).apply({"a": 1}) is None


@pytest.mark.parametrize(("value", "item"), [(5, "a=1"), (None, "a=1"), (["x"], "0=1"), ({"a": 5}, "a.b=1")])
def test_what_is_no_mapping_has_no_fields(value: Any, item: str) -> None:
    with pytest.raises(NotEditableError):
        edit(item).apply(value)


@pytest.mark.parametrize("items", [["a"], ["=1"], ["a..b=1"], [".a=1"], ["a.=1"], ["a=1", "a=2"]])
def test_what_is_no_edit(items: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        Edit.parse(items)
    assert caught.value.hint


def test_nothing_is_no_edit() -> None:
    assert Edit.parse([]) is None


@pytest.mark.parametrize(
    "made",
    [
        edit("a.b=1", "$x=[2]", "c={}"),
        edit(replaces=True),
        edit("a=1", replaces=True, payload={"x.y": "$z"}),
    ],
)
def test_an_edit_is_kept_in_a_document(made: Edit) -> None:
    assert Edit.of(bson.decode(bson.encode(made.as_dict()))) == made


def test_a_pace_is_what_time_brings() -> None:
    """Given a rate, when time passes, then as many may go as it brings; the parts of a job are not lost."""
    pace = Pace(per_s=25)
    credit = gone = 0.0
    for _ in range(100):
        credit = pace.credit(credit, 0.1, 60.0)
        gone += int(credit)
        credit -= int(credit)
    assert gone == 250


def test_what_was_not_taken_is_not_made_up_for() -> None:
    assert Pace(per_s=200).credit(0.0, 60.0, 60.0) == 200 * BURST_S
    # A clock that was set back takes nothing away.
    assert Pace(per_s=200).credit(5.0, -60.0, 60.0) == 5.0
    # However slow the rate, one job may gather.
    assert Pace(per_s=0.01).credit(0.5, 200.0, 300.0) == 1.0


def test_a_ramp_grows_from_a_tenth_to_the_whole() -> None:
    pace = Pace(per_s=100, ramp_s=60)
    assert [round(pace.at(since), 6) for since in (0, 30, 60, 600)] == [10, 55, 100, 100]
    assert Pace(per_s=100).at(0) == 100
