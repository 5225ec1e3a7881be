"""Faults of what the broker carries: hints that are lost, hints that come twice."""

from __future__ import annotations

from contextlib import suppress

from amqp.exceptions import AMQPError
from kombu import Connection
from kombu.exceptions import OperationalError
from pymongo.errors import PyMongoError

from pipeline_app.errors import PipelineError
from pipeline_app.flow.forward import publish
from tests.chaos.driver.faults import Fault
from tests.chaos.driver.load import RUN

#: What is raised when a service is away just now, or a queue is not there yet.
AWAY = (OSError, IndexError, PipelineError, AMQPError, OperationalError, PyMongoError)
#: Hints that are doubled at once, at most.
DOUBLED = 20


class Purge(Fault):
    """All that waits in one of the queues is gone."""

    def act(self) -> bool:
        rt = self.scene.rt
        try:
            queue = self.chance.choice(sorted(rt.store.db.partitions.distinct("_id")))
            with Connection(rt.settings.amqp_url, connect_timeout=3) as connection:
                purged = connection.default_channel.queue_purge(queue)
        except AWAY:
            return False
        self.scene.journal.write("purge", queue=queue, hints=purged)
        return True


class Double(Fault):
    """Hints of messages that are open or claimed are published once more."""

    def act(self) -> bool:
        rt = self.scene.rt
        under_way = {"run": RUN, "state": {"$in": ["open", "claimed"]}}
        try:
            found = list(rt.store.db.messages.find(under_way).limit(10 * DOUBLED))
        except AWAY:
            return False
        if not found:
            return False
        rows = self.chance.sample(found, min(DOUBLED, len(found)))
        self.scene.journal.write("double", messages=[row["_id"] for row in rows])
        # Some may have got through all the same.
        with suppress(*AWAY):
            publish(rt, rows)
        return True
