"""Jobs that ask a provider of 40 requests a second, with a throttle and without: a refusal costs nobody an attempt.

`make faults-full` runs them at full size, pytest alone short ones. CHAOS_RATE_JOBS sets the size.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from statistics import median

import pytest

from pipeline_app.control.duties.hold_release import PROBES
from tests.project import Project
from tests.provider import LIMITED, OK, Log, Provider, closings, per_second, rate

JOBS = int(os.environ.get("CHAOS_RATE_JOBS", "300"))
#: Without a throttle the provider is closed most of the time.
UNTHROTTLED_JOBS = max(120, JOBS // 10)
#: From here on a few closings don't matter.
FULL_SIZE = 5000
WORKERS, THREADS = 2, 4

STAGES = """
from pipeline_app import Job, Pipeline, RateLimited, Retry, Stage
from target import ask


def call(n: int, job: Job) -> dict:
    status, retry_after = ask(job.id)
    if status == 429:
        raise RateLimited(retry_after=retry_after)
    return {"n": n, "status": status}


# One attempt: a refusal that cost one would end the job.
demo = Pipeline("demo", stages=[Stage(call, retry=Retry(attempts=1))], partition_by=["provider"])
"""

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(limit=40, latency_s=0.02) as made:
        yield made


def write_stages(project: Project, provider: Provider, *, chunk: int = 1) -> None:
    """Jobs that ask the provider."""
    project.write("target.py", provider.client)
    project.write("stages.py", STAGES.replace("CHUNK", str(chunk)))


def run_all(project: Project, number: int) -> None:
    """Take `number` jobs through several workers, and prove that all end well and that none paid for a refusal."""
    with ExitStack() as stack:
        for _ in range(WORKERS):
            stack.enter_context(project.worker(concurrency=THREADS))
        project.seed("r", [{"job_id": str(n), "payload": n, "tags": {"provider": "p"}} for n in range(number)])
        project.json("run", "wait", "r", "--strict", "--timeout", "1500", timeout=1530)
    found = project.json("run", "verify", "r")
    assert found["ok"], found
    assert found["states"]["terminal"] == number
    attempts = Counter(row["outcome"] for row in project.json("attempts", "r", "--limit", str(number * 20)))
    assert attempts["ok"] == number
    assert set(attempts) <= {"ok", "deferred"}, attempts


def told(log: Log) -> str:
    """What a person wants to read of it."""
    accepted, refused = log.times(OK), log.times(LIMITED)
    return (
        f"{len(accepted)} accepted, {len(refused)} refused ({len(refused) / len(log.arrivals):.2%}), "
        f"{rate(accepted):.1f}/s from the first to the last, {median(per_second(accepted)):.0f} in the median second"
    )


@pytest.mark.parametrize(("chunk", "latency_s"), [(1, 0.02), (10, 0.1)], ids=["one by one", "slowly in chunks"])
def test_a_throttle_keeps_within_the_limit_and_uses_it(
    project: Project, provider: Provider, chunk: int, latency_s: float
) -> None:
    """Given a throttle right below the provider's limit, when jobs go through, then hardly any is refused, and the
    limit is used, also where a job takes longer than it is until the next one's turn.

    At full size the rate is from the first to the last accepted request. In a short run a single refusal, after which
    the provider wants a second's silence, would weigh more than all the rest: there it is that of the median second.
    """
    provider.tell(latency_s=latency_s)
    write_stages(project, provider, chunk=chunk)
    project.json("throttle", "set", "--selector", "provider=p", "--rate", "39/s", "--burst", "2")
    run_all(project, JOBS)
    log = provider.log()
    print("\nwith a throttle:", told(log))
    assert log.count(OK) == JOBS
    assert log.count(LIMITED) < 0.02 * len(log.arrivals)
    accepted = log.times(OK)
    assert (rate(accepted) if JOBS >= FULL_SIZE else median(per_second(accepted))) >= 0.9 * 40


def test_without_a_throttle_few_are_refused_each_time_the_provider_closes(project: Project, provider: Provider) -> None:
    """Given no throttle, when jobs run into the limit, then each closing refuses no more than were on their way, and
    the probes.
    """
    write_stages(project, provider)
    run_all(project, UNTHROTTLED_JOBS)
    log = provider.log()
    holds = project.json("hold", "list", "--ended")
    closed = sum(hold["closings"] for hold in holds)
    # As the provider saw it: it asks for a second's silence each time.
    bursts = closings(log.times(LIMITED), gap_s=0.5)
    print(
        "\nwithout a throttle:", told(log) + f", {len(holds)} holds closed {closed} times, refused each time: {bursts}"
    )
    assert log.count(OK) == UNTHROTTLED_JOBS
    assert len(holds) == 1
    assert 0 < log.count(LIMITED) <= closed * (WORKERS * THREADS + PROBES)
    assert max(bursts) <= WORKERS * THREADS + PROBES
