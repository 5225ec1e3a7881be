"""What the flow and the control plane work with in one process: connections, pipelines, and what is kept in memory.

Made once for each process (`build`), never carried over a fork: MongoDB's client and AMQP's sockets don't survive one.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version as version_of

from celery import Celery

from pipeline_app.domain.job import job_key
from pipeline_app.domain.outcome import Move
from pipeline_app.domain.pipeline import Pipeline
from pipeline_app.domain.plan import RunPlan
from pipeline_app.domain.target import Table, Target
from pipeline_app.errors import NotFoundError, StoreError
from pipeline_app.settings import Settings
from pipeline_app.store import holds, jobs, manifests, messages, throttles
from pipeline_app.store.client import Document, Store
from pipeline_app.transport.publisher import Publisher

logger = logging.getLogger(__name__)

#: Version of this package.
VERSION = version_of("pipeline-app")
#: A process without a worker's lifeline asks by itself whether a run was cancelled, this often.
REFRESH_S = 1.0
#: A process with a lifeline reads its flags again after this, whether or not it was told of a change.
SAFETY_S = 5.0
#: Runs whose plan a process remembers; beyond, the one that it has known longest is read anew.
PLANS = 1000


def new_incarnation() -> str:
    """A name for a worker process and its lease, unlike any other; short enough for shared memory."""
    return f"{socket.gethostname()[:40]}.{os.getpid()}.{uuid.uuid4().hex[:8]}"


def process_id(process: str) -> int:
    """The id that a process of that name has, or had, on its machine."""
    return int(process.rsplit(".", 2)[1])


@dataclass(frozen=True, kw_only=True)
class Closure:
    """A hold or pause, as the gates see it."""

    id: str
    is_pause: bool
    #: What messages say that it let go itself since it was closed the last time; None if it lets nothing go.
    passes: str | None = None


@dataclass(frozen=True, kw_only=True)
class Throttle:
    """A throttle, as those see it who have to ask for leave."""

    id: str
    rate_per_s: float | None
    concurrency: int | None
    #: The unit that its budget counts, if it has one.
    unit: str | None
    #: Whether it lets jobs go by priority.
    is_ordered: bool

    @property
    def move(self) -> Move:
        """What becomes of a job whose turn it is not."""
        return Move.ORDER if self.is_ordered else Move.THROTTLE


@dataclass(frozen=True, kw_only=True)
class Flags:
    """All that stops jobs, as it was at one look."""

    cancelled: frozenset[str] = frozenset()
    closures: Table[Closure] = field(default_factory=Table)
    throttles: Table[Throttle] = field(default_factory=Table)
    #: Messages that workers hold and that jobs were taken from -> the jobs that are left in each.
    left_in: Mapping[str, frozenset[str]] = field(default_factory=dict)


class Memory:
    """What a process remembers of runs and of what is closed, so that nothing is asked once per job."""

    def __init__(self, store: Store, version: Callable[[], int | None]) -> None:
        self._store = store
        #: Version of the flags as the lifeline last saw it, from shared memory; None without a lifeline.
        self._version = version
        self._seen: int | None = -1
        self._checked = 0.0
        #: After a failed load: not at every look again.
        self._not_before = 0.0
        self._loading = threading.Lock()
        self._flags = Flags()
        #: Holds that handlers of this process have set, and which load of the flags is sure to see each in the store.
        self._own: dict[str, tuple[Target, int | None]] = {}
        self._loads = 0
        self._guard = threading.Lock()
        self._plans: dict[str, RunPlan] = {}

    def plan(self, run: str) -> RunPlan | None:
        """The run's plan, None if there is no such run. A manifest's definition never changes."""
        plan = self._plans.get(run)
        if plan is None:
            manifest = manifests.find(self._store, run)
            if manifest is None:
                return None
            plan = RunPlan.of(manifest)
            with self._guard:
                self._plans[run] = plan
                if len(self._plans) > PLANS:
                    del self._plans[next(iter(self._plans))]
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

    def flags(self) -> Flags:
        """What is cancelled, closed and throttled: a look into memory, reloaded only when something changed."""
        version = self._version()
        age_s = time.monotonic() - self._checked
        # Looked at anew now and then, even if nobody said that anything changed.
        if version == self._seen and age_s <= (REFRESH_S if version is None else SAFETY_S):
            return self._flags
        if time.monotonic() < self._not_before:
            return self._flags
        # One thread loads; the others go by what is known meanwhile, for as long as a read takes.
        if self._loading.acquire(blocking=self._seen == -1):
            try:
                self._load(version)
            except StoreError as exc:
                # The next look tries again. Nothing is recorded while the store is away.
                logger.info("flags are as they were: %s", exc)
                self._not_before = time.monotonic() + REFRESH_S
            finally:
                self._loading.release()
        return self._flags

    def _load(self, version: int | None) -> None:
        self._loads += 1
        cancelled = frozenset(manifests.cancelled(self._store))
        found = Table((Target.of(row), _throttle(row)) for row in throttles.all_of(self._store))
        left_in = _left_in_messages(self._store)
        rows = holds.in_force(self._store)
        with self._guard:
            # What handlers closed since the reading began is not among the rows.
            self._own = {hold: own for hold, own in self._own.items() if own[1] is None or own[1] > self._loads}
            closures = [(Target.of(row), _closure(row)) for row in rows if row["_id"] not in self._own]
            closures += [(target, Closure(id=hold, is_pause=False)) for hold, (target, _) in self._own.items()]
            self._flags = Flags(cancelled=cancelled, closures=Table(closures), throttles=found, left_in=left_in)
        self._seen, self._checked = version, time.monotonic()

    def close(self, hold: str, target: Target) -> None:
        """Close a target for this process at once; the store hears of it next."""
        with self._guard:
            self._own[hold] = (target, None)
            entries = [entry for entry in self._flags.closures.entries if entry[1].id != hold]
            closures = Table([*entries, (target, Closure(id=hold, is_pause=False))])
            self._flags = replace(self._flags, closures=closures)

    def closed(self, hold: str) -> None:
        """The store has the hold: a load that begins from here on sees it there."""
        with self._guard:
            if hold in self._own:
                self._own[hold] = (self._own[hold][0], self._loads + 1)

    def is_cancelled(self, run: str) -> bool:
        """Whether the run was cancelled."""
        return run in self.flags().cancelled


def _left_in_messages(store: Store) -> dict[str, frozenset[str]]:
    marked = messages.claimed(store, cancelled_at={"$exists": True})
    keys = [job_key(row["run"], job) for row in marked for job in row["jobs"]]
    named = jobs.named(store, keys) if keys else {}
    return {
        row["_id"]: frozenset(job for job in row["jobs"] if named.get(job_key(row["run"], job)) == row["_id"])
        for row in marked
    }


def _closure(row: Document) -> Closure:
    return Closure(id=row["_id"], is_pause=row["kind"] == "pause", passes=holds.pass_of(row))


def _throttle(row: Document) -> Throttle:
    return Throttle(
        id=row["_id"],
        rate_per_s=row["rate_per_s"],
        concurrency=row["concurrency"],
        unit=row["budget"]["unit"] if row["budget"] else None,
        is_ordered=bool(row["ordered"]),
    )


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
