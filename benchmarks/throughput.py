"""How many stage executions a second: ours with everything recorded, beside plain Celery that records nothing.

    python -m benchmarks.throughput [--tasks 6000] [--jobs 40000] [--rounds 3]

One worker process each, threads pool, four handlers at once, three stages that do nothing, all in one run on services
of its own. Queues are filled before the worker starts; the time is from the first execution to the last record. Rounds
are taken in turn, and ratios are formed within a round: machines are noisy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline_app.local import rabbitmq, services

#: Messages in flight for each of our threads, by chunk: what is short is recorded together with many others. Plain
#: Celery gets its default of 4, which is faster than 1 and records nothing that could be shared.
PREFETCH = {1: 32, 200: 2}

REPOSITORY = Path(__file__).parent.parent


class Bench:
    """Services for a benchmark, and one measurement after the other on them."""

    def __init__(self, folder: Path, amqp_url: str, mongodb_url: str) -> None:
        self.folder = folder
        self.amqp_url = amqp_url
        self.mongodb_url = mongodb_url

    def environment(self, queue_type: str, **more: str) -> dict[str, str]:
        """A fresh virtual host and database."""
        name = f"b_{uuid.uuid4().hex[:8]}"
        state_dir = self.folder / ".pipeline"
        rabbitmq.ctl(state_dir, "add_vhost", name)
        rabbitmq.ctl(state_dir, "set_permissions", "-p", name, "guest", ".*", ".*", ".*")
        base, _, options = self.mongodb_url.partition("?")
        return {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "AMQP_URL": f"{self.amqp_url.rstrip('/')}/{name}",
            "MONGODB_URL": f"{base.rsplit('/', 1)[0]}/{name}?{options}",
            "PIPELINE_QUEUE_TYPE": queue_type,
            **more,
        }

    @contextmanager
    def worker(self, env: dict[str, str], app: str, log: str) -> Iterator[subprocess.Popen[bytes]]:
        """A worker with four threads that logs nothing per task."""
        command = [sys.executable, "-m", "celery", "-A", app, "worker", "-P", "threads", "-c", "4", "-l", "WARNING",
                   "--without-mingle", "--without-gossip", "--without-heartbeat"]  # fmt: skip
        with (self.folder / log).open("wb") as out:
            process = subprocess.Popen(command, cwd=self.folder, env=env, stdout=out, stderr=out)
            try:
                yield process
            finally:
                process.terminate()
                process.wait(60)

    def raw(self, tasks: int, queue_type: str) -> float:
        """Plain Celery: tasks a second."""
        result = self.folder / "raw.json"
        result.unlink(missing_ok=True)
        env = self.environment(queue_type, BENCH_TASKS=str(tasks), BENCH_RESULT=str(result))
        fill = (
            "from celery import chain; from benchmarks.stages import app\n"
            "from kombu.pools import producers\n"
            "with app.producer_pool.acquire() as p:\n"
            f"    for n in range({tasks // 3}):\n"
            "        chain(app.signature('raw.0', (n,)), app.signature('raw.1'), app.signature('raw.2'))"
            ".apply_async(producer=p)\n"
        )
        subprocess.run([sys.executable, "-c", fill], cwd=self.folder, env=env, check=True)
        with self.worker(env, "benchmarks.stages", "raw.log") as process:
            while not result.exists():
                assert process.poll() is None, (self.folder / "raw.log").read_text()[-3000:]
                time.sleep(0.1)
        return tasks / float(json.loads(result.read_text())["seconds"])

    def ours(self, executions: int, chunk: int, queue_type: str) -> float:
        """The framework: stage executions a second, first start to last record."""
        config = f'pipelines = ["benchmarks.stages:noop"]\nworker_prefetch_multiplier = {PREFETCH[chunk]}\n'
        (self.folder / "celeryconfig.py").write_text(config)
        env = self.environment(queue_type, BENCH_CHUNK=str(chunk))
        self._measure("seed", env, executions // 3)
        with self.worker(env, "pipeline_app", "ours.log") as process:
            assert process.poll() is None
            return executions / self._measure("wait", env, executions // 3)

    def _measure(self, what: str, env: dict[str, str], jobs: int) -> float:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.ours", what, str(jobs)],
            cwd=self.folder, env=env, check=False, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr + (self.folder / "ours.log").read_text()[-3000:])
        return float(done.stdout)


def rounds(bench: Bench, options: argparse.Namespace) -> list[dict[str, float]]:
    """One row of rates for each round."""
    found: list[dict[str, float]] = []
    for number in range(options.rounds):
        row = {
            "raw classic": bench.raw(options.tasks, "classic"),
            "ours classic chunk 1": bench.ours(options.tasks, 1, "classic"),
            "ours classic chunk 200": bench.ours(options.jobs * 3, 200, "classic"),
            "raw quorum": bench.raw(options.tasks, "quorum"),
            "ours quorum chunk 1": bench.ours(options.tasks, 1, "quorum"),
            "ours quorum chunk 200": bench.ours(options.jobs * 3, 200, "quorum"),
        }
        print(f"round {number + 1}: " + ", ".join(f"{name} {rate:,.0f}/s" for name, rate in row.items()), flush=True)
        found.append(row)
    return found


def main() -> None:
    """Print rates, and ratios to plain Celery on the same kind of queue."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=6000, help="executions at one job per message")
    parser.add_argument("--jobs", type=int, default=40000, help="jobs at chunk 200, three executions each")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pipeline-bench-") as name:
        folder = Path(name)
        (folder / "celeryconfig.py").touch()
        os.chdir(folder)
        found: Any = services.up(broker="rabbitmq")
        try:
            rows = rounds(Bench(folder, found.amqp_url, found.mongodb_url), options)
        finally:
            services.down()
            os.chdir(REPOSITORY)
    for name in rows[0]:
        rates = [row[name] for row in rows]
        ratios = [row[name] / row["raw classic" if "classic" in name else "raw quorum"] for row in rows]
        print(f"{name:24} {statistics.median(rates):>9,.0f}/s   {statistics.median(ratios):6.2f} x plain Celery"
              f"   (rounds: {', '.join(f'{ratio:.2f}' for ratio in ratios)})")  # fmt: skip


if __name__ == "__main__":
    main()
