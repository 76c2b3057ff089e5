"""Who looks after a worker's messages on a Redis broker, and what is left of one that never could."""

from __future__ import annotations

import gc
import time
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
from redis import ConnectionPool, Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from legit_worker.broker import owners
from legit_worker.broker.lease import Lease
from legit_worker.broker.ledger import Ledger, Worker
from legit_worker.broker.returning import Keys

KEYS = Keys(unacked="unacked", index="unacked_index", prefix="")


class Leases:
    """All that were made and are still there."""

    def __init__(self) -> None:
        self._made: list[weakref.ref[Lease]] = []

    def make(self, ledger: Ledger, client: Redis, visibility_timeout: float) -> Lease:
        lease = Lease(ledger, client, visibility_timeout)
        self._made.append(weakref.ref(lease))
        return lease

    def __len__(self) -> int:
        gc.collect()
        return sum(made() is not None for made in self._made)


@pytest.fixture
def leases(monkeypatch: pytest.MonkeyPatch) -> Leases:
    found = Leases()
    monkeypatch.setattr(owners, "Lease", found.make)
    return found


def channel_to_a_server_that_is_away(ledger: Ledger) -> Any:
    def pool() -> ConnectionPool:
        return ConnectionPool(host="localhost", port=1)

    return SimpleNamespace(ledger=ledger, visibility_timeout=3600, _get_pool=pool)


def test_nothing_is_left_of_a_lease_that_could_not_begin(leases: Leases) -> None:
    """Each connection to a server that is away, or refuses a lease, makes one more."""
    ledger = Ledger(KEYS, Worker(node="one", lease_seconds=60, max_deliveries=5))
    for _ in range(3):
        with pytest.raises(RedisConnectionError):
            owners.keep_alive(channel_to_a_server_that_is_away(ledger))
    assert len(leases) == 0


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="only Linux tells how long the machine slept")
def test_a_worker_is_in_doubt_as_its_machine_wakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The monotonic clock has stood still, and the broker's has not: others have its messages by now."""
    client = SimpleNamespace(evalsha=lambda *_: [1, [], []])
    ledger = Ledger(KEYS, Worker(node="one", lease_seconds=60, max_deliveries=5))
    Lease(ledger, client, 3600.0).beat()  # type: ignore[arg-type]
    assert not ledger.is_in_doubt
    awake = time.clock_gettime(time.CLOCK_BOOTTIME)
    monkeypatch.setattr(time, "clock_gettime", lambda clock: awake + 3600.0)
    assert ledger.is_in_doubt
