"""A selection: which jobs of a run a command means, kept in documents of operations."""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_app.domain.selection import Selection
from pipeline_app.domain.states import JobState

TEXTS = st.none() | st.text()
TIMES = st.none() | st.datetimes(timezones=st.just(UTC))

SELECTIONS = st.builds(
    Selection,
    job_ids=st.lists(st.text()).map(tuple),
    selector=st.dictionaries(st.text(), st.text()),
    states=st.lists(st.sampled_from(JobState)).map(tuple),
    stage=TEXTS,
    partition=TEXTS,
    group=TEXTS,
    since=TIMES,
    until=TIMES,
)


@given(SELECTIONS)
def test_a_selection_comes_back_from_its_document(selection: Selection) -> None:
    assert Selection.of(selection.as_dict()) == selection


def test_a_document_has_every_field_and_plain_values() -> None:
    # Given a selection with all there is
    at = datetime(2030, 1, 1, tzinfo=UTC)
    selection = Selection(
        job_ids=("a", "b"),
        selector={"provider": "openai"},
        states=(JobState.DEAD_LETTERED,),
        stage="load",
        partition="default",
        group="g-1",
        since=at,
        until=at,
    )

    # Then its document has each field, as what MongoDB and JSON take
    document = selection.as_dict()
    assert list(document) == [field.name for field in fields(Selection)]
    assert document["job_ids"] == ["a", "b"]
    assert document["states"] == ["dead_lettered"]
    assert [type(state) for state in document["states"]] == [str]


def test_without_anything_it_means_every_job() -> None:
    document = Selection().as_dict()
    assert not any(document.values())
    assert Selection.of(document) == Selection()


def test_the_document_does_not_change_with_what_it_was_made_of() -> None:
    selector = {"provider": "openai"}
    document = Selection(selector=selector).as_dict()
    selector["provider"] = "changed"
    assert document["selector"] == {"provider": "openai"}


def test_a_state_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="lost"):
        Selection.of({**Selection().as_dict(), "states": ["lost"]})
