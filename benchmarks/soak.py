"""A steady load for a long time: jobs a second, memory of every process, depth of the queues, lag; and a verdict.

    python -m benchmarks.soak [--minutes 60] [--rate 40] [--warm-up 10] [--every 30] [--growth 0.05]

Services of its own, a worker with a prefork pool, one with threads, and a process that seeds at a steady rate below
what they can do (`soak_load.py`). Lag is the age of the oldest message that is not recorded, or of the oldest job whose
time to go on has come. Ends with 1 if a process of ours grew by more than `--growth` since the warm-up, if the load was
not kept up with, if a process ended, or if a run does not add up. RabbitMQ and mongod are shown and not judged: their
caches fill until they are as large as they may be.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.memory import MEBIBYTE, Memory, Track
from pipeline_app.application import client_runtime
from pipeline_app.control.accounts.verify import verify
from pipeline_app.local import processes, services
from pipeline_app.runtime import Runtime
from pipeline_app.settings import load
from pipeline_app.store import manifests, partitions
from pipeline_app.transport.depth import depths

REPOSITORY = Path(__file__).parent.parent
PIPELINE = "benchmarks.soak_load:soak"
WORKERS = {"prefork": 2, "threads": 4}
#: Memory is looked at this often; shorter runs look more often.
LOOK_S = 5.0
#: Lag that a load that is kept up with never reaches, and time for the last jobs to come to rest.
MAX_LAG_S, REST_S = 30.0, 120.0


@dataclass(frozen=True, kw_only=True)
class Load:
    """How the work stood at one look."""

    at: float
    seeded: int
    at_rest: int
    #: Hints that wait in queues.
    ready: int
    lag_s: float


@dataclass(kw_only=True)
class Findings:
    """What the verdict rests on."""

    loads: list[Load] = field(default_factory=list)
    tracks: Sequence[Track] = ()
    #: What is wrong with a run, by name.
    accounts: dict[str, str] = field(default_factory=dict)


class Soak:
    """Services, workers and a seeder, for as long as the soak lasts."""

    def __init__(self, folder: Path, options: argparse.Namespace, rt: Runtime) -> None:
        self.folder = folder
        self.options = options
        self.rt = rt
        self.seconds = options.minutes * 60
        self.warm_up_s = options.warm_up * 60
        #: Medians are taken over a twentieth of what comes after the warm-up.
        self.window_s = max(0.05 * (self.seconds - self.warm_up_s), 1.0)
        self.look_s = min(LOOK_S, self.window_s / 4)
        self.begin = time.monotonic()
        self.memory = Memory(self.clock)
        self.findings = Findings()

    def clock(self) -> float:
        """Seconds since the soak began."""
        return time.monotonic() - self.begin

    @contextmanager
    def process(self, name: str, command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
        """One of our processes, until it was told to stop."""
        settings = self.rt.settings
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "SOAK_LEAK_KB": str(self.options.leak_kb)}
        env |= {"AMQP_URL": settings.amqp_url, "MONGODB_URL": settings.mongodb_url}
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *command], cwd=self.folder, env=env, stdout=log, stderr=log
            )
            try:
                yield process
            finally:
                process.terminate()
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def worker(self, pool: str) -> Sequence[str]:
        """The command of a worker."""
        return ["celery", "-A", "pipeline_app", "worker", "-P", pool, "-c", str(WORKERS[pool]), "-n", f"{pool}@%h",
                "-l", "WARNING", "--without-mingle"]  # fmt: skip

    def run(self) -> None:
        """Hold the load, and look."""
        for record in processes.marked(self.folder / ".pipeline"):
            self.memory.follow(record.name, record.pid, ours=False)
        with ExitStack() as stack:
            ours: dict[str, subprocess.Popen[bytes]] = {}
            for pool in WORKERS:
                ours[pool] = stack.enter_context(self.process(pool, self.worker(pool)))
            ours["seeder"] = stack.enter_context(
                self.process("seeder", ["benchmarks.soak_load", str(self.seconds), str(self.options.rate)])
            )
            self.begin = time.monotonic()
            for name, process in ours.items():
                self.memory.follow(name, process.pid, ours=True)
            self._look_until_over(ours)
            # It began later than this clock did, and adds jobs for as long.
            if ours["seeder"].wait(60):
                raise SystemExit(f"the seeder failed, see {self.folder / 'seeder.log'}")
            self._await_rest()
        self.findings.tracks = list(self.memory.tracks)
        self._verify()

    def _look_until_over(self, ours: dict[str, subprocess.Popen[bytes]]) -> None:
        said = 0.0
        while (now := self.clock()) < self.seconds:
            self.memory.look()
            self.findings.loads.append(self.load())
            for name, process in ours.items():
                if process.poll() is not None and self.clock() < self.seconds:
                    log = self.folder / f"{name}.log"
                    raise SystemExit(f"{name} ended by itself, see {log}:\n{processes.tail(log, lines=30)}")
            if now - said >= self.options.every:
                self.say(self.options.every)
                said = now
            time.sleep(max(0.0, now + self.look_s - self.clock()))

    def _await_rest(self) -> None:
        """Let the last jobs come to rest: what has not afterwards is a finding of `verify`."""
        deadline = self.clock() + REST_S
        while (now := self.load()).at_rest < now.seeded and self.clock() < deadline:
            time.sleep(0.5)
        self.findings.loads.append(now)

    def load(self) -> Load:
        """The work as it stands."""
        rows = self.rt.store.db.run_counters.aggregate(
            [
                {
                    "$group": {
                        "_id": None,
                        "seeded": {"$sum": "$seeded"},
                        **{state: {"$sum": f"$states.{state}"} for state in ("terminal", "dead_lettered")},
                    }
                }
            ]
        )
        counts: dict[str, int] = next(iter(rows), {"seeded": 0, "terminal": 0, "dead_lettered": 0})
        found = depths(self.rt.settings.amqp_url, partitions.queues(self.rt.store))
        return Load(
            at=self.clock(),
            seeded=counts["seeded"],
            at_rest=counts["terminal"] + counts["dead_lettered"],
            ready=sum(depth.ready for depth in found.values()),
            lag_s=self._lag_s(),
        )

    def _lag_s(self) -> float:
        db, now = self.rt.store.db, self.rt.store.now()
        oldest: list[datetime] = [now]
        for state in ("open", "claimed"):
            found = db.messages.find_one({"state": state}, {"created_at": 1}, sort=[("created_at", 1)])
            oldest += [found["created_at"]] if found else []
        overdue = db.job_states.find_one({"due_at": {"$lt": now}}, {"due_at": 1}, sort=[("due_at", 1)])
        oldest += [overdue["due_at"]] if overdue else []
        return (now - min(oldest)).total_seconds()

    def say(self, since_s: float) -> None:
        """What there is to see: the load of the last `since_s` seconds, and each process."""
        last = self.findings.loads[-1]
        recent = [load for load in self.findings.loads if load.at >= last.at - since_s]
        rate = (last.at_rest - recent[0].at_rest) / max(last.at - recent[0].at, 0.001)
        minutes, seconds = divmod(int(last.at), 60)
        print(f"{minutes:3}:{seconds:02}  {rate:6.1f} jobs/s  {last.at_rest:,} of {last.seeded:,} at rest"
              f"  {last.ready} hints ready  lag {max(load.lag_s for load in recent):.1f} s")  # fmt: skip
        for track in self.memory.tracks:
            if not track.ended:
                sample, growth = track.samples[-1], track.growth(self.warm_up_s, self.window_s)
                grown = "" if growth is None else f"{growth:+8.1%} since minute {self.options.warm_up:g}"
                print(f"        {track.name:16} {track.pid:>8}  RSS {sample.rss / MEBIBYTE:7.1f}"
                      f"  USS {sample.uss / MEBIBYTE:7.1f} MiB {grown}")  # fmt: skip
        sys.stdout.flush()

    def _verify(self) -> None:
        for manifest in manifests.matching(self.rt.store, {}):
            found = verify(self.rt, manifest["_id"])
            unfinished = found.seeded - found.states["terminal"] - found.states["dead_lettered"]
            if not found.ok or unfinished:
                what = "; ".join(f"{p.kind} {p.job_id or ''}: {p.detail}" for p in found.problems[:3])
                self.findings.accounts[manifest["_id"]] = f"{unfinished} jobs are not at rest; {what}"

    def objections(self) -> list[str]:
        """All that speaks against it."""
        return [
            *(f"{run}: {what}" for run, what in self.findings.accounts.items()),
            *lagging(self.findings.loads, self.warm_up_s),
            *growing(self.findings.tracks, self.warm_up_s, self.window_s, self.options.growth),
        ]


def lagging(loads: Sequence[Load], warm_up_s: float) -> list[str]:
    """Whether the load was not kept up with."""
    late = [load for load in loads if load.at >= warm_up_s and load.lag_s > MAX_LAG_S]
    if not late:
        return []
    worst = max(late, key=lambda load: load.lag_s)
    return [f"the load was not kept up with: lag {worst.lag_s:.0f} s at second {worst.at:.0f}"]


def growing(tracks: Sequence[Track], warm_up_s: float, window_s: float, limit: float) -> list[str]:
    """The processes of ours that grew by more than `limit`, or did not live from the warm-up to the end."""
    found = []
    for track in tracks:
        growth = track.growth(warm_up_s, window_s)
        if not track.ours or growth is None:
            continue
        if growth > limit:
            found.append(f"{track.name} {track.pid} grew by {growth:.1%}")
        elif track.ended:
            found.append(f"{track.name} {track.pid} ended")
    return found


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=float, default=40, help="jobs a second, each of three stages")
    parser.add_argument("--warm-up", type=float, default=10, help="minutes after which nothing may grow any more")
    parser.add_argument("--every", type=float, default=30, help="seconds between two reports")
    parser.add_argument("--growth", type=float, default=0.05, help="share that a process may grow by")
    parser.add_argument("--leak-kb", type=int, default=0, help="a handler keeps that of each job: shows what is found")
    return parser.parse_args()


def soak(folder: Path, options: argparse.Namespace) -> list[str]:
    """Hold the load in `folder`; returns what speaks against it."""
    (folder / "celeryconfig.py").write_text(f'pipelines = ["{PIPELINE}"]\n')
    os.chdir(folder)
    found: Any = services.up(broker="rabbitmq")
    try:
        settings = load(amqp_url=found.amqp_url, mongodb_url=found.mongodb_url, pipelines=(PIPELINE,))
        whole = Soak(folder, options, client_runtime(settings))
        try:
            whole.run()
        finally:
            if whole.findings.loads:
                whole.say(whole.seconds)
            whole.rt.close()
        return whole.objections()
    finally:
        services.down()
        os.chdir(REPOSITORY)


def main() -> None:
    """Print what is seen, and the verdict."""
    options = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="pipeline-soak-"))
    print(f"{options.minutes:g} minutes at {options.rate:g} jobs/s; logs in {folder}", flush=True)
    try:
        objections = soak(folder, options)
    except KeyboardInterrupt:
        print(f"interrupted; logs and data: {folder}", file=sys.stderr)
        sys.exit(130)
    if objections:
        sys.exit("\n".join(["verdict: not well", *objections, f"logs and data: {folder}"]))
    shutil.rmtree(folder)
    judged = options.minutes > options.warm_up
    print("verdict: well" if judged else "verdict: well, but too short to say whether anything grows")


if __name__ == "__main__":
    main()
