"""What the integration tests share: small pipelines and runs, and a consumer that needs no Celery worker."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kombu import Connection

from pipeline_app import Pipeline, Stage
from pipeline_app.application import prepare
from pipeline_app.control import runs
from pipeline_app.control.accounts.verify import Verification, verify
from pipeline_app.control.seed import seeding
from pipeline_app.domain.hint import Hint
from pipeline_app.domain.states import MessageState
from pipeline_app.flow import claim
from pipeline_app.flow.consume import ChunkFailedError, Flow
from pipeline_app.runtime import Runtime
from pipeline_app.store import jobs, messages, partitions, workers
from pipeline_app.store.client import Document
from pipeline_app.transport.depth import depths
from pipeline_app.transport.topology import named_queue
from tests.project import Project

#: The fixture `new_flow`.
NewFlow = Callable[[Runtime], Flow]


def pipeline(*stages: Stage | Callable[..., Any], **options: Any) -> Pipeline:
    """A pipeline whose name, and so its queues, no other test uses."""
    made = [stage if isinstance(stage, Stage) else Stage(stage) for stage in stages]
    return Pipeline(f"p{uuid.uuid4().hex[:10]}", made, **options)


def lines(number: int, *, payload: Callable[[int], Any] = lambda n: n, **fields: Any) -> list[dict[str, Any]]:
    """Job lines `j0`, `j1` and so on."""
    return [{"job_id": f"j{n}", "payload": payload(n), **fields} for n in range(number)]


def new_run(project: Project, chosen: Pipeline, run: str = "r") -> Runtime:
    """A runtime of this process, in which there is a run of the pipeline without jobs."""
    rt = project.runtime(chosen)
    prepare(rt)
    runs.create_run(rt, run, chosen)
    return rt


def begin(
    rt: Runtime, chosen: Pipeline, job_lines: Iterable[Mapping[str, Any]], run: str = "r", **options: Any
) -> seeding.Seeded:
    """Make a run and seed it."""
    prepare(rt)
    runs.create_run(rt, run, chosen)
    return seeding.seed(rt, run, job_lines, **options)


def hints(rt: Runtime, run: str = "r", **match: Any) -> list[Hint]:
    """Hints of a run's open messages, oldest first, as the store has them."""
    rows = rt.store.db.messages.find({"run": run, "state": MessageState.OPEN, **match}).sort("_id", 1)
    return [Hint(run=run, stage=row["stage"], partition=row["partition"], message=row["_id"]) for row in rows]


def pump(rt: Runtime, flow: Flow | None = None) -> list[str]:
    """Take hints out of RabbitMQ and run them through their stages until no queue has any; what each came to."""
    flow = flow or Flow(rt, lambda: False)
    answers: list[str] = []
    with Connection(rt.settings.amqp_url) as connection:
        channel: Any = connection.default_channel
        before = -1
        while before != len(answers):
            before = len(answers)
            for name in partitions.queues(rt.store):
                named_queue(name, rt.settings.queue_type)(channel).declare()
                while message := channel.basic_get(name):
                    answers.append(run_hint(flow, message.body))
                    channel.basic_ack(message.delivery_tag)
    flow.notes.flush()
    return answers


def run_hint(flow: Flow, body: str | bytes) -> str:
    """Run what a Celery message carries."""
    args, kwargs, _ = json.loads(body)
    hint = Hint.read(args, kwargs)
    assert isinstance(hint, Hint), hint
    try:
        return flow.run(hint)
    except ChunkFailedError:
        return "failed"


def in_broker(rt: Runtime, *queues: str) -> list[list[Any]]:
    """Take what is in queues out of them: args of each Celery message. A queue that is not there has none."""
    found = []
    with Connection(rt.settings.amqp_url) as connection:
        for name in [name for name, depth in depths(rt.settings.amqp_url, queues).items() if depth.ready]:
            channel: Any = connection.default_channel
            while message := channel.basic_get(name, no_ack=True):
                found.append(json.loads(message.body)[0])
    return found


def backdate(rt: Runtime, collection: str, seconds: float, *fields: str, **match: Any) -> int:
    """Let these times be earlier than they were: what waits for them sees time pass. How many documents."""
    changed = 0
    for field in fields:
        query = {field: {"$type": "date"}, **match}
        earlier = [{"$set": {field: {"$subtract": [f"${field}", int(seconds * 1000)]}}}]
        changed += rt.store.db[collection].update_many(query, earlier).modified_count
    return changed


def job(rt: Runtime, job_id: str, run: str = "r") -> Document:
    """A job's document, which must be there."""
    found = jobs.get(rt.store, run, job_id)
    assert found is not None
    return found


def by_state(rt: Runtime, run: str = "r") -> dict[str, int]:
    """Stored state -> jobs; no zeros."""
    return {state: number for state, number in verify(rt, run).states.items() if number}


def prove(rt: Runtime, run: str = "r", **states: int) -> Verification:
    """Nothing of the run is lost or recorded twice, all counts agree, and its jobs are in these states."""
    found = verify(rt, run)
    assert found.ok, found.problems
    now = {state: number for state, number in found.states.items() if number}
    assert now == states, now
    return found


def attempts(rt: Runtime, run: str = "r", **match: Any) -> list[Document]:
    """The ledger of a run, oldest first."""
    return list(rt.store.db.job_attempts.find({"run": run, **match}).sort([("started_at", 1), ("_id", 1)]))


def outcomes(rows: Sequence[Document]) -> list[str]:
    """How attempts ended."""
    return [row["outcome"] for row in rows]


def everything(rt: Runtime) -> dict[str, list[Document]]:
    """The whole database, to be compared."""
    names = sorted(rt.store.db.list_collection_names())
    return {name: list(rt.store.db[name].find().sort("_id", 1)) for name in names}


def in_threads(*work: Callable[[], object]) -> None:
    """Run all at the same time, to their end; the first error is raised."""
    with ThreadPoolExecutor(len(work)) as pool:
        for future in [pool.submit(one) for one in work]:
            future.result()


def double(n: int) -> int:
    """A handler."""
    return n * 2


def as_row(n: int) -> dict[str, int]:
    """A handler for a last stage."""
    return {"n": n}


def register(rt: Runtime, worker: str, **fields: Any) -> None:
    """A worker that is alive, and runs every stage."""
    stages = [f"{chosen.name}.{stage.name}" for chosen in rt.pipelines.values() for stage in chosen.stages]
    fields = {"queues": [], "stages": stages, "definitions": [], "concurrency": 1, **fields}
    record = {"worker": worker, "state": "running", "ended_at": None, **fields}
    workers.register(rt.store, worker, record)


def open_ids(rt: Runtime, run: str = "r") -> list[str]:
    """Ids of a run's open messages, oldest first."""
    return [hint.message for hint in hints(rt, run)]


def take(rt: Runtime, worker: str, *ids: str) -> list[Document]:
    """A claim that the worker will never record."""
    return messages.claim(rt.store, ids, worker=worker, process=worker, token=f"{worker}/1")


def claimed(rt: Runtime) -> list[claim.Work]:
    """What is open, claimed by this process."""
    return [work for work in claim.claim(rt, open_ids(rt), rt.token()) if work is not None]


def try_run(flow: Flow, hint: Hint) -> None:
    """Run a hint; its jobs may fail."""
    with contextlib.suppress(ChunkFailedError):
        flow.run(hint)
