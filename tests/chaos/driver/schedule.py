"""Which faults a run has: how many of each kind, and how often in the mean."""

from __future__ import annotations

from dataclasses import dataclass

from tests.chaos.driver.faults import Fault, Scene
from tests.chaos.driver.network import Cut
from tests.chaos.driver.queues import Double, Purge
from tests.chaos.driver.stops import KillPrimary, RefusePublishes, RestartBroker, StepDown, StopStore
from tests.chaos.driver.workers import Freeze, Kill, KillChild

#: Name on the command line -> the kind, and seconds between two of it in a run that has nothing else.
KINDS: dict[str, tuple[type[Fault], float]] = {
    "kills": (Kill, 3.0),
    "child-kills": (KillChild, 5.0),
    "freezes": (Freeze, 10.0),
    "cuts": (Cut, 8.0),
    "restarts": (RestartBroker, 12.0),
    "step-downs": (StepDown, 12.0),
    "primary-kills": (KillPrimary, 20.0),
    "outages": (StopStore, 30.0),
    "refusals": (RefusePublishes, 20.0),
    "purges": (Purge, 30.0),
    "doubles": (Double, 5.0),
}
#: The same in a run that has everything.
MIXED: dict[str, float] = {
    "kills": 20.0,
    "child-kills": 20.0,
    "freezes": 60.0,
    "cuts": 30.0,
    "restarts": 90.0,
    "step-downs": 60.0,
    "primary-kills": 180.0,
    "outages": 300.0,
    "refusals": 90.0,
    "purges": 180.0,
    "doubles": 15.0,
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One kind of fault in a run."""

    kind: str
    #: None for as many as come until the time is up.
    number: int | None
    every_s: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run."""

    #: How many there are; of a run that has a time, at most.
    jobs: int
    faults: tuple[Entry, ...] = ()
    #: How long faults come whose number is not given.
    seconds: float | None = None
    seed: int = 1
    #: Pool and concurrency of each worker.
    workers: tuple[tuple[str, int], ...] = (("prefork", 2), ("threads", 3)) * 3
    #: How long a handler takes in the mean.
    pause_s: float = 0.05
    #: Messages carry so many times as many jobs: less of the machine for each.
    times: int = 1
    #: Environment of the workers: which variant of the product they run.
    variant: str = ""

    @property
    def members(self) -> int:
        """How many mongod there must be: one that steps down needs others."""
        return 3 if {"step-downs", "primary-kills"} & {entry.kind for entry in self.faults} else 1


def numbered(**numbers: int) -> tuple[Entry, ...]:
    """So many of each, as often as they come in a run that has nothing else."""
    kinds = {name.replace("_", "-"): number for name, number in numbers.items()}
    return tuple(
        Entry(kind=kind, number=number, every_s=KINDS[kind][1]) for kind, number in kinds.items() if number
    )


def mixed() -> tuple[Entry, ...]:
    """Some of everything, for as long as the run has time."""
    return tuple(Entry(kind=kind, number=None, every_s=every_s) for kind, every_s in MIXED.items())


def faults_of(plan: Plan, scene: Scene) -> list[Fault]:
    """Ready to be started."""
    return [
        KINDS[entry.kind][0](scene, f"{plan.seed}", number=entry.number, every_s=entry.every_s) for entry in plan.faults
    ]
