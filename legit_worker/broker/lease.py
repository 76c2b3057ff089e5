"""A worker's sign of life, and what happens to the messages of workers that give none.

In: a ledger. Out: beats on the server, held messages that stay invisible to others, and messages of dead workers that
are given back.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections.abc import Iterable
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path
from time import time
from typing import Any

from kombu.utils.encoding import bytes_to_str
from redis import Redis
from redis.exceptions import RedisError, ResponseError

from legit_worker.broker.ledger import Ledger, uptime
from legit_worker.broker.returning import Keys, recover
from legit_worker.broker.scripts import Script
from legit_worker.broker.tally import tally

logger = logging.getLogger(__name__)

#: A worker gives a sign of life this many times in a lease, and counts as dead after the lease less one of them. So
#: the others, which look as often, find it before the lease is over.
BEATS = 6

#: Members that one command renews.
RENEWED = 1000

#: Times of renewals that failed, which a worker tells others: more than it tries while its lease is not over.
MOST_RENEWALS = 8

#: Seconds that the lease's own connection waits for an answer, and a worker's end for the lease's thread.
PATIENCE = 5.0

#: Gives a sign of life. If nobody gave one for a while, the server was away, or all workers were. Then nobody counts as
#: dead until all had the time to give another. A full server lets the script go on once it has begun to write.
#:
#: KEYS: the owners, the processes, the last beat. ARGV: the owner, seconds until it counts as dead, what is known of
#: its process, seconds of silence after which the server counts as away. Returns whether the owner counted as alive,
#: the owners that count as dead, and the processes.
BEAT = Script("""
redis.call('ZREM', KEYS[1], '')
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local last, judges_from = string.match(redis.call('GET', KEYS[3]) or '', '(%S+) (%S+)')
if not last or now - tonumber(last) > tonumber(ARGV[4]) then
    judges_from = now + tonumber(ARGV[2])
end
redis.call('SET', KEYS[3], now .. ' ' .. judges_from, 'EX', math.ceil(4 * tonumber(ARGV[2])))
local alive_until = redis.call('ZSCORE', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
local dead = now > tonumber(judges_from) and redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now) or {}
return {alive_until and tonumber(alive_until) > now and 1 or 0, dead, redis.call('HGETALL', KEYS[2])}
""")

#: Beats that the server may miss before it counts as away.
MISSED = 2.5

#: Gives messages a new time: all that the server has noted for the owner, also those whose answer the worker has not
#: read yet, and none that are another's by now; and those that kombu fetched. KEYS: the index of the unacked messages,
#: what the owner holds. ARGV: the time, tags that kombu fetched. Returns the noted tags. A full server lets the script
#: go on once it has begun to write.
RENEW = Script("""
redis.call('ZREM', KEYS[1], '')
local noted = redis.call('HKEYS', KEYS[2])
for _, tag in ipairs(noted) do redis.call('ZADD', KEYS[1], 'XX', ARGV[1], tag) end
for number = 2, #ARGV do redis.call('ZADD', KEYS[1], 'XX', ARGV[1], ARGV[number]) end
return noted
""")

#: Forgets an owner that holds nothing any more. KEYS: the owners, the processes, what it holds. ARGV: the owner.
LEAVE = Script("""
if redis.call('EXISTS', KEYS[3]) == 1 then return 0 end
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[2], ARGV[1])
return 1
""")


class Lease(threading.Thread):
    """Keeps one ledger's owner alive. Its thread has its own connections, and never touches a channel."""

    def __init__(self, ledger: Ledger, client: Redis, visibility_timeout: float) -> None:
        """`visibility_timeout`: the visibility timeout of the ledger's channels, in seconds."""
        super().__init__(name="legit_worker lease", daemon=True)
        assert ledger.worker is not None
        self._ledger = ledger
        self._client = client
        self._keys = ledger.keys
        self._lease = ledger.worker.lease_seconds
        self._beat_seconds = self._lease / BEATS
        self._visibility_timeout = visibility_timeout
        # Another app's workers may have a shorter visibility timeout. Stock workers don't tell: renew with each lease.
        self._renew_seconds = min(visibility_timeout / 3, self._lease)
        self._renewed_at = uptime()
        # The times that held messages may have got: the last one, and those since then that may not have arrived.
        self._renewals: list[float] = []
        # What the server had noted for this worker, and the worker did not know, at the last look.
        self._unknown: set[str] = set()
        # Dead workers whose messages can't all go back, each with the reason that the log has.
        self._refused: set[tuple[str, str]] = set()
        self._has_beaten = False
        # Whether others may look for this process.
        self._is_known = True
        self._is_away = False
        self._stopped = threading.Event()
        # Set when the next beat must not wait for its time.
        self._is_due = threading.Event()
        self._finalize: Finalize | None = None

    def start(self) -> None:
        """Beat from now on, and leave as the process ends. A lease that never starts leaves nothing to do then."""
        self._finalize = Finalize(self, self.leave, exitpriority=0)  # after kombu's channels, which have 1
        super().start()

    def run(self) -> None:
        """Beat until the worker ends. A server that is away ends nothing."""
        while not self._stopped.is_set():
            try:
                self.work()
                self._is_away = False
            except (RedisError, OSError) as error:
                if not self._is_away:
                    logger.warning("the broker hears no sign of life of this worker: %r", error)
                self._is_away = True
            except Exception:
                logger.exception("the messages of dead workers can't be given back")
            self._is_due.wait(min(self._beat_seconds, self._renew_seconds))
            self._is_due.clear()

    def hurry(self) -> None:
        """Have a sign of life given at once."""
        self._is_due.set()

    def work(self) -> None:
        """Give a sign of life, renew what is held, and give back what dead workers held."""
        began = uptime()
        is_due = began - self._renewed_at >= self._renew_seconds
        if is_due:
            # The others know the times first: if this process dies in between, they still know its messages by them.
            self._renewals = [time(), *self._renewals[:MOST_RENEWALS]]
        dead = self.beat()
        if is_due:
            self._renew()
            self._renewals, self._renewed_at = self._renewals[:1], began
        self._refused = {(owner, reason) for owner, reason in self._refused if owner in dead}
        for owner, process in dead.items():
            self._try_to_recover(owner, process)

    def beat(self) -> dict[str, dict[str, Any]]:
        """Give a sign of life. Returns the dead owners with what is known of their processes."""
        keys, name = [self._keys.owners, self._keys.processes, self._keys.beat], self._ledger.owner
        seconds, process = self._lease - self._beat_seconds, json.dumps(self._process())
        silence, began = MISSED * self._beat_seconds, uptime()
        was_alive, late, known = BEAT.run(self._client, keys, name, seconds, process, silence)
        self._ledger.alive_until = began + seconds
        if self._has_beaten and not was_alive:
            self._ledger.has_lapsed = True
            # If a copy of this machine took this process for a dead one of its own, it must not do so again.
            self._is_known = False
            logger.warning(
                "the broker heard no sign of life of this worker for %.0f seconds: others may run its %d tasks again",
                self._lease - self._beat_seconds,
                len(self._ledger.held),
            )
        self._has_beaten = True
        processes = {bytes_to_str(owner): _read(known[at + 1]) for at, owner in enumerate(known) if at % 2 == 0}
        self._renew_for(processes.values())
        dead = {bytes_to_str(owner) for owner in late} | {owner for owner, told in processes.items() if is_gone(told)}
        return {owner: processes.get(owner, {}) for owner in dead - {name}}

    def _process(self) -> dict[str, Any]:
        return (this_process() if self._is_known else {}) | {
            "renewals": self._renewals,
            "unacked": self._keys.unacked,
            "index": self._keys.index,
            "visibility_timeout": self._visibility_timeout,
        }

    def _renew_for(self, processes: Iterable[dict[str, Any]]) -> None:
        """Renew soon enough for all workers that share these messages: each gives back what is too old for itself."""
        ours = [process for process in processes if process.get("index") == self._keys.index]
        timeouts = [seconds for process in ours if isinstance(seconds := process.get("visibility_timeout"), float)]
        self._renew_seconds = min([self._visibility_timeout / 3, self._lease, *(seconds / 3 for seconds in timeouts)])

    def _renew(self) -> None:
        """Keep what this worker holds from others, for which it would be visible after the visibility timeout."""
        fetched = [tag for tag, source in list(self._ledger.held.items()) if source is None]
        keys = [self._keys.index, self._keys.held(self._ledger.owner)]
        for start in range(0, max(1, len(fetched)), RENEWED):
            noted = RENEW.run(self._client, keys, repr(self._renewals[0]), *fetched[start : start + RENEWED])
        self._look_for_unknown(set(map(bytes_to_str, noted)))
        tally["renewed"] += len(noted) + len(fetched)

    def _look_for_unknown(self, noted: set[str]) -> None:
        """Have the ledger look for what never came. A server may hear a question long after its connection broke.

        What is unknown at one look may be on its way.
        """
        unknown = {tag for tag in noted if not self._ledger.knows(tag)}
        self._ledger.is_unsure |= bool(unknown & self._unknown)
        self._unknown = unknown

    def _try_to_recover(self, owner: str, process: dict[str, Any]) -> None:
        """Give back what a dead owner held. If that fails, the log says so once, and others' messages can still go."""
        try:
            self._recover(owner, process)
        except (ResponseError, TypeError, ValueError) as error:
            if (owner, str(error)) not in self._refused:
                self._refused.add((owner, str(error)))
                logger.error(
                    "not all messages of worker %s, which has died, can be given back: %r", _node(owner), error
                )

    def _recover(self, owner: str, process: dict[str, Any]) -> None:
        """Give back what a dead owner held."""
        if is_gone(process):  # before its lease is over
            self._client.zadd(self._keys.owners, {owner: 0}, xx=True)
        keys = Keys(
            unacked=process.get("unacked", self._keys.unacked),
            index=process.get("index", self._keys.index),
            prefix=self._keys.prefix,
        )
        moved = recover(self._client, keys, owner, renewals=process.get("renewals", ()))
        tally["recovered"] += moved
        if self._forget(owner) and moved:
            logger.warning("worker %s has died: its %d messages are given back", _node(owner), moved)

    def _forget(self, owner: str) -> bool:
        keys = [self._keys.owners, self._keys.processes, self._keys.held(owner)]
        return bool(LEAVE.run(self._client, keys, owner))

    def leave(self) -> None:
        """End: send what could not be sent, give everything back that is still held, and be forgotten."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self.hurry()
        if self._finalize is not None:
            self._finalize.cancel()
        if self.is_alive():
            self.join(PATIENCE)
        held = list(self._ledger.held)
        try:
            for tag in held:
                self._ledger.give_back(tag)
            self._ledger.is_unsure = True
            self._ledger.flush(self._client)
            self._forget(self._ledger.owner)
        except (RedisError, OSError) as error:
            self._tell_left(len(held), error)

    def _tell_left(self, held: int, error: Exception) -> None:
        """Say what the broker has still noted, since it could not hear of this worker's end."""
        done = self._ledger.outbox.unsent
        if held or done:
            logger.warning(
                "the broker is away as this worker ends (%r): its %d messages are given back within %.0f seconds, if "
                "another worker runs; the tasks of %d of them are done, and run again",
                *(error, held + done, self._lease, done),
            )


@cache
def this_process() -> dict[str, Any]:
    """Tell which process this is, among all that have ever run on this machine; empty if the system doesn't say."""
    try:
        return {
            "host": socket.gethostname(),
            "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "namespace": os.readlink("/proc/self/ns/pid"),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
        }
    except OSError:
        return {}


def is_gone(process: dict[str, Any]) -> bool:
    """Tell whether a process ran on this machine and is dead. Of other machines nothing is known."""
    this = this_process()
    if not this or any(process.get(part) != this[part] for part in ("host", "boot", "namespace")):
        return False
    try:
        return _started(process["pid"]) != str(process["started"])
    except OSError:
        return not _is_there(process["pid"])


def _started(pid: int) -> str:
    """When a process started, in the system's ticks; nothing if it has ended, and nobody has asked how.

    Raises `OSError` if there is none, or if it is another user's and hidden.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]


def _is_there(pid: int) -> bool:
    """Ask the kernel, which also knows processes that `/proc` hides (`hidepid`, systemd's `ProtectProc`)."""
    try:
        os.kill(pid, 0)  # signal 0 is none
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def _node(owner: str) -> str:
    return owner.rpartition(":")[0]


def _read(raw: bytes) -> dict[str, Any]:
    try:
        process = json.loads(raw)
    except ValueError:
        return {}
    return process if isinstance(process, dict) else {}
