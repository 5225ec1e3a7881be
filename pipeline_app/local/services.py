"""Start, stop and show the embedded services of a project. Called by `up`, `down`, `services`, `demo` and tests.

While services run, `.pipeline/services.json` has their addresses, where settings.py finds them, and their processes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar
from urllib.parse import urlsplit

from pipeline_app import settings
from pipeline_app.local import files, mongod, processes, rabbitmq, workers
from pipeline_app.local.processes import CancelledError, ProcessRecord, RunningService

Progress = Callable[[str], None]
#: Which broker is wanted: the one that runs, else RabbitMQ if this machine has it, else kombu's MongoDB transport.
Broker = Literal["auto", "rabbitmq", "mongodb"]
State = Literal["running", "stopped", "unreachable"]
Result = TypeVar("Result")

MONGODB_BROKER = "broker (mongodb transport)"


@dataclass(frozen=True, kw_only=True)
class Services:
    """What `up` leaves running."""

    amqp_url: str
    mongodb_url: str
    #: Names of those that were not running before.
    started: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ServiceStatus:
    """One line of `pipeline-app services`."""

    name: str
    state: State
    #: Without its password; None while it is stopped.
    address: str | None
    pid: int | None
    log: str


class _Module(Protocol):
    """What mongod.py and rabbitmq.py have in common."""

    #: The service's name is that of its main process.
    NAME: str
    #: Names of all its processes.
    PROCESSES: tuple[str, ...]

    def start(self, state_dir: Path, cancelled: threading.Event) -> RunningService: ...

    def stop(self, state_dir: Path, service: RunningService) -> None: ...

    def answers(self, port: int) -> bool: ...


MODULES: dict[str, _Module] = {rabbitmq.NAME: rabbitmq, mongod.NAME: mongod}
#: Where services.json has a service's address.
ADDRESSES = {rabbitmq.NAME: "amqp_url", mongod.NAME: "mongodb_url"}


def up(progress: Progress = lambda _: None, *, broker: Broker = "auto") -> Services:
    """Start what does not run yet, wait until all of it serves, and write down the addresses.

    Leaves nothing behind of what it started if one fails or Ctrl-C comes. `progress` is called from another thread.

    Raises StoreError or BrokerError if a service cannot be started, UsageError if `.pipeline/` cannot be written.
    """
    return _undisturbed(partial(_up, settings.state_dir(), progress, broker), progress)


def down(progress: Progress = lambda _: None, *, worker_grace_s: float = 15.0) -> list[str]:
    """Stop the project's detached workers, then its services; returns the names of what was stopped. Data stay."""
    state_dir = settings.state_dir()
    if not state_dir.is_dir():
        return []
    with files.lock(state_dir / "services.lock"):
        stopped = _stop_workers(progress, worker_grace_s)
        running = _find(state_dir)
        for name, service in running.items():
            progress(f"stopping {name}")
            MODULES[name].stop(state_dir, service)
        # What a command that was killed could not write down.
        strays = processes.stop_marked(state_dir, grace_s=10.0)
        (state_dir / "services.json").unlink(missing_ok=True)
    return [*stopped, *running, *(record.name for record in strays)]


def status() -> list[ServiceStatus]:
    """The store and the broker of this project."""
    state_dir = settings.state_dir()
    written, running = _read(state_dir), _find(state_dir)
    store = _status(state_dir, mongod.NAME, running, written.get("mongodb_url"))
    if not _broker_is_mongodb("auto", written):
        return [store, _status(state_dir, rabbitmq.NAME, running, written.get("amqp_url"))]
    address = settings.redact(written["amqp_url"]) if store.address else None
    return [store, ServiceStatus(name=MONGODB_BROKER, state=store.state, address=address, pid=store.pid, log=store.log)]


def _up(state_dir: Path, progress: Progress, broker: Broker, cancelled: threading.Event) -> Services:
    files.make_state_dir(state_dir)
    with files.lock(state_dir / "services.lock", cancelled=cancelled):
        running = _find(state_dir)
        wanted = [mongod.NAME] if _broker_is_mongodb(broker, _read(state_dir)) else [rabbitmq.NAME, mongod.NAME]
        for name in list(running):
            if name not in wanted or not _serves(name, running[name]):
                progress(f"stopping {name}, which {'does not answer' if name in wanted else 'is not wanted'}")
                MODULES[name].stop(state_dir, running.pop(name))
        started = _start_all(state_dir, [name for name in wanted if name not in running], progress, cancelled)
        try:
            for name, service in started.items():
                progress(f"{name} is ready on 127.0.0.1:{service.port}")
            running |= started
            if rabbitmq.NAME not in running:
                mongod.make_broker(running[mongod.NAME].port)
            if cancelled.is_set():
                raise CancelledError
            return _write(state_dir, running, tuple(started))
        except BaseException:
            _stop_all(state_dir, started)
            raise


def _start_all(
    state_dir: Path, names: Sequence[str], progress: Progress, cancelled: threading.Event
) -> dict[str, RunningService]:
    """Start these at the same time: all of them run afterwards, or none."""

    def start(name: str) -> RunningService:
        try:
            return _start(state_dir, name, cancelled)
        except BaseException:
            cancelled.set()  # the others need not go on
            raise

    for name in names:
        progress(f"starting {name}")
    with ThreadPoolExecutor() as pool:
        futures = {name: pool.submit(start, name) for name in names}
    problems = [problem for future in futures.values() if (problem := future.exception()) is not None]
    started = {name: future.result() for name, future in futures.items() if future.exception() is None}
    if problems:
        _stop_all(state_dir, started)
        raise min(problems, key=lambda problem: isinstance(problem, CancelledError))  # the reason before its effects
    return started


def _start(state_dir: Path, name: str, cancelled: threading.Event) -> RunningService:
    # Left by a command that was killed: nobody knows their addresses, and they keep the data locked.
    for part in MODULES[name].PROCESSES:
        processes.stop_marked(state_dir, part, grace_s=10.0)
    return MODULES[name].start(state_dir, cancelled)


def _serves(name: str, service: RunningService) -> bool:
    # Asked several times: under load an answer may take long, and workers must not lose a server for that.
    return any(MODULES[name].answers(service.port) for _ in range(5))


def _stop_all(state_dir: Path, services: dict[str, RunningService]) -> None:
    for name, service in services.items():
        MODULES[name].stop(state_dir, service)


def _stop_workers(progress: Progress, grace_s: float) -> list[str]:
    names = [worker.name for worker in workers.running()]
    if names:
        progress(f"stopping {len(names)} workers")
        workers.stop(grace_s=grace_s)
    return [f"worker {name}" for name in names]


def _status(state_dir: Path, name: str, running: dict[str, RunningService], url: str | None) -> ServiceStatus:
    log = str(state_dir / "logs" / f"{name}.log")
    service = running.get(name)
    if service is None:
        return ServiceStatus(name=name, state="stopped", address=None, pid=None, log=log)
    return ServiceStatus(
        name=name,
        state="running" if MODULES[name].answers(service.port) else "unreachable",
        address=settings.redact(url or ""),
        pid=next(record.pid for record in service.processes if record.name == name),
        log=log,
    )


def _broker_is_mongodb(broker: Broker, written: dict[str, Any]) -> bool:
    """Whether mongod is the broker, too: as asked, else as it is now, else where there is no RabbitMQ."""
    if broker != "auto":
        return broker == "mongodb"
    if "amqp_url" in written:
        return str(written["amqp_url"]).startswith("mongodb")
    return rabbitmq.find_tools() is None


def _read(state_dir: Path) -> dict[str, Any]:
    return files.read_json(state_dir / "services.json")


def _write(state_dir: Path, running: dict[str, RunningService], started: tuple[str, ...]) -> Services:
    port = running[mongod.NAME].port
    broker = running.get(rabbitmq.NAME)
    services = Services(
        amqp_url=rabbitmq.url(broker.port) if broker else mongod.broker_url(port),
        mongodb_url=mongod.store_url(port),
        started=started,
    )
    records = [asdict(record) for service in running.values() for record in service.processes]
    addresses = {"amqp_url": services.amqp_url, "mongodb_url": services.mongodb_url}
    files.write_json(state_dir / "services.json", {**addresses, "processes": records})
    return services


def _find(state_dir: Path) -> dict[str, RunningService]:
    """The services that run, by their written processes; whether they answer is another question."""
    written = _read(state_dir)
    records = [ProcessRecord(**entry) for entry in written.get("processes", [])]
    running = {}
    for name, module in MODULES.items():
        parts = tuple(record for record in records if record.name in module.PROCESSES)
        if any(record.name == name and processes.find(record) for record in parts):
            running[name] = RunningService(port=urlsplit(written.get(ADDRESSES[name], "")).port or 0, processes=parts)
    return running


def _undisturbed(work: Callable[[threading.Event], Result], progress: Progress) -> Result:
    """Do this in another thread, which Ctrl-C does not reach: there it is an event, and what was begun is undone."""
    cancelled = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(work, cancelled)
        try:
            return future.result()
        except KeyboardInterrupt:
            cancelled.set()
            progress("interrupted: stopping what was started")
            # Until that is done (it has its time limits) a further Ctrl-C changes nothing. It must not come while
            # the thread is joined: Python then takes the thread for ended, and exits without waiting for it.
            while not future.done():
                with contextlib.suppress(KeyboardInterrupt):
                    wait([future])
            raise
