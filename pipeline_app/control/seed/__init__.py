"""Adding jobs to a run, in batches."""
