"""RabbitMQ and MongoDB that speak nothing but TLS: everything works, and nobody else's certificate is believed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from kombu import Connection

from pipeline_app.errors import BrokerError, UsageError
from pipeline_app.transport import tls
from pipeline_app.transport.depth import depths
from tests.integration.secured import Keys, make_keys, tls_mongod, tls_rabbitmq
from tests.project import Project
from tests.services import TestServices
from tests.worker import Worker


@dataclass(frozen=True, kw_only=True)
class Secured:
    """A RabbitMQ and a mongod with TLS, and what their authority signed."""

    keys: Keys
    #: Another authority's.
    strangers: Keys
    amqp_port: int
    mongodb_port: int

    def amqp_url(self, *, host: str = "127.0.0.1", **options: Path | str) -> str:
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"amqps://guest:guest@{host}:{self.amqp_port}/?{query}".rstrip("?")

    def mongodb_url(self, authority: Path) -> str:
        return f"mongodb://127.0.0.1:{self.mongodb_port}/tls?replicaSet=rs0&tls=true&tlsCAFile={authority}"


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("tls")
    keys = make_keys(folder / "keys", "127.0.0.1")
    (folder / "rabbitmq").mkdir()
    (folder / "mongod").mkdir()
    with tls_mongod(folder / "mongod", keys) as mongodb_port, tls_rabbitmq(folder / "rabbitmq", keys) as amqp_port:
        yield Secured(
            keys=keys,
            strangers=make_keys(folder / "strangers", "127.0.0.1"),
            amqp_port=amqp_port,
            mongodb_port=mongodb_port,
        )


@pytest.fixture
def project(tmp_path: Path, secured: Secured) -> Iterator[Project]:
    amqp_url = secured.amqp_url(ssl_ca_certs=secured.keys.authority)
    mongodb_url = secured.mongodb_url(secured.keys.authority)
    made = Project(tmp_path, TestServices(amqp_url=amqp_url, mongodb_url=mongodb_url, folder=tmp_path))
    yield made
    made.close()


def test_a_pipeline_over_tls(project: Project) -> None:
    """Given services that speak only TLS, then a run with a failing job goes through, and all commands work."""
    rows = [{"job_id": f"j{n}", "payload": {"n": n, "fail": n % 2}, "tags": {"kind": "ab"[n % 2]}} for n in range(40)]
    with project.worker("-E"), project.worker(pool="prefork"):
        project.seed("r", rows)
        assert project.json("run", "wait", "r", "--timeout", "60")["states"]["terminal"] == 40
        assert project.json("run", "verify", "r")["ok"]
        # Remote control travels over TLS, too.
        assert project.json("hold", "set", "--selector", "kind=x")["workers"] == 2
        status = project.json("run", "status", "r")
    assert {queue["ready"] for stage in status["stages"] for queue in stage["partitions"]} == {0}


def test_without_tls_nobody_gets_in(project: Project, secured: Secured) -> None:
    plain = project.cli("run", "list", env={"MONGODB_URL": f"mongodb://127.0.0.1:{secured.mongodb_port}/tls"})
    assert plain.returncode == 3, plain.stderr
    with pytest.raises(BrokerError):
        depths(f"amqp://guest:guest@127.0.0.1:{secured.amqp_port}/", ["celery"])


def wrong_url(secured: Secured, problem: str) -> str:
    """An address of a broker whose certificate another authority signed, or that is for another name."""
    return {
        "another authority": secured.amqp_url(ssl_ca_certs=secured.strangers.authority),
        "no authority named": secured.amqp_url(),
        "another name": secured.amqp_url(host="localhost", ssl_ca_certs=secured.keys.authority),
    }[problem]


@pytest.mark.parametrize("problem", ["another authority", "no authority named", "another name"])
def test_a_certificate_that_is_not_the_brokers_is_refused(secured: Secured, problem: str) -> None:
    """Given such an address, then we connect to nobody there, and say why."""
    with pytest.raises(BrokerError, match="CERTIFICATE_VERIFY_FAILED") as refused:
        depths(wrong_url(secured, problem), ["celery"])
    assert "guest:guest" not in str(refused.value)


def test_a_worker_refuses_it_too(project: Project, secured: Secured) -> None:
    """Given such an address, then Celery's own connections are as careful."""
    project.amqp_url = wrong_url(secured, "another name")
    worker = Worker(project, (), "solo", 1)
    try:
        worker.wait_for(lambda: "CERTIFICATE_VERIFY_FAILED" in worker.text)
        assert " ready." not in worker.text
    finally:
        worker.stop(signal.SIGKILL)


def test_a_store_whose_certificate_is_not_theirs_is_refused(project: Project, secured: Secured) -> None:
    listed = project.cli("run", "list", env={"MONGODB_URL": secured.mongodb_url(secured.strangers.authority)})
    assert listed.returncode == 3
    assert "CERTIFICATE_VERIFY_FAILED" in listed.stderr


def test_the_name_can_be_given(project: Project, secured: Secured) -> None:
    """Given an address that is not the certificate's name, when the name is given, then it is checked against that."""
    url = secured.amqp_url(host="localhost", ssl_ca_certs=secured.keys.authority, ssl_server_hostname="127.0.0.1")
    with Connection(url) as connection:
        connection.connect()
        connection.close()
        # And again: what kombu remembers of the first time must not change the second.
        connection.connect()


def test_each_of_several_addresses_is_checked_for_its_own_name(secured: Secured) -> None:
    """Given a first address that does not answer, then the second one is checked for the second's name."""
    nobody = f"amqps://guest:guest@localhost:1/?ssl_ca_certs={secured.keys.authority}"
    with Connection(f"{nobody};{secured.amqp_url()}", connect_timeout=3) as connection:
        connection.ensure_connection(max_retries=2, interval_start=0.1)
        assert connection.connected


def test_what_an_address_may_say(tmp_path: Path) -> None:
    there = tmp_path / "ca.pem"
    there.touch()
    assert tls.options({"ssl_ca_certs": there, "ssl_keyfile": there}, "here") == {
        "server_hostname": "here",
        "ca_certs": str(there),
        "keyfile": str(there),
    }
    with pytest.raises(UsageError, match="not there"):
        tls.options({"ssl_ca_certs": tmp_path / "none.pem"}, "here")
    for name in ("ssl_cert_reqs", "ssl_check_hostname", "ssl_version"):
        with pytest.raises(UsageError, match=f"not known: {name}"):
            tls.options({name: "none"}, "here")
