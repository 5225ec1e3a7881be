"""What applies to a job: the quick look in the table and the slow one at each target agree."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline_app.domain.target import Table, Target

NAMES = st.sampled_from(["a", "b", "c", "d.e", "$x", ""])
TAGS = st.dictionaries(NAMES, NAMES, max_size=4)
RUNS, STAGES, PARTITIONS = (st.sampled_from([None, f"{kind}1", f"{kind}2"]) for kind in ("run", "p.stage", "part"))
TARGETS = st.builds(Target, run=RUNS, stage=STAGES, partition=PARTITIONS, selector=TAGS)


@given(st.lists(TARGETS, max_size=12), TAGS)
def test_the_table_finds_exactly_what_covers_the_job(targets: list[Target], tags: dict[str, str]) -> None:
    table = Table((target, number) for number, target in enumerate(targets))

    found = table.at("run1", "p.stage1", "part1").matching(tags)

    covering = [n for n, target in enumerate(targets) if target.covers("run1", "p.stage1", "part1", tags)]
    assert sorted(found) == covering


@given(TARGETS)
def test_a_target_survives_its_document_and_keeps_its_id(target: Target) -> None:
    again = Target.of(target.as_dict())

    assert again == target
    assert again.digest("h-") == target.digest("h-")


@given(TARGETS, TARGETS)
def test_different_targets_have_different_ids(one: Target, other: Target) -> None:
    assert (one.digest("h-") == other.digest("h-")) is (one == other)


@given(TARGETS, TARGETS, TAGS)
def test_what_includes_a_target_covers_all_that_it_covers(one: Target, other: Target, tags: dict[str, str]) -> None:
    job = ("run1", "p.stage1", "part1", tags)
    if one.includes(other) and other.covers(*job):
        assert one.covers(*job)


def test_a_place_that_nothing_applies_to_says_so() -> None:
    table = Table([(Target(run="other", selector={"a": "b"}), 1)])

    assert table.at("mine", "p.stage", "default").is_empty
    assert not table.at("other", "p.stage", "default").is_empty


def test_it_is_written_for_people() -> None:
    target = Target(run="r", stage="survey.load", partition="kind__a", selector={"b": "2", "a": "1"})

    assert str(target) == "a=1,b=2, partition kind__a, stage survey.load, run r"
    assert str(Target()) == "everything"
