"""One job through its handler, in whatever process: what a handler is given, and what its errors mean.

Called by handle in the worker's own process, and in the process of a suspect (`alone_child.py`), which must start fast:
nothing here imports Celery or what the worker needs besides.
"""

from __future__ import annotations

from typing import Any

from pipeline_app.domain.handler import Handler, to_storable
from pipeline_app.domain.job import Job
from pipeline_app.domain.states import DeadKind
from pipeline_app.errors import InvalidInputError, InvalidResultError, PermanentError
from pipeline_app.store import outputs

#: Errors that no second attempt mends, and the kind of dead letter that each becomes.
PERMANENT: dict[type[BaseException], DeadKind] = {
    PermanentError: DeadKind.PERMANENT,
    InvalidInputError: DeadKind.INVALID_INPUT,
    InvalidResultError: DeadKind.INVALID_RESULT,
}


def execute(handler: Handler, payload: Any, job: Job, message: str) -> Any:
    """Run the handler for one job of `message`, and encode its output as it is stored.

    Raises whatever the handler raises; InvalidInputError, InvalidResultError.
    """
    value = handler.validate(payload)
    result = to_storable(handler.call(value, job))
    return outputs.encode_output(job.run, job.id, job.stage, message, result)


def permanent_kind(exc: BaseException) -> DeadKind | None:
    """The kind of dead letter that the error makes of its job; None if another attempt may mend it."""
    return next((kind for error, kind in PERMANENT.items() if isinstance(exc, error)), None)
