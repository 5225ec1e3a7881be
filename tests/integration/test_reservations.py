"""A worker of hundreds of partitions holds no more messages than a few, and serves all of them."""

from __future__ import annotations

import time

from pipeline_app.application import prepare
from pipeline_app.control import runs
from pipeline_app.control.seed import seeding
from pipeline_app.worker.rotation import LEAST_BOUND
from tests.integration.helpers import attempts, job, prove
from tests.project import Project, eventually

STAGES = """
import time
from pathlib import Path

from pipeline_app import Pipeline, Stage


def work(n: int) -> int:
    while n < 0 and not Path("go").exists():
        time.sleep(0.02)
    return n


demo = Pipeline("demo", stages=[Stage(work)], partition_by=["kind"])
"""

PARTITIONS = 300


def unacknowledged(project: Project) -> int:
    """Messages that workers hold, as the broker counts them."""
    vhost = project.amqp_url.rsplit("/", 1)[1]
    said = project.services.rabbitmqctl("list_queues", "-p", vhost, "--no-table-headers", "messages_unacknowledged")
    return sum(int(number) for number in said.split())


def test_hundreds_of_partitions(project: Project) -> None:
    """Given 300 partitions with work and two slots, then a worker never holds more than the bound, and does it all.

    Afterwards a job that comes to any of them starts soon.
    """
    project.amqp_url = project.services.new_vhost()
    project.write("stages.py", STAGES)
    rt = project.runtime()
    prepare(rt)
    project.json("run", "init", "r", "--pipeline", "demo")
    tags = [{"kind": f"k{n:03d}"} for n in range(PARTITIONS)]
    # The first in each waits, so that whatever is held stays held.
    rows = [{"job_id": f"{n}-{m}", "payload": m - 1, "tags": tag} for m in range(3) for n, tag in enumerate(tags)]
    seeding.seed(rt, "r", rows)

    with project.worker(pool="prefork", concurrency=2) as worker:
        # What the broker says of quorum queues lags by seconds.
        eventually(lambda: unacknowledged(project) > LEAST_BOUND // 2, timeout=60)
        until = time.monotonic() + 5.0
        while time.monotonic() < until:  # it goes on turning, without anything to take
            assert unacknowledged(project) <= LEAST_BOUND
        project.write("go", "")
        while not runs.wait(rt, "r", timeout_s=0.5).is_past(None):
            # The broker counts one queue after the other, and what moves meanwhile twice.
            assert unacknowledged(project) <= 2 * LEAST_BOUND
        prove(rt, terminal=3 * PARTITIONS)

        seeding.seed(rt, "r", [{"job_id": "late", "payload": 1, "tags": tags[PARTITIONS // 2]}])
        eventually(lambda: attempts(rt, job="late"))
        (attempt,) = attempts(rt, job="late")
        assert (attempt["started_at"] - job(rt, "late")["created_at"]).total_seconds() < 3.0
        assert worker.stop() == 0
