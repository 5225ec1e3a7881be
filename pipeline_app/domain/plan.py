"""A run's definition as its manifest keeps it: all that moving jobs needs, without the handlers' code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipeline_app.domain.partition import ORDER_PARTITIONS
from pipeline_app.errors import NotFoundError


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """A stage in a manifest."""

    name: str
    chunk: int
    losses: int
    #: How long a handler may go on after all its jobs were cancelled.
    grace_s: float = 30.0


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run's manifest, read."""

    run: str
    pipeline: str
    hash: str
    stages: tuple[StagePlan, ...]
    partition_by: tuple[str, ...] | None
    #: Partitions that jobs with an order key are spread over.
    order_partitions: int
    #: Jobs that may be unfinished before seeders wait; None if any number may be.
    bound: int | None
    #: Signatures of the user's own Celery tasks after the last stage.
    then: tuple[dict[str, Any], ...]
    created_at: datetime

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> RunPlan:
        """The plan in a manifest document."""
        definition = manifest["definition"]
        partition_by = definition["partition_by"]
        return cls(
            run=manifest["_id"],
            pipeline=manifest["pipeline"],
            hash=manifest["hash"],
            stages=tuple(
                StagePlan(
                    name=row["name"],
                    chunk=row["chunk"],
                    losses=row["losses"],
                    # Not kept yet in runs that were made before stages had one.
                    grace_s=row.get("grace", 30.0),
                )
                for row in definition["stages"]
            ),
            partition_by=None if partition_by is None else tuple(partition_by),
            # Neither is there in runs that were made before there was order and bounds.
            order_partitions=manifest.get("order_partitions", ORDER_PARTITIONS),
            bound=manifest.get("bound"),
            then=tuple(manifest["then"]),
            created_at=manifest["created_at"],
        )

    def stage(self, name: str) -> StagePlan:
        """The stage of that name. Raises NotFoundError."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        known = ", ".join(stage.name for stage in self.stages)
        raise NotFoundError(f"run {self.run} has no stage {name!r}", hint=f"its stages are {known}")

    def after(self, name: str) -> StagePlan | None:
        """The stage after `name`; None after the last."""
        following = self.rest(name)
        return following[0] if following else None

    def rest(self, name: str) -> tuple[StagePlan, ...]:
        """The stages after `name`."""
        return self.stages[self.stages.index(self.stage(name)) + 1 :]
