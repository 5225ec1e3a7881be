"""Whatever is put into a parser is understood, or refused in our own words: nothing else comes out of any of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline_app.domain.durations import seconds
from pipeline_app.domain.edit import Edit, NotEditableError
from pipeline_app.domain.hint import Hint
from pipeline_app.domain.job import JobLine, as_job_line, check_run_name, parse_job_line
from pipeline_app.domain.pipeline import from_definition, load_definition
from pipeline_app.domain.rate_limit import retry_after
from pipeline_app.domain.rates import Budget, Rate
from pipeline_app.domain.redaction import redact
from pipeline_app.domain.selector import Selectors, check_selector, parse_selector
from pipeline_app.domain.times import point_in_time, time_to_come
from pipeline_app.errors import BadJobLineError, DefinitionError, PipelineError, UsageError
from pipeline_app.settings import load
from pipeline_app.store.encoding import UnstorableError, encode

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
#: Deeper than Python can follow.
DEEP = 5_000

#: Any text, and text that nearly is what the parsers want.
texts = st.text() | st.text(alphabet="0123456789.+-eE/smhdinfa :TZ,=", max_size=30)
#: Anything JSON can say, lone surrogates and numbers that no store can hold included.
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(alphabet=st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(texts)
@example("1" * 5000 + "d")
@example("nan")
@example("-0")
def test_durations(text: str) -> None:
    with suppress(UsageError):
        assert 0 <= seconds(text) < math.inf


@given(texts)
@example("+99999999999999d")
@example("0001-01-01T00:00:00+23:59")
@example("9999-12-31T23:59:59-23:59")
@example("1969-12-31T23:59:60Z")
def test_times(text: str) -> None:
    for parse in (point_in_time, time_to_come):
        with suppress(UsageError):
            assert parse(text, NOW).tzinfo is UTC


@given(texts)
@example("1e308/1ms")
@example("1e-308/1d")
@example("1e999/s")
@example("1/0.0000000000000000000000000000000000000000001ms")
def test_rates_and_budgets(text: str) -> None:
    with suppress(UsageError):
        rate = Rate.parse(text)
        assert 0 < rate.per_s < math.inf
        # What is shown of it can be given again.
        assert Rate.parse(rate.written).per_s == pytest.approx(rate.per_s, rel=1e-5)
    with suppress(UsageError):
        budget = Budget.parse(text)
        assert 0 < budget.amount < math.inf
        assert budget.period_s > 0


@given(texts | st.floats())
@example("Fri, 31 Dec 9999 23:59:59 -2359")
@example("Mon, 01 Jan 0001 00:00:00 +2359")
@example("Fri, 31 Dec 1999 23:59:59 GMT")
def test_retry_after(header: str | float) -> None:
    with suppress(UsageError):
        at = retry_after(header, NOW)
        assert at is not None
        assert at.tzinfo is UTC


@given(st.lists(texts), st.lists(texts))
def test_selectors(select: list[str], skip: list[str]) -> None:
    with suppress(UsageError):
        found = Selectors.parse(select, skip)
        assert parse_selector(found.written()[0]) == found.select


@given(values)
def test_selectors_of_programs(value: Any) -> None:
    with suppress(UsageError):
        assert check_selector(value) == value


@given(st.lists(texts | st.tuples(texts, values).map(lambda pair: f"{pair[0]}={json.dumps(pair[1])}")), values)
@example(["a=" + "[" * DEEP], {})
@example([".".join("a" * DEEP) + "=1"], {})
@example(["a=1e999"], {})
@example(["a=" + "9" * 5000], {})
def test_edits_of_payloads(items: list[str], payload: Any) -> None:
    with suppress(UsageError, NotEditableError):
        edit = Edit.parse(items)
        if edit is not None:
            edited = edit.apply(payload)
            assert isinstance(edited, Mapping)
            assert Edit.of(edit.as_dict()).apply(payload).keys() == edited.keys()


@given(st.binary() | texts | values.map(json.dumps))
@example(b"[" * DEEP)
@example(b'{"job_id": "a", "payload": ' + b"[" * 500 + b"]" * 500 + b"}")
@example(b'{"job_id": "a", "payload": "\\ud800"}')
@example(b'{"job_id": "a", "payload": 1e999}')
@example(b'{"job_id": "a", "payload": ' + b"9" * 5000 + b"}")
@example(b'{"job_id": "a", "delay_s": "1e300d"}')
@example(b'{"job_id": "a", "expires_at": "0001-01-01T00:00:00+23:59"}')
def test_job_lines(line: bytes | str) -> None:
    with suppress(BadJobLineError):
        job = parse_job_line(line, 7)
        assert job.job_id
        storable(job.payload)


def storable(value: Any) -> None:
    """Whatever came in can be stored, or is refused as such."""
    with suppress(UnstorableError):
        encode({"value": value})


#: Field names that a job line has, with values that they nearly have.
fields = st.sampled_from([*JobLine.model_fields, "unknown"])


@given(st.dictionaries(fields, values | texts), st.booleans())
def test_job_lines_with_the_right_fields(row: dict[str, Any], as_text: bool) -> None:
    try:
        job = parse_job_line(json.dumps(row), 7) if as_text else as_job_line(row, 7)
    except BadJobLineError:
        return
    due = job.due_at(NOW)
    assert due is None or due.tzinfo is UTC
    storable(job.tags)


#: Names that lead nowhere: what a definition names is imported.
paths = st.text(alphabet=".:/\\ \x00_0", max_size=6) | st.sampled_from(
    ["builtins:len", "json:none", "no_such:thing", "json"]
)
stages = st.fixed_dictionaries(
    {},
    optional={
        "handler": paths | values,
        "name": texts | values,
        "chunk": values,
        "losses": values,
        "deferrals": values,
        "retry": values
        | st.dictionaries(st.sampled_from(["attempts", "backoff", "cap", "jitter", "x"]), values | texts),
        "time_limit": values | texts,
        "soft_time_limit": values | texts,
        "other": values,
    },
)
definitions = st.fixed_dictionaries(
    {"name": texts | st.just("p"), "stages": st.lists(stages | values, max_size=3) | values},
    optional={"partition_by": values | st.lists(texts), "bound": values, "order_partitions": values, "other": values},
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(definitions | values)
@example({"name": "p", "stages": [{"handler": "builtins:len", "retry": {"attempts": 3, "backoff": "1s"}}]})
def test_definitions(table: Any) -> None:
    with suppress(DefinitionError):
        assert from_definition(table).stages


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary() | values.map(lambda value: json.dumps(value).encode()),
    suffix=st.sampled_from([".toml", ".json"]),
)
@example(content=b"[" * DEEP, suffix=".json")
@example(content=b"a=" + b"[" * DEEP, suffix=".toml")
@example(content=b"name = 'p'\nstages = 1979-05-27", suffix=".toml")
@example(content=b'{"name": "p", "stages": ' + b"9" * 5000 + b"}", suffix=".json")
def test_definition_files(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"definition{suffix}"
    path.write_bytes(content)
    with suppress(DefinitionError):
        load_definition(path)


@given(st.lists(values, max_size=3), st.dictionaries(st.text(), values, max_size=2))
@example([{"v": 1, "run": "r", "stage": "s", "partition": "p", "message": "\ud800"}], {})
@example([{"v": 1, "run": "r", "stage": "s", "partition": "p", "message": "m" * 1_000_000}], {})
def test_hints(args: list[Any], kwargs: dict[str, Any]) -> None:
    found = Hint.read(args, kwargs)
    assert found if isinstance(found, str) else found.message.encode()


hints = st.fixed_dictionaries(
    {"v": st.just(1) | values, **dict.fromkeys(("run", "stage", "partition", "message"), values)}
)


@given(hints)
def test_hints_that_nearly_are(table: dict[str, Any]) -> None:
    found = Hint.read([table], {})
    if isinstance(found, Hint):
        assert found.as_dict() == table
        storable(table)


@given(st.text())
def test_names_of_runs(name: str) -> None:
    with suppress(UsageError):
        assert check_run_name(name).isascii()


#: Passwords that are no part of the addresses around them.
passwords = st.text(alphabet="~!$&'()*+,;=:@/?#[]% äQZ", min_size=4).map(lambda text: f"Q{text}Z")


@given(passwords, st.sampled_from(["amqp", "amqps", "mongodb", "mongodb+srv", "https"]), st.sampled_from(["", "user"]))
def test_no_password_of_an_address_is_shown(password: str, scheme: str, user: str) -> None:
    written = quote(password, safe="")
    url = f"{scheme}://{user}:{written}@host:1234/path?tls=true&tlsCertificateKeyFilePassword={written}&w=1"
    for text in (url, f"no answer from {url}, nor {url};{url}", f"({url})"):
        assert written not in redact(text)
        assert f"{scheme}://{user}:***@host:1234/path?tls=true" in redact(text)
        assert "&w=1" in redact(text)


@given(passwords.filter(lambda text: " " not in text and "://" not in text))
def test_nor_one_that_is_not_written_as_it_should(password: str) -> None:
    assert password not in redact(f"amqp://user:{password}@host:1234/")


@given(texts)
def test_text_without_an_address_stays_as_it_is(text: str) -> None:
    if "://" not in text and "?" not in text and "&" not in text:
        assert redact(text) == text


@given(
    texts | passwords.map(lambda text: f"amqp://user:{text}@host/") | texts.map(lambda text: f"amqp://user:pw@{text}")
)
def test_addresses(url: str) -> None:
    """An address is taken or refused; refused, it shows nothing of itself, for any part of it may be the password."""
    try:
        load(amqp_url=url, mongodb_url="mongodb://localhost/x")
    except UsageError as exc:
        refusal = exc.message
    else:
        return
    assert refusal.lower().startswith("setting amqp_url: it cannot be read")
    assert len(url) < 8 or url not in refusal


@given(st.text())
def test_errors_hold_any_text(text: str) -> None:
    assert str(PipelineError(text or None))
