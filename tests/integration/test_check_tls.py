"""`check` of a RabbitMQ whose management API speaks TLS, under an authority of our own, and asks for certificates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import pytest

from pipeline_app.application import prepare
from pipeline_app.control.check.checks import check
from pipeline_app.control.check.finding import Severity
from pipeline_app.errors import BrokerError
from pipeline_app.local import processes
from pipeline_app.transport.management import Management
from tests.clusters import rabbit_cluster
from tests.integration.checks import by_name, with_queue
from tests.integration.secured import Keys, make_keys
from tests.project import Project

#: Checks that only the management API can answer.
BY_MANAGEMENT = ("mirrored_queues", "dropping_policies", "delivery_limit")


@dataclass(frozen=True, kw_only=True)
class Secured:
    """A RabbitMQ that wants certificates for AMQP and for its management API; its own is for 127.0.0.1."""

    keys: Keys
    #: Another authority's.
    strangers: Keys
    amqp_port: int
    management_port: int

    def amqp_url(self, host: str = "127.0.0.1", **options: Path | str | None) -> str:
        """An address with our authority and certificate; `options` are others, or None for none."""
        ours = {
            "ssl_ca_certs": self.keys.authority,
            "ssl_certfile": self.keys.certificate,
            "ssl_keyfile": self.keys.key,
        }
        query = {name: value for name, value in {**ours, **options}.items() if value is not None}
        return f"amqps://guest:guest@{host}:{self.amqp_port}/?{urlencode(query)}"

    def management_url(self, host: str = "127.0.0.1") -> str:
        return f"https://{host}:{self.management_port}"


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("managed")
    # Erlang takes no client's certificate that has nothing but an address in it.
    keys = make_keys(folder / "keys", "127.0.0.1", "client.example.org")
    amqp_port, management_port = processes.free_port(), processes.free_port()
    options = {
        "cacertfile": keys.authority,
        "certfile": keys.certificate,
        "keyfile": keys.key,
        "verify": "verify_peer",
        "fail_if_no_peer_cert": "true",
    }
    lines = [
        f"listeners.ssl.1 = 127.0.0.1:{amqp_port}",
        *(f"ssl_options.{name} = {value}" for name, value in options.items()),
        "management.ssl.ip = 127.0.0.1",
        f"management.ssl.port = {management_port}",
        *(f"management.ssl.{name} = {value}" for name, value in options.items()),
    ]
    configuration = "".join(f"{line}\n" for line in lines)
    with rabbit_cluster(folder / "node", nodes=1, plugins=["rabbitmq_management"], configuration=configuration):
        yield Secured(
            keys=keys,
            strangers=make_keys(folder / "strangers", "127.0.0.1"),
            amqp_port=amqp_port,
            management_port=management_port,
        )


def test_what_is_configured_for_amqp_holds_for_the_management_api(project: Project, secured: Secured) -> None:
    """Given an authority of our own and a certificate in AMQP_URL, then every check gets its answer."""
    rt = project.runtime(amqp_url=secured.amqp_url(), management_url=secured.management_url())
    prepare(rt)
    with_queue(rt)

    found = check(rt)

    for name in ("rabbitmq", *BY_MANAGEMENT):
        assert by_name(found, name).severity is Severity.OK, by_name(found, name)


def test_the_command_says_what_is_wrong(project: Project, secured: Secured) -> None:
    """Given an API under another host name than its certificate's, then what only it can tell is unknown, and why."""
    env = {"AMQP_URL": secured.amqp_url(), "PIPELINE_MANAGEMENT_URL": secured.management_url("localhost")}

    rows = {row["check"]: row for row in project.json("check", env=env)["findings"]}

    assert rows["rabbitmq"]["severity"] == "ok"
    for name in BY_MANAGEMENT:
        assert rows[name]["severity"] == "unknown"
        assert "CERTIFICATE_VERIFY_FAILED" in rows[name]["what"]


def test_the_name_is_that_of_the_address_with_the_same_host(secured: Secured) -> None:
    """Given an address whose name is told, then the API on that host is checked for it, and on another for its own."""
    url = secured.amqp_url("localhost", ssl_server_hostname="127.0.0.1")
    Management(url, secured.management_url("localhost")).queues()

    other = secured.amqp_url("localhost", ssl_server_hostname="elsewhere.example.org")
    Management(other, secured.management_url()).queues()
    with pytest.raises(BrokerError, match="CERTIFICATE_VERIFY_FAILED"):
        Management(other, secured.management_url("localhost")).queues()


@pytest.mark.parametrize("problem", ["another authority", "no authority named", "plain AMQP"])
def test_nobody_elses_certificate_is_believed(secured: Secured, problem: str) -> None:
    """Given an authority that did not sign the API's certificate, then nothing is sent there."""
    url = {
        "another authority": secured.amqp_url(ssl_ca_certs=secured.strangers.authority),
        "no authority named": secured.amqp_url(ssl_ca_certs=None),
        "plain AMQP": "amqp://guest:guest@127.0.0.1/",
    }[problem]
    with pytest.raises(BrokerError, match="CERTIFICATE_VERIFY_FAILED") as refused:
        Management(url, secured.management_url()).queues()
    assert "guest:guest" not in str(refused.value)


def test_an_api_that_wants_a_certificate_gets_none_that_is_not_named(secured: Secured) -> None:
    """Given no certificate of ours in AMQP_URL, then the API, whose own is believed, does not let us in."""
    url = secured.amqp_url(ssl_certfile=None, ssl_keyfile=None)
    with pytest.raises(BrokerError, match="does not answer") as refused:
        Management(url, secured.management_url()).queues()
    assert "CERTIFICATE_VERIFY_FAILED" not in str(refused.value)


def test_a_file_that_is_not_there(secured: Secured, tmp_path: Path) -> None:
    """Given the name of a file that is not there, then that is said."""
    url = secured.amqp_url(ssl_ca_certs=tmp_path / "none.pem")
    with pytest.raises(BrokerError, match=r"AMQP_URL names a file that is not there: ssl_ca_certs=.*none\.pem"):
        Management(url, secured.management_url()).queues()
