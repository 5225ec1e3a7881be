"""What can be set from outside, read once: flags over environment over files over defaults.

The files are the project's `celeryconfig.py` and `.pipeline/services.json`, which `up` and `demo` write when they
started services. A project is the nearest folder, from the current one upwards, that holds a `celeryconfig.py`.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from pipeline_app.errors import UsageError

DEFAULT_AMQP_URL = "amqp://guest:guest@localhost:5672/"
DEFAULT_MONGODB_URL = "mongodb://localhost:27017/pipeline_app"

#: Names that celeryconfig.py may set for us; everything else in it is Celery's.
FILE_KEYS = ("amqp_url", "mongodb_url", "queue_type", "pipelines")


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


def redact(url: str) -> str:
    """The URL without its password, for logs and errors."""
    # Up to the last @ before the next address: a password that nobody escaped may hold one, or a slash.
    return re.sub(r"(?<=://)([^:/@\s]*):(?:(?!://)\S)*@", r"\1:***@", url)


class Settings(BaseSettings):
    """Settings of one process."""

    model_config = SettingsConfigDict(
        env_prefix="PIPELINE_", env_ignore_empty=True, extra="ignore", frozen=True, populate_by_name=True
    )

    #: The broker: `amqp://` or `amqps://`, or `mongodb://` for the embedded one.
    amqp_url: str = Field(DEFAULT_AMQP_URL, validation_alias="AMQP_URL")
    #: The store; the path names the database.
    mongodb_url: str = Field(DEFAULT_MONGODB_URL, validation_alias="MONGODB_URL")
    #: Kind of the stages' queues. RabbitMQ refuses a later change.
    queue_type: Literal["quorum", "classic"] = "quorum"
    #: Pipelines of the application: `module:attribute`, or the path of a definition file.
    pipelines: tuple[str, ...] = ()

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
        raise UsageError(f"setting {name}: {first['msg']} (it is {first.get('input')!r})") from exc


@cache
def current() -> Settings:
    """The settings of this process, read at first use."""
    return load()


def addresses_are_set() -> bool:
    """Whether the user named a service in the environment or in celeryconfig.py."""
    named = {"amqp_url", "mongodb_url"} & read_celeryconfig().keys()
    return bool(named or os.environ.get("AMQP_URL") or os.environ.get("MONGODB_URL"))
