"""A replay at a rate: it goes on without its operator, the target sees that rate, and it halts when jobs fail again.

`make faults-full` runs it at full size, pytest alone a short one. CHAOS_REPLAY_JOBS sets the size.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from pipeline_app.control.sight.status import status
from tests.project import Project, eventually
from tests.provider import BROKEN, OK, Provider, middle, rate, window_rates

JOBS = int(os.environ.get("CHAOS_REPLAY_JOBS", "1000"))
HALTED_JOBS = min(JOBS, 1000)
RATE, HALT_AFTER = 200, 20
WINDOW_S = 10.0
#: A shorter run has no window of ten seconds, or hardly another one.
FULL_SIZE = 4000
WORKERS, THREADS = 2, 4

STAGES = """
from pipeline_app import Job, Pipeline, Retry, Stage
from target import ask


def call(n: int, job: Job) -> dict:
    answered, _ = ask(job.id)
    if answered != 200:
        raise ValueError(f"the provider answered {answered}")
    return {"n": n}


demo = Pipeline("demo", stages=[Stage(call, chunk=5, retry=Retry(attempts=1))], partition_by=["provider"])
"""

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(limit=1_000_000, failing=True) as made:
        yield made


@pytest.fixture
def failing(project: Project, provider: Provider) -> Project:
    """A project whose jobs ask a provider that is broken."""
    project.write("target.py", provider.client)
    project.write("stages.py", STAGES)
    return project


def start_workers(project: Project, stack: ExitStack) -> None:
    for _ in range(WORKERS):
        stack.enter_context(project.worker(concurrency=THREADS))


def seed_and_let_fail(project: Project, number: int) -> None:
    """All of them die of the provider."""
    project.seed("r", [{"job_id": str(n), "payload": n, "tags": {"provider": "p"}} for n in range(number)])
    waited = project.json("run", "wait", "r", "--timeout", "600", timeout=630)
    assert waited["states"]["dead_lettered"] == number


def test_a_replay_keeps_its_rate_and_survives_its_operator(failing: Project, provider: Provider) -> None:
    """Given dead jobs and a provider that works again, when they are replayed at a rate and the operator's process is
    killed in the middle, then all of them end well, and the provider sees that rate all the time.

    At full size the rate holds in any ten seconds. A short run is about as long as that: there it is the rate of the
    middle eight tenths of the requests.
    """
    with ExitStack() as stack:
        start_workers(failing, stack)
        seed_and_let_fail(failing, JOBS)
        provider.tell(failing=False)
        provider.forget()
        command = ["pipeline-app", "replay", "start", "r", "--rate", f"{RATE}/s", "--yes", "--wait"]
        operator = subprocess.Popen(
            command, cwd=failing.folder, env=failing.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        rt = failing.runtime()

        def done() -> int:
            return status(rt, "r", queues=False).states["terminal"]

        try:
            eventually(lambda: done() >= JOBS * 0.4, timeout=JOBS / RATE + 60)
            assert operator.poll() is None, "the command ended before its replay"
        finally:
            operator.send_signal(signal.SIGKILL)
            operator.wait(30)
        killed_at = done()
        assert killed_at < JOBS * 0.9, "there is no middle left"
        eventually(lambda: done() == JOBS, timeout=JOBS / RATE + 60)
        (replay,) = eventually(
            lambda: [row for row in failing.json("replay", "list", "r") if row["state"] == "done"], timeout=30
        )
    times = provider.log().times(OK)
    print(f"\nthe operator was killed at {killed_at} of {JOBS} jobs: {rate(times):.1f}/s in all, ", end="")
    print(f"{rate(middle(times)):.1f}/s without the ends")
    assert len(times) == JOBS
    assert (replay["released"], replay["failed"]) == (JOBS, 0)
    if JOBS >= FULL_SIZE:
        slowest, fastest = window_rates(times, WINDOW_S)
        print(f"in any {WINDOW_S:.0f} s: {slowest:.1f}/s to {fastest:.1f}/s")
        assert RATE * 0.9 <= slowest <= fastest <= RATE * 1.1
    else:
        assert RATE * 0.9 <= rate(middle(times)) <= RATE * 1.1
    found = failing.json("run", "verify", "r")
    assert found["ok"], found
    assert found["states"]["terminal"] == JOBS


def test_a_replay_halts_when_jobs_fail_again(failing: Project, provider: Provider) -> None:
    """Given dead jobs and a provider that is still broken, when they are replayed, then the replay halts by itself:
    what fails is no more than it was told, and what was on its way when that many had failed.

    On its way is what was let go before the workers could know: at most half a second's worth.
    """
    with ExitStack() as stack:
        start_workers(failing, stack)
        seed_and_let_fail(failing, HALTED_JOBS)
        provider.forget()
        done = failing.cli(
            "replay", "start", "r", "--rate", f"{RATE}/s", "--halt-after", str(HALT_AFTER), "--yes", "--wait"
        )
        assert done.returncode == 1, (done.stdout, done.stderr)
        rt = failing.runtime()
        eventually(lambda: status(rt, "r", queues=False).states["dead_lettered"] == HALTED_JOBS)
        (replay,) = failing.json("replay", "list", "r")
    calls = provider.log().times(BROKEN)
    in_flight, later_s = len(calls) - HALT_AFTER, calls[-1] - calls[HALT_AFTER - 1]
    print(f"\n{HALT_AFTER} had failed, {in_flight} more were on their way, the last of them {later_s:.3f} s later")
    assert replay["state"] == "halted"
    assert replay["released"] == replay["failed"] == len(calls)
    assert 0 <= in_flight <= RATE / 2
    found = failing.json("run", "verify", "r")
    assert found["ok"], found
    # Nobody but the replayed jobs was touched.
    attempts = Counter(row["generation"] for row in failing.json("attempts", "r", "--limit", str(10 * HALTED_JOBS)))
    assert sorted(attempts.values()) == sorted([HALTED_JOBS, len(calls)])
