"""Runs under load on a RabbitMQ cluster and on a replica set, of which nodes are killed and primaries step down.

`make faults-full` makes them longer: CLUSTER_JOBS, CLUSTER_KILLS (of nodes) and CLUSTER_STEP_DOWNS set the size.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from tests.clusters import RabbitCluster, ReplicaSet, rabbit_cluster, replica_set
from tests.project import Project, eventually
from tests.services import TestServices
from tests.worker import Worker

JOBS = int(os.environ.get("CLUSTER_JOBS", "1500"))
KILLS = int(os.environ.get("CLUSTER_KILLS", "2"))
STEP_DOWNS = int(os.environ.get("CLUSTER_STEP_DOWNS", "3"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))

STAGES = '''
import time

from pipeline_app import Pipeline, Stage


def first(n: int) -> int:
    time.sleep(0.01)
    return n


def second(n: int) -> dict:
    time.sleep(0.01)
    return {"square": n * n}


demo = Pipeline("demo", stages=[Stage(first, chunk=3), Stage(second, chunk=2)], partition_by=["kind"])
'''

pytestmark = pytest.mark.timeout(1800)


def make_project(folder: Path, services: TestServices, **addresses: str) -> closing[Project]:
    """A project with other addresses than those of the shared services."""
    # A virtual host of its own: its default queue is of another kind.
    found = {"amqp_url": services.new_vhost(), "mongodb_url": services.mongodb_url, **addresses}
    folder.mkdir()
    made = Project(folder, TestServices(folder=services.folder, **found))
    # The queue of tasks that are no stages is Celery's own business: by default it is on one node, and gone with it.
    made.write("celeryconfig.py", 'pipelines = ["stages:demo"]\ntask_default_queue_type = "quorum"\n')
    made.write("stages.py", STAGES)
    return closing(made)


def under_load(project: Project, disasters: list[Callable[[], None]]) -> None:
    """Run jobs, let one disaster after the other happen while they go on, and prove that every job is accounted for."""
    chance = random.Random(SEED)
    jobs: list[dict[str, Any]] = [
        {"job_id": str(n), "payload": n, "tags": {"kind": "ab"[n % 2]}} for n in range(JOBS)
    ]
    project.seed("r", jobs)
    with ExitStack() as stack:
        workers = [Worker(project, (), "prefork", 2), Worker(project, (), "threads", 2)]
        for worker in workers:
            stack.callback(worker.stop)
        for worker in workers:
            worker.wait_ready()
        for number, disaster in enumerate(disasters):
            share = (number + chance.random()) / (len(disasters) + 1)
            eventually(lambda share=share: terminal(project) >= share * JOBS * 0.9, timeout=600)
            disaster()
        done = project.json("run", "wait", "r", "--timeout", "600", timeout=630)
        assert done["states"]["terminal"] == JOBS
        for worker in workers:
            assert worker.stop() == 0, worker.text[-3000:]
    found = project.json("run", "verify", "r")
    assert (found["ok"], found["exact"]) == (True, True), found
    rows = [json.loads(line) for line in project.cli("run", "results", "r", "--json").stdout.splitlines()]
    assert {row["job_id"]: row["result"]["square"] for row in rows} == {str(n): n * n for n in range(JOBS)}


def terminal(project: Project) -> int:
    done = project.cli("run", "status", "r", "--json")
    # In the moments between two primaries nobody answers.
    return int(json.loads(done.stdout)["states"]["terminal"]) if done.returncode == 0 else 0


def killed_and_back(cluster: RabbitCluster, number: int) -> Callable[[], None]:
    """A node is killed, and started again: the next one is killed when it is back, for two of three must live."""

    def happen() -> None:
        cluster.nodes[number].kill()
        cluster.start_node(number)

    return happen


def test_nodes_of_a_rabbitmq_cluster_are_killed(
    tmp_path: Path, services: TestServices, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given three nodes in AMQP_URL and a run, when they are killed one after the other, then nothing is lost."""
    with (
        rabbit_cluster(tmp_path / "rabbit") as cluster,
        make_project(tmp_path / "project", services, amqp_url=cluster.url) as project,
    ):
        under_load(project, [killed_and_back(cluster, number % 3) for number in range(KILLS)])
    with capsys.disabled():
        print(f"\n{KILLS} nodes killed, {JOBS} jobs: none lost, none recorded twice")


def primary_killed_and_back(members: ReplicaSet) -> None:
    """The primary is killed; another leads, and it comes back as a secondary."""
    before = members.primary()
    before.kill()
    members.primary()
    members.start_member(before)


def test_primaries_step_down_and_are_killed(
    tmp_path: Path, services: TestServices, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given three members in MONGODB_URL and a run, when primaries step down and one is killed, nothing is lost."""
    with (
        replica_set(tmp_path / "mongo") as members,
        make_project(tmp_path / "project", services, mongodb_url=members.url) as project,
    ):
        disasters: list[Callable[[], None]] = [members.step_down] * STEP_DOWNS
        disasters.insert(len(disasters) // 2, lambda: primary_killed_and_back(members))
        under_load(project, disasters)
    with capsys.disabled():
        print(f"\n{STEP_DOWNS} step-downs, 1 primary killed, {JOBS} jobs: none lost, none recorded twice")
