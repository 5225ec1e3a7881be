"""Every error that the framework raises, under one root.

    PipelineError
    ├── PermanentError            raised by handlers: do not retry this job
    ├── RateLimited               raised by handlers: the target is closed until then; costs no attempt
    ├── InvalidInputError         a payload is not what the handler's annotation asks for
    ├── InvalidResultError        a handler's result cannot be stored
    ├── UsageError                the command or call is wrong                      (exit code 2)
    │   └── DefinitionError       a pipeline, stage or retry policy is ill-defined
    ├── RefusedError              the answer is no                                  (exit code 1)
    │   ├── NotFoundError         no such run, job, stage or pipeline
    │   ├── RunExistsError
    │   ├── BadJobLineError       a line of a seed file cannot be read
    │   └── DuplicateJobError     a job id is already in the run
    └── UnreachableError          a service does not answer                         (exit code 3)
        ├── StoreError            MongoDB
        └── BrokerError           RabbitMQ
            └── QueueRefusedError it answers, and refuses a queue or a message

An error's message is written where it is raised; without one the first line of its docstring is the message.
`code` is for machines, `hint` says what to do about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import ClassVar


class PipelineError(Exception):
    """Something went wrong in pipeline_app."""

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str | None = None, *, hint: str | None = None) -> None:
        self.message = message or (self.__doc__ or "").strip().split("\n", 1)[0]
        self.hint = hint
        super().__init__(self.message)


class PermanentError(PipelineError):
    """The handler says that this job can never succeed."""

    code = "permanent"


class RateLimited(PipelineError):  # noqa: N818 - what a handler says, not what went wrong
    """The target takes no more for now.

    Closes the target for all stages and workers, and holds the job until it is open again; no attempt is spent.

    Args:
        message: what the provider said; optional.
        until: when it may be asked again, a time with its zone (UTC if it has none).
        retry_after: the same as seconds, or a `Retry-After` header as it came: seconds or an HTTP date.
        selector: the tags that are closed, such as `{"provider": "openai"}`; by default those that choose the job's
            partition.

    With neither `until` nor `retry_after` the target is closed for a few seconds, and longer each time that it
    refuses.
    """

    code = "rate_limited"

    def __init__(
        self,
        message: str | None = None,
        *,
        until: datetime | None = None,
        retry_after: float | str | None = None,
        selector: Mapping[str, str] | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.until = until
        self.retry_after = retry_after
        self.selector = selector


class InvalidInputError(PipelineError):
    """The payload is not what the handler expects."""

    code = "invalid_input"


class InvalidResultError(PipelineError):
    """The handler's result cannot be stored."""

    code = "invalid_result"


class UsageError(PipelineError):
    """That is not how this is used."""

    code = "usage"
    exit_code = 2


class DefinitionError(UsageError):
    """The pipeline's definition is not valid."""

    code = "definition"


class RefusedError(PipelineError):
    """That is refused."""

    code = "refused"


class NotFoundError(RefusedError):
    """There is no such thing."""

    code = "not_found"


class RunExistsError(RefusedError):
    """A run of that name exists already."""

    code = "run_exists"


class BadJobLineError(RefusedError):
    """A line of the seed file cannot be read."""

    code = "bad_job_line"


class DuplicateJobError(RefusedError):
    """A job with that id is already in the run."""

    code = "duplicate_job"


class UnreachableError(PipelineError):
    """A service does not answer."""

    code = "unreachable"
    exit_code = 3


class StoreError(UnreachableError):
    """MongoDB does not answer."""

    code = "store_unreachable"


class BrokerError(UnreachableError):
    """RabbitMQ does not answer."""

    code = "broker_unreachable"


class QueueRefusedError(BrokerError):
    """RabbitMQ refuses a queue, or a message for it."""

    code = "queue_refused"
