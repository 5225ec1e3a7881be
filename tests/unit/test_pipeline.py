"""Pipelines and stages: their rules, their order, and the hash that workers compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery, chain, group

from pipeline_app.domain.pipeline import MAX_CHUNK, Pipeline, Stage, signatures
from pipeline_app.domain.retry import Retry
from pipeline_app.errors import DefinitionError, NotFoundError


def load(value: str) -> str:
    return value


def analyze(value: str) -> str:
    return value


def summarize(value: str) -> str:
    return value


def survey(**options: Any) -> Pipeline:
    return Pipeline("survey", [Stage(load), Stage(analyze), Stage(summarize)], **options)


def test_a_stage_is_called_like_its_handler_unless_it_is_named() -> None:
    assert Stage(load).name == "load"
    assert Stage(load, name="fetch").name == "fetch"


@pytest.mark.parametrize("name", ["a", "load_2", "A" * 60, "a_b_c"])
def test_names_that_are_allowed(name: str) -> None:
    assert Pipeline(name, [Stage(load, name=name)]).first.name == name


@pytest.mark.parametrize("name", ["2load", "a.b", "a b", "a-b", "a__b", "_a", "é", "A" * 61, "a\n", 5])
def test_names_that_would_confuse_queue_names_are_refused(name: Any) -> None:
    with pytest.raises(DefinitionError, match="a stage cannot be called"):
        Stage(load, name=name)
    with pytest.raises(DefinitionError, match="a pipeline cannot be called"):
        Pipeline(name, [Stage(load)])


def test_a_lambda_needs_a_name() -> None:
    with pytest.raises(DefinitionError, match="<lambda>"):
        Stage(lambda value: value)
    assert Stage(lambda value: value, name="same").name == "same"


@pytest.mark.parametrize("chunk", [0, -1, MAX_CHUNK + 1, 1.0, "20", None, True])
def test_chunk_bounds(chunk: Any) -> None:
    with pytest.raises(DefinitionError, match="stage load: chunk is a whole number from 1 to 1000"):
        Stage(load, chunk=chunk)


@pytest.mark.parametrize("grace", [-1, "soon", "5x", None, float("inf")])
def test_grace_is_a_duration(grace: Any) -> None:
    with pytest.raises(DefinitionError, match="stage load: grace: "):
        Stage(load, grace=grace)


@pytest.mark.parametrize("limit", [0, -1, "soon", "5x", "10ms", True, float("inf")])
@pytest.mark.parametrize("name", ["soft_time_limit", "time_limit"])
def test_time_limits_are_durations(name: str, limit: Any) -> None:
    with pytest.raises(DefinitionError, match=f"stage load: {name}"):
        Stage(load, **{name: limit})


def test_a_stage_has_the_time_limits_that_it_was_given() -> None:
    assert (Stage(load).soft_time_limit_s, Stage(load).time_limit_s) == (None, None)
    stage = Stage(load, soft_time_limit="90s", time_limit="2m")
    assert (stage.soft_time_limit_s, stage.time_limit_s) == (90.0, 120.0)


@pytest.mark.parametrize("soft", ["2m", "3m"])
def test_the_soft_limit_comes_first(soft: str) -> None:
    with pytest.raises(DefinitionError, match="stage load: soft_time_limit is not below time_limit"):
        Stage(load, soft_time_limit=soft, time_limit="2m")


@pytest.mark.parametrize("losses", [0, -1, 1.0, "5", None, True])
def test_losses_bounds(losses: Any) -> None:
    with pytest.raises(DefinitionError, match="stage load: losses is a whole number from 1"):
        Stage(load, losses=losses)


@pytest.mark.parametrize("retry", [3, "2s", {"attempts": 3}])
def test_retry_is_a_policy(retry: Any) -> None:
    with pytest.raises(DefinitionError, match="stage load: retry is a Retry"):
        Stage(load, retry=retry)


def test_a_pipeline_needs_stages() -> None:
    with pytest.raises(DefinitionError, match="has no stages"):
        Pipeline("survey", [])


@pytest.mark.parametrize("row", [load, "handlers.survey:load", None])
def test_a_function_is_not_yet_a_stage(row: Any) -> None:
    with pytest.raises(DefinitionError, match="is not a stage"):
        Pipeline("survey", [row])


def test_two_stages_of_one_name_are_refused() -> None:
    with pytest.raises(DefinitionError, match="two stages are called 'load'"):
        Pipeline("survey", [Stage(load), Stage(analyze), Stage(load)])


@pytest.mark.parametrize("partition_by", ["kind", [1], 5, {"kind"}, [None]])
def test_partition_by_is_a_list_of_tags(partition_by: Any) -> None:
    with pytest.raises(DefinitionError, match="partition_by is a list of tags"):
        survey(partition_by=partition_by)


def test_the_order_of_stages() -> None:
    pipeline = survey()
    assert pipeline.first.name == "load"
    assert [stage.name for stage in pipeline.rest("load")] == ["analyze", "summarize"]
    assert [stage.name for stage in pipeline.rest("summarize")] == []
    following = pipeline.after("analyze")
    assert following is not None
    assert following.name == "summarize"
    assert pipeline.after("summarize") is None


@pytest.mark.parametrize("ask", [Pipeline.stage, Pipeline.after, Pipeline.rest])
def test_an_unknown_stage_is_not_found_and_the_known_ones_are_named(ask: Callable[[Pipeline, str], Any]) -> None:
    with pytest.raises(NotFoundError, match="pipeline survey has no stage 'nope'") as caught:
        ask(survey(), "nope")
    assert caught.value.hint == "its stages are load, analyze, summarize"


def test_the_partition_of_a_job() -> None:
    tags = {"kind": "test", "owner": "me"}
    assert survey(partition_by=["kind"]).partition(tags) == "kind__test"
    assert survey().partition(tags) == "kind__test__owner__me"
    assert survey().partition({}) == "default"


def test_the_definition_is_plain_json_and_names_handlers_by_path() -> None:
    stage = Stage(load, chunk=7, losses=2, retry=Retry(attempts=1), soft_time_limit="90s", time_limit="2m")
    definition = Pipeline("p", [stage], partition_by=("a",)).definition()
    assert json.loads(json.dumps(definition)) == definition
    assert definition == {
        "name": "p",
        "stages": [
            {
                "name": "load",
                "handler": f"{__name__}:load",
                "chunk": 7,
                "retry": {"attempts": 1, "backoff_s": 1.0, "cap_s": 300.0, "jitter": 0.1},
                "losses": 2,
                "deferrals": 1000,
                "grace": 30.0,
                "soft_time_limit": 90.0,
                "time_limit": 120.0,
            }
        ],
        "partition_by": ["a"],
    }


def test_the_same_definition_has_the_same_hash() -> None:
    assert survey(partition_by=["kind"]).hash == survey(partition_by=("kind",)).hash
    assert len(survey().hash) == 16


@pytest.mark.parametrize(
    "other",
    [
        Pipeline("other", [Stage(load), Stage(analyze)]),
        Pipeline("p", [Stage(analyze), Stage(load)]),
        Pipeline("p", [Stage(load), Stage(analyze), Stage(summarize)]),
        Pipeline("p", [Stage(load, chunk=2), Stage(analyze)]),
        Pipeline("p", [Stage(summarize, name="load"), Stage(analyze)]),
        Pipeline("p", [Stage(load), Stage(analyze)], partition_by=[]),
        Pipeline("p", [Stage(load), Stage(analyze)], partition_by=["kind"]),
    ],
)
def test_whatever_differs_in_the_definition_differs_in_the_hash(other: Pipeline) -> None:
    assert Pipeline("p", [Stage(load), Stage(analyze)]).hash != other.hash


@pytest.mark.parametrize(
    "other",
    [
        Pipeline("p", [Stage(load, losses=2), Stage(analyze)]),
        Pipeline("p", [Stage(load, grace="1s"), Stage(analyze)]),
        Pipeline("p", [Stage(load, soft_time_limit="1s", time_limit="2s"), Stage(analyze)]),
        Pipeline("p", [Stage(load, retry=Retry(attempts=9)), Stage(analyze)]),
    ],
)
def test_budgets_may_change_while_a_run_goes_on(other: Pipeline) -> None:
    assert Pipeline("p", [Stage(load), Stage(analyze)]).hash == other.hash


def test_representations_are_short() -> None:
    assert repr(survey()) == "Pipeline('survey', load -> analyze -> summarize)"
    assert repr(Stage(load, chunk=5)) == "Stage('load', chunk=5)"


class TestThen:
    """A user's own Celery tasks after the last stage."""

    app = Celery("then", set_as_current=False)

    def test_nothing(self) -> None:
        assert survey().then == []

    def test_a_signature(self) -> None:
        # Given a task of the user's
        notify = self.app.signature("notify", args=(1,), kwargs={"loud": True})
        # When a pipeline ends in it
        then = survey(then=notify).then
        # Then its name and arguments are kept, as plain JSON
        assert [(part["task"], part["args"], part["kwargs"]) for part in then] == [("notify", [1], {"loud": True})]
        assert json.loads(json.dumps(then)) == then

    def test_a_chain_or_a_list_keeps_its_order(self) -> None:
        one, two = self.app.signature("one"), self.app.signature("two")
        assert [part["task"] for part in signatures(chain(one, two))] == ["one", "two"]
        assert [part["task"] for part in signatures([one, two])] == ["one", "two"]

    def test_it_does_not_count_as_a_part_of_the_definition(self) -> None:
        assert survey(then=self.app.signature("one")).hash == survey().hash

    def test_groups_need_a_result_backend_and_are_refused(self) -> None:
        with pytest.raises(DefinitionError, match=r"celery\.group is not supported"):
            signatures(group(self.app.signature("one"), self.app.signature("two")))

    @pytest.mark.parametrize("then", [["notify"], [{}], [{"task": 5}], "notify"])
    def test_what_is_not_a_signature_is_refused(self, then: Any) -> None:
        with pytest.raises(DefinitionError, match="is not a Celery signature"):
            signatures(then)
