"""A pipeline: an ordered table of stages over plain functions."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline_app.domain.durations import seconds
from pipeline_app.domain.handler import Handler, import_object, inspect_handler
from pipeline_app.domain.partition import ORDER_PARTITIONS, job_partition
from pipeline_app.domain.retry import Retry
from pipeline_app.errors import DefinitionError, NotFoundError, UsageError

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,59}")
#: A chunk's job ids stand in one document and in one event; beyond this nothing is gained.
MAX_CHUNK = 1000
#: Each is a queue of every stage.
MAX_ORDER_PARTITIONS = 1000
#: A shorter time limit is a mistake in the unit.
MIN_TIME_LIMIT_S = 0.1
#: More unfinished jobs than that are no bound.
MAX_BOUND = 10**9

#: What a definition file may say of a stage besides its handler and its retries.
_STAGE_OPTIONS = ("name", "chunk", "losses", "deferrals", "grace", "soft_time_limit", "time_limit")


class Stage:
    """One step of a pipeline: a handler and how it is run.

    Args:
        handler: a function of one input (and, if it wants it, a `Job`), or its dotted path `module:name`.
        name: default is the handler's name.
        chunk: how many jobs travel in one message at most, 1 to 1000.
        retry: when a failed job is tried again.
        deferrals: how often a handler may say that a job's target is closed before the job is dead-lettered.
        losses: how often a job's process may die under its handler in this stage before the job is dead-lettered as
            `worker_lost`. From the first time on the job runs in a process of its own; a death that may have been
            another job's doing, or nobody's, counts a quarter.
        grace: how long a handler may go on after all its jobs were cancelled, before it is stopped; such as "30s".
        soft_time_limit: how long the handler may take for one job before SoftTimeLimitExceeded is raised in it; such as
            "90s". By default as long as it likes.
        time_limit: how long it may take at most: then the attempt has failed, and the handler's slot is given up.

    Raises DefinitionError.
    """

    def __init__(
        self,
        handler: Callable[..., Any] | str,
        *,
        name: str | None = None,
        chunk: int = 1,
        retry: Retry | None = None,
        losses: int = 5,
        deferrals: int = 1000,
        grace: str | float = "30s",
        soft_time_limit: str | float | None = None,
        time_limit: str | float | None = None,
    ) -> None:
        self.handler: Handler = inspect_handler(handler)
        self.name = _check_name("stage", name or self.handler.function.__name__)
        if isinstance(chunk, bool) or not isinstance(chunk, int) or not 1 <= chunk <= MAX_CHUNK:
            raise DefinitionError(f"stage {self.name}: chunk is a whole number from 1 to {MAX_CHUNK}, not {chunk!r}")
        if isinstance(losses, bool) or not isinstance(losses, int) or losses < 1:
            raise DefinitionError(f"stage {self.name}: losses is a whole number from 1, not {losses!r}")
        if isinstance(deferrals, bool) or not isinstance(deferrals, int) or deferrals < 1:
            raise DefinitionError(f"stage {self.name}: deferrals is a whole number from 1, not {deferrals!r}")
        if not isinstance(retry, Retry | None):
            raise DefinitionError(f"stage {self.name}: retry is a Retry, not {retry!r}")
        self.chunk = chunk
        self.retry = retry or Retry()
        self.losses = losses
        self.deferrals = deferrals
        self.grace_s = _duration(f"stage {self.name}: grace", grace)
        self.soft_time_limit_s = _time_limit(f"stage {self.name}: soft_time_limit", soft_time_limit)
        self.time_limit_s = _time_limit(f"stage {self.name}: time_limit", time_limit)
        if self.soft_time_limit_s and self.time_limit_s and self.soft_time_limit_s >= self.time_limit_s:
            raise DefinitionError(
                f"stage {self.name}: soft_time_limit is not below time_limit",
                hint="the soft one comes first, and leaves the handler time to end by itself",
            )

    def definition(self) -> dict[str, Any]:
        """What the run's manifest keeps of it: the path of the handler, not its code."""
        return {
            "name": self.name,
            "handler": self.handler.path,
            "chunk": self.chunk,
            "retry": self.retry.definition(),
            "losses": self.losses,
            "deferrals": self.deferrals,
            "grace": self.grace_s,
            "soft_time_limit": self.soft_time_limit_s,
            "time_limit": self.time_limit_s,
        }

    def __repr__(self) -> str:
        return f"Stage({self.name!r}, chunk={self.chunk})"


class Pipeline:
    """An ordered table of stages.

    Args:
        name: letters, digits and `_`, at most 60.
        stages: in order; their names differ.
        partition_by: tags that choose a job's partition; default is `quota_pool` if a job has it, else all its tags.
        bound: jobs of a run that may be unfinished at a time before its seeders wait; default of new runs.
        order_partitions: how many partitions jobs with an `order_key` are spread over, for new runs.
        then: Celery signatures of your own, called after the last stage with `[{job_id, result, key}]`.

    Raises DefinitionError.
    """

    def __init__(
        self,
        name: str,
        stages: Sequence[Stage],
        *,
        partition_by: Sequence[str] | None = None,
        bound: int | None = None,
        order_partitions: int = ORDER_PARTITIONS,
        then: Any = None,
    ) -> None:
        self.name = _check_name("pipeline", name)
        self.stages = tuple(stages)
        if not self.stages:
            raise DefinitionError(f"pipeline {name}: it has no stages")
        for stage in self.stages:
            if not isinstance(stage, Stage):
                raise DefinitionError(f"pipeline {name}: {stage!r} is not a stage", hint="write Stage(function)")
        names = [stage.name for stage in self.stages]
        for stage_name in names:
            if names.count(stage_name) > 1:
                raise DefinitionError(
                    f"pipeline {name}: two stages are called {stage_name!r}", hint="give one of them name=..."
                )
        self.partition_by = None if partition_by is None else _tag_names(name, partition_by)
        # Both are the run's once it is made, and no part of the definition: workers need neither.
        self.bound = None if bound is None else _whole(f"pipeline {name}: bound", bound, 1, MAX_BOUND)
        self.order_partitions = _whole(f"pipeline {name}: order_partitions", order_partitions, 1, MAX_ORDER_PARTITIONS)
        self.then = signatures(then)

    @property
    def first(self) -> Stage:
        """The stage that seeded jobs start in."""
        return self.stages[0]

    def stage(self, name: str) -> Stage:
        """The stage of that name. Raises NotFoundError."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise NotFoundError(
            f"pipeline {self.name} has no stage {name!r}",
            hint="its stages are " + ", ".join(s.name for s in self.stages),
        )

    def after(self, name: str) -> Stage | None:
        """The stage that follows stage `name`; None after the last."""
        index = self.stages.index(self.stage(name))
        return self.stages[index + 1] if index + 1 < len(self.stages) else None

    def rest(self, name: str) -> tuple[Stage, ...]:
        """The stages after stage `name`."""
        return self.stages[self.stages.index(self.stage(name)) + 1 :]

    def partition(self, tags: Mapping[str, str], order_key: str | None = None) -> str:
        """The partition of a job with these tags, or with that order key."""
        return job_partition(tags, order_key, self.partition_by, self.order_partitions)[0]

    def definition(self) -> dict[str, Any]:
        """Stage order, chunks, partitioning and handler paths, as the manifest keeps them."""
        return {
            "name": self.name,
            "stages": [stage.definition() for stage in self.stages],
            "partition_by": None if self.partition_by is None else list(self.partition_by),
        }

    @property
    def hash(self) -> str:
        """16 hex digits of the definition; a worker runs only jobs of runs whose definition it has.

        Retry policies, budgets, grace and time limits are left out: they may be changed while a run goes on.
        """
        definition = self.definition()
        stages = [{key: row[key] for key in ("name", "handler", "chunk")} for row in definition["stages"]]
        text = json.dumps({**definition, "stages": stages}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"Pipeline({self.name!r}, {' -> '.join(stage.name for stage in self.stages)})"


def signatures(then: Any) -> list[dict[str, Any]]:
    """A Celery signature, a chain, or a list of signatures as plain objects that a manifest can keep."""
    if then is None:
        return []
    if isinstance(then, Mapping):
        tasks = then.get("kwargs", {}).get("tasks") if then.get("task") == "celery.chain" else None
        parts: list[Any] = list(tasks) if tasks is not None else [then]
    else:
        parts = list(then)
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("task"), str):
            raise DefinitionError(f"then: {part!r} is not a Celery signature", hint="write my_task.s()")
        if str(part["task"]).startswith("celery."):
            raise DefinitionError(f"then: {part['task']} is not supported", hint="plain tasks and chains of them")
    return [json.loads(json.dumps(dict(part), default=str)) for part in parts]


def load_pipeline(path: str, root: Path) -> Pipeline:
    """The pipeline that the setting `pipelines` names: `module:attribute`, or a definition file in the folder `root`.

    Raises DefinitionError.
    """
    pipeline = load_definition(root / path) if path.endswith((".toml", ".json")) else import_object(path)
    if not isinstance(pipeline, Pipeline):
        raise DefinitionError(f"{path} is a {type(pipeline).__name__}, not a Pipeline")
    return pipeline


def load_definition(path: Path) -> Pipeline:
    """The pipeline in a TOML or JSON file that names its handlers by dotted path.

    Raises DefinitionError that names the file and what is wrong in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as exc:
        raise DefinitionError(f"{path}: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise DefinitionError(f"{path}: {exc}") from exc
    try:
        return from_definition(table)
    except DefinitionError as exc:
        raise DefinitionError(f"{path}: {exc.message}", hint=exc.hint) from exc


def from_definition(table: Any) -> Pipeline:
    """The pipeline that a definition describes. Raises DefinitionError."""
    if not isinstance(table, Mapping):
        raise DefinitionError("a definition is a table")
    _known(table, {"name", "stages", "partition_by", "bound", "order_partitions"}, "definition")
    if not isinstance(table.get("name"), str):
        raise DefinitionError("name is missing")
    rows = table.get("stages")
    if not isinstance(rows, list):
        raise DefinitionError("stages is missing", hint="write a [[stages]] table for each stage")
    options = {key: table[key] for key in ("partition_by", "bound", "order_partitions") if key in table}
    return Pipeline(table["name"], [_stage(row) for row in rows], **options)


def _stage(row: Any) -> Stage:
    if not isinstance(row, Mapping):
        raise DefinitionError("each of stages is a table")
    _known(row, {"handler", "retry", *_STAGE_OPTIONS}, "stage")
    if not isinstance(row.get("handler"), str):
        raise DefinitionError("a stage has no handler", hint='write handler = "module:name"')
    options = {key: row[key] for key in _STAGE_OPTIONS if key in row}
    return Stage(row["handler"], retry=_retry(row.get("retry")), **options)


def _retry(table: Any) -> Retry | None:
    if table is None:
        return None
    if not isinstance(table, Mapping):
        raise DefinitionError("retry is a table")
    names = {"backoff_s": "backoff", "cap_s": "cap"}
    options = {names.get(str(key), str(key)): value for key, value in table.items()}
    _known(options, {"attempts", "backoff", "cap", "jitter"}, "retry")
    return Retry(**options)


def _duration(what: str, value: str | float) -> float:
    try:
        return seconds(value)
    except UsageError as exc:
        raise DefinitionError(f"{what}: {exc.message}", hint=exc.hint) from exc


def _time_limit(what: str, value: str | float | None) -> float | None:
    if value is None:
        return None
    limit = _duration(what, value)
    if limit < MIN_TIME_LIMIT_S:
        raise DefinitionError(f"{what} is at least {MIN_TIME_LIMIT_S} s, not {value!r}")
    return limit


def _whole(what: str, value: Any, lowest: int, highest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise DefinitionError(f"{what} is a whole number from {lowest} to {highest:,}, not {value!r}")
    return value


def _tag_names(pipeline: str, names: Any) -> tuple[str, ...]:
    if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise DefinitionError(f"pipeline {pipeline}: partition_by is a list of tags, not {names!r}")
    return tuple(names)


def _known(table: Mapping[str, Any], names: set[str], what: str) -> None:
    unknown = sorted(set(table) - names)
    if unknown:
        raise DefinitionError(f"{what}: unknown key {unknown[0]!r}", hint="known keys: " + ", ".join(sorted(names)))


def _check_name(what: str, name: str) -> str:
    # No dot and no double underscore: both separate the parts of queue names.
    if not isinstance(name, str) or not _NAME.fullmatch(name) or "__" in name:
        raise DefinitionError(
            f"a {what} cannot be called {name!r}",
            hint="a letter, then letters, digits and single '_', at most 60",
        )
    return name
