"""Which errors count as the same error."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline_app.domain.fingerprint import MAX_NORMALISED, MAX_READ, frame_of, group_of, normalised

NUMBERS = st.one_of(
    st.integers().map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.integers(min_value=0).map(hex),
    st.tuples(st.integers(min_value=0, max_value=10**6), st.sampled_from(["ms", "s", "GB", "h30m", "m3.2s"])).map(
        lambda pair: f"{pair[0]}{pair[1]}"
    ),
    st.integers(min_value=0, max_value=10**9).map("{:,}".format),
)
IDS = st.one_of(
    st.uuids().map(str),
    st.uuids().map(lambda id: id.hex),
    st.integers(min_value=2**32).map("0x{:x}".format),
    st.text("0123456789abcdef", min_size=8, max_size=64),
    # As of base64: a letter and a digit side by side are what tells them from words.
    st.tuples(
        st.from_regex(r"[A-Za-z0-9_+/-]{4,20}", fullmatch=True), st.from_regex(r"[A-Za-z0-9_-]{4,20}", fullmatch=True)
    ).map(lambda ends: f"{ends[0]}x7{ends[1]}"),
)
TIMES = st.datetimes().flatmap(
    lambda at: st.sampled_from(
        [
            at.isoformat(),
            at.isoformat(" "),
            at.isoformat() + "+01:00",
            at.replace(microsecond=0).isoformat() + "Z",
            at.strftime("%Y-%m-%d %H:%M:%S,%f"),
        ]
    )
)
HTTP_TIMES = st.datetimes().map(lambda at: at.strftime("%a, %d %b %Y %H:%M:%S GMT"))
IPS = st.one_of(
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(str),
    st.ip_addresses(v=4).map("{}:5432".format),
)
WORDS = st.text("abcdefghijklmnopqrstuvwxyzäß", min_size=1, max_size=12)
PATHS = st.tuples(
    st.sampled_from(["/", "./", "../", "~/", "C:\\", "/a/b/"]), st.lists(WORDS, min_size=1, max_size=6)
).map(lambda parts: parts[0] + "/".join(parts[1]))
ADDRESSES = st.tuples(WORDS, WORDS).map(lambda parts: f"{parts[0]}@{parts[1]}.example")
ANYTHING = st.text(max_size=300)


def group(message: str, type_name: str = "ValueError", frame: str | None = "stages:load") -> str:
    return group_of(type_name, message, frame)


@pytest.mark.parametrize("values", [NUMBERS, IDS, TIMES, HTTP_TIMES, IPS, PATHS, ADDRESSES])
def test_what_varies_does_not_count(values: st.SearchStrategy[str]) -> None:
    @given(values, values)
    def same_group(one: str, other: str) -> None:
        for text in ("cannot load {} now", "{}", "bad value: {}", "a={}, b={}", "got [{}]", "({}) is not ours"):
            assert group(text.replace("{}", one)) == group(text.replace("{}", other)), text

    same_group()


@given(ANYTHING, ANYTHING)
@example("it's", 'say "so"')
@example("both ' and \" here", "\\")
@example("O'Brien's", "'")
def test_what_is_quoted_does_not_count(one: str, other: str) -> None:
    quotes: list[Callable[[str], str]] = [repr, json.dumps, lambda text: repr(text.encode())]
    for quote in quotes:
        assert group(f"no such key: {quote(one)} in table") == group(f"no such key: {quote(other)} in table")


@given(st.lists(st.integers(), min_size=1), st.dictionaries(st.text(), st.floats(), min_size=1))
def test_the_length_of_a_list_does_not_count(values: list[int], named: dict[str, float]) -> None:
    numbers = {name: value for name, value in named.items() if value == value and abs(value) != float("inf")}
    assert group(f"left over: {values}") == group("left over: [1]")
    assert group(f"left over: {numbers or {'a': 1}}") == group("left over: {'a': 1.5}")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("worker celery@web-1/4711/ab12 ended", "worker celery@db/9/00ff ended"),
        ("try again in 20s. Limit 30,000", "try again in 1m3.2s. Limit 900"),
        ("<Item object at 0x7f3a12cd>", "<Item object at 0x10ee>"),
        ("  too\n\n many   lines", "too many lines"),
        ("https://api.example/v1/a?key=1 said no", "https://joe:secret@api.example:8443/v2 said no"),
        ("for url 'https://api.example/v1/a'", "for url 'https://api.example/v2'"),
        ("shard https://s3-7.example/a failed", "shard https://s3-12.example/b failed"),
        ("data/one.csv is empty", "data/more/two.csv is empty"),
        # Whoever wrote the message cut the value, and its closing quote with it.
        ("cannot parse 'abc", "cannot parse 'and quite another text"),
    ],
)
def test_messages_that_are_alike(one: str, other: str) -> None:
    assert group(one) == group(other), (normalised(one), normalised(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("connection refused", "connection reset"),
        ("https://api.one.example/v1 said no", "https://api.two.example/v1 said no"),
        ("for url 'https://api.one.example/v1'", "for url 'https://api.two.example/v1'"),
        ("http://api.example said no", "https://api.example said no"),
        ("can't open the user's file", "can't close the user's file"),
        ("input/output error", "read/write error"),
        ("std::vector out of range", "std::string out of range"),
        ("", "x"),
    ],
)
def test_messages_that_are_not_alike(one: str, other: str) -> None:
    assert group(one) != group(other), (normalised(one), normalised(other))


@given(ANYTHING)
def test_type_and_place_count(message: str) -> None:
    groups = {
        group(message),
        group(message, type_name="KeyError"),
        group(message, frame="stages:save"),
        group(message, frame=None),
    }
    assert len(groups) == 4


def test_a_group_stays_the_same_from_one_version_to_the_next() -> None:
    """Operators keep names of groups, and jobs that failed yesterday are there today."""
    assert normalised("job 'a' needs 3 of 5 GB, see https://host/x") == "job * needs * of * GB, see https://host"
    assert group("job 'a' needs 3 of 5 GB, see https://host/x") == "ef40ef04c4"


@given(st.text() | st.text("'\"\\`/:.@-+*0a ", max_size=400))
@example("\ud800")
@example("\x00")
def test_any_text_has_a_group(message: str) -> None:
    assert re.fullmatch("[0-9a-f]{10}", group(message, type_name=message, frame=message))
    assert len(normalised(message)) <= MAX_NORMALISED


def test_only_the_beginning_counts_of_a_message_without_end() -> None:
    """A long value that is quoted hides nothing of what stands behind it."""
    assert group("bad '" + "x y " * 2000 + "' in field a") == group("bad '' in field a")
    assert group("bad '" + "x y " * 2000 + "' in field a") != group("bad '' in field b")
    words = "all these words count until there are too many of them " * 10
    assert group(words) == group(words + "and more")


#: What the parts of the pattern begin with, and what nearly fits them.
PIECES = [*"'\"`\\/:.,;@-+*=~“‘«1aé "]
PIECES += ["\\'", "'\\", "a'", "b'", "a.", "a/", "a/b", "./", "/a:", "C:\\", "a:", "0:", "a@", "::", "a1-", "Mon, "]
PIECES += ["://", "a://", "http://", "http://a@", "deadbeef", "a-", "a-a1 "]


@pytest.mark.parametrize("piece", PIECES)
def test_no_text_takes_long(piece: str) -> None:
    """Ten times the text takes about ten times as long: where it went with the square, it would be a hundred times."""

    def best(text: str) -> float:
        times = []
        for _ in range(3):
            begin = time.process_time()
            normalised(text)
            times.append(time.process_time() - begin)
        return min(times)

    short, long = (best((piece * size)[:size]) for size in (MAX_READ // 10, MAX_READ))
    assert long < max(0.02, 40 * short), (short, long)


def caught(function: Callable[[], object], frames_of_ours: int = 1) -> str | None:
    """The place of what it raises; its handler's frames begin below so many others."""
    with pytest.raises(Exception) as raised:  # noqa: PT011 - whatever it raises
        function()
    frames = raised.value.__traceback__
    for _ in range(frames_of_ours):
        assert frames is not None
        frames = frames.tb_next
    return frame_of(frames)


def load() -> None:
    parse("{")


def parse(text: str) -> None:
    json.loads(text)


class Loader:
    """Methods are named with their class."""

    def load(self) -> None:
        raise ValueError(uuid.uuid4())


def test_the_place_is_the_innermost_of_the_users_own_code() -> None:
    # json's own frames are below, and say nothing about whose fault it is
    assert caught(load) == "tests.unit.test_fingerprint:parse"
    assert caught(Loader().load) == "tests.unit.test_fingerprint:Loader.load"


def test_code_that_was_made_at_run_time_is_nobodys() -> None:
    space: dict[str, Callable[[], None]] = {}
    exec("def made():\n    raise ValueError(1)", {"__name__": "made_here"}, space)

    def handler() -> None:
        space["made"]()

    assert caught(handler) == (
        "tests.unit.test_fingerprint:test_code_that_was_made_at_run_time_is_nobodys.<locals>.handler"
    )


def test_where_all_is_a_library_the_innermost_place_of_the_handlers_package_counts() -> None:
    """Given a handler that is installed like a library, then its package is the user's code all the same."""
    assert caught(lambda: json.loads("{"), frames_of_ours=2) == "json.decoder:JSONDecoder.raw_decode"


def test_without_a_traceback_there_is_no_place() -> None:
    assert frame_of(None) is None
