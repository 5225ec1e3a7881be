"""Making runs, adding jobs to them, and what came of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import celery

from pipeline_app.api.connection import connected
from pipeline_app.application import prepare
from pipeline_app.control import results as control_results
from pipeline_app.control import runs
from pipeline_app.control.accounts import verify as control_verify
from pipeline_app.control.accounts.verify import Verification
from pipeline_app.control.seed import seeding
from pipeline_app.control.seed.seeding import Seeded
from pipeline_app.control.sight import status as control_status
from pipeline_app.control.sight.status import Status
from pipeline_app.domain.job import JobLine
from pipeline_app.domain.pipeline import Pipeline
from pipeline_app.flow.forward import task_name


def create_run(run: str, pipeline: Pipeline | str, then: Any = None, bound: int | None = None) -> None:
    """Make a run.

    Args:
        run: its name: letters, digits, `.`, `_` and `-`.
        pipeline: a Pipeline, or the name of one in celeryconfig.py. The workers must know it, too.
        then: your own Celery tasks to call with the results, instead of the pipeline's `then`: a signature, a chain,
            or the pipeline's whole chain with yours behind it (`chain(pipeline) | notify.s()`).
        bound: how many jobs may be unfinished before `seed` waits, instead of the pipeline's `bound`. What workers
            make of jobs (next stages, retries, replays) never waits for it.

    Raises NotFoundError (no such pipeline), RunExistsError, UsageError (the name, the bound), StoreError.
    """
    runs.create_run(connected(), run, pipeline, then=then, bound=bound)


def seed(
    run: str,
    jobs: Iterable[JobLine | Mapping[str, Any]],
    *,
    whole: bool = False,
    skip_existing: bool = False,
    progress: Callable[[int], None] = lambda added: None,
    waiting: Callable[[str], None] = lambda why: None,
) -> Seeded:
    """Add jobs to a run, in constant memory, and publish them as they come.

    Args:
        run: its name, or `last`.
        jobs: objects with the fields of a job line: `job_id`, `payload`, `tags` and so on.
        whole: publish nothing before all are in, and take all of them back after an error; without it, what was added
            before the error stays.
        skip_existing: pass over jobs that are in the run already: that is how an interrupted seeding goes on.
        progress: called with the number of jobs added so far.
        waiting: called with what is waited for, again and again, while the run's bound leaves no room.

    Raises NotFoundError, RefusedError (the run was cancelled, or has a bound and `whole` is asked for),
    BadJobLineError, DuplicateJobError, StoreError.
    """
    rt = connected()
    prepare(rt)
    return seeding.seed(
        rt, run, jobs, whole=whole, skip_existing=skip_existing, progress=progress, waiting=waiting
    )


def wait(
    run: str,
    *,
    timeout_s: float | None = None,
    stage: str | None = None,
    progress: Callable[[Status], None] = lambda status: None,
) -> Status:
    """Wait until every job is terminal, dead-lettered or cancelled (or past `stage`); returns the last status.

    Also returns when the time is over or a seed batch was interrupted: `status.is_past(stage)` is false then.
    Raises NotFoundError, StoreError.
    """
    return runs.wait(connected(), run, timeout_s=timeout_s, stage=stage, progress=progress)


def results(run: str) -> Iterator[dict[str, Any]]:
    """`{"job_id", "result", "tags"}` of every terminal job, in constant memory. Raises NotFoundError, StoreError."""
    return control_results.results(connected(), run)


def status(run: str) -> Status:
    """What the run is doing now. Raises NotFoundError, StoreError."""
    return control_status.status(connected(), run)


def verify(run: str, *, repair: bool = False) -> Verification:
    """Account for every job of the run; with `repair` bring back what is amiss, and look once more.

    Raises NotFoundError, StoreError; with `repair` BrokerError.
    """
    rt = connected()
    if repair:
        prepare(rt)
    return control_verify.verify(rt, run, repair=repair)


def chain(pipeline: Pipeline) -> Any:
    """The pipeline's stages as a Celery chain, to put tasks of your own behind it.

    `create_run("r1", survey, then=chain(survey) | notify.s())` calls `notify` with `[{"job_id", "result", "key"}]` of
    each chunk of the last stage, at least once.
    """
    return celery.chain(*[celery.signature(task_name(pipeline.name, stage.name)) for stage in pipeline.stages])
