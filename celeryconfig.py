"""Settings of this application, read by Celery and by `pipeline-app`: names of things, no code."""

pipelines = ["handlers.survey:survey"]
