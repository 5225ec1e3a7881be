"""Takes many jobs through pipelines of stages on Celery, RabbitMQ and MongoDB, and is never in doubt about any of them.

The names to write a pipeline with are loaded at once. Those to use one with (`create_run` and so on) come from
`pipeline_app.api` at their first use: handlers import this package in every worker, and should not load all of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline_app.domain.job import Job, JobLine
from pipeline_app.domain.pipeline import Pipeline, Stage
from pipeline_app.domain.rate_limit import retry_after
from pipeline_app.domain.retry import Retry
from pipeline_app.errors import PermanentError, PipelineError, RateLimited

if TYPE_CHECKING:
    from pipeline_app.api import (
        cancel,
        chain,
        clear_hold,
        clear_throttle,
        create_run,
        failure_groups,
        hold,
        holds,
        move,
        pause,
        pause_replay,
        replay,
        replays,
        results,
        resume,
        resume_replay,
        seed,
        set_priority,
        status,
        stop_replay,
        throttle,
        throttles,
        verify,
        wait,
    )

__all__ = [
    "Job",
    "JobLine",
    "PermanentError",
    "Pipeline",
    "PipelineError",
    "RateLimited",
    "Retry",
    "Stage",
    "cancel",
    "chain",
    "clear_hold",
    "clear_throttle",
    "create_run",
    "failure_groups",
    "hold",
    "holds",
    "move",
    "pause",
    "pause_replay",
    "replay",
    "replays",
    "results",
    "resume",
    "resume_replay",
    "retry_after",
    "seed",
    "set_priority",
    "status",
    "stop_replay",
    "throttle",
    "throttles",
    "verify",
    "wait",
]

_FROM_API = frozenset(__all__) - globals().keys()


def __getattr__(name: str) -> Any:
    if name not in _FROM_API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline_app import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
