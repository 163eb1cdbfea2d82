"""How often passwords may be tried, each of which costs 64 MiB and tens of milliseconds."""

import ipaddress
import time
from collections import Counter
from collections.abc import Callable

from app.core.errors import TooMany

FROM_ONE = 60  # tries a minute from one address
FOR_ONE = 10  # of them for one account


class Guesses:
    """The tries of this minute, each process's own. Counted by address, so that nobody can keep
    somebody else out."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._minute = 0
        self._tries = Counter[tuple[str, ...]]()

    def count(self, address: str, email: str) -> None:
        """Raises TooMany."""
        minute, passed = divmod(int(self._now()), 60)
        if minute != self._minute:
            self._minute = minute
            self._tries.clear()
        place = _network(address)
        for key, most in (((place,), FROM_ONE), ((place, email.strip().lower()), FOR_ONE)):
            self._tries[key] += 1
            if self._tries[key] > most:
                rest = 60 - passed
                raise TooMany(
                    f"Too many passwords were tried; try again in {rest} seconds.",
                    retry_after=rest,
                )


def _network(address: str) -> str:
    """All addresses that one IPv6 connection gives are one."""
    try:
        known = ipaddress.ip_address(address)
    except ValueError:
        return address
    if known.version == 4:
        return address
    return str(ipaddress.ip_network((int(known) >> 64 << 64, 64)))
