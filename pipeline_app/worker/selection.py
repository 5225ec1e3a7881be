"""Which queues a worker consumes, given what its command line asks for and the partitions that there are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pipeline_app.domain.partition import DEFAULT, queue_name
from pipeline_app.domain.pipeline import Pipeline
from pipeline_app.store.client import Document
from pipeline_app.transport.topology import IDLE_QUEUE


class Selection:
    """Which queues `-Q` asks for: names of stages (`survey.load` brings all partitions), of partitions, or others."""

    def __init__(self, names: Iterable[str] | None, pipelines: Mapping[str, Pipeline]) -> None:
        stages = {queue_name(p.name, s.name, DEFAULT): (p.name, s.name) for p in pipelines.values() for s in p.stages}
        chosen = None if names is None else [name for name in names if name != IDLE_QUEUE]
        #: (pipeline, stage) whose partitions are all consumed.
        self.stages = {pair for name, pair in stages.items() if chosen is None or name in chosen}
        #: Queues that were named one by one and are partitions of a stage.
        self.exact = {n for n in chosen or () if n not in stages and any(n.startswith(f"{s}.") for s in stages)}
        #: Queues that are none of ours; Celery consumes them as it would without us.
        self.others = {name for name in chosen or () if name not in stages} - self.exact

    def wanted(self, partitions: Iterable[Document]) -> set[str]:
        """Names of the stage queues to consume, given the partitions that exist."""
        names = {queue_name(pipeline, stage, DEFAULT) for pipeline, stage in self.stages}
        names |= {row["_id"] for row in partitions if (row["pipeline"], row["stage"]) in self.stages}
        return names | self.exact
