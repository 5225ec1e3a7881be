"""Embedded services for people who have none: started, checked, stopped and found again in the project's `.pipeline/`.

The command line calls it: `up`, `down`, `services` and `demo`; the tests use it for their own services.

    services.py   up, down, status: what runs, under one lock, written to services.json
    mongod.py     a one-node replica set of a real mongod: the store, and without RabbitMQ the broker, too
    rabbitmq.py   a private RabbitMQ node with an epmd of its own
    workers.py    detached Celery workers
    processes.py  starts a process that outlives us, finds it again for certain, ends it with its children
    files.py      the lock and the atomic JSON files

What lies in `.pipeline/`:

    services.json    addresses (read by settings.py) and processes; there from `up` to `down`
    workers.json     the detached workers
    mongod/          its data, the port it had last
    rabbitmq/        its data, cookie, configuration and ports
    logs/            one file for each process, the one before it as NAME.log.1

Two projects never meet: every port is tried before it is used, a RabbitMQ node knows only its own epmd, and each
process carries its project's folder in its environment, so that one whose record was lost is still found.
"""
