"""A provider that limits its callers: a real HTTP server in a process of its own, so that its clock is nobody else's.

Tests start one with `Provider` and read what reached it from `Provider.log()`. Their projects get the text of
`Provider.client` as a module, for handlers to ask it with.

    GET  /work?job=ID   200 with a small JSON; 429 with Retry-After beyond the limit or while closed; 500 while failing
    POST /control       changes the fields of `Behaviour` that its JSON names; `closed_for_s` counts from now
    GET  /log           every arrival so far: [monotonic time, status answered, job]
    POST /forget        forgets the arrivals and the window

The limit is of requests accepted in the last sliding second. Refused requests do not count towards it, unless
`count_refused` says so: some providers do that, and then a caller who keeps knocking stays outside.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import subprocess
import sys
import time
import urllib.request
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, Self

from aiohttp import web

REPOSITORY = Path(__file__).parent.parent

OK, LIMITED, BROKEN = 200, 429, 500

#: A module for handlers of a test's project; `Provider.client` fills in the port.
CLIENT = '''
import http.client


def ask(job_id: str) -> tuple[int, str | None]:
    """Status and Retry-After."""
    connection = http.client.HTTPConnection("127.0.0.1", {port}, timeout=30)
    try:
        connection.request("GET", f"/work?job={{job_id}}")
        answer = connection.getresponse()
        answer.read()
        return answer.status, answer.headers["Retry-After"]
    finally:
        connection.close()
'''


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """How the provider answers."""

    #: Requests that it accepts in any second.
    limit: int = 40
    #: Refused requests use up the limit as well.
    count_refused: bool = False
    #: What Retry-After says beyond the limit; while closed it says what is left, in whole seconds and at least this.
    retry_after_s: int = 1
    #: Retry-After is an HTTP date instead of seconds.
    retry_after_date: bool = False
    #: Closed to everybody for so long.
    closed_for_s: float = 0.0
    #: It answers 500 to whatever it would have accepted.
    failing: bool = False
    #: How long it takes to answer what it accepted.
    latency_s: float = 0.0


class Window:
    """The requests of the last second that count."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()

    def admits(self, now: float, limit: int, *, count_refused: bool) -> bool:
        """Whether one more at `now` is within the limit, and notes it."""
        while self._times and self._times[0] <= now - 1.0:
            self._times.popleft()
        admitted = len(self._times) < limit
        if admitted or count_refused:
            self._times.append(now)
        return admitted


class Server:
    """The provider's side of it."""

    def __init__(self, behaviour: Behaviour) -> None:
        self._closed_until = 0.0
        self._forget()
        self._become(behaviour)

    def app(self) -> web.Application:
        """Its routes."""
        app = web.Application()
        app.add_routes(
            [
                web.get("/work", self._work),
                web.post("/control", self._control),
                web.get("/log", self._log),
                web.post("/forget", self._forgotten),
            ]
        )
        return app

    def _become(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        self._closed_until = time.monotonic() + behaviour.closed_for_s

    def _forget(self) -> None:
        self._arrivals: list[tuple[float, int, str]] = []
        self._window = Window()

    async def _work(self, request: web.Request) -> web.Response:
        now = time.monotonic()
        how = self._behaviour
        status = self._status(now)
        job = request.query.get("job", "")
        self._arrivals.append((now, status, job))
        if status == LIMITED:
            return web.json_response({"error": "slow down"}, status=status, headers={"Retry-After": self._wait(now)})
        if how.latency_s:
            await asyncio.sleep(how.latency_s)
        return web.json_response({"job": job} if status == OK else {"error": "broken"}, status=status)

    def _status(self, now: float) -> int:
        how = self._behaviour
        if now < self._closed_until or not self._window.admits(now, how.limit, count_refused=how.count_refused):
            return LIMITED
        return BROKEN if how.failing else OK

    def _wait(self, now: float) -> str:
        how = self._behaviour
        seconds = max(how.retry_after_s, math.ceil(self._closed_until - now))
        if not how.retry_after_date:
            return str(seconds)
        # HTTP dates have whole seconds: rounded up, so that nobody is asked back too early.
        then = datetime.now(UTC) + timedelta(seconds=seconds)
        return format_datetime((then + timedelta(microseconds=999_999)).replace(microsecond=0), usegmt=True)

    async def _control(self, request: web.Request) -> web.Response:
        self._become(replace(self._behaviour, **{"closed_for_s": 0.0, **await request.json()}))
        return web.json_response({})

    async def _log(self, _: web.Request) -> web.Response:
        return web.json_response(self._arrivals)

    async def _forgotten(self, _: web.Request) -> web.Response:
        self._forget()
        return web.json_response({})


async def serve(behaviour: Behaviour) -> None:
    """Serve until standard input ends; the port is the one line on standard output."""
    runner = web.AppRunner(Server(behaviour).app(), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await runner.cleanup()


@dataclass(frozen=True)
class Arrival:
    """One request that reached the provider."""

    #: `time.monotonic()`, which on one machine is the same clock in every process.
    at: float
    status: int
    job: str


@dataclass(frozen=True)
class Log:
    """All that reached a provider."""

    arrivals: tuple[Arrival, ...]

    def times(self, status: int) -> list[float]:
        """When the requests arrived that were answered so."""
        return [arrival.at for arrival in self.arrivals if arrival.status == status]

    def count(self, status: int) -> int:
        """How many were answered so."""
        return len(self.times(status))


class Provider:
    """Starts a provider, and ends it; a context manager. It ends as well when this process dies."""

    def __init__(self, **behaviour: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.provider", json.dumps(behaviour)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the provider ended with {self._process.wait(10)}"
        self.port = int(line)
        self._url = f"http://127.0.0.1:{self.port}"
        self.client = CLIENT.format(port=self.port)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def tell(self, **changed: Any) -> None:
        """Change fields of its `Behaviour`."""
        self._post("/control", changed)

    def forget(self) -> None:
        """Begin a new log and a new window."""
        self._post("/forget", {})

    def log(self) -> Log:
        """What reached it so far."""
        with urllib.request.urlopen(f"{self._url}/log", timeout=30) as answer:
            return Log(tuple(Arrival(*row) for row in json.load(answer)))

    def stop(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._process.stdout.close()

    def _post(self, path: str, body: dict[str, Any]) -> None:
        request = urllib.request.Request(self._url + path, json.dumps(body).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=30) as answer:
            answer.read()


def rate(times: Sequence[float]) -> float:
    """Requests a second from the first to the last."""
    return (len(times) - 1) / (times[-1] - times[0])


def middle(times: Sequence[float], share: float = 0.8) -> list[float]:
    """`times` without as many at the beginning as at the end, so that `share` of them is left."""
    cut = round(len(times) * (1 - share) / 2)
    return list(times[cut : len(times) - cut])


def per_second(times: Sequence[float]) -> list[int]:
    """Requests in each whole second from the first to the last."""
    counts = [0] * int(times[-1] - times[0])
    for at in times:
        second = int(at - times[0])
        if second < len(counts):
            counts[second] += 1
    return counts


def window_rates(times: Sequence[float], window_s: float) -> tuple[float, float]:
    """The lowest and the highest rate in any window of that length between the first and the last request."""
    counts: list[int] = []
    for place, begin in enumerate(times):
        if begin + window_s > times[-1]:
            break
        # The fullest windows begin with a request, the emptiest right after one.
        end = bisect_left(times, begin + window_s)
        counts += [end - place, end - place - 1]
    assert counts, f"shorter than {window_s} s"
    return min(counts) / window_s, max(counts) / window_s


def closings(refused: Sequence[float], gap_s: float) -> list[int]:
    """How many were refused each time the provider closed; one is over when nobody was refused for `gap_s`."""
    sizes: list[int] = []
    last = -math.inf
    for at in refused:
        if at - last > gap_s:
            sizes.append(0)
        sizes[-1] += 1
        last = at
    return sizes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("behaviour", type=json.loads, nargs="?", default={}, help='as JSON, such as {"limit": 40}')
    asyncio.run(serve(Behaviour(**parser.parse_args().behaviour)))
