"""A pipeline under load while everything that can fail does; afterwards `tests/chaos/checker.py` proves what must hold.

`python -m tests.chaos.driver --kills 1000 --jobs 100000` is the command line (`__main__.py`), and `run.py` one run.

What is done: `schedule.py` says which faults come how often, `faults.py` what a fault is; `workers.py`, `network.py`,
`stops.py` and `queues.py` are the kinds. To whom: `fleet.py` keeps the workers at their number, `services.py` has
services that may be stopped, `load.py` and `seeder.py` the jobs, `app/` the application with its witness. And what
was seen: `journal.py` has the faults, `amqp.py` what workers acknowledged and published; `report.py` tells it.
"""
