# The application of this folder: the framework, celeryconfig.py and handlers/. compose.yaml runs a worker per stage and
# Flower from it.

FROM python:3.11-slim AS build
WORKDIR /build
RUN python -m venv /opt/venv
COPY pyproject.toml README.md ./
COPY pipeline_app pipeline_app
RUN /opt/venv/bin/pip install --no-cache-dir ".[flower]"

FROM python:3.11-slim
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
RUN useradd --uid 10001 --create-home pipeline
COPY --from=build /opt/venv /opt/venv
WORKDIR /app
COPY celeryconfig.py ./
COPY handlers handlers
# By number: Kubernetes refuses a name where it is to see that this is not root.
USER 10001
CMD ["celery", "-A", "pipeline_app", "worker"]
