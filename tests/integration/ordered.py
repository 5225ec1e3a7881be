"""What the tests of order per key share: a pipeline that keeps a diary, and runs of it without a worker."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from pipeline_app import Job, Pipeline, Retry, Stage
from pipeline_app.control.duties import ordering
from pipeline_app.domain.states import AT_REST
from pipeline_app.runtime import Runtime
from tests.integration.helpers import job, pipeline, pump


class Diary:
    """Two stages that write down what they did, in order."""

    def __init__(self) -> None:
        self.entries: list[str] = []
        #: Job -> what its first stage raises, while it is there.
        self.faults: dict[str, Exception] = {}

    def first(self, value: Any, job: Job) -> Any:
        if job.id in self.faults:
            raise self.faults[job.id]
        self.entries.append(f"{job.id}.first")
        return value

    def second(self, value: Any, job: Job) -> Any:
        self.entries.append(f"{job.id}.second")
        return {"of": value}

    def of(self, prefix: str) -> list[str]:
        """The entries of jobs whose ids begin so."""
        return [entry for entry in self.entries if entry.startswith(prefix)]


def with_diary(diary: Diary) -> Pipeline:
    """A pipeline of two stages that write into it."""
    stages = [Stage(diary.first, chunk=3, retry=Retry(attempts=2, backoff="1h", jitter=0)), Stage(diary.second)]
    return pipeline(*stages, order_partitions=4)


def keyed(key: str, number: int, **fields: Any) -> list[dict[str, Any]]:
    """`a0`, `a1` and so on, of the key `a`."""
    return [{"job_id": f"{key}{n}", "payload": n, "order_key": key, **fields} for n in range(number)]


def in_order(*names: str) -> list[str]:
    """What a diary says of jobs that went through one after the other."""
    return [f"{name}.{stage}" for name in names for stage in ("first", "second")]


def go(rt: Runtime) -> None:
    """Let everything go on as far as it goes by itself; never are two of a key on their way."""
    while True:
        ordering.give_turns(rt)
        assert_one_at_a_time(rt)
        if not pump(rt) and not rt.store.db.turns.count_documents({"due": {"$exists": True}}):
            return


def assert_one_at_a_time(rt: Runtime) -> None:
    going: dict[str, list[str]] = defaultdict(list)
    for row in rt.store.db.job_states.find({"order_key": {"$exists": True}, "state": {"$nin": sorted(AT_REST)}}):
        if row.get("reason") != "order":
            going[row["order_key"]].append(row["job"])
    assert all(len(ids) == 1 for ids in going.values()), dict(going)


def states(rt: Runtime, *ids: str) -> list[str]:
    return [job(rt, one)["state"] for one in ids]
