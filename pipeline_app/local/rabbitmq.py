"""A private RabbitMQ node in `.pipeline/rabbitmq/`. Called by services.py.

Everything of it lies there (its HOME with the cookie, data, configuration), it listens on 127.0.0.1 only and reads
nothing of the system's node. Erlang nodes find one another through `epmd`, which is normally shared and stays behind:
ours is our own, on a port of its own, so no other node is seen and it can be ended with the node.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pipeline_app import settings
from pipeline_app.errors import BrokerError
from pipeline_app.local import files, processes
from pipeline_app.local.processes import ProcessRecord, RunningService

NAME = "rabbitmq"
EPMD = "rabbitmq-epmd"
PROCESSES: tuple[str, ...] = (NAME, EPMD)
NODE = "pipeline@localhost"

#: Usually 5 to 10 s.
READY_S = 90.0
STOP_GRACE_S = 20.0

#: Debian's command in /usr/sbin insists on a user of its own; the script behind it does not.
DEBIAN_SCRIPTS = Path("/usr/lib/rabbitmq/bin")

CONFIGURATION = """\
log.connection.level = error
"""


@dataclass(frozen=True, kw_only=True)
class Tools:
    """Where the programs are."""

    server: Path
    ctl: Path
    epmd: Path


@dataclass(frozen=True, kw_only=True)
class Ports:
    """The node's ports, kept from one start to the next where nobody else took them."""

    amqp: int
    #: For other Erlang nodes: here, `rabbitmqctl`.
    dist: int
    epmd: int


def url(port: int) -> str:
    """Address for clients; the user `guest` may come from this machine only."""
    return f"amqp://guest:guest@127.0.0.1:{port}/"


def find_tools() -> Tools | None:
    """RabbitMQ's programs, if they are all on this machine."""
    epmd, erl, on_path = shutil.which("epmd"), shutil.which("erl"), shutil.which("rabbitmq-server")
    folders = [DEBIAN_SCRIPTS, *([Path(on_path).resolve().parent] if on_path else [])]
    for folder in folders:
        server, ctl = folder / "rabbitmq-server", folder / "rabbitmqctl"
        if epmd and erl and server.is_file() and ctl.is_file():
            return Tools(server=server, ctl=ctl, epmd=Path(epmd))
    return None


def start(state_dir: Path, cancelled: threading.Event) -> RunningService:
    """Start the node with the data that are there, and wait until it serves.

    Leaves no process behind if that fails. Raises BrokerError with the last lines of its log.
    """
    tools = find_tools()
    if tools is None:
        raise BrokerError("there is no rabbitmq-server on this machine", hint="apt-get install rabbitmq-server")
    home = state_dir / NAME
    if not (home / "served").exists():  # what a first start left half done would stop this one
        shutil.rmtree(home / "data", ignore_errors=True)
    ports = _choose_ports(home)
    _write_configuration(home)
    started: list[ProcessRecord] = []
    try:
        env = _environment(state_dir, ports)
        epmd: list[str | Path] = [tools.epmd, "-port", str(ports.epmd), "-address", "127.0.0.1"]
        started.append(processes.start(EPMD, epmd, state_dir=state_dir, env=env))
        _wait_for(lambda: processes.listens(ports.epmd), started[-1], cancelled)
        started.append(processes.start(NAME, [tools.server], state_dir=state_dir, env=env))
        _wait_for(lambda: answers(ports.amqp), started[-1], cancelled)
        # Whoever answers there: only our node answers here, for our epmd knows no other.
        ctl(state_dir, "await_startup")
        (home / "served").touch()
    except BaseException:
        _end(state_dir, started, grace_s=3.0)
        raise
    return RunningService(port=ports.amqp, processes=tuple(started))


def stop(state_dir: Path, service: RunningService) -> None:
    """End the node cleanly, then its epmd; its data stay."""
    node = [record for record in service.processes if record.name == NAME]
    with contextlib.suppress(BrokerError):  # should it not answer, the signals end it
        ctl(state_dir, "stop")
        processes.wait_gone(node, STOP_GRACE_S)
    _end(state_dir, service.processes, grace_s=5.0)


def answers(port: int) -> bool:
    """Whether an AMQP broker answers there within two seconds."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            return connection.recv(1) == b"\x01"  # a method frame: Connection.Start
    except OSError:
        return False


def ctl(state_dir: Path, *arguments: str, timeout_s: float = 30.0) -> str:
    """What `rabbitmqctl` says to the project's node, which need not be ready.

    Raises BrokerError if it fails.
    """
    tools = find_tools()
    ports = files.read_json(state_dir / NAME / "ports.json")
    if tools is None or not ports:
        raise BrokerError(f"there is no RabbitMQ node in {state_dir}")
    try:
        done = subprocess.run(  # noqa: S603 - RabbitMQ's own program
            [tools.ctl, "--node", NODE, "--quiet", *arguments],
            env=_environment(state_dir, Ports(**ports)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=True,
            start_new_session=True,  # Ctrl-C is for us, and may come while this stops the node
        )
    except subprocess.CalledProcessError as exc:
        raise BrokerError(f"rabbitmqctl {arguments[0]} failed: {(exc.stderr or exc.stdout).strip()}") from exc
    except subprocess.TimeoutExpired as exc:
        raise BrokerError(f"rabbitmqctl {arguments[0]} took longer than {timeout_s:.0f} seconds") from exc
    return done.stdout


def consumer_timeout_s(amqp_url: str) -> float | None:
    """How long a consumer may keep a message of the project's own node, which alone lets us ask for it.

    None if the broker is another one, or does not say.
    """
    if urlsplit(settings.read_services_file().get("amqp_url", "")).netloc != urlsplit(amqp_url).netloc:
        return None
    try:
        answer = ctl(settings.state_dir(), "eval", "application:get_env(rabbit, consumer_timeout).")
    except BrokerError:
        return None
    found = re.fullmatch(r"\{ok,(\d+)\}", answer.strip())
    return int(found[1]) / 1000 if found else None


def _end(state_dir: Path, records: Sequence[ProcessRecord], *, grace_s: float) -> None:
    """End by signal: the node before its epmd, and last the epmd that an Erlang program starts when it misses ours."""
    processes.stop([record for record in records if record.name == NAME], grace_s=grace_s)
    processes.stop([record for record in records if record.name == EPMD], grace_s=grace_s)
    for name in PROCESSES:
        processes.stop_marked(state_dir, name, grace_s=grace_s)


def _choose_ports(home: Path) -> Ports:
    home.mkdir(parents=True, exist_ok=True)
    last = files.read_json(home / "ports.json")
    chosen: dict[str, int] = {}
    for name in ("amqp", "dist", "epmd"):
        while (port := processes.free_port(last.pop(name, None))) in chosen.values():
            pass
        chosen[name] = port
    files.write_json(home / "ports.json", dict(chosen))
    return Ports(**chosen)


def _write_configuration(home: Path) -> None:
    (home / "rabbitmq.conf").write_text(CONFIGURATION)
    (home / "enabled_plugins").write_text("[].\n")
    (home / "rabbitmq-env.conf").write_text("")


def _environment(state_dir: Path, ports: Ports) -> dict[str, str]:
    """Of the user's environment everything but what would lead to another node or configuration."""
    home = state_dir / NAME
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RABBITMQ_", "ERL_")) and name != "NOTIFY_SOCKET"
    }
    return inherited | {
        "HOME": str(home),  # the cookie
        "ERL_EPMD_PORT": str(ports.epmd),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_CRASH_DUMP_SECONDS": "0",
        "RABBITMQ_NODENAME": NODE,
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(ports.amqp),
        "RABBITMQ_DIST_PORT": str(ports.dist),
        # Schedulers that don't spin while they wait: the workers on this machine need its processors.
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
            "-kernel inet_dist_use_interface {127,0,0,1} +sbwt none +sbwtdcpu none +sbwtdio none"
        ),
        "RABBITMQ_MNESIA_BASE": str(home / "data"),
        "RABBITMQ_LOG_BASE": str(home / "log"),
        "RABBITMQ_LOGS": "-",
        "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq.conf"),
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(home / "advanced.config"),
        "RABBITMQ_CONF_ENV_FILE": str(home / "rabbitmq-env.conf"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "enabled_plugins"),
        # An Erlang program that misses its epmd starts one: that one must be found, too.
        processes.MARK: processes.mark(state_dir, EPMD),
    }


def _wait_for(ready: Callable[[], bool], record: ProcessRecord, cancelled: threading.Event) -> None:
    if problem := processes.wait_until(ready, record, timeout_s=READY_S, cancelled=cancelled):
        raise BrokerError(f"{problem}:\n{processes.tail(record.log)}", hint=f"the whole log: {record.log}")
