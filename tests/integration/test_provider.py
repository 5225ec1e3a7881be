"""The provider that tests of rate limits ask, hammered for a while: what it answers is what it says of itself."""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import pytest

from tests.project import eventually
from tests.provider import BROKEN, LIMITED, OK, Provider


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(limit=10) as made:
        yield made


def ask(provider: Provider, job: str = "j") -> tuple[int, str | None]:
    """Status and Retry-After."""
    connection = http.client.HTTPConnection("127.0.0.1", provider.port, timeout=10)
    try:
        connection.request("GET", f"/work?job={job}")
        answer = connection.getresponse()
        answer.read()
        return answer.status, answer.getheader("Retry-After")
    finally:
        connection.close()


def test_never_more_than_the_limit_in_any_second(provider: Provider) -> None:
    """Given a limit of ten a second, when four threads keep asking, then no second has more than ten answers."""
    until = time.monotonic() + 2.5
    answered: list[int] = []

    def hammer(_: int) -> None:
        while time.monotonic() < until:
            answered.append(ask(provider)[0])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(hammer, range(4)))
    log = provider.log()
    accepted = log.times(OK)
    assert len(accepted) >= 20
    assert all(later - earlier > 0.9999 for earlier, later in zip(accepted, accepted[10:], strict=False))
    # And the log has every request, with what it was answered
    assert (log.count(OK), log.count(LIMITED)) == (answered.count(OK), answered.count(LIMITED))
    assert log.count(LIMITED) > log.count(OK)


def test_refusals_say_when_to_come_back(provider: Provider) -> None:
    """Given a limit that is used up, when one more asks, then Retry-After says seconds, or a date that is later."""
    assert [ask(provider)[0] for _ in range(10)] == [OK] * 10
    assert ask(provider) == (LIMITED, "1")
    provider.tell(retry_after_date=True, retry_after_s=2)
    before = datetime.now(UTC)
    status, date = ask(provider)
    assert (status, date is not None) == (LIMITED, True)
    assert 2 <= (parsedate_to_datetime(date or "") - before).total_seconds() <= 3.1


def test_closed_until_a_time(provider: Provider) -> None:
    """Given a provider that closes for 1.5 s, when asked, then it refuses with the rest, and opens by itself."""
    closed_at = time.monotonic()
    provider.tell(closed_for_s=1.5)
    assert ask(provider) == (LIMITED, "2")
    eventually(lambda: ask(provider)[0] == OK, timeout=5)
    log = provider.log()
    assert log.times(OK)[0] >= closed_at + 1.5
    assert log.times(LIMITED)[-1] < log.times(OK)[0] < closed_at + 2.5


def test_fails_while_told_to(provider: Provider) -> None:
    """Given a provider told to fail, when asked, then it answers 500 within its limit, until told otherwise."""
    provider.tell(failing=True)
    assert ask(provider, "a") == (BROKEN, None)
    provider.tell(failing=False)
    assert ask(provider, "b") == (OK, None)
    assert [(arrival.status, arrival.job) for arrival in provider.log().arrivals] == [(BROKEN, "a"), (OK, "b")]
    provider.forget()
    assert provider.log().arrivals == ()


def test_ends_with_who_started_it(provider: Provider) -> None:
    """Given a provider, when it is stopped, then nobody answers at its port."""
    assert ask(provider)[0] == OK
    provider.stop()
    with pytest.raises(ConnectionRefusedError):
        ask(provider)
    provider.stop()
