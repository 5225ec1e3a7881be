"""How a plain function is called for a job: what it takes, what becomes of its input and of its result."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, to_jsonable_python

from pipeline_app.domain.job import Job, first_error
from pipeline_app.errors import DefinitionError, InvalidInputError, InvalidResultError


@dataclass(frozen=True)
class Handler:
    """A stage's function and what its signature says."""

    function: Callable[..., Any]
    #: `module:name`, as definitions write it.
    path: str
    #: Annotation of the input; `Any` if there is none.
    input_type: Any
    #: Name of the parameter annotated with Job, if there is one.
    job_parameter: str | None

    @cached_property
    def _input(self) -> TypeAdapter[Any] | None:
        return None if self.input_type is Any else TypeAdapter(self.input_type)

    @cached_property
    def code_version(self) -> str:
        """What the ledger notes as the version of the code: `PIPELINE_CODE_VERSION`, else a digest of its file."""
        named = os.environ.get("PIPELINE_CODE_VERSION")
        if named:
            return named
        try:
            file = inspect.getsourcefile(self.function)
            return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12] if file else "unknown"
        except (OSError, TypeError):
            return "unknown"

    def validate(self, payload: Any) -> Any:
        """The payload as the handler's annotation asks for it.

        Raises InvalidInputError.
        """
        if self._input is None:
            return payload
        try:
            return self._input.validate_python(payload)
        except ValidationError as exc:
            more = f" (and {exc.error_count() - 1} more)" if exc.error_count() > 1 else ""
            raise InvalidInputError(f"{first_error(exc)}{more}") from exc

    def call(self, value: Any, job: Job) -> Any:
        """Run the function."""
        if self.job_parameter is None:
            return self.function(value)
        return self.function(value, **{self.job_parameter: job})


def to_storable(result: Any) -> Any:
    """A handler's result as JSON would have it: models become objects, times become text.

    Raises InvalidResultError.
    """
    try:
        return to_jsonable_python(result)
    except (PydanticSerializationError, ValueError, RecursionError) as exc:
        raise InvalidResultError(f"the result ({type(result).__name__}) cannot be serialised: {exc}") from exc


def import_object(path: str) -> Any:
    """The object that `module:attribute` names.

    Raises DefinitionError that says which half is missing.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise DefinitionError(f"{path!r} is not a path", hint="write module:name, such as handlers.survey:load")
    try:
        module = importlib.import_module(module_name)
    except Exception as exc:  # the module is the user's: whatever it raises, the definition cannot be used
        raise DefinitionError(f"{path}: cannot import {module_name}: {exc or type(exc).__name__}") from exc
    try:
        return getattr(module, attribute)
    except AttributeError as exc:
        raise DefinitionError(f"{path}: there is no {attribute!r} in {module_name}") from exc


def inspect_handler(target: Callable[..., Any] | str) -> Handler:
    """The handler that a stage was given: a function, or its dotted path.

    Raises DefinitionError if it cannot be called with one input and, if it asks for it, the job.
    """
    function = import_object(target) if isinstance(target, str) else target
    if not callable(function) or not hasattr(function, "__qualname__"):
        raise DefinitionError(f"{target!r} is not a function", hint="a handler is a plain function: wrap it in a def")
    path = target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"
    if inspect.iscoroutinefunction(function):
        raise DefinitionError(f"{path}: async handlers are not supported")
    try:
        hints = typing.get_type_hints(function)
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError, NameError) as exc:
        raise DefinitionError(f"{path}: its signature cannot be read: {exc}") from exc
    job_parameter = next((p.name for p in parameters if hints.get(p.name) is Job), None)
    inputs = [p for p in parameters if p.name != job_parameter and p.kind is not p.VAR_KEYWORD]
    required = [p for p in inputs if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    forced = [p.name for p in inputs if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if not inputs or len(required) > 1 or forced or inputs[0].kind is inspect.Parameter.KEYWORD_ONLY:
        raise DefinitionError(f"{path} must take one input (and, if it wants it, a parameter annotated with Job)")
    if job_parameter == parameters[0].name:
        raise DefinitionError(f"{path}: the input comes first, the job after it")
    if any(p.name == job_parameter and p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters):
        raise DefinitionError(f"{path}: the job is passed by name, as {job_parameter}=")
    handler = Handler(function, path, hints.get(inputs[0].name, Any), job_parameter)
    try:
        _ = handler._input
    except (PydanticSchemaGenerationError, PydanticUserError) as exc:
        raise DefinitionError(f"{path}: its annotation cannot be validated: {exc}") from exc
    return handler
