"""Limits on what each client may ask in a minute: token buckets, which refill steadily."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

MAX_CLIENTS = 10_000
"""Clients that are remembered; the one that was quiet for longest is forgotten first."""


class RateLimit:
    """At most `per_minute` units a minute and client. A bucket may be overdrawn by what turns out later."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client: units left, at what time

    def wait(self, client: str, units: float = 1) -> float:
        """Return the seconds until the client may use `units`, of which no more than a full bucket is needed; or 0."""
        missing = min(units, self.per_minute) - self._left(client)
        return max(0.0, missing * 60 / self.per_minute)

    def take(self, client: str, units: float = 1) -> None:
        """Note that the client used `units`."""
        self._buckets[client] = (self._left(client) - units, self._clock())
        self._buckets.move_to_end(client)
        while len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)

    def _left(self, client: str) -> float:
        now = self._clock()
        left, then = self._buckets.get(client, (float(self.per_minute), now))
        return min(float(self.per_minute), left + (now - then) * self.per_minute / 60)
