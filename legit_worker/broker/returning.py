"""How noted messages go back to their lists.

In: tags of unacked messages. Out: the same messages at one end of the lists that they came from; bytes that are no
message in the list of unreadable ones. Each message moves in one step, and only if it is still noted as it was read.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from time import time
from typing import Any

from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads
from redis import Redis
from redis.exceptions import ResponseError

from legit_worker.broker.scripts import Script
from legit_worker.broker.tally import tally

logger = logging.getLogger(__name__)

#: The header that counts the workers that died while they held the message.
DELIVERIES = "legit_deliveries"

#: Messages that are read at once: with images in them, more would fill the memory.
GROUP = 64

#: Moves one message. KEYS: the unacked messages, their index, what the owner holds, the list, the owners.
#: ARGV: tag, the noted bytes' SHA1, the bytes to push, the command that pushes, 1 if the owner must still hold it,
#: the owner if it must be dead, the times of which the message must have one then. Returns 1 if it moved the message.
#: It pushes first: if the list is no list any more, the message stays noted. A full server lets it go on once it has
#: begun to write.
MOVE = Script("""
if ARGV[6] ~= '' then
    local time, alive_until = redis.call('TIME'), redis.call('ZSCORE', KEYS[5], ARGV[6])
    if alive_until and tonumber(alive_until) > tonumber(time[1]) + tonumber(time[2]) / 1e6 then return 0 end
end
local is_held, noted = redis.call('HEXISTS', KEYS[3], ARGV[1]) == 1, redis.call('HGET', KEYS[1], ARGV[1])
if ARGV[5] == '1' and not is_held then return 0 end
local time, is_its_own = redis.call('ZSCORE', KEYS[2], ARGV[1]), ARGV[6] == ''
for number = 7, #ARGV do
    is_its_own = is_its_own or not time or tonumber(time) == tonumber(ARGV[number])
end
if not noted or redis.sha1hex(noted) ~= ARGV[2] or not is_its_own then
    if ARGV[6] ~= '' then redis.call('HDEL', KEYS[3], ARGV[1]) end
    return 0
end
redis.call('ZREM', KEYS[2], '')
redis.call(ARGV[4], KEYS[4], ARGV[3])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[3], ARGV[1])
return 1
""")


@dataclass(frozen=True)
class Keys:
    """The names of one broker's keys, with its prefix."""

    #: kombu's own.
    unacked: str
    index: str
    #: What precedes this project's own.
    prefix: str = ""

    @property
    def unreadable(self) -> str:
        """A list of bytes that are no message, and of messages that can't become a task."""
        return f"{self.prefix}legit.unreadable"

    @property
    def dead(self) -> str:
        """A list of records of messages that are not delivered any more."""
        return f"{self.prefix}legit.dead"

    @property
    def owners(self) -> str:
        """By owner, the server's time until which it counts as alive: a sorted set."""
        return f"{self.prefix}legit.owners"

    @property
    def processes(self) -> str:
        """By owner, what is known of its process: a hash."""
        return f"{self.prefix}legit.processes"

    @property
    def beat(self) -> str:
        """The server's time of the last sign of life, and the time from which owners count as dead."""
        return f"{self.prefix}legit.beat"

    def held(self, owner: str) -> str:
        """By tag, the list from which the owner took the message: a hash."""
        return f"{self.prefix}legit.held.{owner}"


def give_back(client: Redis, keys: Keys, owner: str, lists: Mapping[str, str], *, to_back: bool = False) -> int:
    """Give back what a living owner holds, so that it is taken next, or last. Returns how many messages moved.

    `lists` names, by tag, the list that each message came from, in the order in which the messages were taken.
    """
    in_order = list(lists) if to_back else list(lists)[::-1]  # what is pushed to the front last is taken first
    return _move(client, _Move(keys, owner, "LPUSH" if to_back else "RPUSH"), {tag: lists[tag] for tag in in_order})


def recover(client: Redis, keys: Keys, owner: str, *, renewals: Iterable[float]) -> int:
    """Give back what a dead owner held, behind all other messages, and count its death in each.

    `renewals` are the times that the owner last gave to all its messages. A message with another time than these, and
    than the one at which the owner took it, is somebody else's by now. Returns how many messages moved.
    """
    taken = held_by(client, keys, owner)
    # Those that were taken first stand in front again, since the right end is taken from.
    in_order = sorted(taken, key=lambda tag: taken[tag].at)
    times = {tag: (taken[tag].at, *renewals) for tag in in_order}
    return _move(client, _Move(keys, owner, "LPUSH", times), {tag: taken[tag].key for tag in in_order})


@dataclass(frozen=True)
class Taken:
    """When, by `time.time` of the owner, and from which list an owner took a message."""

    at: float
    key: str


def held_by(client: Redis, keys: Keys, owner: str) -> dict[str, Taken]:
    """Return what an owner has taken and not acked, by tag."""
    taken = {}
    for tag, value in client.hgetall(keys.held(owner)).items():
        at, _, key = bytes_to_str(value).partition(" ")
        taken[bytes_to_str(tag)] = Taken(float(at), key)
    return taken


def put_aside(client: Redis, keys: Keys, tag: str) -> None:
    """Move what no worker can read from the unacked messages to the unreadable ones."""
    _move(client, _Move(keys, "", "RPUSH"), {tag: keys.unreadable})


@dataclass(frozen=True)
class _Move:
    """How messages of one owner go back."""

    keys: Keys
    owner: str
    #: The command that pushes to the list.
    command: str
    #: If the owner is dead, the times that each message may have. Its death is counted then.
    times: Mapping[str, Collection[float]] | None = None

    def message(self, tag: str, noted: bytes, to: str) -> tuple[list[str], list[Any]]:
        """Return the keys and arguments of `MOVE` for one message."""
        command, died = self.command, self.times is not None
        try:
            raw = dumps(redelivered(loads(bytes_to_str(noted))[0], died=died))
        except Exception:  # kombu's JSON calls constructors, which may raise anything
            raw, to, command = _cut_out(noted), self.keys.unreadable, "RPUSH"
            tally["unreadable"] += 1
            logger.error("%d unacked bytes are no message, and were put into the list %s: %.100r", len(raw), to, raw)
        keys = [self.keys.unacked, self.keys.index, self.keys.held(self.owner), to, self.keys.owners]
        sha1 = hashlib.sha1(noted, usedforsecurity=False).hexdigest()
        times = [repr(time) for time in self.times[tag]] if self.times is not None else []
        return keys, [tag, sha1, raw, command, int(bool(self.owner)), self.owner if died else "", *times]


def _move(client: Redis, move: _Move, lists: Mapping[str, str]) -> int:
    """Move messages in this order, in groups. Returns how many moved. What the server refuses is raised at the end."""
    moved, tags, refusal = 0, list(lists), None
    for start in range(0, len(tags), GROUP):
        group = tags[start : start + GROUP]
        calls, gone = [], []
        for tag, noted in zip(group, client.hmget(move.keys.unacked, group), strict=True):
            if isinstance(noted, bytes):
                calls.append(move.message(tag, noted, lists[tag]))
            else:
                gone.append(tag)
        if gone:
            client.hdel(move.keys.held(move.owner), *gone)
        try:
            moved += sum(MOVE.run_each(client, calls)) if calls else 0
        except ResponseError as error:  # its list is no list any more, or this user may not push to it
            refusal = error
    if refusal is not None:
        raise refusal
    return moved


def redelivered(payload: Any, *, died: bool) -> dict[str, Any]:
    """Mark a message as kombu does when it restores one, and count a death, unless its task waited for its ETA.

    Raises `TypeError` if it is no message.
    """
    if not isinstance(payload, dict):
        raise TypeError(f"{type(payload).__name__} is no message")
    headers = payload["headers"] = dict(_mapping(payload.get("headers")))
    properties = payload["properties"] = dict(_mapping(payload.get("properties")))
    to = properties["delivery_info"] = dict(_mapping(properties.get("delivery_info")))
    has_run = died and eta_seconds(headers.get("eta")) <= time()
    deliveries = max(count(headers.get(DELIVERIES)), count(to.pop(DELIVERIES, 0))) + has_run
    headers["redelivered"] = to["redelivered"] = True
    if deliveries:
        headers[DELIVERIES] = deliveries
    return payload


def count(value: Any) -> int:
    """Read a number that strangers may have written; 0 if it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def eta_seconds(eta: Any) -> float:
    """Read a message's ETA: a time of `time.time`, 0 if there is none."""
    if not isinstance(eta, str):
        return 0.0
    try:
        return datetime.fromisoformat(eta.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return 0.0


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _cut_out(noted: bytes) -> bytes:
    """Cut a message out of its note, `[message, exchange, routing key]`, as far as that can be done."""
    return noted.removeprefix(b"[").rsplit(b", ", 2)[0]
