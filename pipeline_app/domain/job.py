"""A job: as a line of a seed file, as the store names it, and as a handler sees it."""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pipeline_app.domain.durations import seconds
from pipeline_app.errors import BadJobLineError, UsageError

#: Ten years: a longer delay is a mistake in the unit.
MAX_DELAY_S = 10 * 365 * 86400

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_run_name(name: str) -> str:
    """`name`, if a run may be called that: letters, digits, `.`, `_`, `-`, at most 100, and not `last`."""
    if not _RUN_NAME.fullmatch(name) or name == "last":
        raise UsageError(
            f"a run cannot be called {name!r}",
            hint="use letters, digits, '.', '_' and '-', at most 100; 'last' stands for the newest run",
        )
    return name


def job_key(run: str, job_id: str) -> str:
    """The `_id` of a job in the store. The slash is the separator, so one inside a job id is escaped."""
    return f"{run}/{job_id.replace('%', '%25').replace('/', '%2F')}"


def turn_id(run: str, order_key: str) -> str:
    """The `_id` of what jobs with that order key take turns at."""
    return job_key(run, order_key)


def idempotency_key(run: str, job_id: str, stage: str, generation: int) -> str:
    """32 hex digits that stay the same however often a job's handler is run in a stage and generation."""
    return hashlib.sha256(f"{job_key(run, job_id)}/{stage}/{generation}".encode()).hexdigest()[:32]


def _scalar_to_str(value: object) -> object:
    """Numbers as ids and tag values are taken for their text; everything else is left for pydantic to judge."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _storable(value: str) -> str:
    """Ids and tags are keys in MongoDB: UTF-8, and no NUL."""
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        raise ValueError("it holds half a surrogate pair, which is no character") from exc
    if "\x00" in value:
        raise ValueError("it holds a NUL character")
    return value


def _duration(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError("write a number of seconds or a duration such as '5m'")  # noqa: TRY004 - pydantic's protocol
    try:
        return seconds(value)
    except UsageError as exc:
        raise ValueError(exc.message) from exc


def _aware(value: datetime) -> datetime:
    """Times without a zone are UTC. MongoDB keeps milliseconds."""
    try:
        value = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    except OverflowError as exc:
        raise ValueError("in UTC it is before the year 1 or after 9999") from exc
    return value.replace(microsecond=value.microsecond // 1000 * 1000)


JobId = Annotated[
    str, Field(min_length=1, max_length=200), BeforeValidator(_scalar_to_str), AfterValidator(_storable)
]
Text = Annotated[str, BeforeValidator(_scalar_to_str), AfterValidator(_storable)]
Delay = Annotated[float, Field(le=MAX_DELAY_S), BeforeValidator(_duration)]
Time = Annotated[datetime, AfterValidator(_aware)]


class JobLine(BaseModel):
    """One job to add to a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: Unique in its run; 1 to 200 characters.
    job_id: JobId
    #: Input of the first stage: anything JSON can say.
    payload: Any = None
    #: Target of the job; chooses its partition and is matched by selectors.
    tags: dict[Text, Text] = Field(default_factory=dict, max_length=50)
    #: Seconds (or a duration such as "5m") before the job may start.
    delay_s: Delay | None = None
    #: Time before which the job does not start, ISO 8601; UTC if it has no zone.
    not_before: Time | None = None
    #: Time after which the job is not started any more but dead-lettered as `expired`.
    expires_at: Time | None = None
    #: Jobs of one key go through the whole pipeline one at a time, in the order in which they were added.
    order_key: JobId | None = None
    #: Jobs with a higher one are let go first wherever jobs wait; equal ones in the order in which they were added.
    priority: Annotated[int, Field(ge=-1000, le=1000, strict=True)] = 0

    def due_at(self, now: datetime) -> datetime | None:
        """When a delayed job may start; None if it is not delayed."""
        from_delay = _aware(now + timedelta(seconds=self.delay_s)) if self.delay_s else None
        return max((time for time in (from_delay, self.not_before) if time is not None), default=None)

    def expiry(self) -> datetime | None:
        """`expires_at` in UTC."""
        return self.expires_at


def parse_job_line(line: str | bytes, number: int) -> JobLine:
    """The job in line `number` (from 1) of a seed file.

    Raises BadJobLineError that names the line and the field.
    """
    try:
        return JobLine.model_validate_json(line)
    except ValidationError as exc:
        raise BadJobLineError(f"line {number}: {first_error(exc)}") from exc


def as_job_line(job: JobLine | Mapping[str, Any], number: int) -> JobLine:
    """`job` as the API takes it, the `number`-th of its seeding (from 1).

    Raises BadJobLineError that names the job and the field.
    """
    if isinstance(job, JobLine):
        return job
    try:
        return JobLine.model_validate(job)
    except ValidationError as exc:
        raise BadJobLineError(f"job {number}: {first_error(exc)}") from exc


def first_error(exc: ValidationError) -> str:
    """The first thing wrong, in one line."""
    first = exc.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    what = str(first["msg"]).removeprefix("Value error, ").replace(" at line 1 column ", " at column ")
    return (f"{where}: {what}" if where else what).encode("utf-8", "replace").decode()


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a handler may know about the job beyond its input; asked for by annotating a parameter with `Job`."""

    #: The job's id in its run.
    id: str
    run: str
    stage: str
    tags: Mapping[str, str]
    #: One more than the failures in this stage and generation; an execution that lost its worker is no failure.
    attempt: int
    #: Stable for job, stage and generation: give it to providers that take idempotency keys.
    key: str
    #: Logs with `run`, `stage` and `job` as attributes of every record, for your formatter.
    log: logging.LoggerAdapter[logging.Logger] = field(repr=False, compare=False)
    #: What the handler reported by `spend`, by unit.
    spent: dict[str, float] = field(default_factory=dict, repr=False, compare=False)

    def spend(self, amount: float, unit: str = "units") -> None:
        """Report what the work costs, for throttles with a budget: tokens, money. Counts also if the handler fails."""
        if not math.isfinite(amount):
            raise ValueError(f"nobody can spend {amount!r} {unit}")
        self.spent[unit] = self.spent.get(unit, 0.0) + amount
