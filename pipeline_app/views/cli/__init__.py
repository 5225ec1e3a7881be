"""The command line: `pipeline-app COMMAND`, and the same command objects under `celery -A pipeline_app`.

    main.py       the group of all commands, and the entry point
    common.py     what they share: options, errors and exit codes, the connection
    render.py     JSON, tables, times: how answers are written
    progress.py   live views, where a person waits at a terminal
    jobfile.py    reading files of job lines
    run.py, watch.py, failures.py, history.py, job.py, workers.py, services.py, demo.py, try_.py, ...
                  the commands, by subject

Celery loads every one of these modules whenever `celery` is started, before it loads the application, and `--help` is
to answer at once. So what is slow to load (Celery, pymongo, rich, the application) is imported inside the functions
that need it.
"""
