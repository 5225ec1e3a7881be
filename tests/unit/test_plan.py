"""A manifest read back, and the hints that messages carry."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from pipeline_app.domain.hint import VERSION, Hint
from pipeline_app.domain.pipeline import Pipeline, Stage
from pipeline_app.domain.plan import RunPlan, StagePlan
from pipeline_app.errors import NotFoundError


def load(value: str) -> str:
    return value


def analyze(value: str) -> str:
    return value


def plan(partition_by: list[str] | None = None) -> RunPlan:
    pipeline = Pipeline("survey", [Stage(load, chunk=9), Stage(analyze, losses=2)], partition_by=partition_by)
    return RunPlan.of(
        {
            "_id": "r1",
            "pipeline": pipeline.name,
            "hash": pipeline.hash,
            "definition": pipeline.definition(),
            "then": pipeline.then,
            "created_at": datetime(2030, 1, 1, tzinfo=UTC),
        }
    )


def test_a_manifest_is_read_back() -> None:
    assert plan(["kind"]).stages == (
        StagePlan(name="load", chunk=9, losses=5),
        StagePlan(name="analyze", chunk=1, losses=2),
    )
    assert plan(["kind"]).partition_by == ("kind",)
    assert plan([]).partition_by == ()
    assert plan(None).partition_by is None
    assert plan().run == "r1"


def test_the_order_of_its_stages() -> None:
    assert [stage.name for stage in plan().rest("load")] == ["analyze"]
    following = plan().after("load")
    assert following is not None
    assert following.name == "analyze"
    assert plan().after("analyze") is None


def test_an_unknown_stage_is_not_found() -> None:
    with pytest.raises(NotFoundError, match="run r1 has no stage 'nope'") as caught:
        plan().stage("nope")
    assert caught.value.hint == "its stages are load, analyze"


HINT = Hint(run="r1", stage="load", partition="kind__test", message="m1")


def test_a_hint_survives_the_journey() -> None:
    assert Hint.read([HINT.as_dict()], {}) == HINT


def test_a_hint_carries_no_payload() -> None:
    assert set(HINT.as_dict()) == {"v", "run", "stage", "partition", "message"}


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ([], {}),
        ([HINT.as_dict(), 1], {}),
        ([HINT.as_dict()], {"x": 1}),
        (["r1"], {}),
        ([None], {}),
        ([[]], {}),
    ],
)
def test_what_is_no_hint_at_all_is_said_to_be_foreign(args: list[Any], kwargs: dict[str, Any]) -> None:
    assert Hint.read(args, kwargs) == "the arguments are not those of a stage"


@pytest.mark.parametrize("version", [None, 0, VERSION + 1, "1"])
def test_an_unknown_version_is_named(version: Any) -> None:
    problem = Hint.read([{**HINT.as_dict(), "v": version}], {})
    assert problem == f"its version is {version!r}, this worker knows {VERSION}"


@pytest.mark.parametrize("name", ["run", "stage", "partition", "message"])
@pytest.mark.parametrize("value", [None, 5, {"$ne": ""}])
def test_a_part_that_is_missing_or_no_text_is_named(name: str, value: Any) -> None:
    assert Hint.read([{**HINT.as_dict(), name: value}], {}) == f"{name} is missing"
