"""A pipeline on nodes of pytest-celery, processes or containers, and what such nodes go through."""

from __future__ import annotations

from typing import Any

import pytest
from pytest_celery import CeleryTestSetup

from tests.nodes import NodeProject
from tests.project import eventually

pytestmark = pytest.mark.timeout(300)


def jobs(number: int, **payload: Any) -> list[dict[str, Any]]:
    return [{"job_id": f"j{n}", "payload": {"n": n, **payload}, "tags": {"kind": "ab"[n % 2]}} for n in range(number)]


def test_a_pipeline_goes_through_the_nodes(project: NodeProject, celery_setup: CeleryTestSetup) -> None:
    """Given a broker, a store and a worker, then jobs become results, and the nodes are what they seem."""
    assert celery_setup.ready(ping=False, control=True, docker=True)
    assert len(celery_setup) == 3
    assert len(celery_setup.app.control.ping()) == 1
    worker = celery_setup.worker
    assert worker.version.startswith("5.7")
    assert len(worker.get_running_processes_info()) >= 3  # the main process and its children

    project.seed("r", jobs(20))
    done = project.json("run", "wait", "r", "--timeout", "90", timeout=100)

    assert done["states"]["terminal"] == 20
    assert [row["state"] for row in project.json("workers")] == ["running"]
    worker.assert_log_exists("demo.third")
    worker.assert_log_does_not_exist("Traceback")
    assert project.json("run", "verify", "r")["ok"]


def test_a_worker_that_is_killed_loses_nothing(project: NodeProject, celery_setup: CeleryTestSetup) -> None:
    """Given a worker that is killed while its handlers run, when it is started again, then their jobs go on."""
    project.seed("r", jobs(4, sleep_s=3))
    eventually(lambda: len(project.calls()) >= 2, 60)

    celery_setup.worker.kill()
    assert celery_setup.worker.container.status == "exited"
    celery_setup.worker.restart()

    done = project.json("run", "wait", "r", "--timeout", "120", timeout=130)
    assert done["states"]["terminal"] == 4
    assert "lost" in {row["outcome"] for row in project.json("attempts", "r")}
    assert project.json("run", "verify", "r")["ok"]


def test_a_broker_that_drops_everybody_makes_nothing_run_twice(
    project: NodeProject, celery_setup: CeleryTestSetup
) -> None:
    """Given handlers that run while the broker ends all connections, then none of them runs a second time."""
    project.seed("r", jobs(4, sleep_s=4))
    eventually(lambda: len(project.calls()) >= 2, 60)

    celery_setup.broker.restart()
    celery_setup.worker.assert_log_exists("Connection to broker lost", timeout=60)

    done = project.json("run", "wait", "r", "--timeout", "120", timeout=130)
    assert done["states"]["terminal"] == 4
    firsts = [line for line in project.calls() if line.startswith("first ")]
    assert len(firsts) == 4
    assert project.json("run", "verify", "r")["ok"]
