"""Faults of the network between one worker and its services: cut, silent, slow."""

from __future__ import annotations

from tests.chaos.driver.faults import Fault
from tests.integration.proxy import Proxy

#: Seconds that one lasts: a hiccup, less than a lease, more than a lease.
LASTS_S = (0.5, 4.0, 14.0)
#: Each piece of data is held up by this.
SLOW_S = 0.2


class StoreProxy(Proxy):
    """A proxy before a replica set of one."""

    def address(self, url: str) -> str:
        """`url` by way of this proxy; the replica set's own address would lead around it."""
        return super().address(url).partition("?")[0] + "?directConnection=true"


class Cut(Fault):
    """Connections end and new ones are refused; or they stay, and nothing goes through, or only slowly."""

    def act(self) -> bool:
        place = self.someone()
        if place is None:
            return False
        proxies = self.chance.choice([[p] for p in place.proxies] + [list(place.proxies)])
        how = self.chance.choice(["cut", "cut", "silence", "delay"])
        seconds = self.chance.choice(LASTS_S)
        names = sorted(name for name, proxy in place.named_proxies.items() if proxy in proxies)
        self.scene.journal.write(how, worker=place.name, pid=place.pid, seconds=seconds, of=names)
        for proxy in proxies:
            if how == "cut":
                proxy.cut()
            elif how == "silence":
                proxy.freeze()
            else:
                proxy.delay_s = SLOW_S
        self.last(seconds)
        for proxy in proxies:
            proxy.restore()
        self.scene.journal.write("restored", worker=place.name)
        return True
