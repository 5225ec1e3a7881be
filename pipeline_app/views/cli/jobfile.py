"""Files of job lines: JSON objects, one a line. Used by `run seed` and `try`.

A regular file can be read twice, so it is: first for syntax, so that a bad line adds nothing. Standard input, and
whatever else can be read only once, is taken as it comes. Either way a line at a time.
"""

from __future__ import annotations

import codecs
import io
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pipeline_app.domain.job import JobLine, parse_job_line
from pipeline_app.errors import BadJobLineError, UsageError

STANDARD_INPUT = "-"

#: Called with the bytes read so far.
Progress = Callable[[int], None]


def can_be_read_twice(path: str) -> bool:
    """Whether it is a regular file; `-`, a pipe or a terminal is not."""
    try:
        return path != STANDARD_INPUT and stat.S_ISREG(Path(path).stat().st_mode)
    except OSError:
        return False  # opening it says what is wrong


def check(path: str, progress: Progress = lambda read: None) -> int:
    """The number of jobs in the file, all of whose lines can be read.

    Raises BadJobLineError for the first that cannot.
    """
    return sum(1 for _ in read(path, progress))


def read(path: str, progress: Progress = lambda read: None) -> Iterator[JobLine]:
    """The jobs in the file, in constant memory; blank lines are passed over, but counted.

    Raises UsageError (it cannot be opened), BadJobLineError that names file, line and field.
    """
    with _opened(path) as file:
        done = 0
        for number, line in enumerate(file, start=1):
            done += len(line)
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if text.strip():
                try:
                    yield parse_job_line(text, number)
                except BadJobLineError as exc:
                    raise BadJobLineError(f"{name(path)}: {exc.message}", hint=exc.hint) from exc
            progress(done)


def name(path: str) -> str:
    """What the file is called in messages."""
    return "standard input" if path == STANDARD_INPUT else path


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    if path == STANDARD_INPUT:
        # Not sys.stdin: seeding reads in a thread, and at a Ctrl-C Python would abort over a lock that it still holds.
        yield io.BufferedReader(io.FileIO(0, closefd=False))
        return
    try:
        file = Path(path).open("rb")  # noqa: SIM115 - an error of whoever reads it is not one of opening
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror}") from exc
    with file:
        yield file
