"""Who holds messages: this process's ledgers, one for each broker that its worker takes messages from.

In: the worker that lives here, and channels as they open and close. Out: each channel's ledger, whose owner has a lease
before its first reservation, and is forgotten after the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from redis import Redis

from legit_worker.broker.acks import ledgers
from legit_worker.broker.lease import PATIENCE, Lease
from legit_worker.broker.ledger import Ledger, Worker
from legit_worker.broker.returning import Keys

_worker: list[Worker] = []
_of_worker: dict[Hashable, Ledger] = {}
_leases: dict[Ledger, Lease] = {}


def join(worker: Worker) -> Callable[[], None]:
    """Let channels of this process reserve for this worker from now on. Returns what ends that.

    Then the worker's last channel gives everything back as it closes.
    """
    _worker[:] = [worker]

    def leave() -> None:
        _worker.clear()
        for ledger in list(_of_worker.values()):
            ledger.is_left = True
            _leave_if_over(ledger)
        _of_worker.clear()

    return leave


def in_doubt() -> bool:
    """Whether others may have the messages of an open channel, so that no task may begin now.

    What came by another server, which this one has replaced, has no channel any more.
    """
    return any(ledger.is_in_doubt and ledger.channels for ledger in list(_of_worker.values()))


def is_hurried() -> bool:
    """Whether tasks of the worker here wait that should not wait for all messages that have come."""
    return any(worker.is_hurried() for worker in _worker)


def is_more_coming() -> bool | None:
    """Whether an answer that is likely to bring messages is on its way, and comes at once; False: the lists were empty.

    None if nobody asks: the broker sends messages by itself, or the worker has no room for more.
    """
    asking = [channel for ledger in list(_of_worker.values()) for channel in ledger.channels if channel.is_asking]
    return any(channel.awaits_messages for channel in asking) if asking else None


def is_more_there() -> bool:
    """Whether the last answer left messages in the broker's lists. Other brokers don't tell."""
    return any(channel.left_messages for ledger in list(_of_worker.values()) for channel in ledger.channels)


def held_here() -> int:
    """Count the messages that this process's worker holds. Any thread may ask."""
    return sum(len(ledger.held) for ledger in list(_of_worker.values()))


def opened(channel: Any) -> Ledger:
    """Return the ledger of a new channel."""
    keys = Keys(
        unacked=channel.global_keyprefix + channel.unacked_key,
        index=channel.global_keyprefix + channel.unacked_index_key,
        prefix=channel.global_keyprefix,
    )
    address = (_address(channel), keys)
    ledger = _of_worker.get(address) or Ledger(keys, *_worker)
    if _worker:
        ledger = _of_worker.setdefault(address, ledger)  # two threads may open its first channels at once
    ledgers.add(ledger)
    ledger.channels.add(channel)
    return ledger


def _address(channel: Any) -> Hashable:
    """Tell brokers apart. A Sentinel's service stays itself, whichever Sentinel names its server."""
    address = channel.connection.client
    service = getattr(channel, "master_name", None) or (address.hostname, address.port)
    return service, address.virtual_host


def keep_alive(channel: Any) -> None:
    """Give the owner of a channel's ledger a lease. Raises what the server or the network raises."""
    ledger: Ledger = channel.ledger
    if ledger.worker is None:
        return
    if ledger in _leases:
        if ledger.is_in_doubt:
            _leases[ledger].hurry()
        return
    pool = channel._get_pool()
    pool.connection_kwargs["socket_timeout"] = PATIENCE
    lease = Lease(ledger, Redis(connection_pool=pool), float(channel.visibility_timeout))
    lease.beat()
    _leases[ledger] = lease
    lease.start()


def closed(channel: Any) -> None:
    """A channel has closed."""
    channel.ledger.channels.discard(channel)
    _leave_if_over(channel.ledger)


def _leave_if_over(ledger: Ledger) -> None:
    """After the worker's last channel: nobody else sends what is unsent."""
    if ledger.is_left and not ledger.channels and ledger in _leases:
        _leases.pop(ledger).leave()
