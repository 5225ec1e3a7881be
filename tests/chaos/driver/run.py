"""One chaos run: workers of its own, jobs that come as it goes on, faults; and then the proof."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline_app.errors import PipelineError
from tests.chaos import checker, evidence
from tests.chaos.driver.amqp import AmqpProxy, BrokerWitness
from tests.chaos.driver.faults import Fault, Scene
from tests.chaos.driver.fleet import Fleet, Place
from tests.chaos.driver.journal import Journal
from tests.chaos.driver.load import RUN
from tests.chaos.driver.network import StoreProxy
from tests.chaos.driver.report import report
from tests.chaos.driver.schedule import Plan, faults_of
from tests.chaos.driver.seeder import Seeder
from tests.chaos.driver.services import Services, own_services
from tests.integration.proxy import Proxy
from tests.project import Project, eventually
from tests.services import TestServices

APP = Path(__file__).parent / "app"
#: After the last fault everything must come to rest within this.
REST_S = 900.0
TELL_EVERY_S = 15.0

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a run."""

    proof: checker.Proof
    evidence: evidence.Evidence
    #: What `run verify` says, the product's own opinion.
    verified: dict[str, Any]
    text: str

    @property
    def holds(self) -> bool:
        """Whether everything that must hold held."""
        return self.proof.holds and bool(self.verified["ok"])


def chaos(plan: Plan, folder: Path, say: Say) -> Result:
    """Carry the plan out in `folder` with services of its own, and say how it goes."""
    with own_services(folder / "services", members=plan.members) as services:
        return chaos_with(plan, folder / "project", services.addresses, say, services)


def chaos_with(
    plan: Plan,
    folder: Path,
    addresses: TestServices,
    say: Say,
    services: Services | None = None,
    rest_s: float = REST_S,
) -> Result:
    """Carry it out with these services, which are stopped only if they are `services`, this run's own."""
    began = time.monotonic()
    project = _project(folder, addresses)
    try:
        _load(plan, project, services, say, rest_s)
        say(f"over after {time.monotonic() - began:.0f} s; looking for what went wrong")
        verified = json.loads(project.cli("run", "verify", RUN, "--json", timeout=900).stdout)
        found = evidence.collect(project.folder, project.mongodb_url)
        proof = checker.prove(found)
        text = report(found, proof, took_s=time.monotonic() - began)
        text += f"\nverify: ok={verified['ok']}, seeded {verified['seeded']:,}, {verified['states']}"
        return Result(proof=proof, evidence=found, verified=verified, text=text)
    finally:
        project.close()


def _project(folder: Path, services: TestServices) -> Project:
    (folder / "witness").mkdir(parents=True)
    project = Project(folder, services)
    shutil.copytree(APP, folder, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    return project


def _load(plan: Plan, project: Project, services: Services | None, say: Say, rest_s: float) -> None:
    project.json("run", "init", RUN, "--pipeline", "chaos", env={"CHAOS_TIMES": str(plan.times)})
    with ExitStack() as stack:
        journal = Journal(project.folder / "journal.jsonl")
        stack.callback(journal.close)
        fleet = stack.enter_context(_fleet(plan, project, journal, say))
        scene = Scene(
            fleet=fleet, journal=journal, rt=project.runtime(), witness=project.folder / "witness", services=services
        )
        faults = faults_of(plan, scene)
        going = Going(plan, faults, say)
        seeder = Seeder(
            project.runtime(), journal, going.share, number=plan.jobs, pause_s=plan.pause_s, seed=plan.seed
        )
        stack.callback(seeder.close)
        going.seeder = seeder
        # Faults that meet nobody at work are none.
        eventually(lambda: any(scene.witness.iterdir()), timeout=120)
        _do_faults(fleet, faults, going)
        say(f"the last fault is done: {going.state()}")
        _wait_for_rest(plan, fleet, seeder, going, rest_s)


@contextmanager
def _fleet(plan: Plan, project: Project, journal: Journal, say: Say) -> Iterator[Fleet]:
    """Workers that consume, each behind proxies; told to stop at the end."""
    witness = BrokerWitness(project.folder / "broker.jsonl", project.mongodb_url)
    numbers = itertools.count(1)
    cuts_store = plan.members == 1 and "cuts" in {entry.kind for entry in plan.faults}
    places: list[Place] = []
    for kind in plan.workers:
        amqp = AmqpProxy(project.amqp_url, witness)
        proxies: dict[str, Proxy] = {"broker": amqp}
        env = {
            "AMQP_URL": amqp.address(project.amqp_url),
            "CHAOS_VARIANT": plan.variant,
            "CHAOS_TIMES": str(plan.times),
        }
        if cuts_store:
            store = proxies["store"] = StoreProxy(project.mongodb_url)
            env["MONGODB_URL"] = store.address(project.mongodb_url)
        place = Place(project, journal, numbers, kind, proxies, env)
        amqp.name_worker = lambda place=place: place.name
        places.append(place)
    fleet = Fleet(places)
    try:
        fleet.wait_ready()
        yield fleet
    finally:
        say(f"workers that were told to stop ended with {fleet.stop()}")
        witness.close()


def _do_faults(fleet: Fleet, faults: list[Fault], going: Going) -> None:
    for fault in faults:
        fault.start()
    try:
        while not going.is_over():
            fleet.look()
            going.tell()
            time.sleep(0.05)
    finally:
        for fault in faults:
            fault.close()


def _wait_for_rest(plan: Plan, fleet: Fleet, seeder: Seeder, going: Going, rest_s: float) -> None:
    """What does not come to rest by itself is for the checker to find."""
    deadline = time.monotonic() + rest_s
    while time.monotonic() < deadline and not (seeder.is_done and seeder.at_rest >= seeder.seeded):
        fleet.look()
        going.tell()
        try:
            seeder.look()
        except PipelineError:
            continue
        time.sleep(0.2)


class Going:
    """How far a run is."""

    def __init__(self, plan: Plan, faults: list[Fault], say: Say) -> None:
        self._plan = plan
        self._faults = faults
        self._say = say
        self._began = self._told = time.monotonic()
        self.seeder: Seeder | None = None

    def share(self) -> float:
        """How much of what is to be done is done."""
        return min(1.0, self._passed(), *(fault.share for fault in self._faults))

    def _passed(self) -> float:
        return 1.0 if self._plan.seconds is None else (time.monotonic() - self._began) / self._plan.seconds

    def is_over(self) -> bool:
        """Whether all faults are done and all jobs added. Raises what went wrong with a fault."""
        for fault in self._faults:
            if fault.error is not None:
                raise fault.error
        assert self.seeder is not None
        if not all(fault.is_done for fault in self._faults) or self._passed() < 1.0:
            return False
        if self._plan.seconds is not None:
            self.seeder.enough()
        return self.seeder.is_done

    def state(self) -> str:
        """For people."""
        done = ", ".join(f"{fault.done} {type(fault).__name__}" for fault in self._faults)
        assert self.seeder is not None
        return f"{done or 'no faults'}; {self.seeder.seeded} jobs added, {self.seeder.at_rest} at rest"

    def tell(self) -> None:
        """Say it, now and then."""
        now = time.monotonic()
        if now - self._told >= TELL_EVERY_S:
            self._told = now
            self._say(f"{now - self._began:6.0f} s: {self.state()}")
