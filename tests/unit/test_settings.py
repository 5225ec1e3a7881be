"""Settings: flags over environment over celeryconfig.py over services.json over defaults."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline_app import settings
from pipeline_app.errors import UsageError


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder that is the current one, and an environment that says nothing."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name in ("AMQP_URL", "MONGODB_URL") or name.startswith("PIPELINE_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "celeryconfig", raising=False)
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop("celeryconfig", None)


def celeryconfig(folder: Path, text: str) -> None:
    (folder / "celeryconfig.py").write_text(text)


def services(folder: Path, text: str) -> None:
    (folder / ".pipeline").mkdir()
    (folder / ".pipeline" / "services.json").write_text(text)


def test_the_defaults(project: Path) -> None:
    found = settings.load()
    assert found.amqp_url == "amqp://guest:guest@localhost:5672/"
    assert found.mongodb_url == "mongodb://localhost:27017/pipeline_app"
    assert found.queue_type == "quorum"
    assert found.pipelines == ()
    assert not settings.addresses_are_set()


def test_each_source_gives_way_to_the_one_above_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given services that were started here
    services(project, json.dumps({"amqp_url": "amqp://services/", "mongodb_url": "mongodb://services/db"}))
    assert settings.load().amqp_url == "amqp://services/"
    # When celeryconfig.py names another broker
    celeryconfig(project, 'amqp_url = "amqp://config/"')
    # Then it wins, and what it does not name stays
    assert settings.load().amqp_url == "amqp://config/"
    assert settings.load().mongodb_url == "mongodb://services/db"
    # And the environment wins over the file, a flag over the environment
    monkeypatch.setenv("AMQP_URL", "amqp://environment/")
    assert settings.load().amqp_url == "amqp://environment/"
    assert settings.load(amqp_url="amqp://flag/").amqp_url == "amqp://flag/"
    assert settings.load(amqp_url=None).amqp_url == "amqp://environment/"


def test_an_empty_variable_says_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMQP_URL", "")
    assert settings.load().amqp_url == settings.DEFAULT_AMQP_URL
    assert not settings.addresses_are_set()


@pytest.mark.parametrize("name", ["AMQP_URL", "MONGODB_URL"])
def test_an_address_in_the_environment_is_the_users(project: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "somewhere://")
    assert settings.addresses_are_set()


def test_an_address_in_celeryconfig_is_the_users_but_one_in_services_is_ours(project: Path) -> None:
    services(project, json.dumps({"amqp_url": "amqp://services/"}))
    assert not settings.addresses_are_set()
    celeryconfig(project, 'mongodb_url = "mongodb://config/db"')
    assert settings.addresses_are_set()


def test_pipelines_come_from_celeryconfig_and_the_rest_of_it_is_celerys(project: Path) -> None:
    celeryconfig(project, 'pipelines = ["a:b", "c.toml"]\nworker_concurrency = 3')
    assert settings.load().pipelines == ("a:b", "c.toml")


def test_the_project_is_the_nearest_folder_with_a_celeryconfig(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a project and a folder deep in it
    celeryconfig(project, 'queue_type = "classic"')
    deep = project / "a" / "b"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    # Then it is found from there, with its state beside it
    assert settings.project_root() == project
    assert settings.services_file() == project / ".pipeline" / "services.json"
    assert settings.load().queue_type == "classic"


def test_without_a_celeryconfig_the_current_folder_is_the_project(project: Path) -> None:
    assert settings.project_root() == project


@pytest.mark.parametrize(("text", "reason"), [("{", "is not JSON"), ("[]", "is not an object"), ("5", "is not an obj")])
def test_a_damaged_services_file_is_named_with_what_mends_it(project: Path, text: str, reason: str) -> None:
    services(project, text)
    with pytest.raises(UsageError, match=reason) as caught:
        settings.load()
    assert str(project / ".pipeline" / "services.json") in caught.value.message
    assert caught.value.hint == "pipeline-app down removes it"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("PIPELINE_QUEUE_TYPE", "fancy", "setting queue_type: .*'quorum' or 'classic'.*'fancy'"),
        ("PIPELINE_PIPELINES", "handlers.survey:survey", "pipelines"),
    ],
)
def test_a_value_that_is_not_valid_is_named(
    project: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=reason):
        settings.load()


def test_a_string_instead_of_a_list_of_pipelines_is_refused(project: Path) -> None:
    celeryconfig(project, 'pipelines = "handlers.survey:survey"')
    with pytest.raises(UsageError, match="setting pipelines"):
        settings.load()


@pytest.mark.parametrize(
    ("url", "embedded"),
    [("amqp://localhost/", False), ("amqps://localhost/", False), ("mongodb://localhost/broker", True)],
)
def test_kombus_mongodb_transport_is_the_embedded_broker(project: Path, url: str, embedded: bool) -> None:
    assert settings.load(amqp_url=url).broker_is_embedded is embedded


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("amqp://user:secret@host:5672/vhost", "amqp://user:***@host:5672/vhost"),
        ("amqps://user:sec%40ret@host", "amqps://user:***@host"),
        ("amqp://:secret@host/", "amqp://:***@host/"),
        ("amqp://user:sec@ret@host/", "amqp://user:***@host/"),
        ("amqp://user:sec/ret@host/", "amqp://user:***@host/"),
        ("amqp://user:sec?re#t@host/", "amqp://user:***@host/"),
        ("amqp://user:sec:ret@host/", "amqp://user:***@host/"),
        ("mongodb://user:secret@a:1,b:2/db?replicaSet=rs0", "mongodb://user:***@a:1,b:2/db?replicaSet=rs0"),
        ("mongodb+srv://user:secret@host/db", "mongodb+srv://user:***@host/db"),
        ("amqp://a:secret@one:5672/;amqp://b:secret@two/", "amqp://a:***@one:5672/;amqp://b:***@two/"),
        ("no answer from amqp://a:secret@one/, ask me@home", "no answer from amqp://a:***@one/, ask me@home"),
    ],
)
def test_a_password_is_never_shown(url: str, shown: str) -> None:
    assert settings.redact(url) == shown


@pytest.mark.parametrize(
    "url", ["amqp://localhost:5672/", "mongodb://a:1,b:2/db", "amqp://user@host:5672/", "", "text"]
)
def test_a_url_without_a_password_stays_as_it_is(url: str) -> None:
    assert settings.redact(url) == url
