"""Runs under load while workers are killed and services go away; afterwards every job must be accounted for.

`make chaos` runs them at full size; in `make test` they are short. CHAOS_JOBS, CHAOS_KILLS and CHAOS_SEED set the size.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline_app.local import rabbitmq, services
from tests.project import Project, Worker, eventually
from tests.services import TestServices

JOBS = int(os.environ.get("CHAOS_JOBS", "2000"))
KILLS = int(os.environ.get("CHAOS_KILLS", "3"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))

STAGES = '''
import time

from pipeline_app import PermanentError, Pipeline, Stage


def first(n: int) -> int:
    if n % 100 == 7:
        raise PermanentError("one in a hundred")
    time.sleep(0.001)
    return n


def second(n: int) -> dict:
    return {"n": n}


def third(row: dict) -> dict:
    time.sleep(0.001)
    return {**row, "square": row["n"] ** 2}


demo = Pipeline(
    "demo",
    stages=[Stage(first, chunk=10), Stage(second, chunk=20), Stage(third, chunk=5)],
    partition_by=["kind"],
)
'''

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture
def own_services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestServices]:
    """A RabbitMQ node and a mongod that only this test uses, and may stop."""
    folder = tmp_path / "services"
    folder.mkdir()
    (folder / "celeryconfig.py").touch()
    monkeypatch.chdir(folder)
    found = services.up(broker="rabbitmq")
    try:
        yield TestServices(amqp_url=found.amqp_url, mongodb_url=found.mongodb_url, folder=folder)
    finally:
        services.down()


@pytest.fixture
def chaos(tmp_path: Path, own_services: TestServices) -> Iterator[Project]:
    """A project whose services may be stopped."""
    (tmp_path / "project").mkdir()
    made = Project(tmp_path / "project", own_services)
    made.write("stages.py", STAGES)
    yield made
    made.close()


def jobs(number: int) -> list[dict[str, Any]]:
    return [{"job_id": str(n), "payload": n, "tags": {"kind": "ab"[n % 2]}} for n in range(number)]


def at_rest(project: Project) -> int:
    states = project.json("run", "status", "r")["states"]
    return int(states["terminal"] + states["dead_lettered"])


def prove(project: Project, workers: list[Worker]) -> dict[str, Any]:
    """Nothing lost, nothing recorded twice, every count agrees."""
    for worker in workers:
        worker.stop()
    found = project.json("run", "verify", "r")
    assert found["ok"], found
    assert found["seeded"] == JOBS == found["states"]["terminal"] + found["states"]["dead_lettered"]
    assert found["states"]["dead_lettered"] == len([n for n in range(JOBS) if n % 100 == 7])
    rows = [json.loads(line) for line in project.cli("run", "results", "r", "--json").stdout.splitlines()]
    assert {row["job_id"]: row["result"]["square"] for row in rows} == {
        str(n): n * n for n in range(JOBS) if n % 100 != 7
    }
    return found


def start(project: Project, stack: ExitStack, pool: str, concurrency: int) -> Worker:
    worker = Worker(project, (), pool, concurrency)
    stack.callback(worker.stop)
    worker.wait_ready()
    return worker


def test_workers_killed_at_any_moment(chaos: Project) -> None:
    """Given a run under way, when workers are killed again and again, then no job is lost or recorded twice."""
    chance = random.Random(SEED)
    chaos.seed("r", jobs(JOBS))
    with ExitStack() as stack:
        workers = [start(chaos, stack, "prefork", 2), start(chaos, stack, "threads", 4)]
        for number in range(KILLS):
            share = (number + chance.random()) / (KILLS + 1)
            eventually(lambda share=share: at_rest(chaos) >= share * JOBS * 0.9, timeout=900)
            place = chance.randrange(len(workers))
            workers[place].kill()
            workers[place] = start(chaos, stack, *(("prefork", 2), ("threads", 4))[place])
        chaos.json("run", "wait", "r", "--timeout", "900", timeout=930)
        prove(chaos, workers)
    print(f"\n{KILLS} kills, {JOBS} jobs: none lost, none recorded twice")


def stop_mongod(project: Project) -> Callable[[], object]:
    """End mongod; the returned function starts it again as it was."""
    port = project.services.mongodb_url.split(":")[2].split("/")[0]
    process = next(p for p in psutil.process_iter(["name", "cmdline"]) if _is_mongod(p, port))
    command, environment = process.cmdline(), process.environ()
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    # Its environment is how the services find it again, to stop it at the end.
    return lambda: subprocess.run(
        ["setsid", "--fork", *command], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True
    )


def _is_mongod(process: psutil.Process, port: str) -> bool:
    command = process.info["cmdline"] or []
    return "mongod" in (process.info["name"] or "") and port in command


def restart_rabbitmq(project: Project) -> Callable[[], object]:
    """Stop the broker's application; the returned function starts it again."""
    state_dir = project.services.folder / ".pipeline"
    rabbitmq.ctl(state_dir, "stop_app")
    return lambda: rabbitmq.ctl(state_dir, "start_app", timeout_s=60)


@pytest.mark.parametrize(
    ("take_away", "seconds"), [(stop_mongod, 20.0), (restart_rabbitmq, 2.0)], ids=["mongodb", "rabbitmq"]
)
def test_service_goes_away_under_load(
    chaos: Project, take_away: Callable[[Project], Callable[[], object]], seconds: float
) -> None:
    """Given a run under way, when a service is gone for a while, then every job is accounted for afterwards."""
    chaos.seed("r", jobs(JOBS))
    with ExitStack() as stack:
        workers = [start(chaos, stack, "prefork", 2), start(chaos, stack, "threads", 4)]
        eventually(lambda: at_rest(chaos) >= JOBS * 0.2, timeout=600)
        bring_back = take_away(chaos)
        time.sleep(seconds)  # the outage itself
        bring_back()
        eventually(lambda: chaos.cli("run", "status", "r").returncode == 0, timeout=120)
        chaos.json("run", "wait", "r", "--timeout", "600", timeout=630)
        prove(chaos, workers)
