"""Clusters of local processes for tests: three RabbitMQ nodes, three members of a replica set, one of which is killed.

Everything lies in one folder, listens on 127.0.0.1, and ends with the `with` block.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pymongo import MongoClient
from pymongo.errors import AutoReconnect, OperationFailure, PyMongoError

from pipeline_app.local import mongod, processes, rabbitmq
from tests.project import eventually

READY_S = 90.0

#: MongoDB's code (ExceededTimeLimit) for a step-down with nobody to hand over to.
NOT_CAUGHT_UP = 262


class Node:
    """A process that is started, killed, and started again with the data that it had."""

    def __init__(self, command: Sequence[str | Path], log: Path, env: Mapping[str, str], port: int) -> None:
        self.port = port
        self.log = log
        self._command = [str(word) for word in command]
        self._env = dict(env)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, ready: Callable[[], bool]) -> None:
        """Start it and wait until it is ready."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + READY_S
        while not ready():
            assert self._process.poll() is None, f"it ended while it started:\n{processes.tail(self.log)}"
            assert time.monotonic() < deadline, f"not ready:\n{processes.tail(self.log)}"
            time.sleep(0.1)

    def kill(self) -> None:
        """As a machine that loses power."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None


class RabbitCluster:
    """Nodes of one RabbitMQ cluster, under an epmd of their own."""

    def __init__(self, folder: Path, *, nodes: int = 3, configuration: str = "", plugins: Sequence[str] = ()) -> None:
        self._folder = folder
        self._configuration = configuration
        self._plugins = plugins
        tools = rabbitmq.find_tools()
        assert tools is not None
        self._tools = tools
        self._epmd_port = processes.free_port()
        #: Of the first node's management API, if that is among the plugins; only that node has them.
        self.management_port = processes.free_port()
        self._names = [f"n{number}@localhost" for number in range(1, nodes + 1)]
        self.nodes: list[Node] = []
        self._epmd = Node(
            [tools.epmd, "-port", str(self._epmd_port), "-address", "127.0.0.1"],
            folder / "epmd.log",
            os.environ,
            self._epmd_port,
        )

    @property
    def url(self) -> str:
        """All addresses."""
        return ";".join(f"amqp://guest:guest@127.0.0.1:{node.port}/" for node in self.nodes)

    def start(self) -> None:
        """Start the first node, then the others, which join it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._epmd.start(lambda: processes.listens(self._epmd_port))
        self.nodes = [self._make(number) for number in range(len(self._names))]
        self.start_node(0)
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.start_node, range(1, len(self.nodes))))

    def start_node(self, number: int) -> None:
        """Start a node that does not run, and wait until it is in the cluster."""
        node = self.nodes[number]
        node.start(lambda: rabbitmq.answers(node.port))
        self.ctl("await_startup", node=number)

    def ctl(self, *arguments: str, node: int = 0) -> str:
        """What rabbitmqctl says."""
        command = [str(self._tools.ctl), "--node", self._names[node], "--quiet", *arguments]
        done = subprocess.run(
            command, env=self._environment(node), capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout

    def close(self) -> None:
        """End all."""
        for node in (*self.nodes, self._epmd):
            node.kill()
        shutil.rmtree(self._folder / "data", ignore_errors=True)

    def _make(self, number: int) -> Node:
        home = self._folder / self._names[number]
        home.mkdir()
        peers = "".join(
            f"cluster_formation.classic_config.nodes.{n} = {name}\n" for n, name in enumerate(self._names, 1)
        )
        management = f"management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {self.management_port}\n"
        (home / "rabbitmq.conf").write_text(
            "log.connection.level = error\n"
            "cluster_formation.peer_discovery_backend = classic_config\n"
            "cluster_formation.randomized_startup_delay_range.min = 0\n"
            "cluster_formation.randomized_startup_delay_range.max = 1\n"
            f"{peers}{management if self._plugins and number == 0 else ''}{self._configuration}"
        )
        (home / "enabled_plugins").write_text(f"[{','.join(self._plugins if number == 0 else ())}].\n")
        (home / "rabbitmq-env.conf").write_text("")
        port = processes.free_port()
        env = {
            **self._environment(number),
            "RABBITMQ_NODENAME": self._names[number],
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(processes.free_port()),
            "RABBITMQ_MNESIA_BASE": str(self._folder / "data"),
            "RABBITMQ_LOG_BASE": str(home / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(home / "advanced.config"),
            "RABBITMQ_CONF_ENV_FILE": str(home / "rabbitmq-env.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "enabled_plugins"),
        }
        return Node([self._tools.server], home / "node.log", env, port)

    def _environment(self, number: int) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RABBITMQ_", "ERL_"))}
        return inherited | {
            "HOME": str(self._folder),  # the cookie
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_CRASH_DUMP_SECONDS": "0",
            "RABBITMQ_CONF_ENV_FILE": str(self._folder / self._names[number] / "rabbitmq-env.conf"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "-kernel inet_dist_use_interface {127,0,0,1} +sbwt none +sbwtdcpu none +sbwtdio none"
            ),
        }


@contextmanager
def rabbit_cluster(folder: Path, **options: Any) -> Iterator[RabbitCluster]:
    """A cluster that runs."""
    made = RabbitCluster(folder, **options)
    try:
        made.start()
        yield made
    finally:
        made.close()


class ReplicaSet:
    """Members of one replica set."""

    def __init__(self, folder: Path, *, members: int = 3, oplog_mb: int = 64) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        binary = mongod.find_binary(folder)
        self.name = "cluster"
        self.members: list[Node] = []
        for number in range(members):
            data = folder / f"m{number}"
            data.mkdir()
            port = processes.free_port()
            options = [
                *("--dbpath", data, "--bind_ip", "127.0.0.1", "--port", str(port), "--nounixsocket"),
                *("--replSet", self.name, "--oplogSize", str(oplog_mb), "--wiredTigerCacheSizeGB", "0.25"),
                *("--quiet", "--setParameter", "diagnosticDataCollectionEnabled=false"),
            ]
            self.members.append(Node([binary, *options], folder / f"m{number}.log", os.environ, port))

    @property
    def url(self) -> str:
        """All addresses."""
        hosts = ",".join(f"127.0.0.1:{member.port}" for member in self.members)
        return f"mongodb://{hosts}/pipeline_app?replicaSet={self.name}"

    def start(self) -> None:
        """Start all, make them a set, and wait until one leads and the others follow."""
        for member in self.members:
            self.start_member(member)
        config = {
            "_id": self.name,
            "members": [{"_id": n, "host": f"127.0.0.1:{member.port}"} for n, member in enumerate(self.members)],
            "settings": {"electionTimeoutMillis": 3000},  # after a kill; the default is 10 s
        }
        with connected(self.members[0]) as client:
            client.admin.command("replSetInitiate", config)
        eventually(lambda: sorted(self.states()) == ["PRIMARY", *["SECONDARY"] * (len(self.members) - 1)], timeout=60)

    def start_member(self, member: Node) -> None:
        """Start a member that does not run."""
        member.start(lambda: processes.listens(member.port))

    def states(self) -> list[str]:
        """What each member is."""
        with connected(self.members[0]) as client:
            return [row["stateStr"] for row in client.admin.command("replSetGetStatus")["members"]]

    def primary(self) -> Node:
        """The member that leads, once there is one."""
        return eventually(lambda: next((one for one in self.members if leads(one)), None), timeout=60)  # type: ignore[no-any-return]

    def step_down(self) -> None:
        """Let another member lead, and wait until one does."""
        before = self.primary()
        # It refuses while no other has caught up, which takes its time on a machine that has much to do.
        eventually(lambda: _stepped_down(before), timeout=60)
        eventually(lambda: self.primary() is not before)

    def close(self) -> None:
        """End all."""
        for member in self.members:
            member.kill()


def _stepped_down(member: Node) -> bool:
    try:
        with connected(member) as client:
            client.admin.command("replSetStepDown", 10, secondaryCatchUpPeriodSecs=5)
    except OperationFailure as exc:
        if exc.code != NOT_CAUGHT_UP:
            raise
        return False
    except AutoReconnect:
        # Another election came first, and the client was told so by the one that lost it.
        return not leads(member)
    return True


def leads(member: Node) -> bool:
    """Whether it is the primary."""
    with contextlib.suppress(PyMongoError), connected(member) as client:
        return bool(client.admin.command("hello")["isWritablePrimary"])
    return False


@contextmanager
def connected(member: Node) -> Iterator[MongoClient[dict[str, Any]]]:
    """A client of this member alone."""
    client: MongoClient[dict[str, Any]] = MongoClient(
        "127.0.0.1", member.port, directConnection=True, serverSelectionTimeoutMS=2000
    )
    with client:
        yield client


@contextmanager
def replica_set(folder: Path, **options: Any) -> Iterator[ReplicaSet]:
    """A replica set that runs."""
    made = ReplicaSet(folder, **options)
    try:
        made.start()
        yield made
    finally:
        made.close()
