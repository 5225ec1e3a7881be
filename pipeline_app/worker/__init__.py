"""What a worker is besides Celery's own: a lease, the queues that it follows, care for lost children, its leave.

    process.py    the main process: how it registers, and how it leaves
    lifeline.py   its lease, and what its processes share
    selection.py  which queues it should consume
    follow.py     Celery's bootstep that consumes them
    janitor.py    gives back what lost children had claimed
"""
