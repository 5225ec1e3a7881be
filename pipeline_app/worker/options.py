"""What `celery -A pipeline_app worker` takes besides Celery's own options. Added by the composition root.

They are checked while the command line is read: a stage that is not there must not become a worker that waits for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from celery import Celery
from celery.bin.base import CeleryOption

from pipeline_app.domain.partition import DEFAULT, queue_name
from pipeline_app.domain.pipeline import Pipeline
from pipeline_app.domain.selector import Selectors
from pipeline_app.errors import UsageError
from pipeline_app.worker.selection import Selection

#: Where `celery worker --help` shows them.
GROUP = "Pipeline Options"


def add_options(app: Celery, pipelines: Mapping[str, Pipeline]) -> None:
    """Let `celery worker` of this app take `--stage`, `--select` and `--skip`."""
    known = [queue_name(p.name, stage.name, DEFAULT) for p in pipelines.values() for stage in p.stages]

    def check_stages(ctx: Any, param: Any, values: tuple[str, ...]) -> tuple[str, ...]:
        for name in values:
            if name not in known:
                param.type.fail(f"there is no stage {name!r}: the stages are {', '.join(known)}", param, ctx)
        return values

    def option(name: str, metavar: str, text: str, check: Callable[..., Any]) -> Any:
        return CeleryOption([name], multiple=True, metavar=metavar, help=text, help_group=GROUP, callback=check)

    app.user_options["worker"].update(
        [
            option("--stage", "PIPELINE.STAGE", "Consume this stage; may be given several times.", check_stages),
            option("--select", "K=V", "Only partitions with this tag; of several, with all of them.", _check_tags),
            option("--skip", "K=V", "No partitions with this tag; of several, with any of them.", _check_tags),
        ]
    )


def _check_tags(ctx: Any, param: Any, values: tuple[str, ...]) -> tuple[str, ...]:
    try:
        Selectors.parse(**{"select": (), "skip": (), param.name: values})
    except UsageError as exc:
        param.type.fail(f"{exc.message}: {exc.hint}", param, ctx)
    return values


def selection(names: Sequence[str] | None, pipelines: Mapping[str, Pipeline], options: Mapping[str, Any]) -> Selection:
    """What the worker consumes, from `-Q` and the options above. Raises UsageError if selectors contradict."""
    selectors = Selectors.parse(options.get("select") or (), options.get("skip") or ())
    return Selection(names, pipelines, tuple(options.get("stage") or ()), selectors)
