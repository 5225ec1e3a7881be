"""Several addresses of a broker, and services that are gone for a while: who waits, what is said, what it costs."""

from __future__ import annotations

import contextlib
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil
import pytest

from pipeline_app.domain.outage import FIRST
from pipeline_app.errors import BrokerError, UsageError
from pipeline_app.local import processes
from pipeline_app.runtime import Runtime
from pipeline_app.settings import redact
from pipeline_app.transport.connecting import connect
from pipeline_app.transport.depth import depths
from pipeline_app.transport.publisher import Envelope
from pipeline_app.transport.topology import named_queue
from tests.integration.helpers import double, pipeline
from tests.integration.proxy import MongoProxy, Proxy
from tests.project import Project, eventually
from tests.worker import Worker

#: How long services are gone where the cost of waiting is measured: longer than a lease.
AWAY_S = 15.0


@pytest.fixture
def other_proxy(project: Project) -> Iterator[Proxy]:
    """A second way to the same broker: to a client, another node of a cluster."""
    made = Proxy(project.amqp_url)
    yield made
    made.close()


def nobody() -> str:
    """An address where nothing listens."""
    return f"amqp://guest:s3cret@127.0.0.1:{processes.free_port()}/"


# Several addresses


def test_the_address_that_answers(project: Project) -> None:
    """Given three addresses of which the last answers, then publishing, depths and announcements find it."""
    several = f"{nobody()};{nobody()}; {project.amqp_url}"
    rt = project.runtime(pipeline(double), amqp_url=several)

    rt.publisher.ping()
    assert rt.publisher.broadcast("pipeline_flags", {"version": 1}, answers=0, timeout_s=1) == 0
    assert depths(several, ["nothing.there"])["nothing.there"].ready == 0


def test_no_address_answers(project: Project) -> None:
    """Given addresses that nothing answers, then the error names all of them and no password."""
    several = f"{nobody()};{nobody()}"

    with pytest.raises(BrokerError, match="does not answer") as away:
        depths(several, ["x"])

    assert str(away.value).count("amqp://guest:***@127.0.0.1") == 2
    assert "s3cret" not in str(away.value)
    assert "s3cret" not in redact(several)


@pytest.mark.parametrize("url", [" ; ", "nonsense://x/"])
def test_no_address_of_a_broker(url: str) -> None:
    """Given an AMQP_URL that names no broker, then that is wrong usage, not an outage."""
    with pytest.raises(UsageError, match="AMQP_URL"):
        connect(url)


def test_the_address_that_answered_last_is_asked_first(project: Project, amqp_proxy: Proxy, other_proxy: Proxy) -> None:
    """Given a node that went away, then later connections don't ask it again before the one that answers."""
    several = ";".join(one.address(project.amqp_url) for one in (amqp_proxy, other_proxy))
    depths(several, ["x"])
    amqp_proxy.cut()
    depths(several, ["x"])
    amqp_proxy.restore()
    amqp_proxy.freeze()  # whoever asked it now would wait

    begun = time.monotonic()
    depths(several, ["x"])

    assert time.monotonic() - begun < 1


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_a_worker_goes_to_the_next_address(
    project: Project, amqp_proxy: Proxy, other_proxy: Proxy, pool: str
) -> None:
    """Given a worker with two addresses, when the one that it uses goes away, then it goes on at the other."""
    several = ";".join(one.address(project.amqp_url) for one in (amqp_proxy, other_proxy))
    project.seed("r", jobs(40, sleep_s=0.1))
    with project.worker(pool=pool, env={"AMQP_URL": several}):
        eventually(lambda: len(project.calls()) >= 8)
        amqp_proxy.cut()
        done = project.json("run", "wait", "r", "--timeout", "60", timeout=70)

    assert done["states"]["terminal"] == 40
    assert project.json("run", "verify", "r")["ok"] is True


def jobs(number: int, **payload: object) -> list[dict[str, object]]:
    return [{"job_id": f"j{n}", "payload": {"n": n, **payload}, "tags": {"kind": "a"}} for n in range(number)]


# Services that are gone


def cpu_s(worker: Worker) -> float:
    """Seconds of processor that the worker and its children have used."""
    main = psutil.Process(worker.process.pid)
    times = [one.cpu_times() for one in (main, *main.children(recursive=True))]
    return sum(one.user + one.system for one in times)


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_a_worker_that_waits_for_both_services(
    project: Project, amqp_proxy: Proxy, mongo_proxy: MongoProxy, pool: str
) -> None:
    """Given a worker whose services are both gone, then waiting costs little, it says so, and it comes back."""
    env = {"AMQP_URL": amqp_proxy.address(project.amqp_url), "MONGODB_URL": mongo_proxy.address(project.mongodb_url)}
    project.json("run", "init", "r", "--pipeline", "demo")
    with project.worker(pool=pool, env=env) as worker:
        project.seed("r", jobs(1), init=False)
        project.json("run", "wait", "r", "--timeout", "60", timeout=70)
        silent = len(worker.text)
        amqp_proxy.cut()
        mongo_proxy.cut()
        worker.wait_for(lambda: "the store is away" in worker.text)
        before, begun = cpu_s(worker), time.monotonic()
        time.sleep(AWAY_S)  # what is measured
        share = (cpu_s(worker) - before) / (time.monotonic() - begun)
        said = worker.text[silent:]
        amqp_proxy.restore()
        mongo_proxy.restore()
        project.seed("r", jobs(3)[1:], init=False)
        done = project.json("run", "wait", "r", "--timeout", "90", timeout=100)
        after = worker.text

    print(f"\n{pool}: {share:.1%} of a processor while it waits, {len(said.splitlines())} lines in the log")
    assert done["states"]["terminal"] == 3
    assert share < 0.05
    waits = [line for line in said.splitlines() if "sweep waits for the store since" in line]
    assert 1 <= len(waits) <= 2 + AWAY_S / FIRST.total_seconds(), "at growing intervals"
    assert "Cannot connect to amqp://guest:**@127.0.0.1" in said
    assert "sweep goes on: the store was away for" in after
    assert "lease ended" not in after, "an outage is nobody's death"


@contextmanager
def command(project: Project, *arguments: str, env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A command that runs meanwhile; what it says on standard error is in errors.txt."""
    with (
        (project.folder / "errors.txt").open("w") as errors,
        subprocess.Popen(
            ["pipeline-app", *arguments],
            cwd=project.folder,
            env={**project.env, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def looks_on(mongo_proxy: MongoProxy) -> None:
    """Wait until a command has asked for its run several times."""
    asked: list[str] = []

    def count(when: str, asking: dict[str, object]) -> bool:
        if when == "before" and asking.get("find") == "run_manifests":
            asked.append(when)
        return False

    mongo_proxy.hook = count
    eventually(lambda: len(asked) >= 3)


@pytest.mark.parametrize("words", [("wait",), ("watch", "--json"), ("status", "--watch")], ids=lambda words: words[0])
def test_commands_that_look_on_come_back(project: Project, mongo_proxy: MongoProxy, words: Sequence[str]) -> None:
    """Given a command that looks at a run, when MongoDB goes away and comes back, then it says so and goes on."""
    project.seed("r", jobs(2))
    errors = project.folder / "errors.txt"
    env = {"MONGODB_URL": mongo_proxy.address(project.mongodb_url)}
    with command(project, "run", words[0], "last", *words[1:], env=env) as process:
        looks_on(mongo_proxy)
        mongo_proxy.cut()
        eventually(lambda: "waiting since" in errors.read_text())
        mongo_proxy.restore()
        with project.worker():
            out, _ = process.communicate(timeout=60)

    said = errors.read_text()
    assert process.returncode == 0, said
    assert said.count("waiting since") == 1
    assert "MongoDB answers again, after" in said
    assert "2" in out
    assert "terminal" in out


def test_waiting_with_a_time_limit_ends(project: Project, mongo_proxy: MongoProxy) -> None:
    """Given `run wait --timeout`, when MongoDB goes away for longer, then it ends with the reason, in time."""
    project.seed("r", jobs(1))
    env = {"MONGODB_URL": mongo_proxy.address(project.mongodb_url)}
    with command(project, "run", "wait", "r", "--timeout", "8", env=env) as process:
        looks_on(mongo_proxy)
        mongo_proxy.cut()
        process.wait(30)

    assert process.returncode == 3
    assert "does not answer" in (project.folder / "errors.txt").read_text()


def test_a_store_that_is_away_at_the_start(project: Project) -> None:
    """Given no MongoDB when a command begins, then it says so at once: nobody waits for a mistake in an address."""
    begun = time.monotonic()

    done = project.cli("run", "wait", "r", env={"MONGODB_URL": "mongodb://127.0.0.1:1/x"})

    assert done.returncode == 3
    assert time.monotonic() - begun < 15


def test_publishing_to_a_broker_that_is_gone_is_cheap(project: Project, amqp_proxy: Proxy) -> None:
    """Given a broker that went away, when much is to be published, then few connections are tried until it is back."""
    rt = project.runtime(pipeline(double), amqp_url=amqp_proxy.address(project.amqp_url))
    rt.publisher.ping()
    amqp_proxy.cut()
    tried = 0
    begun = time.monotonic()

    while time.monotonic() - begun < 2:
        with pytest.raises(BrokerError):
            rt.publisher.publish([envelope()])
        tried += 1

    assert tried > 200, "most of them are told at once"
    amqp_proxy.restore()
    eventually(lambda: published(rt), timeout=10)


def envelope() -> Envelope:
    return Envelope(queue=named_queue("to.nobody", "quorum"), task="x", id=uuid.uuid4().hex, args=[{}])


def published(rt: Runtime) -> bool:
    with contextlib.suppress(BrokerError):
        rt.publisher.publish([envelope()])
        return True
    return False
