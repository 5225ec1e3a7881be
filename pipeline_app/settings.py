"""What can be set from outside, read once: flags over environment over files over defaults.

The files are the project's `celeryconfig.py` and `.pipeline/services.json`, which `up` and `demo` write when they
started services. A project is the nearest folder, from the current one upwards, that holds a `celeryconfig.py`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from pipeline_app.domain.redaction import redact as redact
from pipeline_app.errors import UsageError

DEFAULT_AMQP_URL = "amqp://guest:guest@localhost:5672/"
DEFAULT_MONGODB_URL = "mongodb://localhost:27017/pipeline_app"

#: The environment variable that tells a detached worker its log file, for its record.
WORKER_LOG = "PIPELINE_WORKER_LOG"

#: Names that celeryconfig.py may set for us; everything else in it is Celery's.
FILE_KEYS = ("amqp_url", "mongodb_url", "management_url", "queue_type", "pipelines", "acknowledge_after_s")


def project_root() -> Path:
    """The project's folder: where `celeryconfig.py` is, or the current folder if there is none above it."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "celeryconfig.py").is_file():
            return folder
    return here


def state_dir() -> Path:
    """`.pipeline/` in the project's folder: embedded services, their data, addresses and logs."""
    return project_root() / ".pipeline"


def services_file() -> Path:
    """Where the addresses of embedded services stand."""
    return state_dir() / "services.json"


class Settings(BaseSettings):
    """Settings of one process."""

    model_config = SettingsConfigDict(
        env_prefix="PIPELINE_", env_ignore_empty=True, extra="ignore", frozen=True, populate_by_name=True
    )

    #: The broker: `amqp://` or `amqps://`, or `mongodb://` for the embedded one.
    amqp_url: str = Field(DEFAULT_AMQP_URL, validation_alias="AMQP_URL")
    #: The store; the path names the database.
    mongodb_url: str = Field(DEFAULT_MONGODB_URL, validation_alias="MONGODB_URL")
    #: RabbitMQ's management API, for `check`; None is where it usually is, beside the broker.
    management_url: str | None = None
    #: Kind of the stages' queues. RabbitMQ refuses a later change.
    queue_type: Literal["quorum", "classic"] = "quorum"
    #: Pipelines of the application: `module:attribute`, or the path of a definition file.
    pipelines: tuple[str, ...] = ()
    #: A message whose handler runs for that long is acknowledged meanwhile. Less than RabbitMQ's consumer_timeout.
    acknowledge_after_s: float = Field(60.0, gt=0)

    @field_validator("amqp_url", "management_url")
    @classmethod
    def _is_readable(cls, url: str | None) -> str | None:
        """Refused here: whatever reads it later would show a part of the password with its error."""
        if url and not url.startswith("mongodb") and not all(_is_address(part.strip()) for part in url.split(";")):
            raise ValueError("it cannot be read; in a password write %2F for /, %40 for @, %3F for ?, %23 for #")
        return url

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _Files(settings_cls)

    @property
    def broker_is_embedded(self) -> bool:
        """Whether kombu's MongoDB transport is the broker: no confirms, no redelivery, no depth of un-acked."""
        return self.amqp_url.startswith("mongodb")


def _is_address(url: str) -> bool:
    try:
        return urlsplit(url).port != 0 and not any(character.isspace() for character in url)
    except ValueError:
        return False


class _Files(PydanticBaseSettingsSource):
    """celeryconfig.py over services.json."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        found = read_services_file() | read_celeryconfig()
        aliases = {name: cast(str, f.validation_alias or name) for name, f in Settings.model_fields.items()}
        return {aliases[name]: value for name, value in found.items() if name in aliases}


def read_services_file() -> dict[str, Any]:
    """The addresses in `.pipeline/services.json`; empty if there are none."""
    try:
        found = json.loads(services_file().read_text())
    except FileNotFoundError:
        return {}
    except ValueError as exc:
        raise UsageError(f"{services_file()} is not JSON: {exc}", hint="pipeline-app down removes it") from exc
    if not isinstance(found, dict):
        raise UsageError(f"{services_file()} is not an object", hint="pipeline-app down removes it")
    return {name: found[name] for name in ("amqp_url", "mongodb_url") if found.get(name)}


def read_celeryconfig() -> dict[str, Any]:
    """Our settings in the project's `celeryconfig.py`."""
    root = project_root()
    if not (root / "celeryconfig.py").is_file():
        return {}
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    module = importlib.import_module("celeryconfig")
    return {name: getattr(module, name) for name in FILE_KEYS if hasattr(module, name)}


def load(**flags: Any) -> Settings:
    """Settings of this process; `flags` win over everything.

    Raises UsageError for a value that is not valid.
    """
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except SettingsError as exc:
        raise UsageError(f"{exc}: {exc.__cause__}", hint='a list is written as JSON: ["module:name"]') from exc
    except ValidationError as exc:
        first = exc.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        shown = "" if name.lower().endswith("url") else f" (it is {first.get('input')!r})"
        # An address that is not one may show its password anywhere: nothing of it, and no cause that does.
        raise UsageError(f"setting {name}: {first['msg'].removeprefix('Value error, ')}{shown}") from None


@cache
def current() -> Settings:
    """The settings of this process, read at first use."""
    return load()


def addresses_are_set() -> bool:
    """Whether the user named a service in the environment or in celeryconfig.py."""
    named = {"amqp_url", "mongodb_url"} & read_celeryconfig().keys()
    return bool(named or os.environ.get("AMQP_URL") or os.environ.get("MONGODB_URL"))
