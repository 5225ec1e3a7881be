"""Settings of the application that chaos runs."""

from __future__ import annotations

pipelines = ["stages:chaos"]
