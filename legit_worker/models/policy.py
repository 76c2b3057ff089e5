"""Who is in memory: the decision, and what it changes. Pure: no lock, no thread, no clock, no device.

In: the models' slots, the requests that wait, how many bytes there are, the time. Out: a plan.

A model that somebody uses stays. Of the others the least recently used goes first, and a pinned one never. If all that
fits is in use without a pause, the model that keeps the fewest waiting gives way once someone has waited for long
enough: it takes no new request, ends those it has, and goes. "Long enough" is several times what a load takes, so that
swaps stay a small part of the time, however demand is spread.

Beside the weights there is a reserve for batches: as many bytes as the neediest model's batch takes, since one batch
runs at a time. Batches may take all that the weights leave free.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from legit_worker.errors import ModelLoadError
from legit_worker.models.loaded import LoadedModel
from legit_worker.models.slot import Slot

#: A model in constant use gives way after this many times the seconds that the other's load takes, and not before it
#: has been there for as long itself.
PATIENCE = 4.0

#: And never in less than this, seconds.
LEAST_PATIENCE = 0.5

#: Seconds for which a failed load answers the next askers, so that a thousand waiting tasks don't read a broken
#: file a thousand times, and a file that is mended is noticed without a restart.
LOAD_RETRY_AFTER = 10.0


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """Bytes that weights and batches may take together. None: nothing bounds them."""

    #: Now.
    now: int | None = None
    #: At the most, whatever other processes give back.
    most: int | None = None


@dataclass(eq=False, kw_only=True)
class Request:
    """Somebody's wish to use a model. Its future has the model, or `ModelLoadError`; `Residency.release` ends it."""

    slot: Slot
    #: Whether it can't wait until others are done, because they can't go on before it.
    must: bool = False
    #: Whether an operator asks, and no task; and whether the model is pinned as soon as it is there.
    is_operators: bool = False
    is_pinning: bool = False
    #: When it was made.
    since: float
    future: Future[LoadedModel] = field(default_factory=Future, repr=False)
    #: Whether it has the model.
    is_served: bool = False
    #: Whether the log says that it waits for other processes' memory.
    is_told: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The steps to take, in the order of these fields. Models by alias."""

    #: They drained for somebody who does not wait any more.
    reopen: list[str] = field(default_factory=list)
    #: They have their model, or its error.
    serve: list[Request] = field(default_factory=list)
    fail: list[tuple[Request, BaseException]] = field(default_factory=list)
    evict: list[str] = field(default_factory=list)
    #: They leave because an operator said so, and wait nowhere.
    unload: list[str] = field(default_factory=list)
    load: list[str] = field(default_factory=list)
    drain: list[str] = field(default_factory=list)
    #: Models in `load` that get more memory than is allowed, for a task that can't wait.
    over: list[str] = field(default_factory=list)
    #: They wait for memory that other processes have.
    blocked: list[Request] = field(default_factory=list)


def weights(slots: Iterable[Slot]) -> int:
    """Bytes of all that is in memory."""
    return sum(slot.size for slot in slots if slot.is_resident)


def being_read(slots: Iterable[Slot]) -> int:
    """Bytes of all that is being loaded."""
    return sum(slot.size for slot in slots if slot.is_loading)


def is_draining(slots: Iterable[Slot]) -> bool:
    """Whether some model takes no more requests until it is gone."""
    return any(slot.state == "draining" for slot in slots)


def reserve(slots: Sequence[Slot], budget: int | None, wanted: Slot | None = None) -> int:
    """Bytes to keep for batches. Weights come first: if they leave less than that, batches are smaller."""
    present = [slot for slot in slots if slot.is_resident or slot.is_loading or slot is wanted]
    needed = max((slot.reserve for slot in present), default=0)
    stays = sum(slot.size for slot in present if slot.is_pinned or slot.is_loading or slot is wanted)
    return needed if budget is None else min(needed, max(0, budget - stays))


def to_evict(wanted: int, budget: int | None, slots: Sequence[Slot], reserved: int = 0) -> list[str] | None:
    """The aliases to evict so that `wanted` more bytes fit, beside `reserved`; None if that can't be done now.

    Only models that nobody uses, the least recently used first, and no more of them than needed.
    """
    if budget is None:
        return []
    short = wanted + reserved + weights(slots) - budget
    chosen = []
    for slot in sorted(slots, key=lambda slot: slot.used_at):
        if short <= 0:
            break
        if slot.is_idle:
            chosen.append(slot.alias)
            short -= slot.size
    return chosen if short <= 0 else None


def to_drain(wanted: int, budget: int, slots: Sequence[Slot], reserved: int, loaded_before: float) -> list[str] | None:
    """The aliases that are to take no more requests, so that `wanted` bytes fit once theirs have ended.

    First those that drain already, perhaps for another request; then those that keep the fewest waiting, and were
    loaded before that time. None if even all of them are not enough.
    """
    short = wanted + reserved + weights(slots) - budget
    chosen = []
    for slot in sorted(slots, key=lambda slot: (slot.state != "draining", slot.users, slot.loaded_at)):
        if short <= 0:
            break
        if slot.is_resident and not slot.is_pinned and (slot.state == "draining" or slot.loaded_at < loaded_before):
            chosen.append(slot.alias)
            short -= slot.size
    return chosen if short <= 0 else None


def patience(slot: Slot) -> float:
    """Seconds that a request for this model waits before others in constant use give way."""
    return max(LEAST_PATIENCE, PATIENCE * slot.load_seconds)


def decide(slots: Iterable[Slot], waiting: Iterable[Request], allowed: Allowance, now: float) -> Plan:
    """Which steps to take now. Changes nothing."""
    return _Decision({slot.alias: _copied(slot) for slot in slots}, list(waiting), allowed, now).plan


def _copied(slot: Slot) -> Slot:
    """As `copy.copy` does it, which takes five times as long."""
    copied = object.__new__(Slot)
    vars(copied).update(vars(slot))
    return copied


class _Decision:
    """One decision, on copies of the slots, which show each step what the steps before it did."""

    def __init__(self, slots: dict[str, Slot], waiting: list[Request], allowed: Allowance, now: float) -> None:
        self._by_alias, self._waiting, self._allowed, self._now = slots, waiting, allowed, now
        self._slots = list(slots.values())
        self.plan = Plan()
        self._reopen()
        # First, or a model that has just been loaded would make room before those who waited for it had it.
        self._serve()
        self._unload()
        self._keep_within()
        self._load()

    def _reopen(self) -> None:
        """Nobody waits any more for what those that drain were to make room for."""
        if any(self._by_alias[request.slot.alias].state != "draining" for request in self._waiting):
            return
        for slot in self._slots:
            if slot.state == "draining" and not slot.is_leaving:
                slot.state = "resident"
                self.plan.reopen.append(slot.alias)

    def _serve(self) -> None:
        """Those whose model is there have it, and those whose model failed a moment ago have its error."""
        left = []
        for request in self._waiting:
            slot = self._by_alias[request.slot.alias]
            if slot.state in ("unloaded", "loading"):
                left.append(request)
            elif slot.state == "resident" or (slot.is_resident and request.must):
                slot.users += 1
                slot.is_pinned = slot.is_pinned or request.is_pinning
                self.plan.serve.append(request)
            elif slot.error is not None and self._has_failed_for(request, slot):
                self.plan.fail.append((request, slot.error))
            else:
                left.append(request)
        self._waiting = left

    def _has_failed_for(self, request: Request, slot: Slot) -> bool:
        """Those who waited for this load have its error. Those who come later have it, too, for a while."""
        is_recent = request.since <= slot.failed_at or self._now - slot.failed_at <= LOAD_RETRY_AFTER
        return slot.state == "failed" and is_recent

    def _unload(self) -> None:
        """Those that are to leave go once nobody has them, and take no new requests until then."""
        for slot in self._slots:
            if slot.is_leaving and slot.is_idle:
                slot.state = "unloaded"
                self.plan.unload.append(slot.alias)
            elif slot.is_leaving and slot.state == "resident" and not slot.is_pinned:
                slot.state = "draining"
                self.plan.drain.append(slot.alias)

    def _keep_within(self) -> None:
        """Other processes grow, and weights can be larger than their files: evict what is over the budget."""
        budget, reading = self._allowed.now, being_read(self._slots)
        chosen = to_evict(0, budget, self._slots, reading + reserve(self._slots, budget))
        if chosen is None:  # then at least the weights
            chosen = to_evict(0, budget, self._slots, reading)
        self._evict(self._idle() if chosen is None else chosen)

    def _load(self) -> None:
        """Make room for the model of the oldest request, and then for the next ones'."""
        seen: set[str] = set()
        # First those that must not wait for others: they may hold what the others wait for.
        for request in sorted(self._waiting, key=lambda one: not one.must):
            slot = self._by_alias[request.slot.alias]
            if slot.alias in seen or slot.state in ("draining", "loading"):
                continue
            seen.add(slot.alias)
            if self._can_never_fit(slot) and not request.must:
                self._refuse(slot)
            elif not self._make_room(request, slot):
                if not self._waits_for_others(slot):
                    return  # nobody overtakes the one who waited longest
                self.plan.blocked.append(request)

    def _make_room(self, request: Request, slot: Slot) -> bool:
        """Load the request's model, if it fits or can be made to."""
        budget = self._allowed.now
        reserved = being_read(self._slots) + reserve(self._slots, budget, slot)
        evicted = to_evict(slot.size, budget, self._slots, reserved)
        if evicted is None and request.must:
            self.plan.over.append(slot.alias)
            evicted = self._idle()
        if evicted is None:
            self._drain_for(request, slot, reserved)
            return False
        self._evict(evicted)
        slot.state = "loading"
        self.plan.load.append(slot.alias)
        return True

    def _drain_for(self, request: Request, slot: Slot, reserved: int) -> None:
        """Have others in constant use give way, if the request has waited for long enough."""
        budget, since = self._allowed.now, self._now - patience(slot)
        if budget is None or request.since >= since:
            return
        for alias in to_drain(slot.size, budget, self._slots, reserved, since) or ():
            if self._by_alias[alias].state != "draining":
                self._by_alias[alias].state = "draining"
                self.plan.drain.append(alias)

    def _refuse(self, slot: Slot) -> None:
        error = ModelLoadError(
            f"model {slot.alias!r} has weights of {slot.size} bytes, and beside the pinned models only "
            f"{self._allowed.most} bytes may be taken in all: raise LEGIT_WORKER_VRAM_LIMIT, or unpin a model"
        )
        self.plan.fail.extend((request, error) for request in self._waiting if request.slot.alias == slot.alias)

    def _can_never_fit(self, slot: Slot) -> bool:
        most = self._allowed.most
        return most is not None and slot.size + self._pinned(slot) > most

    def _waits_for_others(self, slot: Slot) -> bool:
        """Whether the memory that it lacks is another process's: evicting all of ours would not be enough."""
        budget = self._allowed.now
        return budget is not None and slot.size + self._pinned(slot) > budget

    def _pinned(self, but: Slot) -> int:
        return sum(slot.size for slot in self._slots if slot.is_pinned and slot.is_resident and slot is not but)

    def _idle(self) -> list[str]:
        return [slot.alias for slot in self._slots if slot.is_idle]

    def _evict(self, aliases: Iterable[str]) -> None:
        for alias in aliases:
            self._by_alias[alias].state = "unloaded"
            self.plan.evict.append(alias)


def carry_out(plan: Plan, slots: dict[str, Slot], now: float) -> list[tuple[Slot, LoadedModel | None]]:
    """Enter a plan into the slots. Returns the models that leave memory: their weights are still there."""
    for alias in plan.reopen:
        slots[alias].state = "resident"
    for request in plan.serve:
        admit(request, now)
    left = [leave(slots[alias]) for alias in (*plan.evict, *plan.unload)]
    for alias in plan.load:
        slots[alias].state = "loading"
    for alias in plan.drain:
        slots[alias].state = "draining"
    return left


def admit(request: Request, now: float) -> None:
    """A request has its model."""
    request.is_served = True
    request.slot.users += 1
    request.slot.used_at = now
    if request.is_pinning:
        request.slot.is_pinned, request.slot.is_leaving = True, False


def leave(slot: Slot) -> tuple[Slot, LoadedModel | None]:
    """A model leaves memory."""
    model, slot.model, slot.state, slot.is_leaving = slot.model, None, "unloaded", False
    slot.evictions += 1
    return slot, model
