"""Handlers: which functions a stage takes, and what becomes of input and result."""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from pipeline_app.domain.handler import import_object, inspect_handler, to_storable
from pipeline_app.domain.job import Job
from pipeline_app.errors import DefinitionError, InvalidInputError, InvalidResultError


class Point(BaseModel):
    x: int
    y: int = 0


def plain(value):  # type: ignore[no-untyped-def]
    return value


def typed(point: Point) -> int:
    return point.x + point.y


def with_job(value: str, job: Job) -> str:
    return f"{value}@{job.id}"


def with_job_by_name(value: str, *, context: Job) -> str:
    return context.stage + value


def with_default(value: int, extra: int = 3) -> int:
    return value + extra


def with_keywords(value: int, **options: int) -> int:
    return value + len(options)


def with_star(*values: int) -> int:
    return sum(values)


def no_input() -> None: ...
def only_job(job: Job) -> None: ...
def job_first(job: Job, value: str) -> None: ...
def job_by_position(value: str, job: Job, /) -> None: ...
def two_inputs(one: str, other: str) -> None: ...
def only_by_name(*, value: str) -> None: ...
def forced_name(value: str, *, other: str) -> None: ...
def only_keywords(**values: str) -> None: ...
def unknown_annotation(value: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821
def unvalidatable(value: threading.Thread) -> None: ...
async def later(value: str) -> None: ...


class Callable_:  # noqa: N801 - it stands for an object that is called like a function
    def __call__(self, value: str) -> str:
        return value


def job() -> Job:
    return Job(
        id="a1",
        run="r",
        stage="load",
        tags={},
        attempt=1,
        key="k",
        log=logging.LoggerAdapter(logging.getLogger("test"), {}),
    )


@pytest.mark.parametrize(
    ("function", "payload", "result"),
    [
        (plain, {"any": "thing"}, {"any": "thing"}),
        (typed, {"x": "3", "y": 4}, 7),
        (with_job, "v", "v@a1"),
        (with_job_by_name, "v", "loadv"),
        (with_default, 4, 7),
        (with_keywords, 4, 4),
        (with_star, 4, 4),
        (len, "four", 4),
    ],
)
def test_a_function_of_one_input_is_called_with_it(function: Callable[..., Any], payload: Any, result: Any) -> None:
    handler = inspect_handler(function)
    assert handler.call(handler.validate(payload), job()) == result


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (no_input, "must take one input"),
        (only_job, "must take one input"),
        (two_inputs, "must take one input"),
        (only_by_name, "must take one input"),
        (forced_name, "must take one input"),
        (only_keywords, "must take one input"),
        (job_first, "the input comes first"),
        (job_by_position, "passed by name"),
        (unknown_annotation, "signature cannot be read: name 'Nowhere'"),
        (unvalidatable, "annotation cannot be validated"),
        (later, "async handlers are not supported"),
        (functools.partial(two_inputs, "x"), "is not a function"),
        (Callable_(), "is not a function"),
        (5, "is not a function"),
        (None, "is not a function"),
    ],
)
def test_what_cannot_be_called_with_one_input_is_refused(function: Any, reason: str) -> None:
    with pytest.raises(DefinitionError, match=reason):
        inspect_handler(function)


def test_a_refusal_names_the_function() -> None:
    with pytest.raises(DefinitionError, match=f"{__name__}:two_inputs"):
        inspect_handler(two_inputs)


def test_a_handler_knows_its_path_and_what_it_takes() -> None:
    handler = inspect_handler(with_job)
    assert handler.path == f"{__name__}:with_job"
    assert handler.input_type is str
    assert handler.job_parameter == "job"


def test_a_path_is_as_good_as_the_function() -> None:
    assert inspect_handler("os.path:basename").call("/a/b", job()) == "b"
    assert inspect_handler("os.path:basename").path == "os.path:basename"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("", "is not a path"),
        ("os.path", "is not a path"),
        (":load", "is not a path"),
        ("os.path:", "is not a path"),
        ("no_such_module:load", "cannot import no_such_module"),
        ("os.no_such_module:load", "cannot import"),
        (".relative:load", "cannot import"),
        ("os.path:no_such_function", "there is no 'no_such_function' in os.path"),
    ],
)
def test_a_path_that_leads_nowhere_says_which_half_is_wrong(path: str, reason: str) -> None:
    with pytest.raises(DefinitionError, match=reason):
        import_object(path)


@pytest.mark.parametrize(("code", "reason"), [("1 / 0", "division by zero"), ("def (", "invalid syntax")])
def test_a_module_that_fails_when_it_is_imported_is_a_bad_definition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    # Given a module of the user's that cannot be imported
    name = "broken_" + hashlib.sha256(code.encode()).hexdigest()[:8]
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    # Then the definition that names it is refused with the reason
    with pytest.raises(DefinitionError, match=f"cannot import {name}: .*{reason}"):
        import_object(f"{name}:load")


def test_input_is_validated_as_annotated() -> None:
    assert inspect_handler(typed).validate({"x": 1}) == Point(x=1)


def test_input_without_an_annotation_is_passed_as_it_is() -> None:
    payload = {"x": object()}
    assert inspect_handler(plain).validate(payload) is payload


def test_invalid_input_names_the_field_and_how_much_more_is_wrong() -> None:
    with pytest.raises(InvalidInputError, match=r"^x: .*valid integer.* \(and 1 more\)$"):
        inspect_handler(typed).validate({"x": "seven", "y": []})
    with pytest.raises(InvalidInputError, match=r"^x: Field required$"):
        inspect_handler(typed).validate({})
    with pytest.raises(InvalidInputError, match="valid string"):
        inspect_handler(with_job).validate(7)


@pytest.mark.parametrize(
    ("result", "stored"),
    [
        (None, None),
        (Point(x=1), {"x": 1, "y": 0}),
        ([Point(x=1), {"at": datetime(2030, 1, 2, tzinfo=UTC)}], [{"x": 1, "y": 0}, {"at": "2030-01-02T00:00:00Z"}]),
        ((1, 2), [1, 2]),
        ({1: "a"}, {"1": "a"}),
        (Path("/a"), "/a"),
        (b"text", "text"),
    ],
)
def test_a_result_becomes_what_json_would_have(result: Any, stored: Any) -> None:
    assert to_storable(result) == stored


def cycle() -> list[Any]:
    ring: list[Any] = []
    ring.append(ring)
    return ring


@pytest.mark.parametrize("result", [object(), threading.Lock(), b"\xff", plain, cycle(), {"deep": {"er": object()}}])
def test_a_result_that_cannot_be_stored_names_its_type(result: Any) -> None:
    with pytest.raises(InvalidResultError, match=rf"the result \({type(result).__name__}\) cannot be serialised"):
        to_storable(result)


def test_the_code_version_is_named_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_CODE_VERSION", "v1.2.3")
    assert inspect_handler(plain).code_version == "v1.2.3"


def test_the_code_version_is_else_a_digest_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIPELINE_CODE_VERSION", raising=False)
    assert inspect_handler(plain).code_version == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    assert inspect_handler(len).code_version == "unknown"
