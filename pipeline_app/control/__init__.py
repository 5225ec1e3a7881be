"""The control plane: what people ask for, and what goes on by itself. Views ask these functions, never the store.

    duties/      the sweep and the pacing: what one worker at a time does for all
    replays/     letting jobs go through once more, as people ask for it
    accounts/    is every job where it says it is, and what brings it back
    sight/       status, ledger, why: only questions
    changes/     jobs taken from where they stand to somewhere else: cancelled, moved, let go
    seed/        adding jobs to a run
    targets/     holds, pauses, throttles

    runs.py, results.py, trial.py    runs as a whole
"""
