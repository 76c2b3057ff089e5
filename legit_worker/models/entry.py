"""A slot with its model's methods, for those who still call them on it. See `slot`, `loaded` and `residency`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from legit_worker.device.devices import Launch
from legit_worker.models.loaded import LoadedModel
from legit_worker.models.protocol import Model
from legit_worker.models.residency import Residency
from legit_worker.models.slot import Slot


@dataclass(eq=False, kw_only=True, repr=False)
class Entry(Slot):
    """One configured model."""

    #: Who decides when it is in memory. Set by `Registry`.
    residency: Residency = field(init=False)

    @property
    def loaded(self) -> LoadedModel:
        """The model, which is known to be in memory."""
        assert self.model is not None, f"model {self.alias!r} is {self.state}"
        return self.model

    @property
    def model_now(self) -> Model:
        """The user's own object, which is known to be in memory."""
        return self.loaded.model

    @staticmethod
    def outcome(future: Future[LoadedModel]) -> Model:
        """What a request's future has; waits for it. Raises `ModelLoadError`, `DeviceLostError`."""
        error = future.exception()
        if error is not None:
            # One of its own for each asker: tasks that share an exception would share its traceback.
            raise type(error)(*error.args) from error.__cause__
        return future.result().model

    def batch_key(self, prepared: Any) -> Hashable:
        """See `LoadedModel`, as for the others."""
        return self.loaded.batch_key(prepared)

    def cost(self, prepared: Any) -> int:
        """See `LoadedModel`."""
        return self.loaded.cost(prepared)

    def preprocess(self, item: Any) -> Any:
        """See `LoadedModel`."""
        return self.loaded.preprocess(item)

    def alone(self, name: str, method: Callable[..., Any], *arguments: Any) -> Any:
        """See `LoadedModel`."""
        return self.loaded.alone(name, method, *arguments)

    def postprocess(self, output: Any) -> Any:
        """See `LoadedModel`."""
        return self.loaded.postprocess(output)

    def forward(self, batch: Sequence[Any]) -> Sequence[Any]:
        """Compute a batch and wait for it. Raises what the model raises."""
        outputs: Sequence[Any] = self.loaded.compute(batch).outputs
        return outputs

    def launch(self, batch: Sequence[Any]) -> Launch:
        """See `LoadedModel`."""
        return self.loaded.launch(batch)

    def observe(self, count: int, longest: int, launch: Launch) -> None:
        """See `LoadedModel`. A batch whose tasks are gone may end after its model has left."""
        if self.model is not None:
            self.model.observe(count, longest, launch)

    def largest_cost(self, longest: int) -> int:
        """See `LoadedModel`."""
        return self.loaded.largest_cost(longest)

    def is_lost(self, error: BaseException) -> bool:
        """See `LoadedModel`."""
        return self.model is not None and self.model.is_lost(error)

    def make_room(self, count: int, longest: int, tries: int = 0) -> None:
        """See `LoadedModel`."""
        self.loaded.make_room(count, longest, tries)
