"""Takes many jobs through pipelines of stages on Celery, RabbitMQ and MongoDB, and is never in doubt about any of them.

These are the names to write a pipeline with; `pipeline_app.api` has those to use one with.
"""

from __future__ import annotations

from pipeline_app.domain.job import Job, JobLine
from pipeline_app.domain.pipeline import Pipeline, Stage
from pipeline_app.domain.retry import Retry
from pipeline_app.errors import PermanentError, PipelineError

__all__ = [
    "Job",
    "JobLine",
    "PermanentError",
    "Pipeline",
    "PipelineError",
    "Retry",
    "Stage",
]
