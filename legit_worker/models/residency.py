"""Which models are in memory, and who waits for which.

In: requests for models, from any thread, and how much memory there is. Out: loads and evictions, one load at a time,
and each request's model once it is there.

A model that somebody uses stays. Of the others the least recently used goes first, and a pinned one never. Where all
that fits is in use without a pause, the model that keeps the fewest waiting gives way once someone has waited for long
enough: it takes no new request, ends those it has, and goes. "Long enough" is several times what a load takes, so that
swaps stay a small part of the time, however demand is spread.

Beside the weights there is a reserve for what a batch needs, that of the neediest model: one batch runs at a time. What
the weights leave free, at least that, is what batches may take.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any

from legit_worker.models.budget import Budget
from legit_worker.models.shelf import Shelf

if TYPE_CHECKING:
    from legit_worker.models.entry import Entry

logger = logging.getLogger(__name__)

#: A model in constant use gives way after so many times the seconds that the other's load takes, and not before it has
#: been there for as long itself.
PATIENCE = 4.0

#: And never in less than this, seconds.
LEAST_PATIENCE = 0.5

#: Seconds for which a budget that was read is good enough to decide who has to wait.
BUDGET_SECONDS = 0.25


class NotNowError(Exception):
    """Another process took the memory that a load counted on, before it had its turn."""


@dataclass(frozen=True, kw_only=True)
class Resident:
    """A model in memory, as the policy sees it."""

    alias: str
    #: Bytes of its weights.
    size: int
    #: Requests that have it now.
    users: int = 0
    pinned: bool = False
    #: Seconds on any clock.
    used_at: float = 0.0
    loaded_at: float = 0.0


def to_evict(wanted: int, budget: int | None, residents: Sequence[Resident], reserved: int = 0) -> list[str] | None:
    """The aliases to evict so that `wanted` more bytes fit, beside `reserved`; None where that can't be done now.

    Only models that nobody uses, the least recently used first, and no more of them than needed.
    """
    if budget is None:
        return []
    short = wanted + reserved + sum(one.size for one in residents) - budget
    chosen = []
    for one in sorted(residents, key=lambda one: one.used_at):
        if short <= 0:
            break
        if not one.users and not one.pinned:
            chosen.append(one.alias)
            short -= one.size
    return chosen if short <= 0 else None


def to_drain(
    wanted: int, budget: int, residents: Sequence[Resident], reserved: int, loaded_before: float
) -> list[str] | None:
    """The aliases that are to take no more requests, so that `wanted` bytes fit once theirs have ended.

    Those that keep the fewest waiting, and were loaded before that time; None where even all of them are not enough.
    """
    short = wanted + reserved + sum(one.size for one in residents) - budget
    chosen = []
    for one in sorted(residents, key=lambda one: (one.users, one.loaded_at)):
        if short <= 0:
            break
        if not one.pinned and one.loaded_at < loaded_before:
            chosen.append(one.alias)
            short -= one.size
    return chosen if short <= 0 else None


@dataclass(eq=False)
class Request:
    """Somebody's wish to use a model. Its future has the model, or `ModelLoadError`; `Residency.release` ends it."""

    entry: Entry
    #: Whether it can't wait until others are done, because they can't go on before it.
    must: bool = False
    since: float = field(default_factory=monotonic)
    future: Future[Any] = field(default_factory=Future)


class Residency:
    """Serves requests for one registry's models. Any thread may call it."""

    def __init__(self, entries: Iterable[Entry], budget: Budget, shelf: Shelf) -> None:
        self._entries = list(entries)
        self._shelf = shelf
        self._bytes = budget
        self._waiting: deque[Request] = deque()
        #: Those that take no new request until they are gone.
        self._draining: set[str] = set()
        self._lock = threading.RLock()
        #: As it was last read.
        self._known_budget: int | None = None
        self._budget_read_at = -inf

    def request(self, entry: Entry, *, must: bool = False) -> Request:
        """Ask for a model. What was asked for must be released."""
        request = Request(entry, must)
        with self._lock:
            if entry.is_resident and entry.alias not in self._draining:
                self._admit(request)
            else:
                self._waiting.append(request)
                try:
                    self._review()
                except BaseException:  # nobody will release what was never handed out
                    self._waiting.remove(request)
                    raise
        return request

    def release(self, request: Request) -> None:
        """Its holder is done, or does not wait any more."""
        with self._lock:
            if request in self._waiting:
                self._waiting.remove(request)
            elif not request.future.exception():
                request.entry.users -= 1
                request.entry.used_at = monotonic()
            if self._waiting or self._draining:
                self._review()

    def review(self) -> None:
        """Load and evict what can be by now. Called now and then: patience ends without anyone's doing."""
        if self._waiting or self._draining:
            with self._lock:
                self._review()

    def evict_idle(self) -> None:
        """Evict what nobody has used for as long as its `keep_alive`."""
        with self._lock:
            for entry in self._unused():
                if entry.spec.keep_alive is not None and entry.idle_seconds > entry.spec.keep_alive:
                    self._evict(entry)

    def evict_unused(self) -> None:
        """Evict all that nobody uses, and read the budget anew: the device has less memory than was thought."""
        with self._lock:
            for entry in self._unused():
                self._evict(entry)
            self._read_budget()

    def watch(self) -> None:
        """Read the budget anew, and evict what is over it. Called now and then: other processes grow."""
        with self._lock:
            self._keep_within(self._read_budget())

    def check_room(self, entry: Entry) -> None:
        """Called by the loader when it has its turn: whether the room that its load counted on is still there.

        Raises `NotNowError`; those who wait for it wait on, and room is looked for again.
        """
        with self._lock:
            budget = self._read_budget()
            is_must = any(request.must for request in self._waiting if request.entry is entry)
            if budget is not None and not is_must and self._weights() + self._being_read() > budget:
                raise NotNowError(entry.alias)

    def is_loading(self) -> bool:
        """Whether weights are being read."""
        return any(entry.is_loading for entry in self._entries)

    def room_for_activations(self) -> int | None:
        """Bytes that a batch may take beside all weights, also those that are being read; None: nothing bounds them."""
        if self._known_budget is None:
            return None
        return max(0, self._known_budget - self._weights() - self._being_read())

    def _unused(self) -> list[Entry]:
        return [entry for entry in self._entries if entry.is_resident and not entry.users and not entry.spec.pin]

    def restart(self) -> None:
        """In a forked child: nobody waits here, and what the parent's tasks used is used by none."""
        self._lock = threading.RLock()
        self._waiting.clear()
        self._draining.clear()
        for entry in self._entries:
            entry.users = 0

    def turn(self) -> AbstractContextManager[None]:
        """Held by the loader while weights are read."""
        return self._bytes.turn()

    def _budget(self) -> int | None:
        """As it was read just now: each load reads it anew, and who waits is looked after many times a second."""
        if monotonic() - self._budget_read_at > BUDGET_SECONDS:
            self._read_budget()
        return self._known_budget

    def _read_budget(self) -> int | None:
        self._known_budget = self._bytes.bytes(self._weights())
        self._budget_read_at = monotonic()
        self.hold()
        return self._known_budget

    def hold(self) -> None:
        """Have the device's allocator keep within the budget: what it keeps for later is not in ours. Any thread.

        Or within the weights and what batches need beside them, where that is more: others have grown, or a task could
        not wait. Not while a model is there that does not tell its size.
        """
        with self._lock:
            budget = self._known_budget
            if budget is None or any(not one.size for one in self._entries if one.is_resident or one.is_loading):
                self._bytes.hold(None)
            else:
                self._bytes.hold(max(budget, self._weights() + self._being_read() + self._reserve(None)))

    def _weights(self) -> int:
        return sum(entry.size for entry in self._entries if entry.is_resident)

    def _being_read(self) -> int:
        return sum(entry.size for entry in self._entries if entry.is_loading)

    def _reserve(self, budget: int | None, wanted: Entry | None = None) -> int:
        """Bytes to keep for batches. Weights come first: with less than that left, batches are smaller."""
        present = [entry for entry in self._entries if entry.is_resident or entry.is_loading or entry is wanted]
        needed = max((entry.reserve for entry in present), default=0)
        stays = sum(entry.size for entry in present if entry.spec.pin or entry is wanted)
        return needed if budget is None else min(needed, max(0, budget - stays))

    def report(self) -> dict[str, Any]:
        """As `inspect stats` gives it: bytes; `budget` None where there is no bound; of the GPU, where NVML tells."""
        with self._lock:
            weights = self._weights()
            found = self._bytes.report(weights)
            return {
                **found,
                "weights": weights,
                "reserve": self._reserve(found["budget"]),
                "host_cache": self._shelf.used,
                "waiting": len(self._waiting),
            }

    def _review(self) -> None:
        if not any(request.entry.alias not in self._draining for request in self._waiting):
            self._reopen()
        # First, or one that has just been loaded would make room before those who waited for it had it.
        for entry in self._entries:
            if entry.is_resident and entry.alias not in self._draining:
                self._serve(entry)
        budget = self._budget()
        seen: set[str] = set()
        for request in list(self._waiting):
            entry = request.entry
            if entry.alias in seen or entry.alias in self._draining or request not in self._waiting:
                continue
            seen.add(entry.alias)
            if not entry.is_loading and not self._make_room(request, budget):
                return  # nobody overtakes the one who waited longest

    def _make_room(self, request: Request, budget: int | None) -> bool:
        """Begin to load the request's model, if it fits or can be made to."""
        entry, now = request.entry, monotonic()
        residents = [self._seen(other) for other in self._entries if other.is_resident]
        reserved = self._being_read() + self._reserve(budget, entry)
        evicted = to_evict(entry.size, budget, residents, reserved)
        if evicted is None and request.must:
            logger.warning("model %r is loaded over the limit of memory: a task that can't wait needs it", entry.alias)
            evicted = [one.alias for one in residents if not one.users and not one.pinned]
        if evicted is None and budget is not None and self._never_fits(entry, residents, budget):
            self._fail(entry, budget)
            return True
        patience = max(LEAST_PATIENCE, PATIENCE * entry.load_seconds)
        if evicted is None and budget is not None and now - request.since > patience and not self._draining:
            drained = to_drain(entry.size, budget, residents, reserved, now - patience)
            self._draining.update(drained or ())
        if evicted is None:
            return False
        for other in self._entries:
            if other.alias in evicted:
                self._evict(other, keep=True)
        # A callback of an earlier load may run below this one, on this thread: it finds the entry loading.
        entry.load().add_done_callback(lambda _: self._loaded(entry))
        return True

    def _never_fits(self, entry: Entry, residents: Sequence[Resident], budget: int) -> bool:
        return entry.size + sum(one.size for one in residents if one.pinned and one.alias != entry.alias) > budget

    def _fail(self, entry: Entry, budget: int) -> None:
        error = entry.too_large(budget)
        for request in self._take(entry):
            request.future.set_exception(error)

    def _loaded(self, entry: Entry) -> None:
        with self._lock:
            self._serve(entry)
            self._keep_within(self._read_budget())
            self._review()

    def _keep_within(self, budget: int | None) -> None:
        """Weights can be larger than their files: what they take is known once they are there."""
        residents = [self._seen(other) for other in self._entries if other.is_resident]
        chosen = to_evict(0, budget, residents, self._being_read() + self._reserve(budget))
        if chosen is None:  # then at least the weights
            chosen = to_evict(0, budget, residents, self._being_read())
        if chosen is None:
            chosen = [one.alias for one in residents if not one.users and not one.pinned]
        for entry in self._entries:
            if entry.alias in chosen:
                self._evict(entry)

    def _serve(self, entry: Entry) -> None:
        """Its load is over: all who wait for it have it, or its error. If it is gone again, they wait on."""
        if entry.state not in ("resident", "failed"):
            return
        error = entry.load_error
        for request in self._take(entry):
            if error is None:
                self._admit(request)
            else:
                request.future.set_exception(error)

    def _take(self, entry: Entry) -> list[Request]:
        taken = [request for request in self._waiting if request.entry is entry]
        self._waiting = deque(request for request in self._waiting if request.entry is not entry)
        return taken

    def _admit(self, request: Request) -> None:
        request.entry.users += 1
        request.entry.used_at = monotonic()
        request.future.set_result(request.entry.model_now)

    def _evict(self, entry: Entry, *, keep: bool = False) -> None:
        logger.info("model %r leaves memory: %d bytes, unused for %.1f s", entry.alias, entry.size, entry.idle_seconds)
        entry.unload(keep=keep)
        self._draining.discard(entry.alias)

    def _reopen(self) -> None:
        """Nobody waits any more for what those that drain were to make room for."""
        for entry in self._entries:
            if entry.alias in self._draining:
                self._draining.discard(entry.alias)
                if entry.is_resident:
                    self._serve(entry)

    @staticmethod
    def _seen(entry: Entry) -> Resident:
        return Resident(
            alias=entry.alias,
            size=entry.size,
            users=entry.users,
            pinned=entry.spec.pin,
            used_at=entry.used_at,
            loaded_at=entry.loaded_at,
        )
