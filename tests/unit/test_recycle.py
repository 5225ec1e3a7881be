"""What recycling reads from the command line, and the command line that it begins anew with; the board."""

from __future__ import annotations

import os
import warnings

import pytest
from billiard import process

from pipeline_app.domain.recycling import size
from pipeline_app.errors import UsageError
from pipeline_app.flow.board import Board
from pipeline_app.worker.recycle import command_again


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512MB", 512_000_000),
        ("2GB", 2_000_000_000),
        ("1.5GiB", 3 << 29),
        ("100 kb", 100_000),
        ("4096", 4096),
        ("1kib", 1024),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "MB", "0", "0GB", "-1MB", "5 apples", "5TB", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        size(text)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["python", "-m", "celery", "worker"], ["/p", "-m", "celery", "worker"]),
        (["python3", "bin/celery", "--workdir", "x", "worker"], ["/p", "bin/celery", "--workdir", "/a/x", "worker"]),
        (["python3", "bin/celery", "--workdir=x", "worker"], ["/p", "bin/celery", "--workdir=/a/x", "worker"]),
    ],
)
def test_the_same_command_line(before: list[str], after: list[str]) -> None:
    assert command_again("/p", before, "/a/x") == after


def test_a_child_that_is_overdue_is_seen_by_its_parent() -> None:
    # Given a board that is made before a child is forked
    board = Board()
    first, second = os.pipe(), os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of other tests: the child uses none of them
        pid = os.fork()
    if pid == 0:
        process.current_process().index = 3
        board.begins("m" * 24, 5, 0.0)
        board.count(7)
        os.write(first[1], b"x")
        os.read(second[0], 1)
        board.ends()
        os.write(first[1], b"x")
        os.read(second[0], 1)
        os._exit(0)
    # When the child's handler has no time left
    os.read(first[0], 1)
    (found,) = board.overdue()
    # Then its parent knows which one that is
    assert (found.pid, found.message, found.position) == (pid, "m" * 24, 5)
    # And when it has ended, there is none
    os.write(second[1], b"x")
    os.read(first[0], 1)
    assert board.overdue() == []
    os.write(second[1], b"x")
    os.waitpid(pid, 0)
    # And what each process counted is known
    board.count(2)
    assert board.jobs == 9
    for end in (*first, *second):
        os.close(end)


def test_the_main_process_looks_after_its_own_handlers() -> None:
    board = Board()
    board.begins("m", 0, 0.0)
    assert board.overdue() == []
