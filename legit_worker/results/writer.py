"""The thread that stores results on one Redis server, in groups.

In: writes, from tasks' fibers. Out: a future for each group, done when the server has all of its writes.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from celery.exceptions import BackendStoreError
from redis.exceptions import BusyLoadingError, ResponseError

from legit_worker import parking
from legit_worker.redis_errors import is_forbidden
from legit_worker.results.patience import WAIT, Outage
from legit_worker.results.writes import IsSuccess, Write, check, is_away, send, withdraw_refusals

logger = logging.getLogger(__name__)

#: The most writes, and bytes of values, that go to the server in one step.
MOST_WRITES, MOST_BYTES = 256, 4 * 2**20

#: Errors that are a server's answer, so that its connection stays.
ANSWERS = (ResponseError, BusyLoadingError)

#: Seconds before a server that is away is tried again: the first pause, and the longest.
FIRST_RETRY, LAST_RETRY = 0.05, 1.0

#: If a server breaks more connections than this over the same writes, one after the other, and answers at once after
#: each, it refuses one of them.
MOST_BREAKS = 3


class Group:
    """Writes that go to the server together. `done` is done when it has them all, or refuses some."""

    def __init__(self) -> None:
        self.writes: list[Write] = []
        self.done: Future[None] = Future()


class Writer:
    """Owns one thread and one client. Any thread may call `store`; the thread alone uses the client."""

    def __init__(self, name: str, connect: Callable[[], Any], is_success: IsSuccess) -> None:
        """`name` is the server's URL without a password."""
        self.name = name
        self._connect = connect
        self._is_success = is_success
        self._client: Any = None
        # Whether the server runs scripts for this user.
        self._runs_scripts = True
        self._lock = threading.Lock()
        #: The group that writes join now.
        self._open: Group | None = None
        self._groups: queue.SimpleQueue[Group] = queue.SimpleQueue()
        # Those that the thread stores now.
        self._begun: list[Group] = []
        self._outage = Outage(self.name)
        # A daemon: what waits at the process's end is not acked, and runs again.
        threading.Thread(target=self._run, name="legit-results", daemon=True).start()

    def __repr__(self) -> str:
        return f"<Writer {self.name}: {'server away' if self.away_since else 'server there'}>"

    @property
    def away_since(self) -> float | None:
        """When the server stopped taking writes, by the monotonic clock; None while it takes them."""
        return self._outage.since

    def store(self, write: Write, *, waits: bool = True) -> None:
        """Park until the write is stored. Raises the server's error if it refuses the write.

        If not `waits`, return at once, unless the server is away. Writes are stored in their order.
        """
        write.is_waited_for = waits or self.away_since is not None
        group = self._join(write)
        if not write.is_waited_for:
            return
        if not parking.park(group.done, WAIT, counts=True):
            group.done.result()
        if write.error is not None:
            raise write.error

    def _join(self, write: Write) -> Group:
        with self._lock:
            group = self._open
            if group is None:
                group = self._open = Group()
                self._groups.put(group)
            group.writes.append(write)
        return group

    def _run(self) -> None:
        while True:
            self._begun = []
            try:
                self._store(self._begin(self._groups.get()))
            except BaseException as error:  # the fibers must not wait for ever
                logger.exception("results can't be stored on %s", self.name)
                self._outage.ends()
                for write in (write for group in self._begun for write in group.writes if write.is_open):
                    write.error = BackendStoreError(f"results can't be stored on {self.name}: {error!r}")
            for group in self._begun:
                self._end(group)

    def _begin(self, group: Group) -> list[Write]:
        """Take a group that waits. No more writes join it."""
        with self._lock:
            self._open = None
        self._begun.append(group)
        return group.writes

    def _begin_next(self) -> list[Write]:
        try:
            return self._begin(self._groups.get_nowait())
        except queue.Empty:
            return []

    def _end(self, group: Group) -> None:
        for write in group.writes:
            if write.error is not None and not write.is_waited_for:
                what = "to read" if write.is_read else "the state of"
                logger.error("%s refuses %s %s: %r", self.name, what, write.key, write.error)
        group.done.set_result(None)

    def _store(self, writes: list[Write]) -> None:
        """Store some writes, however long the server is away, or its user may store nothing."""
        tries = breaks = 0
        pause = FIRST_RETRY
        while writes:
            error = self._attempt(writes)
            writes = [write for write in writes if write.is_open]
            if error is not None and writes:
                tries += 1
                breaks = breaks + 1 if self._client is None and self._answers() else 0
                if breaks > MOST_BREAKS:
                    self._split(writes, error)
                    return
                if tries > 1 or not breaks:  # the idle connection may have been stale: try the new one at once
                    self._wait(error, pause)
                pause = min(2 * pause, LAST_RETRY)
                if is_forbidden(error):  # if it takes another write, it refuses these for their own sake
                    writes += self._begin_next()
        self._outage.ends()

    def _attempt(self, writes: list[Write]) -> Exception | None:
        """Try once. Returns an error if the server is away, or lets its user store nothing."""
        tried: list[Write] = []
        try:
            if self._client is None:
                self._client = self._connect()
            error = None
            for part in _parts(writes):
                error = error or self._attempt_part(self._client, part, tried)
            refusal = withdraw_refusals(tried)
            return error or refusal
        except Exception as error:
            withdraw_refusals(tried)
            waits = is_away(error) or is_forbidden(error)
            if not (waits and isinstance(error, ANSWERS)):
                self._disconnect()
            if not waits:
                raise
            return error

    def _attempt_part(self, client: Any, part: list[Write], tried: list[Write]) -> Exception | None:
        """Try what the server takes in one step, and add to `tried` what it could store."""
        unstored = [write for write in part if not write.is_stored]
        check(client, unstored, self._is_success, runs_scripts=self._runs_scripts)
        tried += [write for write in unstored if write.is_open and not write.is_stored]
        error = send(client, part)
        self._learn_of_scripts(unstored)
        return error

    def _learn_of_scripts(self, writes: list[Write]) -> None:
        """If the server takes without a script what it refuses by one, send it no more scripts."""
        refusals = [write.refusal for write in writes if write.refusal is not None and write.is_stored]
        if refusals and self._runs_scripts:
            self._runs_scripts = False
            logger.warning(
                "%s runs no script (%r): a state that it takes late may replace a SUCCESS of another worker",
                *(self.name, refusals[0]),
            )

    def _answers(self) -> bool:
        """Tell whether the server answers over a new connection."""
        try:
            self._client = self._connect()
            return bool(self._client.ping())
        except Exception as error:
            if is_forbidden(error):  # which is an answer, too
                return True
            self._disconnect()
            if not is_away(error):
                raise
            return False

    def _split(self, writes: list[Write], error: Exception) -> None:
        """Find the write that breaks the connection, as one does that is larger than `proto-max-bulk-len`."""
        if len(writes) == 1:
            size = len(writes[0].value or b"")
            writes[0].error = BackendStoreError(f"{self.name} breaks the connection over {size} bytes: {error}")
            self._outage.ends()
        else:
            for write in writes:
                self._store([write])

    def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.connection_pool.disconnect()

    def _wait(self, error: Exception, seconds: float) -> None:
        self._outage.goes_on(f"{type(error).__name__}: {error}")
        threading.Event().wait(seconds)


def _parts(writes: list[Write]) -> list[list[Write]]:
    """Cut a group into parts of a bounded size, in order."""
    parts: list[list[Write]] = []
    size = 0
    for write in writes:
        if not parts or len(parts[-1]) >= MOST_WRITES or size + len(write.value or b"") > MOST_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(write)
        size += len(write.value or b"")
    return parts
