"""Which queues a worker consumes, given what its command line asks for and the partitions that there are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pipeline_app.domain.partition import DEFAULT, queue_name
from pipeline_app.domain.pipeline import Pipeline
from pipeline_app.domain.selector import Selectors
from pipeline_app.store.client import Document
from pipeline_app.transport.topology import IDLE_QUEUE

#: What serves every partition.
ALL = Selectors()


class Selection:
    """Which queues to consume.

    Args:
        names: of `-Q`: names of stages (`survey.load` brings all partitions), of partitions, or of queues that are none
            of ours; None if it was not given.
        pipelines: those of the application.
        stages: of `--stage`; with neither these nor names, all stages.
        selectors: of `--select` and `--skip`: which partitions of the stages; what is named one by one stays.
    """

    def __init__(
        self,
        names: Iterable[str] | None,
        pipelines: Mapping[str, Pipeline],
        stages: Sequence[str] = (),
        selectors: Selectors = ALL,
    ) -> None:
        known = {queue_name(p.name, s.name, DEFAULT): (p.name, s.name) for p in pipelines.values() for s in p.stages}
        #: Nothing was named: all stages, and Celery's own queue.
        self.everything = names is None and not stages
        chosen = [name for name in (*(names or ()), *stages) if name != IDLE_QUEUE]
        self.selectors = selectors
        #: (pipeline, stage) whose partitions are consumed, as far as the selectors admit them.
        self.stages = {pair for name, pair in known.items() if self.everything or name in chosen}
        #: Queues that were named one by one and are partitions of a stage.
        self.exact = {n for n in chosen if n not in known and any(n.startswith(f"{s}.") for s in known)}
        #: Queues that are none of ours; Celery consumes them as it would without us.
        self.others = {name for name in chosen if name not in known} - self.exact

    @property
    def named(self) -> set[str]:
        """For the worker's record: the default queues of its stages, and the partitions named one by one."""
        return {queue_name(*pair, DEFAULT) for pair in self.stages} | self.exact

    def wanted(self, partitions: Iterable[Document]) -> set[str]:
        """Names of the stage queues to consume, given the partitions that exist."""
        names: set[str] = set()
        if self.selectors.admit({}):
            # Also before there is anything in it.
            names = {queue_name(pipeline, stage, DEFAULT) for pipeline, stage in self.stages}
        for row in partitions:
            if (row["pipeline"], row["stage"]) in self.stages and self.selectors.admit(row["tags"]):
                names.add(row["_id"])
        return names | self.exact
