"""Files of job lines: line numbers in errors, blank lines, and what can be read only once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline_app.errors import BadJobLineError, UsageError
from pipeline_app.views.cli import jobfile


def test_blank_lines_are_passed_over_but_counted(tmp_path: Path) -> None:
    # Given a file with blank lines before a bad one
    file = tmp_path / "jobs.jsonl"
    file.write_bytes(b'\n{"job_id": "a"}\r\n   \n{"job_id": "b"}\nnonsense\n')

    # When it is read
    lines = jobfile.read(str(file))

    # Then the good ones come, and the bad one is named by its line in the file
    assert [next(lines).job_id, next(lines).job_id] == ["a", "b"]
    with pytest.raises(BadJobLineError, match=f"^{file}: line 5: "):
        next(lines)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    file = tmp_path / "jobs.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"job_id": "a"}\n')
    assert jobfile.check(str(file)) == 1


def test_a_last_line_needs_no_line_break(tmp_path: Path) -> None:
    file = tmp_path / "jobs.jsonl"
    file.write_text('{"job_id": "a"}\n{"job_id": "b"}')
    assert jobfile.check(str(file)) == 2


def test_progress_ends_at_the_size_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "jobs.jsonl"
    file.write_text('{"job_id": "a"}\n\n{"job_id": "b"}\n')
    seen: list[int] = []
    jobfile.check(str(file), seen.append)
    assert seen[-1] == file.stat().st_size


def test_only_a_regular_file_can_be_read_twice(tmp_path: Path) -> None:
    file, fifo = tmp_path / "jobs.jsonl", tmp_path / "fifo"
    file.touch()
    os.mkfifo(fifo)
    assert jobfile.can_be_read_twice(str(file))
    assert not jobfile.can_be_read_twice(str(fifo))
    assert not jobfile.can_be_read_twice("-")


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_a_file_that_cannot_be_opened(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        jobfile.check(str(tmp_path / name))
