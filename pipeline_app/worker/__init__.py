"""What a worker is besides Celery's own: a lease, the queues that it follows, care for lost children, its leave.

    process.py    the main process: how it registers, and how it leaves
    lifeline.py   its lease, and what its processes share
    selection.py  which queues it should consume
    follow.py     Celery's bootstep that consumes them; consuming.py is its AMQP side
    rotation.py   which of them at a time, and how much of each
    backlog.py    what is reserved and not started, where it can be taken back
    early.py      acknowledges messages whose handlers run long
    stopping.py   signals, and what may end after them
    janitor.py    gives back what lost children had claimed
    overtime.py   ends children that are stuck in a handler whose time is over
    recycle.py    begins the worker anew, and how that is asked for
    ending.py     ends processes with all that they started
"""
