"""What is still to be told to a Redis server about messages: acks, burials and returns.

In: what a ledger's messages came to. Out: the same to the server, by whatever connection there is next.
"""

from __future__ import annotations

import threading
from collections.abc import Container

from redis import Redis

from legit_worker.broker.returning import Keys, give_back
from legit_worker.broker.scripts import Script

#: Acks that one command takes. Lua can't unpack 8,000.
MOST_ACKS = 500

#: Acks a message, and keeps a record of it, unless it was given back. KEYS: the unacked messages, their index, what the
#: owner holds, the list of records. ARGV: tag, record. It pushes first: if the server does not take the record, the
#: message stays noted. A full server lets it go on once it has begun to write.
BURY = Script("""
redis.call('ZREM', KEYS[2], '')
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then redis.call('RPUSH', KEYS[4], ARGV[2]) end
redis.call('HDEL', KEYS[3], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
return redis.call('HDEL', KEYS[1], ARGV[1])
""")


class Outbox:
    """One ledger's. Any thread may put something in, and whoever has a client sends it."""

    def __init__(self, keys: Keys, owner: str) -> None:
        self._keys, self._owner = keys, owner
        #: By tag, the record that a message leaves as it is acked.
        self.records: dict[str, str] = {}
        self._lock = threading.Lock()
        self._acked: list[str] = []
        self._buried: dict[str, str] = {}
        # By tag, the list that a message goes back to, and whether it goes to the list's back.
        self._returned: dict[str, tuple[str, bool]] = {}

    def __repr__(self) -> str:
        return f"{len(self._acked)} acks unsent"

    def __contains__(self, tag: object) -> bool:
        return tag in self._returned or tag in self._buried or tag in self._acked

    def ack(self, tag: str) -> None:
        """Have a message acked, with its record if there is one."""
        if tag in self.records:
            self._buried[tag] = self.records.pop(tag)
        else:
            with self._lock:
                self._acked.append(tag)

    def give_back(self, tag: str, key: str, *, to_back: bool = False) -> None:
        """Have a message given back to a list."""
        self.records.pop(tag, None)
        self._returned[tag] = key, to_back

    def has_left(self, tag: str) -> None:
        """A message is given back already: it has come from its list again, or is somebody else's by now."""
        self._returned.pop(tag, None)

    def keep_nothing_but(self, noted: Container[str]) -> None:
        """Give back none but these."""
        for tag in [tag for tag in self._returned if tag not in noted]:
            self.has_left(tag)

    @property
    def unsent(self) -> int:
        """How many acks the server has not heard of."""
        return len(self._acked)

    @property
    def has_only_acks(self) -> bool:
        """Whether the server must hear of nothing else."""
        return not (self._returned or self._buried)

    def take_acks(self) -> list[str]:
        """Take acks that a reservation brings along. Give them to `ack_again` if it failed."""
        with self._lock:
            taken, self._acked = self._acked[:MOST_ACKS], self._acked[MOST_ACKS:]
            return taken

    def ack_again(self, tags: list[str]) -> None:
        """Keep acks that may not have arrived. To ack twice does no harm."""
        with self._lock:
            self._acked = tags + self._acked

    def send(self, client: Redis) -> None:
        """Send everything, and keep what may not have arrived. Raises the first error, after the last attempt."""
        while tags := self.take_acks():
            self._send_acks(client, tags)
        try:
            self._send_buried(client)
        finally:
            self._send_returned(client)

    def _send_acks(self, client: Redis, tags: list[str]) -> None:
        pipe = client.pipeline(transaction=False)  # a full server takes acks, and no transactions
        pipe.hdel(self._keys.unacked, *tags)
        pipe.zrem(self._keys.index, *tags)
        if self._owner:
            pipe.hdel(self._keys.held(self._owner), *tags)
        try:
            pipe.execute()
        except BaseException:
            self.ack_again(tags)
            raise

    def _send_buried(self, client: Redis) -> None:
        buried = dict(self._buried)
        if buried:
            keys = [self._keys.unacked, self._keys.index, self._keys.held(self._owner), self._keys.dead]
            BURY.run_each(client, [(keys, [tag, record]) for tag, record in buried.items()])
        for tag in buried:
            self._buried.pop(tag, None)

    def _send_returned(self, client: Redis) -> None:
        for to_back in (False, True):
            lists = {tag: key for tag, (key, is_last) in list(self._returned.items()) if is_last is to_back}
            if lists:
                give_back(client, self._keys, self._owner, lists, to_back=to_back)
            for tag in lists:
                self._returned.pop(tag, None)
