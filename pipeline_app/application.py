"""Puts an application together: its pipelines, the Celery app with the settings that the promises rest on, a runtime.

Used by the worker (`pipeline_app.celery`), by the command line and by `pipeline_app.api`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from celery import Celery

from pipeline_app import settings as settings_module
from pipeline_app.domain.pipeline import Pipeline, load_pipeline
from pipeline_app.errors import DefinitionError, UsageError
from pipeline_app.flow.consume import Flow, StageTask
from pipeline_app.flow.forward import task_name
from pipeline_app.runtime import Runtime, build
from pipeline_app.settings import FILE_KEYS, Settings
from pipeline_app.store import schema
from pipeline_app.transport.connecting import addresses
from pipeline_app.transport.publisher import ANSWER_TIMEOUT_S
from pipeline_app.transport.topology import HintRouter, idle_queue, plain_queue


def load_pipelines(paths: Iterable[str]) -> dict[str, Pipeline]:
    """Name -> pipeline, from `module:attribute` or definition files relative to the project's folder.

    Raises DefinitionError.
    """
    root = settings_module.project_root()
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    found: dict[str, Pipeline] = {}
    for path in paths:
        pipeline = load_pipeline(path, root)
        if pipeline.name in found:
            raise DefinitionError(f"two pipelines are called {pipeline.name!r}", hint="see celeryconfig.py")
        found[pipeline.name] = pipeline
    return found


def make_celery(settings: Settings, pipelines: dict[str, Pipeline], flow: Callable[[], Flow]) -> Celery:
    """The Celery app: the user's celeryconfig.py, and over it what may not be otherwise."""
    app = Celery("pipeline_app")
    own = None
    if (settings_module.project_root() / "celeryconfig.py").is_file():
        own = importlib.import_module("celeryconfig")
        # Celery shows its settings to whoever asks (`celery report`, `inspect conf`, Flower): ours have passwords.
        app.config_from_object({name: value for name, value in vars(own).items() if name not in FILE_KEYS})
    tasks = {task_name(p.name, s.name): (p.name, s.name) for p in pipelines.values() for s in p.stages}
    app.conf.update(_fixed(settings, own, app.conf, HintRouter(settings.queue_type, tasks)))
    for pipeline in pipelines.values():
        for stage in pipeline.stages:
            app.register_task(StageTask(task_name(pipeline.name, stage.name), stage, flow))
    return app


def _fixed(settings: Settings, own: ModuleType | None, conf: Any, router: HintRouter) -> dict[str, Any]:
    """Settings that the promises rest on; several of Celery's defaults lose work silently."""
    routes = conf.get("task_routes") or []
    default_queue = conf.get("task_default_queue") or "celery"
    # As Celery has it, since plain applications publish there, too; on a cluster the user sets it to quorum.
    default_type = getattr(own, "task_default_queue_type", "classic")
    own_queues = list(conf.get("task_queues") or [])
    # The embedded broker is polled; kombu's own pause is a second.
    options: dict[str, Any] = {"polling_interval": 0.1}
    if not settings.broker_is_embedded:
        # Without confirms a lost message is no error; without time limits a silent broker is a worker that hangs.
        options = {"confirm_publish": True, "read_timeout": ANSWER_TIMEOUT_S, "write_timeout": ANSWER_TIMEOUT_S}
    return {
        "broker_url": ";".join(addresses(settings.amqp_url)),
        "broker_transport_options": {**(conf.get("broker_transport_options") or {}), **options},
        "broker_connection_retry_on_startup": True,
        # A consumer timeout of RabbitMQ closes the channel: reconnect instead of ending the worker.
        "broker_channel_error_retry": True,
        "broker_connection_max_retries": None,
        "result_backend": conf.get("result_backend") or "disabled://",
        # A cold stop lets running handlers end within this; what does not is given back.
        "worker_soft_shutdown_timeout": getattr(own, "worker_soft_shutdown_timeout", 30.0),
        "accept_content": ["json"],
        "task_serializer": "json",
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        # Celery's four would be reserved by one worker while another is idle, for each queue if it is a quorum queue.
        "worker_prefetch_multiplier": getattr(own, "worker_prefetch_multiplier", 1),
        "worker_enable_prefetch_count_reduction": False,
        # Seconds that a killed child's message waits for an exit status that may still come.
        "worker_lost_wait": 2.0,
        # A redelivered copy finds its message claimed; nothing that runs needs to be stopped for it.
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "task_routes": [router, *(routes if isinstance(routes, (list, tuple)) else [routes])],
        "task_queues": [idle_queue(settings.queue_type), plain_queue(default_queue, default_type), *own_queues],
        "task_default_queue": default_queue,
        "worker_consumer": "pipeline_app.worker.follow:StageConsumer",
        "worker_hijack_root_logger": conf.get("worker_hijack_root_logger", True),
    }


def client_runtime(settings: Settings | None = None) -> Runtime:
    """A runtime for a process that is no worker: the command line, a script, Flower.

    Raises UsageError, DefinitionError. Connects at first use.
    """
    chosen = settings or settings_module.current()
    pipelines = load_pipelines(chosen.pipelines)

    def no_flow() -> Flow:
        raise UsageError("this process runs no stages", hint="start a worker: celery -A pipeline_app worker")

    return build(chosen, make_celery(chosen, pipelines, no_flow), pipelines)


def prepare(rt: Runtime) -> None:
    """Make sure that the store answers, has transactions and is laid out. Raises StoreError, UsageError."""
    rt.store.synchronise()
    schema.ensure(rt.store)
