"""Faults of the services: the broker restarts, the store's primary steps down, either is killed."""

from __future__ import annotations

from tests.chaos.driver.faults import Fault
from tests.chaos.driver.services import Services


class ServiceFault(Fault):
    """A fault of services that are this run's own."""

    @property
    def services(self) -> Services:
        found = self.scene.services
        assert found is not None, "these services are not this run's own"
        return found


class RestartBroker(ServiceFault):
    """RabbitMQ stops and starts again, in good order or killed."""

    def act(self) -> bool:
        killed = self.chance.random() < 0.5
        seconds = self.chance.uniform(0.0, 5.0)
        self.scene.journal.write("broker killed" if killed else "broker stopped", seconds=seconds)
        broker = self.services.broker
        with broker.lock, broker.killed() if killed else broker.stopped():
            self.last(seconds)
        self.scene.journal.write("broker back")
        return True


class StepDown(ServiceFault):
    """The store's primary hands over to another member."""

    def act(self) -> bool:
        with self.services.store.lock:
            self.scene.journal.write("step-down")
            self.services.store.step_down()
        self.scene.journal.write("primary again")
        return True


class KillPrimary(ServiceFault):
    """The store's primary is killed; the others have to notice first."""

    def act(self) -> bool:
        store = self.services.store
        self.scene.journal.write("primary killed")
        with store.lock, store.primary_killed():
            self.last(self.chance.uniform(0.0, 5.0))
        self.scene.journal.write("primary again")
        return True


class RefusePublishes(ServiceFault):
    """Queues are full and the broker refuses what is published, or it believes to be out of memory and says nothing."""

    def act(self) -> bool:
        full = self.chance.random() < 0.5
        seconds = self.chance.uniform(2.0, 15.0)
        self.scene.journal.write("queues full" if full else "publishers blocked", seconds=seconds)
        broker = self.services.broker
        with broker.lock, broker.refusing() if full else broker.blocking():
            self.last(seconds)
        self.scene.journal.write("publishes taken")
        return True


class StopStore(ServiceFault):
    """All of MongoDB is away, for less than a lease or for more."""

    def act(self) -> bool:
        seconds = self.chance.choice([2.0, 15.0, 25.0])
        store = self.services.store
        self.scene.journal.write("store killed", seconds=seconds)
        with store.lock, store.killed():
            self.last(seconds)
        self.scene.journal.write("store back")
        return True
