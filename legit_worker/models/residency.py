"""Serves requests for models: which are in memory, and who waits for which.

In: requests, from any thread; ends of loads; how much memory there is. Out: loads and evictions, and each request's
model once it is there. `policy` decides. `Residency` enters the decision under one lock; loads, evictions and results
follow outside of the lock, in order.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from math import inf
from time import monotonic
from typing import Any

from legit_worker.models import policy
from legit_worker.models.budget import Budget
from legit_worker.models.loaded import LoadedModel
from legit_worker.models.loader import Loads, NotNowError
from legit_worker.models.policy import Allowance, Request
from legit_worker.models.shelf import Shelf
from legit_worker.models.slot import Slot

logger = logging.getLogger(__name__)

#: Seconds for which a budget that was read is good enough to decide who has to wait.
BUDGET_SECONDS = 0.25

#: Seconds between two decisions that nothing but time calls for: one takes 0.1 ms if a thousand requests wait.
REVIEW_SECONDS = 0.02

#: Bytes that a GPU's allocator always has beside the weights: it takes memory in blocks of up to 20 MiB, and a batch of
#: one short item must find some although others have grown.
LEAST_ROOM = 64 * 2**20

#: Seconds after which a request that waits for other processes' memory is told of in the log.
BLOCKED_SECONDS = 10.0


class Residency:
    """Owns the slots of one registry's models and the requests for them. Any thread may call it.

    Calls no user code, no callback and no device while it holds its lock. A question (`report`, `is_loading`,
    `room_for_batches`) takes no lock and changes nothing; its answer may be late.
    """

    def __init__(
        self,
        slots: Iterable[Slot],
        budget: Budget,
        loader: Loads,
        shelf: Shelf,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._slots = {slot.alias: slot for slot in slots}
        self._budget = budget
        self._loader = loader
        self._shelf = shelf
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: list[Request] = []
        #: As it was last read, and when; and when the last decision was made.
        self._allowed = Allowance()
        self._read_at = self._decided_at = -inf
        self._effects = Effects()
        #: Whether a loop calls `review` and `evict_idle`, and whether a thread does: see `caretaker`.
        self.is_looked_after = self.has_caretaker = False

    # Requests.

    def take(self, slot: Slot) -> LoadedModel | None:
        """Have a model that is there. What was taken must be given back. None if it must be asked for."""
        with self._lock:
            if slot.state != "resident":
                return None
            slot.users += 1
            slot.used_at = self._clock()
            return slot.model

    def give_back(self, slot: Slot) -> None:
        """Its holder is done."""
        with self._lock:
            slot.users -= 1
            slot.used_at = self._clock()
        self._move_on(slot)

    def request(
        self, slot: Slot, *, must: bool = False, is_operators: bool = False, is_pinning: bool = False
    ) -> Request:
        """Ask for a model. What was asked for must be released."""
        request = Request(slot=slot, must=must, since=self._clock(), is_operators=is_operators, is_pinning=is_pinning)
        model = self.take(slot)
        if model is not None:
            request.is_served = True
            if request.is_pinning:
                self.pin(slot, True)
            request.future.set_result(model)
        else:
            self._read_budget(older_than=BUDGET_SECONDS)  # which may raise: the request is then nobody's
            with self._lock:
                is_first = not any(other.slot is slot for other in self._waiting)
                self._waiting.append(request)
                # One decision for many requests: those behind the first one change nothing before its load ends.
                is_news = slot.state != "loading" and (slot.state != "unloaded" or must or is_first)
            if is_news:
                self._advance()
        return request

    def release(self, request: Request) -> None:
        """Its holder is done, or does not wait any more."""
        with self._lock:
            is_served, request.is_served = request.is_served, False
            if not is_served and request in self._waiting:
                self._waiting.remove(request)
        if is_served:
            self.give_back(request.slot)
        else:
            self._move_on(request.slot)

    def _move_on(self, slot: Slot) -> None:
        """Decide again if nobody has this model now, and others may have its place."""
        if not slot.users and (self._waiting or policy.is_draining(self._slots.values())):
            self._read_budget(older_than=BUDGET_SECONDS)
            self._advance()

    def review(self) -> None:
        """Load and evict what can be by now. Called at each turn of the loop: patience ends without anyone's doing."""
        if self._clock() - self._decided_at < REVIEW_SECONDS:
            return
        if self._waiting or self._effects or policy.is_draining(self._slots.values()):
            self._read_budget(older_than=BUDGET_SECONDS)
            self._advance()

    def watch(self) -> None:
        """Read the budget anew, and evict what is over it. Called now and then: other processes grow."""
        self._read_budget()
        self._advance()

    def evict_idle(self) -> None:
        """Evict what nobody has used for as long as its `keep_alive`. It does not wait in the host's memory."""
        now = self._clock()
        with self._lock:
            idle = [
                alias
                for alias, slot in self._slots.items()
                if slot.is_idle and slot.spec.keep_alive is not None and now - slot.used_at > slot.spec.keep_alive
            ]
            self._carry_out(policy.Plan(unload=idle))
        self._effects.do()

    def next_look(self) -> float | None:
        """Seconds until `evict_idle` or `review` has something to do; None: nothing before the next request."""
        now, slots = self._clock(), [slot for slot in self._slots.values() if slot.is_resident and not slot.is_pinned]
        ends = [slot.used_at + slot.spec.keep_alive - now for slot in slots if slot.spec.keep_alive is not None]
        return 0.0 if self._waiting or policy.is_draining(slots) else min(ends, default=None)

    # An operator's.

    def unload(self, slot: Slot) -> int:
        """Have a model leave once nobody has it, and not wait in the host's memory. Requests that come wait.

        An operator's requests for it that still wait are taken back. Returns how many these are.
        """
        with self._lock:
            slot.is_leaving = slot.is_resident and not slot.is_pinned
            kept = [request for request in self._waiting if request.slot is not slot or not request.is_operators]
            taken_back, self._waiting = len(self._waiting) - len(kept), kept
        self._shelf.drop(slot.alias)
        self._advance()
        return taken_back

    def pin(self, slot: Slot, is_pinned: bool) -> None:
        """Keep a model that is there for good; or not any longer, and not once it is there either."""
        with self._lock:
            if not is_pinned:
                for request in self._waiting:
                    request.is_pinning = request.is_pinning and request.slot is not slot
            slot.is_pinned = is_pinned
            slot.is_leaving = slot.is_leaving and not is_pinned
        self._advance()

    def want(self, slot: Slot) -> None:
        """A model that was to leave stays, and one whose load failed a moment ago may be tried again."""
        with self._lock:
            slot.is_leaving = False
            if slot.state == "failed":
                slot.state, slot.error = "unloaded", None

    def free(self, needed: int = 0, tries: int = 0) -> None:
        """A batch ran out of memory: free what it lacks, and no more than that.

        `needed`: bytes that it takes, 0 if that is unknown; `tries`: how often it ran out before. What the device's
        allocator keeps for later goes first. Then models that nobody uses make room and wait in the host's memory:
        as many as the batch needs, none if all of them would not be enough, and one if nobody knows.
        """
        gave_back = self._budget.give_back()
        self._read_budget()
        room = self.room_for_batches()
        lacks = 0 if room is None else needed - room
        if lacks <= 0 and gave_back and not tries:
            return
        with self._lock:
            slots = list(self._slots.values())
            wanted = max(1, lacks)
            chosen = policy.to_evict(wanted, policy.weights(slots), slots) or []
            self._carry_out(policy.Plan(evict=chosen))
            self._effects.add(self._shelf.move)  # at once: the batch is tried again next
        self._effects.do()

    # Loads, on the loader thread.

    def turn(self) -> AbstractContextManager[None]:
        """Held while weights are read."""
        return self._budget.turn()

    def check_room(self, slot: Slot) -> None:
        """Whether the room that this load counted on is still there, now that it has its turn. Raises `NotNowError`.

        Those who wait for it wait on, and room is looked for again.
        """
        self._read_budget()
        allowed, slots = self._allowed.now, list(self._slots.values())
        is_must = any(request.must for request in list(self._waiting) if request.slot is slot)
        if allowed is not None and not is_must and policy.weights(slots) + policy.being_read(slots) > allowed:
            raise NotNowError(slot.alias)

    def sized(self, slot: Slot, size: int | None) -> None:
        """Its weights are read."""
        with self._lock:
            slot.size = slot.size if size is None else size
        self._hold()

    def loaded(self, slot: Slot, model: LoadedModel, seconds: float) -> None:
        """It is there: all who wait for it have it."""
        with self._lock:
            slot.state, slot.model, slot.error = "resident", model, None
            slot.loaded_at = slot.used_at = self._clock()
            slot.load_seconds, slot.loads = seconds, slot.loads + 1
        self._advance()
        self.watch()

    def failed(self, slot: Slot, error: BaseException) -> None:
        """It could not be loaded: all who wait for it have the error, or wait on if there was no room."""
        is_final = not isinstance(error, NotNowError)
        if is_final:  # the tasks that asked for it are logged with the traceback
            logger.error("%s", error)
        with self._lock:
            slot.state = "failed" if is_final else "unloaded"
            slot.error, slot.failed_at = (error, self._clock()) if is_final else (None, 0.0)
        if is_final:
            self._advance()
        self.watch()

    # Questions.

    def is_loading(self) -> bool:
        """Whether weights are being read."""
        return any(slot.is_loading for slot in self._slots.values())

    def waiting(self, slot: Slot) -> int:
        """How many requests wait for this model."""
        return sum(request.slot is slot for request in list(self._waiting))

    def room_for_batches(self) -> int | None:
        """Bytes that a batch may take beside all weights, also those that are being read; None: nothing bounds them."""
        allowed, slots = self._allowed.now, self._slots.values()
        return None if allowed is None else max(0, allowed - policy.weights(slots) - policy.being_read(slots))

    def report(self) -> dict[str, int | None]:
        """As `inspect stats` gives it: bytes; `budget` None if there is no bound; of the GPU, if NVML tells."""
        slots = list(self._slots.values())
        weights = policy.weights(slots)
        found = self._budget.report(weights)
        return {
            **found,
            "weights": weights,
            "reserve": policy.reserve(slots, found["budget"]),
            "host_cache": self._shelf.used,
            "waiting": len(self._waiting),
        }

    # The rest.

    def restart(self) -> None:
        """In a forked child: nobody waits here, what the parent's tasks used is used by none, and no load will end."""
        self._lock, self._effects = threading.Lock(), Effects()
        self._waiting.clear()
        self.is_looked_after = self.has_caretaker = False
        self._loader.restart()
        self._shelf.restart()
        for slot in self._slots.values():
            slot.users, slot.is_leaving = 0, False
            slot.state = "resident" if slot.model is not None else "unloaded"
            if slot.model is not None:
                slot.model.restart()

    def _read_budget(self, *, older_than: float = 0.0) -> None:
        """Not under the lock: it asks NVML and torch. `older_than`: seconds for which the last reading is good."""
        if self._clock() - self._read_at < older_than:
            return
        now = self._budget.bytes(policy.weights(self._slots.values()))
        self._allowed, self._read_at = Allowance(now=now, most=self._budget.most()), self._clock()
        self._hold()

    def _hold(self) -> None:
        """Have the device's allocator keep within the budget: what it keeps for later is not in ours.

        Or within the weights and what batches need beside them, if that is more: others have grown, or a task could
        not wait. That is never more than the operator's limit, but for the weights and `LEAST_ROOM`. Not while a model
        is there that does not tell its size.
        """
        allowed, slots = self._allowed.now, list(self._slots.values())
        if allowed is None or any(not slot.size for slot in slots if slot.is_resident or slot.is_loading):
            self._budget.hold(None)
        else:
            held = policy.weights(slots) + policy.being_read(slots)
            most = inf if self._allowed.most is None else self._allowed.most
            needed = min(held + policy.reserve(slots, None), most)
            self._budget.hold(int(max(allowed, needed, held + LEAST_ROOM)))

    def _advance(self) -> None:
        """Decide, enter what was decided, and do what follows."""
        with self._lock:
            plan = policy.decide(self._slots.values(), self._waiting, self._allowed, self._clock())
            self._decided_at = self._clock()
            self._carry_out(plan)
        _tell(plan, self._allowed.now, self._clock())
        self._effects.do()

    def _carry_out(self, plan: policy.Plan) -> None:
        """Under the lock. Models leave before others are loaded in their place."""
        now = self._clock()
        for slot, model in policy.carry_out(plan, self._slots, now):
            if model is not None:
                is_kept = slot.alias not in plan.unload
                put = partial(self._shelf.put, slot.alias, model, slot.size)
                self._effects.add(put if is_kept else partial(self._shelf.forget, model))
                _log_leaving(slot, now)
        if (plan.evict or plan.unload) and not plan.load:
            self._effects.add(self._loader.clear_device)
        self._effects.add(*(partial(self._loader.start, self._slots[alias], self) for alias in plan.load))
        for request in plan.serve:
            assert request.slot.model is not None
            self._effects.add(partial(request.future.set_result, request.slot.model))
        self._effects.add(*(partial(request.future.set_exception, error) for request, error in plan.fail))
        gone = {id(request) for request in plan.serve} | {id(request) for request, _ in plan.fail}
        if gone:
            self._waiting = [request for request in self._waiting if id(request) not in gone]


class Effects:
    """Steps to take outside of a lock, one by one, in the order in which they were added under that lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: deque[Callable[[], Any]] = deque()
        self._is_doing = False

    def __len__(self) -> int:
        return len(self._left)

    def add(self, *effects: Callable[[], Any]) -> None:
        """Never does anything itself."""
        self._left.extend(effects)

    def do(self) -> None:
        """All of them. A thread that finds another at it leaves them to that one."""
        while True:
            with self._lock:
                if self._is_doing or not self._left:
                    return
                self._is_doing, effect = True, self._left.popleft()
            try:
                effect()
            except Exception:  # whoever asked for something else must not hear of it
                logger.exception("a step of loading or evicting a model failed")
            finally:
                self._is_doing = False


def _tell(plan: policy.Plan, allowed: int | None, now: float) -> None:
    for alias in plan.over:
        logger.warning("model %r is loaded over the limit of memory: a task that can't wait needs it", alias)
    for request in plan.blocked:
        if now - request.since > BLOCKED_SECONDS and not request.is_told:
            request.is_told = True
            logger.warning(
                "model %r has waited %.0f s for memory: its weights take %d bytes, %s may be taken now, and other "
                "processes have the rest; it is loaded once they give it back",
                *(request.slot.alias, now - request.since, request.slot.size, allowed),
            )


def _log_leaving(slot: Slot, now: float) -> None:
    logger.info("model %r leaves memory: %d bytes, unused for %.1f s", slot.alias, slot.size, now - slot.used_at)
