"""`up`, `down` and `services`: the store and the broker of a project, and its detached workers.

A project uses the addresses that its user named. Where none are named it uses what answers at the default addresses;
where nothing does, embedded services in `.pipeline/`, which every other command finds by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from pipeline_app.errors import UnreachableError
from pipeline_app.views.cli.common import Command, interrupted_once, json_option, undisturbed
from pipeline_app.views.cli.render import echo_json, echo_table

#: Ports of the default addresses: RabbitMQ's and MongoDB's.
DEFAULT_PORTS = (5672, 27017)


@dataclass(frozen=True, kw_only=True)
class Provided:
    """Services that can be used."""

    #: Without their passwords.
    amqp_url: str
    mongodb_url: str
    #: Whether they are the project's own, in `.pipeline/`.
    embedded: bool
    #: Names of those that did not run before.
    started: tuple[str, ...]


def provide(tell: Callable[[str], None]) -> Provided:
    """Make sure that there are services: the user's, or embedded ones, which are started if they do not run.

    Raises StoreError, BrokerError.
    """
    from pipeline_app import settings
    from pipeline_app.local import services as local

    if settings.addresses_are_set():
        return _external(check=True)
    if not settings.services_file().exists() and _defaults_listen():
        found = _external(check=False)
        problems = [row["problem"] for row in _ask() if row["problem"]]
        if not problems:
            return found
        tell(f"what answers at the default addresses cannot be used: {problems[0]}")
    started = local.up(tell).started
    # What was read before did not know the addresses.
    settings.current.cache_clear()
    chosen = settings.current()
    return Provided(
        amqp_url=settings.redact(chosen.amqp_url),
        mongodb_url=settings.redact(chosen.mongodb_url),
        embedded=True,
        started=started,
    )


def _external(*, check: bool) -> Provided:
    """The services at the addresses in the settings."""
    from pipeline_app import settings

    if check:
        for row in _ask():
            if row["problem"]:
                raise UnreachableError(row["problem"], hint="check AMQP_URL and MONGODB_URL")
    chosen = settings.current()
    addresses = {name: settings.redact(getattr(chosen, name)) for name in ("amqp_url", "mongodb_url")}
    return Provided(**addresses, embedded=False, started=())


def _ask() -> list[dict[str, Any]]:
    """The services that the settings name, and whether they answer."""
    from pipeline_app import settings
    from pipeline_app.application import client_runtime
    from pipeline_app.control.sight import listing

    rt = client_runtime(settings.current().model_copy(update={"pipelines": ()}))
    try:
        return listing.services(rt)
    finally:
        rt.close()


def _defaults_listen() -> bool:
    from pipeline_app.local import processes

    return all(processes.listens(port) for port in DEFAULT_PORTS)


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  pipeline-app up
  pipeline-app up --json | jq -r .mongodb_url""",
)
@json_option
def up(as_json: bool) -> None:
    """Start local services where there are none.

    A mongod (from PATH, or of the extra "local") and, if this machine has RabbitMQ, a node of it; else MongoDB is the
    broker, too. They live in .pipeline/, and every other command finds them. Nothing is started if AMQP_URL or
    MONGODB_URL is set, or if services answer at the default addresses.
    """
    with interrupted_once():
        found = provide(lambda text: click.echo(text, err=True))
    if as_json:
        echo_json(vars(found))
        return
    if not found.embedded:
        click.echo("nothing to start, these services answer:")
    elif found.started:
        click.echo(f"started {' and '.join(found.started)}:")
    else:
        click.echo("they run already:")
    click.echo(f"  store   {found.mongodb_url}")
    click.echo(f"  broker  {found.amqp_url}")


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  pipeline-app down""",
)
@json_option
def down(as_json: bool) -> None:
    """Stop the project's local services and detached workers.

    Workers first: they finish what they have in hand. Data stay, and "up" serves them again.
    """
    from pipeline_app.local import services as local

    # What it began it ends: half of the services stopped is of no use to anybody.
    with undisturbed():
        stopped = local.down(lambda text: click.echo(text, err=True))
    if as_json:
        echo_json({"stopped": stopped})
    else:
        click.echo(f"stopped {', '.join(stopped)}" if stopped else "nothing was running")


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  pipeline-app services
  pipeline-app services --json | jq '.services[] | select(.state != "running")'""",
)
@json_option
def services(as_json: bool) -> None:
    """Show the services and detached workers of this project.

    Workers that were started in other ways, or on other machines, are shown by "workers".
    """
    from pipeline_app.local import workers as local_workers

    found = _listed()
    workers: list[dict[str, Any]] = [
        {
            "worker": worker.name,
            "stage": worker.stage,
            "pool": worker.pool,
            "concurrency": worker.concurrency,
            "pid": worker.pid,
            "log": worker.log,
        }
        for worker in local_workers.running()
    ]
    if as_json:
        echo_json({"services": found, "workers": workers})
        return
    rows = [[row["name"], row["state"], row["address"], _pid(row["pid"]), row["log"]] for row in found]
    echo_table(["service", "state", "address", "pid", "log"], rows, shrink=["address", "log"])
    if workers:
        click.echo()
        lines = [[row["worker"], row["stage"], row["pool"], row["concurrency"], _pid(row["pid"])] for row in workers]
        echo_table(["worker", "stage", "pool", "slots", "pid"], lines, shrink=["worker"])


def _listed() -> list[dict[str, Any]]:
    """The services that this project uses, embedded or not."""
    from pipeline_app import settings
    from pipeline_app.local import services as local

    if not settings.addresses_are_set():
        embedded = local.status()
        if settings.services_file().exists() or not _defaults_listen():
            return [vars(row) for row in embedded]
    return [
        {"name": row["name"], "state": row["state"], "address": row["address"], "pid": None, "log": None}
        for row in _ask()
    ]


def _pid(pid: int | None) -> str | None:
    return None if pid is None else str(pid)
