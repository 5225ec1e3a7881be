"""The error tree: what a message says when none is given, and which exit code an error becomes."""

from __future__ import annotations

import pytest

from pipeline_app import errors
from pipeline_app.errors import PipelineError


def tree(root: type[PipelineError]) -> list[type[PipelineError]]:
    return [root, *(found for child in root.__subclasses__() for found in tree(child))]


OURS = [cls for cls in tree(PipelineError) if cls.__module__ == errors.__name__]


@pytest.mark.parametrize("cls", OURS)
def test_without_a_message_the_docstring_is_the_message(cls: type[PipelineError]) -> None:
    assert cls().message == str(cls()) == (cls.__doc__ or "").strip().split("\n", 1)[0]
    assert cls().message.endswith(".")


@pytest.mark.parametrize("cls", OURS)
def test_message_and_hint_are_kept(cls: type[PipelineError]) -> None:
    error = cls("it broke", hint="mend it")
    assert (str(error), error.message, error.hint) == ("it broke", "it broke", "mend it")


def test_codes_for_machines_are_unique() -> None:
    codes = [cls.code for cls in OURS]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize(
    ("cls", "exit_code"),
    [
        (errors.UsageError, 2),
        (errors.DefinitionError, 2),
        (errors.RefusedError, 1),
        (errors.NotFoundError, 1),
        (errors.BadJobLineError, 1),
        (errors.DuplicateJobError, 1),
        (errors.RunExistsError, 1),
        (errors.StoreError, 3),
        (errors.BrokerError, 3),
    ],
)
def test_exit_codes(cls: type[PipelineError], exit_code: int) -> None:
    assert cls.exit_code == exit_code


def test_the_tree_in_the_docstring_names_every_error() -> None:
    assert errors.__doc__ is not None
    assert [cls.__name__ for cls in OURS if cls.__name__ not in errors.__doc__] == []
