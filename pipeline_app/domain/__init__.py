"""What a pipeline, a stage and a job are, and the rules between them. Pure: no network, no clock, no Celery."""
