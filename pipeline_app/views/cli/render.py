"""How answers are written: JSON for programs; tables, times and durations for people.

JSON is what the design promises and nothing else: times in UTC with `Z`, numbers that every parser takes. Text for
people is cut to the terminal's width only where there is a terminal: what is piped is whole.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import click

#: Columns narrower than this are not cut any further.
NARROWEST = 8

_UNITS = ((86400.0, "d", 3600.0, "h"), (3600.0, "h", 60.0, "m"), (60.0, "m", 1.0, "s"))


def echo_json(value: Any) -> None:
    """One object or array, indented: the whole output of a command with `--json`."""
    click.echo(_dumps(value, indent=2))


def echo_json_line(value: Any) -> None:
    """One of many objects, in a line; seen at once by whoever reads them."""
    click.echo(_dumps(value))


def echo_json_array(values: Iterable[Any]) -> None:
    """An array, written as its items come."""
    before = "["
    for value in values:
        click.echo(before + "\n  " + _dumps(value), nl=False)
        before = ","
    click.echo("[]" if before == "[" else "\n]")


def echo_error(code: str, message: str, hint: str | None, *, as_json: bool) -> None:
    """An error on standard error."""
    if as_json:
        click.echo(_dumps({"error": {"code": code, "message": message, "hint": hint}}), err=True)
        return
    click.echo(f"{styled('error', fg='red', err=True)}: {message}", err=True)
    if hint:
        click.echo(f"hint:  {hint}", err=True)


def echo_warning(text: str) -> None:
    """Something that is not as it should be, on standard error."""
    click.echo(f"{styled('warning', fg='yellow', err=True)}: {text}", err=True)


def _dumps(value: Any, indent: int | None = None) -> str:
    ascii_only = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    try:
        return json.dumps(value, default=_plain, indent=indent, ensure_ascii=ascii_only, allow_nan=False)
    except ValueError:  # NaN and infinity are no JSON
        return json.dumps(_finite(value), default=_plain, indent=indent, ensure_ascii=ascii_only)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return iso(value)
    return value.hex() if isinstance(value, bytes) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def iso(at: datetime) -> str:
    """ISO 8601 in UTC, to the millisecond, with `Z`."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def clock(at: datetime | None) -> str:
    """The same to the second, for people."""
    return "-" if at is None else at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def duration(seconds: float | None) -> str:
    """`0.3 ms`, `850 ms`, `2.5 s`, `3m05s`, `2h10m`."""
    if seconds is None:
        return "-"
    if seconds < 0.01:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    for size, unit, part, part_unit in _UNITS:
        if seconds >= size:
            return f"{int(seconds // size)}{unit}{int(seconds % size // part):02d}{part_unit}"
    raise AssertionError(seconds)


def size(count: int | None) -> str:
    """`96 MB`."""
    return "-" if count is None else f"{count / 1_000_000:,.0f} MB"


def number(count: int | None) -> str:
    """`1,790`."""
    return "-" if count is None else f"{count:,}"


def plural(count: int, word: str) -> str:
    """`1 job`, `1,790 jobs`."""
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def one_line(text: str) -> str:
    """The text without line breaks and without what would steer a terminal."""
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def printable(text: str) -> str:
    """The text with its lines, without what would steer a terminal."""
    return "\n".join(one_line(line.expandtabs(4)) for line in text.splitlines())


def _escaped(char: str) -> str:
    return " " if char in "\n\t" else char.encode("unicode_escape").decode()


def compact(value: Any) -> str:
    """A value as JSON in one line, for people."""
    return one_line(_dumps(value))


def styled(text: str, *, err: bool = False, **style: Any) -> str:
    """Coloured or bold text where a terminal shows it and nobody asked for none (NO_COLOR)."""
    stream = sys.stderr if err else sys.stdout
    if os.environ.get("NO_COLOR") or not stream.isatty():
        return text
    return click.style(text, **style)


def width() -> int | None:
    """The terminal's columns; None where the output goes elsewhere, and is not cut."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def cells(text: str) -> int:
    """How many columns of a terminal the text takes."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else not unicodedata.combining(char) for char in text)


def cut(text: str, columns: int | None) -> str:
    """The text in at most that many columns."""
    if columns is None or cells(text) <= columns:
        return text
    taken, used = [], 1
    for char in text:
        used += cells(char)
        if used > columns:
            break
        taken.append(char)
    return "".join(taken) + "…"


def echo_table(headers: Sequence[str], rows: Iterable[Sequence[Any]], *, shrink: Sequence[str] = ()) -> None:
    """Aligned columns; numbers to the right. Where they are too wide for the terminal, those in `shrink` are cut."""
    values = list(rows)
    texts = [[_cell(value) for value in row] for row in values]
    numeric = [all(isinstance(row[index], (int, type(None))) for row in values) for index in range(len(headers))]
    widths = [max(cells(row[i]) for row in [list(headers), *texts]) for i in range(len(headers))]
    _fit(headers, widths, shrink)
    click.echo(styled(_line(headers, widths, numeric), bold=True))
    for row in texts:
        click.echo(_line(row, widths, numeric))


def _cell(value: Any) -> str:
    if isinstance(value, datetime):
        return clock(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return number(value)
    return "-" if value is None or value == "" else one_line(str(value))


def _fit(headers: Sequence[str], widths: list[int], shrink: Sequence[str]) -> None:
    """Take the columns in `shrink` down, the widest first, until the line fits."""
    available = width()
    if available is None:
        return
    places = [index for index, header in enumerate(headers) if header in shrink]
    excess = sum(widths) + 2 * (len(widths) - 1) - available
    while excess > 0 and places:
        widest = max(places, key=lambda index: widths[index])
        if widths[widest] <= NARROWEST:
            return
        widths[widest] -= 1
        excess -= 1


def _line(row: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    parts: list[str] = []
    for index, (text, columns) in enumerate(zip(row, widths, strict=True)):
        shown = cut(text, columns)
        gap = " " * (columns - cells(shown))
        parts.append(gap + shown if numeric[index] else shown + gap)
    return "  ".join(parts).rstrip()


def echo_fields(fields: Mapping[str, Any]) -> None:
    """Names and values in two columns; those that are None are left out."""
    shown = {name: _cell(value) for name, value in fields.items() if value is not None}
    columns = max((cells(name) for name in shown), default=0)
    for name, value in shown.items():
        click.echo(f"{styled(name.ljust(columns), dim=True)}  {value}")


def indented(text: str, by: int = 2) -> Iterator[str]:
    """The lines of a text, moved to the right."""
    for line in printable(text).splitlines():
        yield (" " * by + line).rstrip()


def brief(error: dict[str, Any] | None) -> str:
    """An error in a line; its type without the module."""
    if error is None:
        return ""
    name = error["type"].rpartition(".")[2]
    return one_line(f"{name}: {error['message']}" if error["message"] else name)


def echo_limit(found: Sequence[Any], limit: int) -> None:
    """Say that there may be more than was asked for."""
    if len(found) == limit:
        click.echo(styled(f"{plural(limit, 'line')} at most; --limit shows more", dim=True))
