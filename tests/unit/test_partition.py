"""Partition keys: two different targets never share a queue, whatever their tags hold."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline_app.domain.partition import DEFAULT, MAX_KEY, job_partition, partition_key, queue_name, target_tags

# Short texts of the characters that the escape itself uses find collisions; the long ones find the digest's.
TRICKY = st.text(alphabet="_~-.a5f7e", max_size=6)
ANY = st.text(st.characters(exclude_categories=()), max_size=12)
LONG = st.text(alphabet="ab_~é", min_size=100, max_size=500)
TOKENS = st.one_of(TRICKY, ANY, LONG)
TAGS = st.dictionaries(TOKENS, TOKENS, max_size=3)
FEW_TAGS = st.dictionaries(st.sampled_from(["a", "b", "_", "a_", "a__b"]), TRICKY, max_size=3)
PARTITION_BY = st.one_of(st.none(), st.lists(st.sampled_from(["a", "b", "_", "a_", "a__b"]), max_size=3))


@given(one=st.one_of(TAGS, FEW_TAGS), other=st.one_of(TAGS, FEW_TAGS), by=PARTITION_BY)
@example(one={"a__b": "c"}, other={"a": "b__c"}, by=None)
@example(one={"a": "b", "c": "d"}, other={"a": "b__c__d"}, by=None)
@example(one={"a": "_"}, other={"a_": ""}, by=None)
@example(one={"a": "~5f"}, other={"a": "_"}, by=None)
@example(one={"a": "\x05f"}, other={"a": "_"}, by=None)
@example(one={"a": "\ud800"}, other={"a": "?"}, by=None)
@example(one={"": ""}, other={}, by=None)
@example(one={"a": "x" * 499 + "1"}, other={"a": "x" * 499 + "2"}, by=None)
@settings(max_examples=500)
def test_keys_are_equal_exactly_when_the_targets_are(
    one: dict[str, str], other: dict[str, str], by: list[str] | None
) -> None:
    same_target = target_tags(one, by) == target_tags(other, by)
    assert (partition_key(one, by) == partition_key(other, by)) is same_target


@given(tags=TAGS)
def test_a_key_is_short_ascii_that_keeps_dots_for_the_queue_name(tags: dict[str, str]) -> None:
    key = partition_key(tags)
    assert re.fullmatch(r"[A-Za-z0-9_~-]{1,120}", key)
    assert len(key) <= MAX_KEY


@given(tags=TAGS)
def test_the_longest_queue_name_fits_into_amqp(tags: dict[str, str]) -> None:
    name = queue_name("p" * 60, "s" * 60, partition_key(tags))
    assert len(name.encode()) <= 255
    assert name.count(".") == (1 if not tags else 2)


@given(tags=TAGS)
def test_the_order_of_tags_does_not_matter(tags: dict[str, str]) -> None:
    assert partition_key(dict(reversed(tags.items()))) == partition_key(tags)


@pytest.mark.parametrize(
    ("tags", "by", "key"),
    [
        ({"kind": "test"}, None, "kind__test"),
        ({"kind": "test", "b": "2"}, None, "b__2__kind__test"),
        ({}, None, "default"),
        ({"kind": "test"}, [], "default"),
        ({"kind": "test"}, ["other"], "default"),
        ({"kind": "test", "b": "2"}, ["kind"], "kind__test"),
        ({"quota_pool": "gpt", "provider": "openai"}, None, "quota_pool__gpt"),
        ({"quota_pool": "gpt", "provider": "openai"}, ["provider"], "provider__openai"),
        ({"kind": "two words"}, None, "kind__two~20words"),
        ({"kind": "é"}, None, "kind__~c3~a9"),
        ({"snake_case": "a_b"}, None, "snake_case__a_b"),
        ({"kind": ""}, None, "kind__~"),
        ({"a.b": "c.d"}, None, "a~2eb__c~2ed"),
    ],
)
def test_keys_that_people_will_read(tags: dict[str, str], by: list[str] | None, key: str) -> None:
    assert partition_key(tags, by) == key


def test_partition_by_may_name_a_tag_twice_and_in_any_order() -> None:
    tags = {"a": "1", "b": "2"}
    assert partition_key(tags, ["b", "a", "b"]) == partition_key(tags, ["a", "b"])


def test_a_value_of_500_characters_keeps_its_beginning() -> None:
    # Given two long values that differ at their very end
    keys = {partition_key({"kind": "x" * 499 + end}) for end in "12"}
    # Then their keys differ, are as long as allowed, and can still be recognised
    assert len(keys) == 2
    assert all(len(key) == MAX_KEY and key.startswith("kind__xxx") for key in keys)


def test_a_tag_called_default_is_not_the_default_partition() -> None:
    assert partition_key({"default": ""}) != DEFAULT
    assert partition_key({"": "default"}) != DEFAULT


def test_queue_names() -> None:
    assert queue_name("survey", "load", DEFAULT) == "survey.load"
    assert queue_name("survey", "load", "kind__test") == "survey.load.kind__test"


@given(tags=TAGS, other=TAGS, key=TOKENS, number=st.integers(1, 1000))
def test_an_order_key_decides_whatever_the_tags_are(
    tags: dict[str, str], other: dict[str, str], key: str, number: int
) -> None:
    partition, shown = job_partition(tags, key, None, number)
    assert (partition, shown) == job_partition(other, key, ["a"], number)
    assert partition == f"order-{shown['order_partition']}"
    assert 0 <= int(shown["order_partition"]) < number
    # No tags make a queue that is called so.
    assert partition not in (DEFAULT, partition_key(tags), partition_key(other))


def test_order_keys_are_spread_over_all_partitions() -> None:
    found = [job_partition({}, f"account-{n}", None, 16)[0] for n in range(1600)]
    assert len(set(found)) == 16
    assert max(found.count(name) for name in set(found)) < 150


@given(tags=TAGS, partition_by=PARTITION_BY)
def test_without_an_order_key_the_tags_decide(tags: dict[str, str], partition_by: list[str] | None) -> None:
    expected = (partition_key(tags, partition_by), target_tags(tags, partition_by))
    assert job_partition(tags, None, partition_by, 16) == expected
