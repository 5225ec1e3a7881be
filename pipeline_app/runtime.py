"""What the flow and the control plane work with in one process: connections, pipelines, and what is kept in memory.

Made once for each process (`build`), never carried over a fork: MongoDB's client and AMQP's sockets don't survive one.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from celery import Celery

from pipeline_app.domain.pipeline import Pipeline
from pipeline_app.domain.plan import RunPlan
from pipeline_app.errors import NotFoundError, StoreError
from pipeline_app.settings import Settings
from pipeline_app.store import manifests
from pipeline_app.store.client import Store
from pipeline_app.transport.publisher import Publisher

#: A process without a worker's lifeline asks by itself whether a run was cancelled, this often.
REFRESH_S = 1.0


def new_incarnation() -> str:
    """A name for a worker process and its lease, unlike any other; short enough for shared memory."""
    return f"{socket.gethostname()[:40]}.{os.getpid()}.{uuid.uuid4().hex[:8]}"


def process_id(process: str) -> int:
    """The id that a process of that name has, or had, on its machine."""
    return int(process.rsplit(".", 2)[1])


class Memory:
    """What a process remembers of runs, so that nothing is asked once per job."""

    def __init__(self, store: Store, version: Callable[[], int | None]) -> None:
        self._store = store
        #: Version of the flags as the lifeline last saw it, from shared memory; None without a lifeline.
        self._version = version
        self._seen: int | None = -1
        self._checked = 0.0
        self._cancelled: set[str] = set()
        self._plans: dict[str, RunPlan] = {}

    def plan(self, run: str) -> RunPlan | None:
        """The run's plan, None if there is no such run. A manifest's definition never changes."""
        plan = self._plans.get(run)
        if plan is None:
            manifest = manifests.find(self._store, run)
            if manifest is None:
                return None
            plan = self._plans[run] = RunPlan.of(manifest)
        return plan

    def need_plan(self, run: str) -> RunPlan:
        """The run's plan. Raises NotFoundError."""
        plan = self.plan(run)
        if plan is None:
            raise NotFoundError(f"there is no run {run!r}")
        return plan

    def forget(self, run: str) -> None:
        """Drop what is remembered of a run: one of the same name may be made after it was deleted."""
        self._plans.pop(run, None)

    def is_cancelled(self, run: str) -> bool:
        """Whether the run was cancelled: a look into memory, reloaded only when something changed."""
        version = self._version()
        if version != self._seen or (version is None and time.monotonic() - self._checked > REFRESH_S):
            try:
                self._cancelled = manifests.cancelled(self._store)
                self._seen, self._checked = version, time.monotonic()
            except StoreError:
                # The gate is a convenience: a job that runs all the same is refused when it is recorded.
                return run in self._cancelled
        return run in self._cancelled


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The bag. Everything in it is safe to share between the threads of a process."""

    settings: Settings
    app: Celery
    pipelines: Mapping[str, Pipeline]
    store: Store
    publisher: Publisher
    memory: Memory
    #: The incarnation whose lease covers what this process claims, as it is now.
    incarnation: Callable[[], str]
    #: Name of this process, and of its connections.
    process: str
    _free_counters: list[str] = field(default_factory=list)
    _counters: itertools.count[int] = field(default_factory=itertools.count)
    _tokens: itertools.count[int] = field(default_factory=itertools.count)

    def token(self) -> str:
        """A fresh claim token of this process."""
        return f"{self.incarnation()}/{self.process.rsplit('.', 1)[-1]}/{next(self._tokens)}"

    @contextmanager
    def counting(self) -> Iterator[str]:
        """A name for counters that no other thread uses meanwhile: two transactions on one document would collide."""
        try:
            name = self._free_counters.pop()
        except IndexError:
            name = f"{self.process}.{next(self._counters)}"
        try:
            yield name
        finally:
            self._free_counters.append(name)

    def pipeline_of(self, plan: RunPlan) -> Pipeline | None:
        """The pipeline with exactly the run's definition; None if this process does not have it."""
        pipeline = self.pipelines.get(plan.pipeline)
        return pipeline if pipeline is not None and pipeline.hash == plan.hash else None

    def close(self) -> None:
        """End the connections."""
        self.publisher.close()
        self.store.close()


def build(
    settings: Settings,
    app: Celery,
    pipelines: Mapping[str, Pipeline],
    *,
    incarnation: Callable[[], str] | None = None,
    version: Callable[[], int | None] = lambda: None,
) -> Runtime:
    """A runtime for this process; connects at first use."""
    own = new_incarnation()
    store = Store(settings.mongodb_url, process=own)
    return Runtime(
        settings=settings,
        app=app,
        pipelines=pipelines,
        store=store,
        publisher=Publisher(app, settings.amqp_url, settings.queue_type),
        memory=Memory(store, version),
        incarnation=incarnation or (lambda: own),
        process=own,
    )


