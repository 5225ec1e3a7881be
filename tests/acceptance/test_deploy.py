"""The templates of docs/deploy: their own linters find nothing, and their commands start workers that stop in time."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml

from handlers.survey import survey
from pipeline_app.domain.partition import queue_name
from tests.nodes import NodeProject
from tests.project import REPOSITORY

SYSTEMD = REPOSITORY / "docs" / "deploy" / "systemd"
KUBERNETES = REPOSITORY / "docs" / "deploy" / "kubernetes"
UNITS = sorted(path.name for path in SYSTEMD.iterdir() if path.suffix in (".service", ".target"))
STAGES = [stage.name for stage in survey.stages]

#: Where the units expect the programs, and where they are here.
INSTALLED, HERE = "/opt/pipeline/venv/bin/", f"{Path(sys.executable).parent}/"


def linter(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not here")
    return found


# systemd


class Keys(configparser.RawConfigParser):
    """A unit file; keys are as they are written."""

    def optionxform(self, optionstr: str) -> str:
        return optionstr


def service(name: str) -> configparser.SectionProxy:
    parser = Keys(strict=False, interpolation=None)
    # A repeated key would hide the one before it: their values are asked for elsewhere.
    parser.read_string(re.sub(r"^EnvironmentFile=.*\n", "", (SYSTEMD / name).read_text(), flags=re.MULTILINE))
    return parser["Service"]


@pytest.fixture
def units(tmp_path: Path) -> list[Path]:
    """The units, for programs that are here."""
    folder = tmp_path / "units"
    folder.mkdir()
    for name in UNITS:
        (folder / name).write_text((SYSTEMD / name).read_text().replace(INSTALLED, HERE))
    return [folder / name for name in UNITS]


def test_systemd_finds_nothing_wrong(units: list[Path]) -> None:
    done = subprocess.run(
        [linter("systemd-analyze"), "verify", "--man=no", *units], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", [name for name in UNITS if name.endswith(".service")])
def test_the_services_are_locked_in(units: list[Path], name: str) -> None:
    unit = next(path for path in units if path.name == name)
    command = [linter("systemd-analyze"), "security", "--offline=true", "--threshold=20", "--no-pager", unit]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze judges no files")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_worker_is_given_longer_than_it_takes_to_stop() -> None:
    worker = service("pipeline-worker@.service")
    assert worker["KillMode"] == "mixed"
    assert int(worker["TimeoutStopSec"]) >= 60
    assert worker["OOMPolicy"] == "continue"
    assert worker["Restart"] == "always"


def started_by_systemd(instance: str) -> tuple[list[str], dict[str, str]]:
    """The words and the environment of a worker, with systemd's specifiers and variables replaced."""
    section = service("pipeline-worker@.service")
    env = dict(pair.partition("=")[::2] for pair in shlex.split(section["Environment"]))
    line = section["ExecStart"].replace("%i", instance).replace("%%", "%").replace(INSTALLED, HERE)
    for name, value in env.items():
        line = line.replace(f"${{{name}}}", value).replace(f"${name}", value)
    return shlex.split(line), env


def test_a_worker_as_systemd_starts_and_stops_it(project: NodeProject) -> None:
    """Given the unit's own command, then its stage runs; at the unit's signal it ends well, and in time."""
    words, env = started_by_systemd("demo.first")
    section = service("pipeline-worker@.service")
    with works(project, words, env) as process:
        process.send_signal(signal.Signals[section["KillSignal"]])
        assert process.wait(float(section["TimeoutStopSec"])) == 0


# Kubernetes


def manifests(name: str = "*.yaml") -> Iterator[dict[str, Any]]:
    for path in sorted(KUBERNETES.glob(name)):
        yield from yaml.safe_load_all(path.read_text())


def of_kind(kind: str, name: str = "*.yaml") -> list[dict[str, Any]]:
    return [manifest for manifest in manifests(name) if manifest["kind"] == kind]


def spec_of(deployment: dict[str, Any]) -> dict[str, Any]:
    found = deployment["spec"]["template"]["spec"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("version", ["1.29", kubernetes_validate.latest_version()])
def test_kubernetes_knows_every_field(version: str) -> None:
    checked = 0
    for manifest in manifests():
        if "keda.sh" in manifest["apiVersion"] or manifest["kind"] == "Kustomization":
            continue
        kubernetes_validate.validate(manifest, version, strict=True)
        checked += 1
    assert checked >= 3 + len(STAGES)


def test_kubectl_puts_them_together() -> None:
    kubectl = linter("kubectl")
    done = subprocess.run([kubectl, "kustomize", KUBERNETES], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    made = list(yaml.safe_load_all(done.stdout))
    assert {manifest["metadata"]["namespace"] for manifest in made} == {"pipeline"}
    assert len(made) == len([manifest for manifest in manifests() if manifest["kind"] != "Kustomization"])


def test_nothing_is_left_out_of_the_kustomization() -> None:
    (table,) = of_kind("Kustomization")
    assert sorted(table["resources"]) == sorted(
        path.name for path in KUBERNETES.glob("*.yaml") if path.name != "kustomization.yaml"
    )


def test_the_stages_are_alike() -> None:
    """Given the stages' files, then they differ in the stage's name and in nothing else."""
    texts = {(KUBERNETES / f"worker-{stage}.yaml").read_text().replace(stage, "STAGE") for stage in STAGES}
    assert len(texts) == 1


#: What KEDA's ScaledObject and its trigger for RabbitMQ may have, and we use some of.
SCALED = {"scaleTargetRef", "pollingInterval", "cooldownPeriod", "minReplicaCount", "maxReplicaCount", "fallback"}
TRIGGER = {"protocol", "queueName", "useRegex", "operation", "pageSize", "mode", "value", "vhostName", "timeout"}


@pytest.mark.parametrize("stage", STAGES)
def test_keda_counts_the_queues_of_the_stage(stage: str) -> None:
    """Given the queues of all stages, then the trigger's pattern chooses those of one, partitions included."""
    (scaled,) = of_kind("ScaledObject", f"worker-{stage}.yaml")
    (deployment,) = of_kind("Deployment", f"worker-{stage}.yaml")
    assert set(scaled["spec"]) <= {*SCALED, "advanced", "triggers"}
    assert scaled["spec"]["scaleTargetRef"] == {"name": deployment["metadata"]["name"]}
    assert "replicas" not in deployment["spec"]  # applying it again would undo KEDA's number
    # The sweep runs inside the workers: without any, what waits would wait for ever.
    assert scaled["spec"]["minReplicaCount"] >= 1

    (trigger,) = scaled["spec"]["triggers"]
    assert trigger["type"] == "rabbitmq"
    assert set(trigger["metadata"]) <= TRIGGER
    assert all(isinstance(value, str) for value in trigger["metadata"].values())
    assert (trigger["metadata"]["protocol"], trigger["metadata"]["useRegex"]) == ("http", "true")
    pattern = re.compile(trigger["metadata"]["queueName"])
    names = {
        (other, partition): queue_name("survey", other, partition)
        for other in [*STAGES, f"{stage}er", f"re{stage}"]
        for partition in ("default", "kind__test", "order-3")
    }
    chosen = {key for key, name in names.items() if pattern.search(name)}
    assert chosen == {key for key in names if key[0] == stage}
    assert not pattern.search(f"pipeline_app.survey.{stage}")

    (authentication,) = of_kind("TriggerAuthentication")
    assert trigger["authenticationRef"]["name"] == authentication["metadata"]["name"]
    (reference,) = authentication["spec"]["secretTargetRef"]
    secrets = {secret["metadata"]["name"]: secret["stringData"] for secret in of_kind("Secret")}
    assert reference["key"] in secrets[reference["name"]]


@pytest.mark.parametrize("deployment", of_kind("Deployment"), ids=lambda row: row["metadata"]["name"])
def test_pods_have_no_rights(deployment: dict[str, Any]) -> None:
    spec = spec_of(deployment)
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    for container in spec["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "livenessProbe" not in container
    user = re.search(r"^USER (\d+)$", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE)
    assert user is not None
    assert spec["securityContext"]["runAsUser"] == int(user[1])


def policies_of(deployment: dict[str, Any]) -> list[dict[str, Any]]:
    """What the NetworkPolicies that choose its pods say."""
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    found = [policy["spec"] for policy in of_kind("NetworkPolicy")]
    assert all(set(spec["podSelector"]) == {"matchLabels"} for spec in found)
    return [spec for spec in found if spec["podSelector"]["matchLabels"].items() <= labels]


def ports(rules: list[dict[str, Any]]) -> set[tuple[str, int | str]]:
    """What these rules let through; a rule without ports would let through all."""
    assert all(rule["ports"] for rule in rules)
    return {(port["protocol"], port["port"]) for rule in rules for port in rule["ports"]}


@pytest.mark.parametrize("deployment", of_kind("Deployment"), ids=lambda row: row["metadata"]["name"])
def test_nobody_reaches_a_pod_but_where_it_is_meant(deployment: dict[str, Any]) -> None:
    """Given a workload, then a policy covers it, and lets in only whom it names, at ports that the pod opens."""
    found = [spec for spec in policies_of(deployment) if "Ingress" in spec["policyTypes"]]
    assert found
    opened = {
        ("TCP", port["name"]) for container in spec_of(deployment)["containers"] for port in container.get("ports", [])
    }
    for spec in found:
        rules = spec.get("ingress", [])
        assert ports(rules) <= opened
        # Without "from" it would be everybody.
        assert all(rule["from"] for rule in rules)
        assert all(source["podSelector"]["matchLabels"] for rule in rules for source in rule["from"])


def test_flower_reaches_its_services_and_nothing_else() -> None:
    """Given the addresses in the Secret, then Flower may connect to their ports, over TLS, too, and ask for names."""
    (deployment,) = of_kind("Deployment", "flower.yaml")
    rules = [rule for spec in policies_of(deployment) if "Egress" in spec["policyTypes"] for rule in spec["egress"]]
    addresses = next(row["stringData"] for row in of_kind("Secret") if row["metadata"]["name"] == "pipeline-addresses")
    broker = urlsplit(addresses["AMQP_URL"]).port
    assert not re.search(r":\d", addresses["MONGODB_URL"].rpartition("@")[2]), "MongoDB's own port"
    assert ports(rules) == {("TCP", broker), ("TCP", 5671), ("TCP", 27017), ("UDP", 53), ("TCP", 53)}


def test_a_worker_as_kubernetes_starts_and_stops_it(project: NodeProject) -> None:
    """Given a pod's own command, then its stage runs, its probe says so, and at SIGTERM it ends well, and in time."""
    (deployment,) = of_kind("Deployment", "worker-load.yaml")
    spec = spec_of(deployment)
    (container,) = spec["containers"]
    words = [word.replace("survey.load", "demo.first") for word in [*container["command"], *container["args"]]]
    node = subprocess.run(["hostname"], capture_output=True, text=True, check=True).stdout.strip()
    env = {row["name"]: row.get("value", node) for row in container["env"]}
    with works(project, words, env) as process:
        probe = container["readinessProbe"]
        asked = project.run(*probe["exec"]["command"], env=env, timeout=probe["timeoutSeconds"])
        assert asked.returncode == 0, asked.stdout + asked.stderr
        process.terminate()
        assert process.wait(spec["terminationGracePeriodSeconds"]) == 0


# What both have in common


@contextmanager
def works(project: NodeProject, words: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A worker of that command line that has run its stage for a job."""
    path = project.folder / "deployed.log"
    with path.open("wb") as log:
        process = subprocess.Popen(
            words,
            cwd=project.folder,
            env=project.env | env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        project.seed("r", [{"job_id": "a", "payload": {"n": 1}}])
        done = project.json("run", "wait", "r", "--stage", "first", "--timeout", "60", timeout=70)
        assert done["outcome"] == "done", path.read_text()
        (worker,) = project.json("workers")
        assert worker["stages"] == ["demo.first"]
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_the_linter_of_dockerfiles_finds_nothing_wrong() -> None:
    done = subprocess.run([linter("hadolint"), REPOSITORY / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_template_is_in_the_document() -> None:
    text = (REPOSITORY / "docs" / "deployment.md").read_text()
    for name in ("systemd", "kubernetes"):
        assert f"](deploy/{name})" in text
