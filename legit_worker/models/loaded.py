"""One adapter over a model's five to eleven methods: whoever uses a model sees this, and no optional method.

In: a model of any class, its device. Out: batches, costs, bytes; a default for each method that the class lacks.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from contextlib import suppress
from typing import Any, Protocol

from legit_worker.batching.costmodel import CostModel
from legit_worker.batching.keys import key_of
from legit_worker.device.devices import Device, Launch
from legit_worker.errors import LegitWorkerError
from legit_worker.models.methods import Methods
from legit_worker.models.protocol import Model

logger = logging.getLogger(__name__)

#: The cost of the largest item; far beyond any batch's.
MAX_COST = 2**31

#: The batch that there must be room for beside the weights, as (items, cost of each): a GPU is busy enough with it.
RESERVE = (16, 256)

#: Activations count for this many times what is predicted: allocators round up, and a fit goes through the middle.
MARGIN = 1.2

#: The largest batch, in padded cost units, of a model whose activations were never measured.
UNMEASURED_COST = 16_384


#: What `computed_by` tells.
COMPUTED_BY = ("revision", "dimensions", "dtype", "prompt", "backend")


#: Hands a function over that computes a batch.
Beside = Callable[[Callable[[], Any]], Launch]


class Surroundings(Protocol):
    """What a model asks about the memory around it. Any thread may ask."""

    def room_for_batches(self) -> int | None:
        """Bytes that a batch may take beside all weights; None if nothing bounds them."""

    def is_loading(self) -> bool:
        """Whether weights are being read."""

    def free(self, needed: int = 0, tries: int = 0) -> None:
        """Free what a batch that needs this many bytes lacks, or a little if that is unknown."""


class LoadedModel:
    """A model in memory. Threads other than the engine's may call it, too: it lets one of them in at a time.

    It has more than 20 methods: one for each of a model's own, and those that the engine asks of a model.
    """

    def __init__(
        self, alias: str, kind: str, model: Model, device: Device, activations: CostModel, around: Surroundings
    ) -> None:
        self.alias = alias
        self.kind = kind
        #: The object of its class; None once it has left memory for good.
        self.model: Any = model
        #: Whether this class is a user's own.
        self.is_own = ":" in kind
        self._device = device
        self._activations = activations
        self._around = around
        self._methods = Methods(self.alias)
        self._to = self._optional("to")
        self._unload = self._optional("unload")
        self._memory = self._optional("memory")
        self._key_of = self._optional("batch_key")
        self._identity_of = self._optional("identity")
        self._sample = self._optional("sample")
        # Its batches on other threads. Such a batch may outlive its tasks, and with them their hold on this model.
        self._beside: weakref.WeakSet[Launch] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"<LoadedModel {self.alias} ({self.kind}) on {self._device.name}>"

    @property
    def device(self) -> str:
        """The name of the device that it is on."""
        return self._device.name

    def _optional(self, name: str) -> Callable[..., Any] | None:
        method: Callable[..., Any] | None = getattr(self.model, name, None)
        return method

    def has(self, name: str) -> bool:
        """Whether the model's kind has this method."""
        return self._optional(name) is not None

    def plan(self, name: str) -> Callable[..., tuple[list[Any], Callable[[list[Any]], Any]]]:
        """What plans a call of this name. Raises `TypeError` if the model's kind has no such call."""
        return self._method(f"plan_{name}", name)

    def alone(self, name: str, *arguments: Any) -> Any:
        """Call one of the model's methods while no other thread does: tokenizers and modules keep state."""
        return self._methods.alone(name, self._method(name, name), *arguments)

    def _method(self, name: str, call: str) -> Callable[..., Any]:
        method = self._optional(name)
        if method is None:
            raise TypeError(
                f"model {self.alias!r} is of kind {self.kind!r}, which has no {call}(): "
                f"use map(), or a model of another kind, or give its class a method {name}()"
            )
        return method

    @property
    def backend(self) -> dict[str, str]:
        """What computes a model of a built-in kind, and why; empty for other kinds."""
        return {} if self.is_own else dict(getattr(self.model, "backend", {}))

    def computed_by(self, items: list[Any], result: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """What an index must know of a call's result; nothing is known of a user's own model."""
        own = self._optional("computed_by")
        return dict.fromkeys(COMPUTED_BY) if own is None else own(items, result, options)

    # In and out of memory.

    def load(self) -> None:
        """Read the weights onto the device. Called once, on the loader thread. Raises what the model raises."""
        self._methods.at_once("load", self.model.load, self._device.name)

    @property
    def size(self) -> int | None:
        """Bytes of the weights in memory; None if the model does not tell."""
        return None if self._memory is None else int(self._methods.at_once("memory", self._memory))

    @property
    def can_move(self) -> bool:
        """Whether the weights can leave the device for the host's memory and come back."""
        return self._to is not None and self._device.tells_memory

    def move(self, *, to_host: bool) -> None:
        """To the host's memory, or back. Raises what the model raises."""
        assert self._to is not None
        self._methods.at_once("to", self._to, "cpu" if to_host else self._device.name)

    def unload(self) -> weakref.ref[Any] | None:
        """It leaves memory for good. Returns the object that must be gone before that is free; None if it is free now.

        A model without `unload()`, and of a class that knows weak references, is gone once nobody has it any more.
        Waits for a batch that another thread computes for tasks that have ended.
        """
        for launch in list(self._beside):
            launch.wait()
        model, unload = self.model, self._unload
        self.model = self._sample = self._to = self._unload = self._memory = self._key_of = self._identity_of = None
        if unload is None:
            with suppress(TypeError):
                return weakref.ref(model)
            return None
        try:
            self._methods.at_once("unload", unload)
        except Exception:
            logger.exception("unload() of model %r failed", self.alias)
        return None

    def restart(self) -> None:
        """In a forked child: a thread that the child does not have may have been in one of its methods."""
        self._methods = Methods(self.alias)
        self._beside = weakref.WeakSet()

    # Items.

    def preprocess(self, item: Any) -> Any:
        """One item, ready for a batch. Raises what the model raises."""
        return self._methods.alone("preprocess", self.model.preprocess, item)

    @property
    def has_samples(self) -> bool:
        """Whether the model makes items of a given cost."""
        return self._sample is not None

    def trial(self, cost: int) -> Any:
        """An item of about this cost, ready for a batch. Raises `CallsModelError` if that takes another model."""
        assert self._sample is not None
        item = self._methods.at_once("sample", self._sample, cost)
        return self._methods.at_once("preprocess", self.model.preprocess, item)

    def cost(self, prepared: Any) -> int:
        """The model's cost of a preprocessed item, at least 1, and small enough for the packer's arithmetic."""
        return min(max(1, int(self._methods.at_once("cost", self.model.cost, prepared))), MAX_COST)

    def batch_key(self, prepared: Any) -> Hashable:
        """What must be equal for two items to share a batch. Raises `TypeError` if the model's key is no key."""
        key: Hashable = None if self._key_of is None else self._methods.at_once("batch_key", self._key_of, prepared)
        safe = self._safe(key)
        if not key == key:  # a tensor has a hash, and can't be compared as one thing
            raise TypeError(f"batch_key() of model {self.alias!r} gave {key!r}, which does not equal itself")
        return safe

    def identity(self, prepared: Any) -> Hashable:
        """What tells that two items of equal keys have the same output. Raises `TypeError` if it has no hash."""
        if self._identity_of is None:
            return None
        return self._safe(self._methods.at_once("identity", self._identity_of, prepared))

    def _safe(self, key: Hashable) -> Hashable:
        """A key that can be compared between two tasks. Raises `TypeError` if it has no hash."""
        if self.is_own:
            return key_of(key)
        hash(key)
        return key

    def postprocess(self, output: Any) -> Any:
        """One output, as the task gets it. Raises what the model raises."""
        return self._methods.at_once("postprocess", self.model.postprocess, output)

    # Batches.

    @property
    def computes_beside(self) -> bool:
        """Whether its batches may be computed on another thread, beside each other and beside tasks."""
        return not self.is_own and getattr(self.model, "computes_beside", False)

    def pads(self, prepared: Any) -> bool:
        """Whether each item of a batch with this one takes as long as the batch's longest one."""
        pads = None if self.is_own else getattr(self.model, "pads", None)
        return pads is None or pads(prepared)

    def launch(self, batch: Sequence[Any], beside: Beside | None = None) -> Launch:
        """Hand a batch to the device: one output per item. Raises what the model raises.

        `beside` hands over what computes a batch on another thread, if the model allows that for this batch.
        """
        was_loading = self._around.is_loading()
        launch = self._launch(batch, beside)
        if was_loading or self._around.is_loading():  # whose bytes are in the peak, too
            launch.peak = None
        return launch

    def compute(self, batch: Sequence[Any]) -> Launch:
        """Hand a batch to the device and wait for its end. Raises what the model raises."""
        launch = self._launch(batch)
        launch.wait()
        if launch.error is not None:
            raise launch.error
        return launch

    def _launch(self, batch: Sequence[Any], beside: Beside | None = None) -> Launch:
        with self._methods.lock:
            compute = None if beside is None else self._methods.at_once("forward", self.model.computation, batch)
            if beside is not None and compute is not None:
                launch = beside(lambda: self._checked(batch, compute()))
                self._beside.add(launch)
                return launch
            return self._device.launch(
                lambda: self._checked(batch, self._methods.at_once("forward", self.model.forward, batch))
            )

    def _checked(self, batch: Sequence[Any], outputs: Any) -> Any:
        is_list = hasattr(outputs, "__len__") and not isinstance(outputs, Mapping | Set)
        given = len(outputs) if is_list else f"{type(outputs).__name__} instead of"
        if given != len(batch):
            raise LegitWorkerError(
                f"model {self.alias!r} gave {given} outputs for a batch of {len(batch)} items: "
                f"forward() must return one output per item, in order"
            )
        return outputs

    def is_lost(self, error: BaseException) -> bool:
        """Whether this error of a batch broke the device for this process."""
        return self._device.is_lost(error)

    # Memory of batches.

    def observe(self, count: int, longest: int, launch: Launch) -> None:
        """A batch is over: learn from it if it took more memory than was expected."""
        if launch.peak and (not self._activations.is_known or launch.peak > self._activations.predict(count, longest)):
            self._activations.observe(count, longest, launch.peak)

    def largest_cost(self, longest: int) -> int:
        """The largest padded cost of a batch whose longest item has this cost, by the memory that there is now.

        Longer items take more for each unit: it is less for them.
        """
        room = self._around.room_for_batches()
        if room is None or not self._activations.is_known:
            return UNMEASURED_COST
        return longest * self._activations.largest(longest, room / MARGIN)

    def make_room(self, count: int, longest: int, tries: int = 0) -> None:
        """A batch ran out of memory: free what it lacks. `tries`: how often it ran out of it before."""
        known = self._activations.is_known
        self._around.free(int(MARGIN * self._activations.predict(count, longest)) if known else 0, tries)
