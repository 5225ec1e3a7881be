"""The group of all commands, and the entry point `pipeline-app`."""

from __future__ import annotations

import os
import sys

import click

from pipeline_app.views.cli import services
from pipeline_app.views.cli.check import check
from pipeline_app.views.cli.common import EXIT_INTERRUPTED, Group
from pipeline_app.views.cli.demo import demo
from pipeline_app.views.cli.failures import failures
from pipeline_app.views.cli.hiding import hide_passwords
from pipeline_app.views.cli.history import attempts, events
from pipeline_app.views.cli.hold import hold
from pipeline_app.views.cli.job import job, why
from pipeline_app.views.cli.jobs import cancel, move, priority
from pipeline_app.views.cli.pause import pause, resume
from pipeline_app.views.cli.replay import replay
from pipeline_app.views.cli.run import run
from pipeline_app.views.cli.stage import stage
from pipeline_app.views.cli.throttle import throttle
from pipeline_app.views.cli.try_ import try_
from pipeline_app.views.cli.workers import workers


@click.group(
    cls=Group,
    epilog="""\b
Start here:
  pipeline-app demo                             see it work, on real files
  pipeline-app up                               start local services
  pipeline-app run init r1 --pipeline survey    make a run
  pipeline-app run seed r1 --jobs jobs.jsonl    add jobs to it
  celery -A pipeline_app worker                 start a worker
  pipeline-app run watch r1                     look at it

\b
Exit codes: 0 done, 1 the answer is no, 2 wrong usage, 3 a service is unreachable, 4 a bug of ours, 130 Ctrl-C.""",
)
@click.option("--amqp-url", metavar="URL", help="The broker, instead of AMQP_URL.")
@click.option("--mongodb-url", metavar="URL", help="The store, instead of MONGODB_URL.")
@click.version_option(package_name="pipeline-app", prog_name="pipeline-app", message="%(prog)s %(version)s")
def app(amqp_url: str | None, mongodb_url: str | None) -> None:
    """Take many jobs through pipelines of stages, and never be in doubt about any of them.

    RUN is the name of a run, or "last" for the newest. Every command has --json and --help with examples.
    """
    # The environment is what settings read, and what workers that we start inherit.
    for name, value in (("AMQP_URL", amqp_url), ("MONGODB_URL", mongodb_url)):
        if value is not None:
            os.environ[name] = value


for command in (
    demo,
    services.up,
    services.down,
    services.services,
    try_,
    run,
    stage,
    workers,
    check,
    failures,
    attempts,
    events,
    job,
    why,
    hold,
    throttle,
    replay,
    pause,
    resume,
    cancel,
    move,
    priority,
):
    app.add_command(command)


def main() -> None:
    """Run a command and exit with its code."""
    hide_passwords()
    try:
        sys.exit(app.main(prog_name="pipeline-app", standalone_mode=False))
    except (click.Abort, KeyboardInterrupt):  # before a command began
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
