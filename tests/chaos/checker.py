"""Proves from the evidence that what must always hold did hold. Each invariant is a function that says what breaks it.

The promises are those of the design: nothing is lost, what is recorded is exactly once, recorded before acknowledged
and before forwarded, a claim is one worker's, budgets are not mixed, and nothing needs an operator. The checker is
tested itself: `test_broken_variants.py` breaks the product in each of these ways.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from tests.chaos.driver.load import STAGES, fate
from tests.chaos.evidence import Evidence, Execution, seconds

AT_REST = frozenset({"terminal", "dead_lettered", "cancelled"})
#: The store's clock as a process knows it may be this far from the witness's.
CLOCKS_S = 0.05
#: From then on a worker may acknowledge what it still runs (setting `acknowledge_after_s`).
EARLY_S = 60.0
#: The children of a worker that was killed are ended within that, also on a busy machine; until then one may start.
ORPHANS_S = 2.0
#: Breaches of one invariant that are told in full.
SHOWN = 10

Invariant = Callable[[Evidence], Iterable[str]]


@dataclass(kw_only=True)
class Proof:
    """What was found: invariant -> what breaks it."""

    breaches: dict[str, list[str]] = field(default_factory=dict)
    #: How much was looked at.
    looked_at: Mapping[str, int] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether nothing was broken."""
        return not any(self.breaches.values())

    def text(self) -> str:
        """For people: each invariant, and what breaks it."""
        lines = ["looked at " + ", ".join(f"{number:,} {what}" for what, number in self.looked_at.items())]
        for name, broken in self.breaches.items():
            lines.append(f"  {name.replace('_', ' '):48} {'holds' if not broken else f'BROKEN {len(broken)} times'}")
            lines += [f"      {detail}" for detail in broken[:SHOWN]]
        return "\n".join(lines)


def prove(evidence: Evidence) -> Proof:
    """Ask every invariant."""
    return Proof(
        breaches={invariant.__name__: list(invariant(evidence)) for invariant in INVARIANTS},
        looked_at={
            "jobs": len(evidence.jobs),
            "executions": len(evidence.executions),
            "attempts": len(evidence.attempts),
            "outputs": len(evidence.outputs),
            "messages": len(evidence.messages),
            "faults": sum(map(len, evidence.faults_of.values())),
        },
    )


def nothing_is_lost(evidence: Evidence) -> Iterator[str]:
    """Every job that was seeded is there, and no other; and each that is through has the result of its own input."""
    for job in sorted(evidence.seeded - evidence.jobs.keys()):
        yield f"job {job} is gone"
    for job in sorted(evidence.jobs.keys() - evidence.seeded):
        yield f"job {job} came from nowhere"
    for job, row in evidence.jobs.items():
        if row["state"] != "terminal":
            continue
        output = evidence.outputs.get(f"{row['_id']}/{row['input']}")
        if output is None or output["value"]["n"] != int(job) or len(output["value"]["trail"]) != len(STAGES):
            yield f"job {job} is terminal, and its result is {output}"


def nothing_is_left_behind(evidence: Evidence) -> Iterator[str]:
    """Nobody has to do anything: all jobs are at rest, no message is open or claimed, every batch is closed."""
    for job, row in evidence.jobs.items():
        if row["state"] not in AT_REST:
            yield f"job {job} is {row['state']} in {row['stage']} (message {row['message']})"
        elif row["message"] is not None:
            yield f"job {job} is {row['state']} and names message {row['message']}"
    for row in evidence.messages.values():
        if row["state"] != "closed":
            yield f"message {row['_id']} of {row['stage']} is {row['state']}"
    for row in evidence.batches:
        if row["state"] != "closed":
            yield f"batch {row['_id']} is {row['state']}"
    for row in evidence.parked:
        yield f"a message of {row.get('queue')} was parked: {row.get('reason')}"


def nothing_is_recorded_twice(evidence: Evidence) -> Iterator[str]:
    """A job ends a stage once in a generation: one attempt that is ok, one output, one line of the event log."""
    outputs = Counter(tuple(key.split("/")[1:3]) for key in evidence.outputs)
    ends: Counter[tuple[str, str]] = Counter()
    for (job, stage, generation), rows in evidence.attempts_by_step.items():
        number = sum(row["outcome"] == "ok" for row in rows)
        ends[job, stage] += number
        if number > 1:
            yield f"job {job} ended {stage} {number} times in generation {generation}"
    for step in ends.keys() | outputs.keys():
        if ends[step] != outputs[step]:  # type: ignore[index]
            yield f"job {step[0]} ended {step[1]} {ends[step]} times and has {outputs[step]} outputs of it"  # type: ignore[index]
    recorded = [row["message"] for row in evidence.events if row["event"] in ("recorded", "lost", "given_back")]
    for message, number in Counter(recorded).items():
        if number > 1:
            yield f"message {message} was closed {number} times"
    for stage in STAGES:
        in_log = sum(row.get("advanced", 0) for row in evidence.events if row["stage"] == stage)
        in_ledger = sum(number for (_, name), number in ends.items() if name == stage)
        if in_log != in_ledger:
            yield f"{in_ledger} jobs ended {stage}, the event log says {in_log}"


def what_is_recorded_was_done(evidence: Evidence) -> Iterator[str]:
    """Each success is of an execution that ended well, in a process of the worker that had claimed the message."""
    for row in evidence.attempts:
        if row["outcome"] != "ok":
            continue
        output = evidence.outputs.get(row["_id"])
        if output is None:
            yield f"{row['_id']} is ok and has no output"
            continue
        execution = evidence.executions.get(output["value"]["trail"][-1])
        if execution is None or (execution.job, execution.stage) != (row["job"], row["stage"]):
            yield f"{row['_id']} is ok, and nobody did it ({execution})"
        elif execution.how != "end":
            yield f"{row['_id']} is ok, and its execution {execution.name} did not end well ({execution.how})"
        elif execution.worker != evidence.worker_of(row["worker"]):
            yield f"{row['_id']} was recorded by {row['worker']}, and {execution.worker} did it"


def recorded_before_forwarded(evidence: Evidence) -> Iterator[str]:
    """A stage starts with what the stage before recorded, after it was recorded."""
    made = {(row["job"], row["stage"]): row for row in evidence.attempts if row["outcome"] == "ok"}
    for execution in evidence.executions.values():
        place = STAGES.index(execution.stage)
        if place == 0:
            continue
        row = made.get((execution.job, STAGES[place - 1]))
        if row is None:
            yield f"{_named(execution)} started, and {STAGES[place - 1]} is not recorded"
            continue
        output = evidence.outputs.get(row["_id"])
        if output is None or tuple(output["value"]["trail"]) != execution.trail:
            yield f"{_named(execution)} started with {execution.trail}, recorded is {output}"
        before = evidence.executions.get(execution.trail[-1])
        if before is None or before.ended is None or before.ended > execution.started:
            yield f"{_named(execution)} started before {execution.trail[-1]} had ended"
        message = evidence.messages.get(row["_id"].rsplit("/", 1)[1])
        if message is not None and seconds(message["closed_at"]) > execution.started_at + CLOCKS_S:
            yield f"{_named(execution)} started before {row['_id']} was recorded"


def forwarded_when_durable(evidence: Evidence) -> Iterator[str]:
    """What is published is in the store by then, on a majority of its members."""
    for line in evidence.broker:
        if line["what"] == "publish" and line["row"] is None:
            yield f"{line['worker']} published {line['message']}, which was not in the store"


def recorded_before_acknowledged(evidence: Evidence) -> Iterator[str]:
    """What a worker acknowledges is recorded by then, or is not its to record.

    A second copy of what runs is acknowledged while it runs; and so is what runs for longer than EARLY_S.
    """
    for line in evidence.broker:
        row = line["row"]
        if line["what"] != "ack" or line["message"] in evidence.doubled:
            continue
        named = f"{line['worker']} acknowledged {line['message']}"
        if row is None:
            yield f"{named}, which was not in the store"
        elif row["state"] == "open":
            yield f"{named}, which nobody had claimed"
        elif row["state"] == "claimed" and evidence.worker_of(row["worker"]) == line["worker"]:
            age_s = line["at"] - row["claimed_at"]
            if not line["again"] and not line["copies"] and age_s < EARLY_S:
                yield f"{named}, which it had claimed {age_s:.1f} s before and not recorded"


def one_at_a_time(evidence: Evidence) -> Iterator[str]:
    """No execution of a job starts while another one of it goes on, unless that one's worker had lost its lease."""
    for executions in evidence.by_step.values():
        for first, second in itertools.pairwise(executions):
            end = first.ended if first.ended is not None else _death(evidence, first)
            if end is None or second.started >= end:
                continue  # where it was not killed, `executions_end` says so
            if not _lost_its_lease(evidence, first, before=second):
                yield f"{_named(second)} started {end - second.started:.3f} s before the end of {_named(first)}"


def nothing_runs_again_without_reason(evidence: Evidence) -> Iterator[str]:
    """A handler runs again for a job that failed, or whose worker was harmed; not for a service that went away."""
    for executions in evidence.by_step.values():
        for first, second in itertools.pairwise(executions):
            harmed = any(fault.mono <= second.started for fault in evidence.faults_of.get(first.worker, ()))
            if first.how != "raise" and not harmed:
                yield f"{_named(second)} started after {_named(first)} had done it"


def executions_end(evidence: Evidence) -> Iterator[str]:
    """Each execution comes to its end, unless its process was killed."""
    for execution in evidence.executions.values():
        if execution.ended is None and _death(evidence, execution) is None:
            yield f"{_named(execution)} never ended, and nobody killed it"


def refused_outcomes_overwrite_nothing(evidence: Evidence) -> Iterator[str]:
    """What a worker did that had lost its claim is a line in the ledger, and nothing else."""
    for row in evidence.attempts:
        if row["outcome"] != "refused":
            continue
        counted = row["_id"].split("/")
        output = evidence.outputs.get("/".join(counted[:4]))
        message = evidence.messages.get(counted[3])
        if message is not None and not message.get("given_back"):
            yield f"{row['_id']} was refused, and its message was not taken away"
        elif output is not None:
            yield f"{row['_id']} was refused, and left the output {output['_id']}"


def only_faults_lose_attempts(evidence: Evidence) -> Iterator[str]:
    """Only a worker to which something was done loses its lease, or an attempt."""
    for row in evidence.attempts:
        if row["outcome"] == "lost" and not _was_harmed(evidence, row["worker"]):
            yield f"{row['_id']} was lost by {row['worker']}, to which nothing was done"
    for incarnation, record in evidence.workers.items():
        if record["state"] == "stale" and not _was_harmed(evidence, incarnation):
            yield f"{incarnation} lost its lease, and nothing was done to it"


def budgets_are_not_mixed(evidence: Evidence) -> Iterator[str]:
    """Failures are the handler's, losses the worker's; neither costs a job of the other."""
    for (job, stage, _), rows in evidence.attempts_by_step.items():
        failed = 0
        for row in rows:
            if row["outcome"] in ("ok", "failed") and row["attempt"] != failed + 1:
                yield f"{row['_id']} is attempt {row['attempt']} after {failed} failures"
            failed += row["outcome"] == "failed"
        if failed > fate(int(job)).failures.get(stage, 0):
            yield f"job {job} failed {failed} times in {stage}"
        lost = sum(row["outcome"] == "lost" for row in rows)
        state = evidence.jobs[job]
        if state["stage"] == stage and (state["failures"], state["losses"]) != (failed, lost):
            yield f"job {job} says {state['failures']} failures, {state['losses']} losses; the ledger {failed}, {lost}"


def nobody_innocent_dies(evidence: Evidence) -> Iterator[str]:
    """Each job ended as it had to: dead letters are those whose handler refused them, and for that reason."""
    for job, row in evidence.jobs.items():
        expected = fate(int(job))
        found = (row["state"], row.get("reason"), row["stage"])
        if row["state"] in AT_REST and found != (expected.state, expected.reason, expected.stage):
            yield f"job {job} is {found}, and should be {(expected.state, expected.reason, expected.stage)}"


def the_witness_is_whole(evidence: Evidence) -> Iterator[str]:
    """Every line of it can be read, no worker ended by itself, and there is something to look at."""
    yield from evidence.unreadable
    for fault in evidence.faults:
        if fault.what in ("ended by itself", "did not start"):
            yield f"{fault.worker} {fault.what}: {fault.more}"
    if not evidence.executions:
        yield "nothing was executed"


INVARIANTS: tuple[Invariant, ...] = (
    nothing_is_lost,
    nothing_is_left_behind,
    nothing_is_recorded_twice,
    what_is_recorded_was_done,
    recorded_before_forwarded,
    forwarded_when_durable,
    recorded_before_acknowledged,
    one_at_a_time,
    nothing_runs_again_without_reason,
    executions_end,
    refused_outcomes_overwrite_nothing,
    only_faults_lose_attempts,
    budgets_are_not_mixed,
    nobody_innocent_dies,
    the_witness_is_whole,
)


def _named(execution: Execution) -> str:
    return f"{execution.stage} of job {execution.job} ({execution.name} on {execution.worker})"


def _death(evidence: Evidence, execution: Execution) -> float | None:
    """When the execution's process was killed, by the clock that all processes share."""
    for fault in evidence.faults_of.get(execution.worker, ()):
        dies = fault.what == "kill" or (fault.what == "kill child" and fault.more["child"] == execution.pid)
        if dies and fault.mono >= execution.started:
            return fault.mono
        if dies and fault.mono + ORPHANS_S >= execution.started:
            return fault.mono + ORPHANS_S
    return None


def _lost_its_lease(evidence: Evidence, execution: Execution, *, before: Execution) -> bool:
    """Whether a lease of the execution's worker, which something was done to, ended between the two starts."""
    return any(
        evidence.worker_of(incarnation) == execution.worker
        and _was_harmed(evidence, incarnation)
        and record["ended_at"] is not None
        and execution.started_at - CLOCKS_S <= seconds(record["ended_at"]) <= before.started_at + CLOCKS_S
        for incarnation, record in evidence.workers.items()
    )


def _was_harmed(evidence: Evidence, incarnation: str) -> bool:
    worker = evidence.worker_of(incarnation)
    return worker is None or bool(evidence.faults_of.get(worker))
