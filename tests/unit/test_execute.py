"""One job through its handler: what comes out, which errors are final, and what is sent between processes."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any

import pytest

from pipeline_app import Job, PermanentError
from pipeline_app.domain.handler import inspect_handler
from pipeline_app.domain.states import DeadKind
from pipeline_app.errors import InvalidInputError, InvalidResultError
from pipeline_app.flow.alone_child import is_whole
from pipeline_app.flow.execute import execute, permanent_kind
from pipeline_app.store.encoding import UnstorableError, encoded, from_bytes, to_bytes

JOB = Job(
    id="a/b", run="r", stage="double", tags={}, attempt=1, key="k", log=logging.LoggerAdapter(logging.getLogger(), {})
)


def double(n: int) -> Any:
    return object() if n == 13 else n * 2


def test_an_output_is_encoded_as_it_is_stored() -> None:
    """Given a job, when its handler ran, then its output is a document under the job, stage and message."""
    output = execute(inspect_handler(double), 21, JOB, "m1")

    assert dict(output) == {"_id": "r/a%2Fb/double/m1", "value": 42}
    assert encoded(bytes(output.raw)) == output


@pytest.mark.parametrize(("payload", "error"), [("x", InvalidInputError), (13, InvalidResultError)])
def test_input_and_result_are_judged(payload: Any, error: type[Exception]) -> None:
    """Given an input or a result that cannot be used, then that is an error of its own."""
    with pytest.raises(error):
        execute(inspect_handler(double), payload, JOB, "m1")


class NeverError(PermanentError):
    """A user's own."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PermanentError(), DeadKind.PERMANENT),
        (NeverError(), DeadKind.PERMANENT),
        (InvalidInputError(), DeadKind.INVALID_INPUT),
        (InvalidResultError(), DeadKind.INVALID_RESULT),
        (ValueError(), None),
        (SystemExit(3), None),
    ],
)
def test_errors_that_no_second_attempt_mends(error: BaseException, kind: DeadKind | None) -> None:
    """Given an error, then it is known whether another attempt may mend it."""
    assert permanent_kind(error) is kind


def test_documents_between_processes() -> None:
    """Given a document, when it was sent in bytes, then it is the same, and its end is known without reading it."""
    document = {"text": "ä", "bytes": b"\0", "at": datetime(2026, 1, 2, tzinfo=UTC), "a.b": {"$c": [1, None, 2.5]}}
    data = to_bytes(document)

    assert from_bytes(data) == document
    assert is_whole(data)
    assert not any(is_whole(data[:length]) for length in range(len(data)))
    with pytest.raises(UnstorableError):
        to_bytes({"at": object()})
