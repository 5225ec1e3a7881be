"""The data plane: how a chunk goes through a stage. One module for each word of it.

    seed -> enqueue -> [RabbitMQ: stage.partition] -> consume -> claim -> gates -> handle -> record -> forward -> ...

    consume.py   Celery's side: the task of a stage, what becomes of its message in every case
    claim.py     from a hint to the jobs and their inputs, owned by this worker
    gates.py     which of the jobs may run
    handle.py    run the handler for each, and say how it ended
    execute.py   one job through its handler; for a suspect alone.py has that done in a process of its own
                 (alone_process.py starts it, alone_nursery.py forks it, alone_child.py is it)
    deadline.py  time limits of a handler
    record.py    make all of it durable in one transaction, in common with other threads' records
    enqueue.py   the only place where jobs are given a message
    forward.py   publish what was recorded
    give_back.py close a claim that will not be recorded, and enqueue its jobs anew

    board.py     what children of a pool tell their main process by shared memory
    slots.py     handlers that may run at once in a pool of threads
    group.py     lets threads that ask for the same thing at the same time share one round trip
    later.py     tries again what could not be given back
    frames.py    cuts what was raised off the frames that it keeps alive
"""
