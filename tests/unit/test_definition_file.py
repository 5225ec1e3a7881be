"""Pipelines from TOML and JSON files, and every kind of mistake in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline_app.domain.pipeline import Pipeline, Stage, from_definition, load_definition
from pipeline_app.domain.retry import Retry
from pipeline_app.errors import DefinitionError

TOML = """
name = "survey"
partition_by = ["kind"]

[[stages]]
handler = "posixpath:basename"
chunk = 100

[[stages]]
name = "second"
handler = "posixpath:dirname"
losses = 2
soft_time_limit = "90s"
time_limit = 120
retry = { attempts = 5, backoff = "2s", cap = "5m", jitter = 0 }
"""


def expected() -> Pipeline:
    return Pipeline(
        "survey",
        [
            Stage("posixpath:basename", chunk=100),
            Stage(
                "posixpath:dirname",
                name="second",
                losses=2,
                soft_time_limit="90s",
                time_limit="2m",
                retry=Retry(attempts=5, backoff="2s", cap="5m", jitter=0),
            ),
        ],
        partition_by=["kind"],
    )


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_toml(tmp_path: Path) -> None:
    pipeline = load_definition(write(tmp_path, "survey.toml", TOML))
    assert pipeline.definition() == expected().definition()
    assert pipeline.hash == expected().hash


def test_json_is_read_from_what_a_manifest_keeps(tmp_path: Path) -> None:
    # Given the definition that a run's manifest has
    path = write(tmp_path, "survey.json", json.dumps(expected().definition()))
    # Then it is a definition file as well, with the same hash
    assert load_definition(path).hash == expected().hash


def table(**changes: Any) -> dict[str, Any]:
    """A correct definition with the changes made to it; a change to None takes the key out."""
    whole = {"name": "survey", "stages": [{"handler": "posixpath:basename"}], **changes}
    return {key: value for key, value in whole.items() if value is not None}


def stage(**changes: Any) -> dict[str, Any]:
    return table(stages=[{"handler": "posixpath:basename", **changes}])


MISTAKES: list[tuple[Any, str]] = [
    ([], "a definition is a table"),
    ("survey", "a definition is a table"),
    (None, "a definition is a table"),
    ({}, "name is missing"),
    (table(name=5), "name is missing"),
    (table(name="a.b"), "a pipeline cannot be called 'a.b'"),
    (table(name=""), "a pipeline cannot be called ''"),
    (table(stages=None), "stages is missing"),
    (table(stages={}), "stages is missing"),
    (table(stages="posixpath:basename"), "stages is missing"),
    (table(stages=[]), "has no stages"),
    (table(stages=["posixpath:basename"]), "each of stages is a table"),
    (table(stages=[{}]), "a stage has no handler"),
    (table(stages=[{"handler": 5}]), "a stage has no handler"),
    (table(stage=[]), "definition: unknown key 'stage'"),
    (table(partition_by="kind"), "partition_by is a list of tags"),
    (table(partition_by=5), "partition_by is a list of tags"),
    (table(partition_by=[5]), "partition_by is a list of tags"),
    (table(stages=[{"handler": "posixpath:basename"}] * 2), "two stages are called 'basename'"),
    (stage(handler="posixpath.basename"), "is not a path"),
    (stage(handler="no_such_module:load"), "cannot import no_such_module"),
    (stage(handler="posixpath:no_such_function"), "there is no 'no_such_function' in posixpath"),
    (stage(handler="posixpath:sep"), "is not a function"),
    (stage(handler="posixpath:relpath", name="a b"), "a stage cannot be called 'a b'"),
    (stage(handler="os:getcwd"), "must take one input"),
    (stage(chunks=5), "stage: unknown key 'chunks'"),
    (stage(chunk=0), "stage basename: chunk is a whole number"),
    (stage(chunk="20"), "stage basename: chunk is a whole number"),
    (stage(losses=0), "stage basename: losses is a whole number"),
    (stage(name=5), "a stage cannot be called 5"),
    (stage(retry=3), "retry is a table"),
    (stage(retry=[]), "retry is a table"),
    (stage(retry={"tries": 3}), "retry: unknown key 'tries'"),
    (stage(retry={"attempts": 0}), "retry: attempts is a whole number"),
    (stage(retry={"backoff": "soon"}), "retry: backoff: not a duration: 'soon'"),
    (stage(retry={"cap": -1}), "retry: cap: a duration is not negative"),
    (stage(retry={"jitter": 2}), "retry: jitter is between 0 and 1"),
]


@pytest.mark.parametrize(("mistake", "reason"), MISTAKES)
def test_a_mistake_is_named(mistake: Any, reason: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        from_definition(mistake)
    assert reason in caught.value.message


@pytest.mark.parametrize(("mistake", "reason"), MISTAKES)
def test_a_mistake_in_a_file_names_the_file_too(tmp_path: Path, mistake: Any, reason: str) -> None:
    path = write(tmp_path, "survey.json", json.dumps(mistake))
    with pytest.raises(DefinitionError) as caught:
        load_definition(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert reason in caught.value.message


def test_the_correct_table_that_the_mistakes_change_is_accepted() -> None:
    assert from_definition(table()).first.name == "basename"
    assert from_definition(stage(retry={"attempts": 2})).first.retry == Retry(attempts=2)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("survey.toml", "name = ", "Invalid value"),
        ("survey.toml", "name = 'a'\nname = 'b'", "overwrite"),
        ("survey.toml", '{"name": "survey"}', "Invalid"),
        ("survey.json", "name = 'survey'", "Expecting value"),
        ("survey.json", "", "Expecting value"),
        ("survey.toml", b"name = '\xff'", "can't decode"),
        ("survey.json", b"\xff", "can't decode"),
    ],
)
def test_a_file_that_cannot_be_read_as_what_its_name_says(
    tmp_path: Path, name: str, content: str | bytes, reason: str
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(DefinitionError, match=reason) as caught:
        load_definition(path)
    assert str(path) in caught.value.message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DefinitionError, match="No such file"):
        load_definition(tmp_path / "nope.toml")
    with pytest.raises(DefinitionError, match="Is a directory"):
        load_definition(tmp_path)
