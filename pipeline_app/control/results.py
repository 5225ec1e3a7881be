"""What a run made: the output of the last stage for every job that went through it, in constant memory."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline_app.domain.plan import RunPlan
from pipeline_app.domain.states import JobState
from pipeline_app.errors import PipelineError
from pipeline_app.runtime import Runtime
from pipeline_app.store import jobs, manifests, outputs
from pipeline_app.store.client import Document

#: Results that are read at a time: each may be as large as MongoDB allows.
PAGE = 100


def results(rt: Runtime, run: str) -> Iterator[Document]:
    """`{"job_id", "result", "tags"}` of every terminal job, in the order of their ids in the store.

    Raises NotFoundError at once; StoreError.
    """
    return _results(rt, RunPlan.of(manifests.get(rt.store, run)))


def _results(rt: Runtime, plan: RunPlan) -> Iterator[Document]:
    # Terminal jobs stand in the last stage; naming it lets the index give them in order.
    last = plan.stages[-1].name
    for page in jobs.stream(rt.store, plan.run, state=JobState.TERMINAL, stage=last, page=PAGE):
        ids = {row["_id"]: f"{row['_id']}/{row['input']}" for row in page}
        values = outputs.read(rt.store, list(ids.values()))
        for row in page:
            output = ids[row["_id"]]
            if output not in values:
                raise PipelineError(
                    f"job {row['job']!r} of run {plan.run} is terminal, and its result is not there",
                    hint="pipeline-app run verify shows what else is missing",
                )
            yield {"job_id": row["job"], "result": values[output], "tags": row["tags"]}
