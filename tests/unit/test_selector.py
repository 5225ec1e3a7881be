"""Selectors: `key=value`, all of which must match a job's tags."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_app.domain.selector import check_selector, matches, parse_selector, written
from pipeline_app.errors import UsageError

KEYS = st.text(min_size=1).filter(lambda key: "=" not in key)


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([], {}),
        (["provider=openai"], {"provider": "openai"}),
        (["provider=openai", "pool=gpt"], {"provider": "openai", "pool": "gpt"}),
        (["provider=openai", "provider=openai"], {"provider": "openai"}),
        (["formula=a=b"], {"formula": "a=b"}),
        (["empty="], {"empty": ""}),
        (["$or=x.y"], {"$or": "x.y"}),
    ],
)
def test_a_selector_is_read(items: list[str], expected: dict[str, str]) -> None:
    assert parse_selector(items) == expected


@pytest.mark.parametrize("item", ["provider", "", "=openai", "=", "provider:openai"])
def test_what_is_no_selector_is_refused_and_quoted(item: str) -> None:
    with pytest.raises(UsageError, match="not a selector") as caught:
        parse_selector(["kind=odd", item])
    assert repr(item) in caught.value.message
    assert "KEY=VALUE" in str(caught.value.hint)


def test_a_selector_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(UsageError, match="no job has both provider=a and provider=b"):
        parse_selector(["provider=a", "provider=b"])


@pytest.mark.parametrize("value", [{"a": 1}, {1: "a"}, {"": "a"}, {"a": None}, ["a=b"], "a=b", None])
def test_a_selector_of_a_program_is_a_mapping_of_texts(value: Any) -> None:
    with pytest.raises(UsageError, match="a selector is a mapping"):
        check_selector(value)


def test_a_selector_of_a_program_is_copied() -> None:
    given_by_user = {"provider": "openai"}
    kept = check_selector(given_by_user)
    given_by_user["provider"] = "changed"
    assert kept == {"provider": "openai"}


@pytest.mark.parametrize(
    ("selector", "tags", "expected"),
    [
        ({"a": "1"}, {"a": "1"}, True),
        ({"a": "1"}, {"a": "1", "b": "2"}, True),
        ({"a": "1", "b": "2"}, {"a": "1", "b": "2"}, True),
        ({"a": "1", "b": "2"}, {"a": "1"}, False),
        ({"a": "1"}, {"a": "2"}, False),
        ({"a": ""}, {}, False),
        ({}, {"a": "1"}, True),
        ({"A": "1"}, {"a": "1"}, False),
    ],
)
def test_all_of_a_selector_must_match(selector: dict[str, str], tags: dict[str, str], expected: bool) -> None:
    assert matches(selector, tags) is expected


def test_a_selector_is_written_in_one_order() -> None:
    assert written({"b": "2", "a": "1"}) == written({"a": "1", "b": "2"}) == "a=1,b=2"
    assert written({}) == ""


@given(st.dictionaries(KEYS, st.text()))
def test_what_is_written_item_by_item_reads_as_the_same(selector: dict[str, str]) -> None:
    assert parse_selector(f"{key}={value}" for key, value in selector.items()) == selector
    assert matches(selector, selector)
