"""Exceptions as the ledger keeps them: always storable, never endless."""

from __future__ import annotations

import pytest

from pipeline_app.domain.outcome import MAX_ERROR_TEXT, MAX_TRACEBACK, ErrorRecord
from pipeline_app.domain.selector import check_selector
from pipeline_app.errors import PermanentError, UsageError


class UnreadableError(Exception):
    """An exception that fails when it is asked for its message."""

    def __str__(self) -> str:
        raise RuntimeError("no")


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as exc:
        return exc


def test_type_message_and_traceback_are_kept() -> None:
    record = ErrorRecord.of(raised(ValueError("seven")))
    assert (record.type, record.message) == ("ValueError", "seven")
    assert record.traceback.startswith("Traceback")
    assert "in raised" in record.traceback
    assert record.as_dict() == {
        "type": "ValueError",
        "message": "seven",
        "traceback": record.traceback,
        "frame": "tests.unit.test_outcome:raised",
        "group": record.group,
    }


def test_an_error_has_its_group_however_it_was_made() -> None:
    # Given errors of processes that died, which nobody raised
    one, other = (ErrorRecord(type="WorkerLost", message=f"the lease of w@{n} ended", traceback="") for n in "ab")

    # Then they have a group, and no place in the code
    assert one.group == other.group != ""
    assert "frame" not in one.as_dict()

    # and what was raised has one that its kept message, cut short, does not change
    long = [ErrorRecord.of(raised(ValueError(f"bad {'x ' * length!r} in field a"))) for length in (10, 5000)]
    assert long[0].group == long[1].group != one.group


def test_an_error_of_the_framework_itself_has_no_place_in_the_users_code() -> None:
    try:
        check_selector({"": "x"})
    except UsageError as exc:
        record = ErrorRecord.of(exc.with_traceback(exc.__traceback__.tb_next if exc.__traceback__ else None))
    assert record.frame is None
    assert record.group


def test_a_type_outside_the_builtins_has_its_module() -> None:
    assert ErrorRecord.of(PermanentError("x")).type == "pipeline_app.errors.PermanentError"


def test_the_cause_is_in_the_traceback() -> None:
    error = ValueError("outer")
    error.__cause__ = KeyError("inner")
    assert "inner" in ErrorRecord.of(raised(error)).traceback


@pytest.mark.parametrize("error", [SystemExit(3), MemoryError(), KeyboardInterrupt()])
def test_what_is_no_ordinary_exception_is_recorded_too(error: BaseException) -> None:
    assert ErrorRecord.of(raised(error)).type == type(error).__name__


def test_an_exception_without_a_readable_message_is_still_a_record() -> None:
    assert ErrorRecord.of(raised(UnreadableError())).message == "(its message cannot be read)"


def test_long_texts_are_cut_and_both_ends_of_the_traceback_stay() -> None:
    record = ErrorRecord.of(raised(ValueError("start" + "x" * 100_000 + "end")))
    assert len(record.message) == MAX_ERROR_TEXT
    assert len(record.traceback) < MAX_TRACEBACK + 100
    assert record.traceback.startswith("Traceback")
    assert record.traceback.rstrip().endswith("end")


@pytest.mark.parametrize("text", ["caf\udce9.py", "a\x00b"])
def test_text_that_the_store_would_refuse_is_replaced(text: str) -> None:
    record = ErrorRecord.of(raised(ValueError(text)))
    for value in record.as_dict().values():
        value.encode()
        assert "\x00" not in value
