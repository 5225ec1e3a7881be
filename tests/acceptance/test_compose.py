"""compose.yaml, as docker-compose reads it: that checks it against the Compose specification, and needs no daemon."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from handlers.survey import survey

ROOT = Path(__file__).parents[2]
SERVICES = {"rabbitmq", "mongodb", "flower"}
WORKERS = {f"worker-{stage.name}" for stage in survey.stages}


def compose() -> list[str]:
    """The command: docker-compose of the system's packages, or Docker's plugin."""
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    if shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        return ["docker", "compose"]
    pytest.fail("neither docker-compose nor docker compose is here; `make packages` installs one")


def config(**environment: str) -> dict[str, Any]:
    """compose.yaml as docker-compose reads it, with `environment` alone: no `.env` file, nothing from outside."""
    with tempfile.NamedTemporaryFile() as empty:
        done = subprocess.run(
            [*compose(), "--env-file", empty.name, "-f", "compose.yaml", "config"],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    loaded = yaml.safe_load(done.stdout)
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    found = config()["services"]
    assert isinstance(found, dict)
    return found


def words(service: dict[str, Any]) -> list[str]:
    """A service's command; older versions of the tool give it as one string, newer ones as a list."""
    command = service["command"]
    return shlex.split(command) if isinstance(command, str) else list(command)


def published(port: Any) -> tuple[str, str]:
    """Host address and port that a port is published on, in either spelling."""
    if isinstance(port, dict):
        return port["host_ip"], str(port["published"])
    address, _, rest = str(port).partition(":")
    return address, rest.partition(":")[0]


def test_there_are_the_services_and_a_worker_for_each_stage(services: dict[str, dict[str, Any]]) -> None:
    assert set(services) == SERVICES | WORKERS


@pytest.mark.parametrize("stage", [stage.name for stage in survey.stages])
def test_a_worker_consumes_the_queue_of_its_stage(services: dict[str, dict[str, Any]], stage: str) -> None:
    service = services[f"worker-{stage}"]
    command = words(service)
    assert command[:4] == ["celery", "-A", "pipeline_app", "worker"]
    assert command[command.index("-Q") + 1] == f"survey.{stage}"
    assert "-E" in command  # without events Flower shows no tasks
    # Its health check asks exactly this worker: the name before the @ is the one that it gave itself.
    assert command[command.index("-n") + 1] == f"{service['environment']['STAGE']}@%h"
    assert "--destination $$STAGE@$$HOSTNAME" in service["healthcheck"]["test"][-1]


@pytest.mark.parametrize("name", sorted(SERVICES | WORKERS))
def test_every_service_is_checked_restarted_and_given_time_to_stop(
    services: dict[str, dict[str, Any]], name: str
) -> None:
    service = services[name]
    assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert {"interval", "timeout", "retries", "start_period"} <= set(service["healthcheck"])
    assert service["restart"] == "unless-stopped"
    assert service["stop_grace_period"]


@pytest.mark.parametrize("name", sorted(WORKERS | {"flower"}))
def test_the_application_waits_until_both_services_are_healthy(services: dict[str, dict[str, Any]], name: str) -> None:
    conditions = {service: wait["condition"] for service, wait in services[name]["depends_on"].items()}
    assert conditions == {"rabbitmq": "service_healthy", "mongodb": "service_healthy"}


def test_mongodb_is_a_replica_set_that_its_health_check_makes(services: dict[str, dict[str, Any]]) -> None:
    mongodb = services["mongodb"]
    command = words(mongodb)
    assert command[command.index("--replSet") + 1] == "rs0"
    script = mongodb["healthcheck"]["test"][-1]
    assert 'rs.initiate({ _id: "rs0", members: [{ _id: 0, host: "mongodb:27017" }] })' in script
    assert "isWritablePrimary" in script
    for worker in WORKERS:
        assert services[worker]["environment"]["MONGODB_URL"].endswith("/pipeline_app?replicaSet=rs0")


def test_rabbitmq_has_its_management_and_keeps_its_name(services: dict[str, dict[str, Any]]) -> None:
    assert services["rabbitmq"]["image"].endswith("-management")
    assert services["rabbitmq"]["hostname"] == "rabbitmq"


def test_the_data_of_both_services_outlives_their_containers(services: dict[str, dict[str, Any]]) -> None:
    volumes = set(config()["volumes"])
    for name, path in (("rabbitmq", "/var/lib/rabbitmq"), ("mongodb", "/data/db")):
        mounts = [
            (mount["source"], mount["target"]) if isinstance(mount, dict) else tuple(mount.split(":")[:2])
            for mount in services[name]["volumes"]
        ]
        assert [source in volumes for source, target in mounts if target == path] == [True]


def test_ports_are_open_on_this_machine_only(services: dict[str, dict[str, Any]]) -> None:
    ports = {name: [published(port) for port in service.get("ports", [])] for name, service in services.items()}
    assert {address for found in ports.values() for address, _ in found} == {"127.0.0.1"}
    assert {name: [port for _, port in found] for name, found in ports.items() if found} == {
        "rabbitmq": ["5672", "15672"],
        "mongodb": ["27017"],
        "flower": ["5555"],
    }


def test_images_are_names_without_a_registry_and_have_a_version(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        repository, _, version = service["image"].partition(":")
        assert "." not in repository
        assert version or service.get("build"), name


def test_passwords_and_ports_come_from_the_environment() -> None:
    # Given a user's own passwords and port
    services = config(
        RABBITMQ_USER="me", RABBITMQ_PASSWORD="sesame", FLOWER_USER="her", FLOWER_PASSWORD="tulip", MONGODB_PORT="4711"
    )["services"]
    # Then they are everywhere that they have to be
    assert services["rabbitmq"]["environment"]["RABBITMQ_DEFAULT_USER"] == "me"
    assert services["rabbitmq"]["environment"]["RABBITMQ_DEFAULT_PASS"] == "sesame"
    for name in WORKERS | {"flower"}:
        assert services[name]["environment"]["AMQP_URL"] == "amqp://me:sesame@rabbitmq:5672/"
    assert services["flower"]["environment"]["FLOWER_BASIC_AUTH"] == "her:tulip"
    assert [published(port)[1] for port in services["mongodb"]["ports"]] == ["4711"]


@pytest.mark.parametrize("stage", [stage.name for stage in survey.stages])
def test_a_stage_can_have_more_workers_and_slots(stage: str) -> None:
    # Given a number of workers and slots for one stage
    services = config(**{f"{stage.upper()}_WORKERS": "4", f"{stage.upper()}_SLOTS": "7"})["services"]
    # Then it has them, the others have their own, and nothing keeps several from running on one machine
    numbers = {name: services[name]["deploy"]["replicas"] for name in WORKERS}
    assert numbers == {name: 4 if name == f"worker-{stage}" else 1 for name in WORKERS}
    command = words(services[f"worker-{stage}"])
    assert command[command.index("--concurrency") + 1] == "7"
    assert not [name for name in WORKERS if "container_name" in services[name] or services[name].get("ports")]


@pytest.mark.parametrize("name", sorted(WORKERS | {"flower"}))
def test_the_application_has_no_rights(services: dict[str, dict[str, Any]], name: str) -> None:
    service = services[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert "/tmp" in str(service["tmpfs"])


def test_the_file_has_no_password_that_cannot_be_set() -> None:
    text = (ROOT / "compose.yaml").read_text()
    for name, value in re.findall(r"^\s*(\w*(?:PASS|AUTH)\w*): (.*)$", text, re.MULTILINE):
        assert re.fullmatch(r"(\$\{\w+:-\w+\}:?)+", value), name


def test_the_image_is_built_from_what_is_there() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    assert {"pyproject.toml", "pipeline_app", "handlers", "celeryconfig.py"} <= sources
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sources == allowed
    assert [source for source in sorted(sources) if not (ROOT / source).exists()] == []
