"""Job lines, run names, and the keys that jobs are stored under."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline_app.domain.job import JobLine, as_job_line, check_run_name, idempotency_key, job_key, parse_job_line
from pipeline_app.errors import BadJobLineError, UsageError

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)


def parse(**fields: Any) -> JobLine:
    return parse_job_line(json.dumps({"job_id": "a1", **fields}), 1)


def test_a_whole_line() -> None:
    job = parse(
        payload={"x": [1, None]},
        tags={"kind": "test"},
        delay_s="5m",
        not_before="2030-01-01T14:00:00+01:00",
        expires_at="2031-01-01T00:00:00Z",
    )
    assert job.job_id == "a1"
    assert job.payload == {"x": [1, None]}
    assert job.tags == {"kind": "test"}
    assert job.delay_s == 300
    assert job.not_before == datetime(2030, 1, 1, 13, tzinfo=UTC)
    assert job.expiry() == datetime(2031, 1, 1, tzinfo=UTC)


def test_only_the_id_is_needed() -> None:
    job = parse_job_line(b'{"job_id": "a1"}', 1)
    assert (job.payload, job.tags, job.due_at(NOW), job.expiry()) == (None, {}, None, None)


@pytest.mark.parametrize("payload", [None, 0, "text", [], {}, [1, {"a": None}], True, "\x00"])
def test_a_payload_is_whatever_json_can_say(payload: Any) -> None:
    assert parse(payload=payload).payload == payload


def test_numbers_as_ids_and_tag_values_are_taken_for_their_text() -> None:
    job = parse(job_id=17, tags={"a": 1, "b": 1.5})
    assert (job.job_id, job.tags) == ("17", {"a": "1", "b": "1.5"})


@pytest.mark.parametrize("tags", [{"two words": "a b"}, {"ключ": "значение"}, {"k": "x" * 500}, {"": ""}, {}])
def test_unusual_tags_are_kept_as_they_are(tags: dict[str, str]) -> None:
    assert parse(tags=tags).tags == tags


MISTAKES: list[tuple[str | bytes, str]] = [
    ("", "Invalid JSON: EOF"),
    ("not json", "Invalid JSON"),
    ('{"job_id": "a1"', "Invalid JSON: EOF"),
    ('{"job_id": "a1"} {}', "Invalid JSON: trailing characters"),
    (b'{"job_id": "\xff"}', "Invalid JSON"),
    (r'{"job_id": "\ud800"}', "Invalid JSON"),
    ('{"job_id": "a1", "payload": ' + "[" * 10_000, "Invalid JSON: recursion limit"),
    ("[]", "Input should be an object"),
    ("null", "Input should be an object"),
    ('"a1"', "Input should be an object"),
    ("{}", "job_id: Field required"),
    ('{"job_id": null}', "job_id: Input should be a valid string"),
    ('{"job_id": ""}', "job_id: String should have at least 1 character"),
    ('{"job_id": true}', "job_id: Input should be a valid string"),
    (json.dumps({"job_id": "x" * 201}), "job_id: String should have at most 200 characters"),
    (r'{"job_id": "a\u0000b"}', "job_id: it holds a NUL character"),
    ('{"job_id": "a1", "job": 1}', "job: Extra inputs are not permitted"),
    ('{"job_id": "a1", "tags": null}', "tags: Input should be an object"),
    ('{"job_id": "a1", "tags": ["kind"]}', "tags: Input should be an object"),
    ('{"job_id": "a1", "tags": {"kind": null}}', "tags.kind: Input should be a valid string"),
    ('{"job_id": "a1", "tags": {"kind": ["a"]}}', "tags.kind: Input should be a valid string"),
    (r'{"job_id": "a1", "tags": {"k\u0000": "a"}}', "tags.k\x00.[key]: it holds a NUL character"),
    (json.dumps({"job_id": "a1", "tags": {str(n): "" for n in range(51)}}), "tags: Dictionary should have at most 50"),
    ('{"job_id": "a1", "delay_s": -1}', "delay_s: a duration is not negative"),
    ('{"job_id": "a1", "delay_s": "soon"}', "delay_s: not a duration: 'soon'"),
    ('{"job_id": "a1", "delay_s": true}', "delay_s: write a number of seconds"),
    ('{"job_id": "a1", "delay_s": [1]}', "delay_s: write a number of seconds"),
    ('{"job_id": "a1", "delay_s": 1e12}', "delay_s: Input should be less than or equal to"),
    ('{"job_id": "a1", "not_before": "tomorrow"}', "not_before: Input should be a valid datetime"),
    ('{"job_id": "a1", "not_before": "9999-12-31T23:00:00-05:00"}', "not_before: in UTC it is before the year 1 or"),
    ('{"job_id": "a1", "expires_at": "0001-01-01T00:00:00+05:00"}', "expires_at: in UTC it is before the year 1 or"),
]


@pytest.mark.parametrize(("line", "reason"), MISTAKES)
def test_a_bad_line_is_named_by_its_number_and_field(line: str | bytes, reason: str) -> None:
    with pytest.raises(BadJobLineError) as caught:
        parse_job_line(line, 4711)
    assert caught.value.message.startswith(f"line 4711: {reason}")


def test_jobs_from_python_are_checked_like_lines() -> None:
    assert as_job_line({"job_id": 5, "tags": {"kind": "test"}}, 1) == parse(job_id="5", tags={"kind": "test"})
    job = parse()
    assert as_job_line(job, 1) is job


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        ({}, "job 7: job_id: Field required"),
        ([], "job 7: Input should be a valid dictionary"),
        (None, "job 7: Input should be a valid dictionary"),
        ({"job_id": "caf\udce9"}, "job 7: job_id: Input should be a valid string, unable to parse"),
        ({"job_id": "a", "tags": {"k": "\ud800"}}, "job 7: tags.k: it holds half a surrogate pair"),
    ],
)
def test_a_bad_job_from_python_is_named_by_its_number_and_field(job: Any, reason: str) -> None:
    with pytest.raises(BadJobLineError) as caught:
        as_job_line(job, 7)
    assert caught.value.message.startswith(reason)


@pytest.mark.parametrize(
    ("fields", "due"),
    [
        ({}, None),
        ({"delay_s": 0}, None),
        ({"delay_s": None}, None),
        ({"delay_s": 1.5}, NOW + timedelta(seconds=1.5)),
        ({"delay_s": "1d"}, NOW + timedelta(days=1)),
        ({"not_before": "2030-01-01T13:00:00"}, NOW + timedelta(hours=1)),
        ({"not_before": "2030-01-01T13:00:00-02:00"}, NOW + timedelta(hours=3)),
        ({"delay_s": "2h", "not_before": "2030-01-01T13:00:00Z"}, NOW + timedelta(hours=2)),
        ({"delay_s": "1m", "not_before": "2030-01-01T13:00:00Z"}, NOW + timedelta(hours=1)),
    ],
)
def test_the_later_of_delay_and_time_decides(fields: dict[str, Any], due: datetime | None) -> None:
    assert parse(**fields).due_at(NOW) == due


def test_times_have_the_milliseconds_that_the_store_keeps() -> None:
    job = parse(not_before="2030-01-01T00:00:00.123999Z", delay_s=0.0001)
    assert job.not_before == datetime(2030, 1, 1, 0, 0, 0, 123000, tzinfo=UTC)
    due = job.due_at(NOW)
    assert due is not None
    assert due.microsecond % 1000 == 0


@given(one=st.text(min_size=1), other=st.text(min_size=1))
@example(one="a/b", other="a%2Fb")
@example(one="a%2Fb", other="a%252Fb")
def test_two_job_ids_never_have_the_same_key(one: str, other: str) -> None:
    assert (job_key("run", one) == job_key("run", other)) is (one == other)


@given(job_id=st.text(alphabet="a/%2Fé", min_size=1))
def test_the_run_is_the_part_before_the_only_slash(job_id: str) -> None:
    key = job_key("run", job_id)
    assert key.startswith("run/")
    assert key.count("/") == 1


def test_the_idempotency_key_is_stable_and_differs_with_what_it_stands_for() -> None:
    key = idempotency_key("run", "a1", "load", 0)
    assert key == idempotency_key("run", "a1", "load", 0)
    assert len(key) == 32
    others = {
        idempotency_key("ruN", "a1", "load", 0),
        idempotency_key("run", "a2", "load", 0),
        idempotency_key("run", "a1", "save", 0),
        idempotency_key("run", "a1", "load", 1),
        idempotency_key("run", "a1/load", "load", 0),
    }
    assert len(others | {key}) == 6


@pytest.mark.parametrize("name", ["a", "2030-01-01", "nightly_3.1", "A" * 100, "9"])
def test_run_names_that_are_allowed(name: str) -> None:
    assert check_run_name(name) == name


@pytest.mark.parametrize("name", ["", "last", ".a", "-a", "_a", "a/b", "a b", "é", "A" * 101, "a\n", "a%b", "$a"])
def test_run_names_that_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="a run cannot be called") as caught:
        check_run_name(name)
    assert caught.value.hint


def test_an_order_key_is_text_like_an_id() -> None:
    assert as_job_line({"job_id": "a"}, 1).order_key is None
    assert as_job_line({"job_id": "a", "order_key": 7}, 1).order_key == "7"
    for wrong in ("", "x" * 201, "a\x00", "\ud800", True, ["a"]):
        with pytest.raises(BadJobLineError, match=r"job 1: order_key"):
            as_job_line({"job_id": "a", "order_key": wrong}, 1)
