"""Which jobs of a run a command means: replay, cancel, move and priority choose alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pipeline_app.domain.states import JobState


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Jobs that match all that is given; without anything, every job of the run."""

    job_ids: tuple[str, ...] = ()
    #: Tags that all must match.
    selector: Mapping[str, str] = field(default_factory=dict)
    #: Stored states; `running` is never stored.
    states: tuple[JobState, ...] = ()
    #: The stage that the job stands in.
    stage: str | None = None
    partition: str | None = None
    #: The failure group of its last error.
    group: str | None = None
    #: Its last change was at or after this.
    since: datetime | None = None
    #: Its last change was before this.
    until: datetime | None = None

    def as_dict(self) -> dict[str, Any]:
        """For documents and JSON."""
        return {
            "job_ids": list(self.job_ids),
            "selector": dict(self.selector),
            "states": [str(state) for state in self.states],
            "stage": self.stage,
            "partition": self.partition,
            "group": self.group,
            "since": self.since,
            "until": self.until,
        }

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Selection:
        """The selection in a document."""
        return cls(
            job_ids=tuple(document["job_ids"]),
            selector=dict(document["selector"]),
            states=tuple(JobState(state) for state in document["states"]),
            stage=document["stage"],
            partition=document["partition"],
            group=document["group"],
            since=document["since"],
            until=document["until"],
        )
