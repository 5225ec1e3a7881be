"""Every error that the framework raises, under one root.

    PipelineError
    ├── PermanentError            raised by handlers: do not retry this job
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

An error's message is written where it is raised; without one its docstring is the message.
`code` is for machines, `hint` says what to do about it.
"""

from __future__ import annotations

from typing import ClassVar


class PipelineError(Exception):
    """Something went wrong in pipeline_app."""

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str | None = None, *, hint: str | None = None) -> None:
        self.message = message or (self.__doc__ or "").strip()
        self.hint = hint
        super().__init__(self.message)


class PermanentError(PipelineError):
    """The handler says that this job can never succeed."""

    code = "permanent"


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
