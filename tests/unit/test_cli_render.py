"""How the command line writes answers: JSON that every parser takes, text that fits and steers no terminal."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_app.views.cli import render


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def refuse_constant(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def test_times_are_utc_with_z(capsys: pytest.CaptureFixture[str]) -> None:
    at = datetime(2030, 1, 1, 14, 0, 0, 123_000, tzinfo=timezone(timedelta(hours=1)))
    render.echo_json({"at": at})
    assert json.loads(printed(capsys)) == {"at": "2030-01-01T13:00:00.123Z"}


def test_numbers_that_json_lacks_become_null(capsys: pytest.CaptureFixture[str]) -> None:
    render.echo_json_line({"a": [float("nan"), 1.5], "b": {"c": float("inf")}})
    assert json.loads(printed(capsys), parse_constant=refuse_constant) == {"a": [None, 1.5], "b": {"c": None}}


def test_what_json_cannot_say_becomes_text(capsys: pytest.CaptureFixture[str]) -> None:
    render.echo_json({"raw": b"\x00\xff"})
    assert json.loads(printed(capsys)) == {"raw": "00ff"}


@pytest.mark.parametrize("items", [[], [1], [{"a": 1}, {"b": [2]}]])
def test_an_array_is_written_item_by_item(items: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    render.echo_json_array(iter(items))
    assert json.loads(printed(capsys)) == items


def test_a_line_of_json_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    render.echo_json_line({"text": "a\nb"})
    assert printed(capsys).count("\n") == 1


def test_an_error_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    render.echo_error("not_found", "there is none", "make one", as_json=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err) == {"error": {"code": "not_found", "message": "there is none", "hint": "make one"}}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0.0003, "0.3 ms"),
        (0.25, "250 ms"),
        (2.5, "2.5 s"),
        (185, "3m05s"),
        (7800, "2h10m"),
        (90000, "1d01h"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert render.duration(seconds) == text


def test_text_cannot_steer_the_terminal() -> None:
    assert render.one_line("a\x1b[2Jb\nc\rd") == "a\\x1b[2Jb c\\rd"


@given(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"]), max_size=40), st.integers(2, 30))
def test_cut_text_fits(text: str, columns: int) -> None:
    assert render.cells(render.cut(text, columns)) <= columns


def test_wide_characters_take_two_columns() -> None:
    assert render.cut("日本語のファイル", 7) == "日本語…"


def test_a_table_is_aligned_and_whole_where_it_is_piped(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 300
    render.echo_table(["job", "attempts", "error"], [["a", 1, long], ["日本", 1200, None]], shrink=["error"])
    lines = printed(capsys).splitlines()
    assert lines == [
        "job   attempts  error",
        f"a            1  {long}",
        "日本     1,200  -",
    ]


def test_a_table_without_rows_has_its_headers(capsys: pytest.CaptureFixture[str]) -> None:
    render.echo_table(["a", "b"], [])
    assert printed(capsys) == "a  b\n"


def test_fields_that_are_unknown_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    at = datetime(2030, 1, 1, tzinfo=UTC)
    render.echo_fields({"stage": "load", "due": None, "expires": at})
    assert printed(capsys) == "stage    load\nexpires  2030-01-01T00:00:00Z\n"
