"""The worker's composition root: `celery -A pipeline_app` finds `app` here. Nobody imports it.

The main process and every child of its pool get a runtime of their own at first use; what they share is in `Shared`,
made here, before any fork.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any

from celery import signals

from pipeline_app import settings as settings_module
from pipeline_app.application import load_pipelines, make_celery, prepare
from pipeline_app.control.duties.pacing import pacing
from pipeline_app.control.duties.sweep import sweep
from pipeline_app.errors import StoreError
from pipeline_app.flow.board import Board
from pipeline_app.flow.consume import Flow, StageRequest
from pipeline_app.runtime import Runtime, build
from pipeline_app.worker.follow import Follow
from pipeline_app.worker.lifeline import Shared
from pipeline_app.worker.options import add_options
from pipeline_app.worker.overtime import Overtime
from pipeline_app.worker.process import WorkerProcess
from pipeline_app.worker.recycle import Recycle, Recycling, add_recycling_options

__all__ = ["app"]

_settings = settings_module.current()
_pipelines = load_pipelines(_settings.pipelines)
_shared = Shared()
_board = Board()
_lock = threading.Lock()
_flows: dict[int, Flow] = {}


def _flow() -> Flow:
    """This process's flow; a child must not use what was connected before the fork."""
    flow = _flows.get(os.getpid())
    if flow is None:
        with _lock:
            flow = _flows.get(os.getpid())
            if flow is None:
                rt = build(
                    _settings,
                    app,
                    _pipelines,
                    incarnation=lambda: _shared.incarnation,
                    version=lambda: _shared.version,
                )
                # Children, too: all times of a run are MongoDB's.
                with contextlib.suppress(StoreError):
                    rt.store.synchronise()
                flow = _flows[os.getpid()] = Flow(
                    rt,
                    lambda: _shared.stopping,
                    Follow.process.slots,
                    leased=lambda: _shared.leased,
                    board=_board,
                    give_up_slot=Recycle.recycling.give_up_slot,
                )
    return flow


def _runtime() -> Runtime:
    return _flow().rt


app = make_celery(_settings, _pipelines, _flow)
add_options(app, _pipelines)
add_recycling_options(app)

Follow.process = WorkerProcess(_shared, _pipelines, _runtime)
app.steps["consumer"].add(Follow)
Recycle.recycling = Recycling(Follow.process, _board)
app.steps["worker"].add(Recycle)
StageRequest.on_lost = Follow.process.janitor.lost

_overtime = Overtime(_board, _runtime)
_leaders = (sweep(_runtime), pacing(_runtime))


def _up() -> None:
    """The store is laid out by whoever comes first; a worker that starts before the store does waits for it."""
    # While the store is away the lifeline says so; and what was seeded has been laid out by its seeder.
    with contextlib.suppress(StoreError):
        prepare(_runtime())
    for leader in _leaders:
        leader.start()


Follow.process.on_up.append(_up)
if any(stage.time_limit_s for pipeline in _pipelines.values() for stage in pipeline.stages):
    Follow.process.on_up.append(_overtime.start)
Follow.process.on_leave.extend(leader.stop for leader in _leaders)


def _revoked(request: Any = None, **_: Any) -> None:
    """A revoked message is acknowledged by Celery: its jobs go on under a message of another id."""
    task_id = getattr(request, "id", None)
    if task_id is not None:
        Follow.process.janitor.revoked(task_id)


signals.worker_before_create_process.connect(Follow.process.before_fork)
signals.worker_shutdown.connect(Follow.process.leave)
signals.task_revoked.connect(_revoked)
