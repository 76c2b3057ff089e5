"""What waits for one model, and the batches that are made of it.

In: items, and how each batch of them ended. Out: the next batch, and outputs or errors to the chunks.

The next batch is the items' first in fair order (`fairness`), and with that one its neighbours in length (`packer`), so
the fairest item is in every batch. A batch that failed is tried again in halves, before anything new.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf, prod
from typing import Any, Protocol

from legit_worker.batching.demand import Demand
from legit_worker.batching.fairness import FairQueue, Item
from legit_worker.batching.packer import evened, fill, pick
from legit_worker.batching.sizing import Sizing
from legit_worker.batching.twins import distinct, with_twins
from legit_worker.device.devices import Launch
from legit_worker.device.memory import is_out_of_memory, let_go
from legit_worker.errors import DeviceOutOfMemoryError, said
from legit_worker.models.loaded import Beside
from legit_worker.pool.calls import ENDS, Call, Chunk
from legit_worker.pool.counters import Counters
from legit_worker.pool.parts import Parts

logger = logging.getLogger(__name__)

#: A batch of this part of the limit shows that the limit holds, and raises it by this factor: 36 of them double it.
NEAR, RAISE = 0.8, 1.02

#: An item of this part of a batch's longest one fills the batch up: beside shorter ones, padding would take too long.
EVEN = 0.5

#: A batch without padding that takes this many launches is large enough for a stream that has none.
ENOUGH_LAUNCHES = 5.0

#: How often an item that runs out of memory, alone in its batch, is tried before it fails. Others come and go on a
#: device; the failures of an item that never fits are quick.
TRIES_ALONE = 8


class BatchModel(Protocol):
    """All that a queue and the engine know of a model."""

    @property
    def alias(self) -> str:
        """Its name in the settings."""

    def cost(self, prepared: Any) -> int:
        """The size of an item in the model's own unit, at least 1."""

    def batch_key(self, prepared: Any) -> Hashable:
        """What must be equal for two items to share a batch."""

    def identity(self, prepared: Any) -> Hashable:
        """Two items have the same output if this and their keys are equal; None says nothing about it."""

    @property
    def computes_beside(self) -> bool:
        """Whether its batches may be computed on another thread."""

    def pads(self, prepared: Any) -> bool:
        """Whether each item of a batch with this one takes as long as the batch's longest one."""

    def launch(self, batch: Sequence[Any], beside: Beside | None = None) -> Launch:
        """Hand a batch to the device; by `beside`, if that is given and can be. Raises what the model raises."""

    def observe(self, count: int, longest: int, launch: Launch) -> None:
        """A batch is over: learn what memory it took."""

    def largest_cost(self, longest: int) -> int:
        """The largest padded cost of a batch that memory has room for, if its longest item costs this much."""

    def make_room(self, count: int, longest: int, tries: int = 0) -> None:
        """A batch ran out of memory, `tries` times before: free what it lacks."""

    def is_lost(self, error: BaseException) -> bool:
        """Whether this error of a batch broke the device for this process."""

    def postprocess(self, output: Any) -> Any:
        """Make a task's output of one of `forward`'s. Raises what the model raises."""


@dataclass
class Room:
    """The computed cost of the batches that fit into memory, learned from those that did not. At first, any does."""

    most: float = inf

    def did_not_fit(self, cost: int) -> None:
        """A batch of this cost ran out of memory: half of it may fit."""
        self.most = max(1.0, min(self.most, cost / 2))

    def did_fit(self, cost: int) -> None:
        """A batch that came near the limit went well: perhaps the memory that was short is free again."""
        if cost > self.most * NEAR:
            self.most *= RAISE


class ModelQueue:
    """The items that wait for one model. Lives on the main thread, inside the engine; never computes, knows no time."""

    def __init__(
        self,
        model: BatchModel,
        *,
        max_batch_seconds: float,
        target_latency: float | None = None,
        weight_of: Callable[[str], float],
    ) -> None:
        self.model = model
        self.sizing = Sizing(max_batch_seconds, target_latency)
        self.counters = Counters()
        #: Device seconds that the model had: the engine serves the queue with the least.
        self.seconds = 0.0
        #: Its `forward` waits for the device: behind a batch in flight, it would keep this thread until that is done.
        self.waits = False
        #: The batches of this model that are computed at a time, each on its own thread: the next one is smaller.
        self.streams = 1
        self._fair = FairQueue(weight_of)
        self._parts = Parts()
        # What memory was seen to hold.
        self._room = Room()

    def __repr__(self) -> str:
        return f"<ModelQueue {self.model.alias}: {len(self)} waiting, cost {self.cost}, {self.sizing!r}>"

    def __len__(self) -> int:
        return len(self._fair) + len(self._parts)

    @property
    def cost(self) -> int:
        """Of all that waits."""
        return self._fair.cost + self._parts.cost

    @property
    def is_full(self) -> bool:
        """Whether waiting longer would not make the next batch larger."""
        if self._parts:
            return True
        budget = self._budget()
        if self._fair.cost < budget:
            return False
        return any(cost >= budget for cost in accumulate(item.cost for item in self._fair.front()))

    @property
    def is_enough(self) -> bool:
        """Whether a stream that has no batch should have one now: waiting longer would gain little."""
        if not len(self._fair) or self.model.pads(self._fair.first(1)[0].prepared):
            return self.is_full
        return self.waiting_seconds() >= ENOUGH_LAUNCHES * self.sizing.costs.launch_seconds

    @property
    def is_urgent(self) -> bool:
        """Whether an item of an app waits that sends little: it must not wait for company."""
        return self._fair.has_light

    @property
    def is_shared(self) -> bool:
        """Whether an app that sends little has sent something of late: others must be done in small parts."""
        return self._fair.light_cost > 0

    def waiting_seconds(self) -> float:
        """How long all that waits would take, as predicted, were all items of one length."""
        return self._seconds_of(len(self._fair))

    def _seconds_of(self, count: int) -> float:
        """How long as many items would take, as predicted, if they were as long as those that wait."""
        return self.sizing.costs.predict(count, round(self._fair.cost / len(self._fair))) if count else 0.0

    def seconds_of_call(self, demand: Demand) -> float:
        """Device seconds that another call like the last ones adds to a batch, as predicted."""
        longest, cost = demand.cost_per_item(self.model.alias), demand.cost_per_call(self.model.alias)
        costs = self.sizing.costs
        return (costs.predict(1, longest) - costs.predict(0, longest)) * cost / longest

    def surplus_seconds(self, demand: Demand, *, loading: int = 0, calls: float = 0) -> float:
        """Device seconds for all that waits, for the items of `loading` tasks, and for `calls` more calls.

        The next batch counts nothing. Counted with caution: see `Sizing.surplus_seconds`.
        """
        longest = demand.cost_per_item(self.model.alias)
        cost = self.cost + loading * longest + calls * demand.cost_per_call(self.model.alias)
        return self.sizing.surplus_seconds(cost, longest)

    def submit(self, call: Call, prepared: Sequence[Any]) -> Chunk:
        """More items of a call wait from now on. Raises what the model raises when asked for their costs and keys."""
        chunk, model = Chunk(call, self.model.alias), self.model
        # All of them first: what a user's model raises here is the task's error, and leaves nothing queued.
        chunk.begin(
            [
                Item(call, chunk, item, model.cost(item), model.batch_key(item), model.identity(item))
                for item in prepared
            ]
        )
        for item in chunk.items:
            self._fair.add(item)
        return chunk

    def drop(self, chunk: Chunk) -> None:
        """Forget what is left of a chunk whose task is gone."""
        left = [item for item in chunk.items if item.place is not None]
        chunk.give_up()
        for item in left:
            item.prepared = None  # its place is taken later
        self._parts.remove(item for item in left if isinstance(item.place, list))
        self._fair.remove([item for item in left if item.place is not None])

    def forget(self) -> None:
        """Nothing that waits will be computed any more."""
        while self._parts:
            self._parts.take_next()
        self._fair.remove(self._fair.first(len(self._fair)))

    def next_batch(self) -> list[Item]:
        """Take out the batch that is next; something waits."""
        if self._parts:
            return self._parts.take_next()
        budget = self._budget()
        return self._pick(list(self._fair.front()), budget, self._fair.due(budget))

    def batch_of(self, chunk: Chunk) -> list[Item]:
        """Take out a batch with items of this chunk, whoever is next. Empty if none of them wait."""
        mine = [item for item in chunk.items if item.place is not None]
        part = next((item.place for item in mine if isinstance(item.place, list)), None)
        if part is not None:
            return self._parts.take(part)
        others = [item for item in self._fair.front() if item.chunk is not chunk]
        return self._pick(mine + others, self._budget()) if mine else []

    def put_back(self, batch: list[Item]) -> None:
        """It was not computed, and is next."""
        self._parts.put(batch, is_next=True)

    def launch(self, batch: list[Item], beside: Beside | None = None) -> Launch:
        """Hand a batch to the device, each of its equal items once. Raises what the model raises."""
        items = [item.prepared for item in distinct(batch)]
        return self.model.launch(items) if beside is None else self.model.launch(items, beside)

    def succeeded(self, batch: list[Item], launch: Launch) -> None:
        """Learn from a batch that went well, and hand out its outputs. Raises what ends the worker."""
        computed = distinct(batch)
        self.counters.duplicates += len(batch) - len(computed)
        self._learn(computed, launch)
        try:
            outputs = {id(item.group or item): output for item, output in zip(computed, launch.outputs, strict=True)}
        except ENDS:
            self.put_back(batch)
            raise
        except BaseException as error:  # a sequence of the model's own
            self.failed(batch, error)
            return
        self._deliver(batch, outputs)

    def _learn(self, batch: list[Item], launch: Launch) -> None:
        """Let the next batches be sized by this one. If that fails, its tasks get their outputs all the same."""
        costs, (count, longest) = [item.cost for item in batch], self._shape(batch)
        self.counters.note(costs, round(count * longest), launch.seconds)
        try:
            self.sizing.observe(count, longest, launch.seconds)
            self.model.observe(len(costs), max(costs), launch)
            self._room.did_fit(round(count * longest))
        except Exception:
            logger.exception("nothing was learned from a batch of %d items of model %r", len(costs), self.model.alias)

    def _deliver(self, batch: list[Item], outputs: dict[int, Any]) -> None:
        """Each item gets the output of its group; of equal items, all but the last one get a copy."""
        delivered = 0
        left = Counter(id(item.group or item) for item in batch)
        try:
            for item in batch:
                group = id(item.group or item)
                left[group] -= 1
                finish = self._finish_a_copy if left[group] else self.model.postprocess
                item.chunk.deliver(item, outputs[group], finish)
                delivered += 1
        except ENDS:  # whoever drains the worker finds the rest where it was
            self.put_back(batch[delivered:])
            raise

    def _finish_a_copy(self, output: Any) -> Any:
        """A task may change what it gets, and its neighbours must not see that."""
        return copy.deepcopy(self.model.postprocess(output))

    def failed(self, batch: list[Item], error: BaseException) -> None:
        """One item may have spoilt the batch: try its halves, down to the item, which fails by itself."""
        is_memory = is_out_of_memory(error)
        if is_memory:
            self._make_room(distinct(batch), error)
        if len(batch) > 1:
            middle = len(batch) // 2
            self.put_back(batch[middle:])
            self.put_back(batch[:middle])
        elif is_memory and batch[0].tries < TRIES_ALONE:
            self._parts.put(batch, is_next=False)  # last, so that what others hold may be given back meanwhile
        else:
            batch[0].chunk.fail(_never_fits(batch[0], self.model.alias, error) if is_memory else error)

    def _budget(self) -> int:
        """The largest padded cost of a batch of items as long as the next one."""
        longest = self._fair.first(1)[0].cost if len(self._fair) else 1
        by_memory = min(self._room.most, self.model.largest_cost(longest))
        items = self.sizing.items(longest, self._fair.light_cost, self._seconds_of(self._fair.calls), self.streams)
        return int(min(by_memory, longest * items))

    def _pick(self, candidates: list[Item], budget: int, due: Sequence[Item] = ()) -> list[Item]:
        """The batch that holds the first candidate, and those that are `due`, taken out of the queue."""
        first = candidates[0]
        if due:
            candidates = list(dict.fromkeys([first, *due, *candidates]))  # of equal items, those that are due count
        if self._fair.has_twins:
            candidates = distinct(candidates)
        # By hash before they are compared: a tuple with a tensor in it can't be compared with another one.
        keys = {first.key}
        candidates = [item for item in candidates if item.key in keys]
        batch = self._cut_around(frozenset(due), candidates, budget)
        by_memory = self.model.largest_cost(max(item.cost for item in batch))
        if round(prod(self._shape(batch))) > by_memory:  # longer ones take more for each unit
            batch = self._cut([first, *(item for item in batch if item is not first)], by_memory)
        batch = with_twins(batch)
        self._fair.take(batch)
        return batch

    def _cut_around(self, due: Collection[Item], candidates: list[Item], budget: int) -> list[Item]:
        """Cut a batch from the candidates. If some are due, it is made of them, and others only fill it up."""
        if not due or not self.model.pads(candidates[0].prepared):
            return self._cut(candidates, budget)
        batch = self._cut([candidates[0], *(item for item in candidates[1:] if item in due)], budget)
        longest = max(item.cost for item in batch)
        even = [item for item in candidates if longest * EVEN <= item.cost <= longest]
        others = sorted(set(even).difference(batch), key=lambda item: -item.cost)
        return batch + others[: max(0, budget // longest - len(batch))]

    def _cut(self, candidates: list[Item], budget: int) -> list[Item]:
        costs, pads = [item.cost for item in candidates], self.model.pads(candidates[0].prepared)
        chosen = pick(costs, budget, self.sizing.costs) if pads else fill(costs, budget)
        return [candidates[index] for index in chosen]

    def _shape(self, batch: list[Item]) -> tuple[float, float]:
        """How many equal items take as long as this batch, and the cost of each. Their product counts in the budget."""
        costs = [item.cost for item in batch]
        return (len(costs), max(costs)) if self.model.pads(batch[0].prepared) else evened(costs)

    def _make_room(self, batch: list[Item], error: BaseException) -> None:
        """Too much at once: free what can be freed, and have no batch as large from now on."""
        self.counters.out_of_memory += 1
        let_go(error)  # where `forward` stopped, it still holds what it had
        tries = batch[0].tries if len(batch) == 1 else 0
        if len(batch) == 1:
            batch[0].tries += 1
            if batch[0].tries == TRIES_ALONE - 1:
                # Before the last try, since it takes long: tracebacks of tasks that failed otherwise hold what they
                # had, too, and Celery leaves those to the collector.
                gc.collect()
        try:
            self.model.make_room(len(batch), max(item.cost for item in batch), tries)
        except Exception:
            logger.exception("memory could not be freed after model %r ran out of it", self.model.alias)
        if len(batch) > 1:
            cost = round(prod(self._shape(batch)))
            self._room.did_not_fit(cost)
            logger.warning(
                "model %r ran out of memory with %d items, computed cost %d; batches have at most %.0f from now on: %s",
                *(self.model.alias, len(batch), cost, self._room.most, said(error)),
            )


def _never_fits(item: Item, alias: str, error: BaseException) -> DeviceOutOfMemoryError:
    refused = DeviceOutOfMemoryError(
        f"an item of cost {item.cost} does not fit into the device's memory beside model {alias!r}, even alone in its "
        f"batch and after {item.tries} tries: shorten it, or give the model more memory ({said(error)})"
    )
    refused.__cause__ = error
    return refused


def calls_of(batch: list[Item]) -> Iterable[Call]:
    """The calls that have items in this batch, each once."""
    return {id(item.call): item.call for item in batch}.values()
