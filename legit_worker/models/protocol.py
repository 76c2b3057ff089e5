"""What a model is, to the engine.

In: items from tasks. Out: one output per item. A user's own model is any class with these five methods, named in
settings as `module:Class`; it need not import anything from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from legit_worker.prep.images import decode


@dataclass(frozen=True)
class ImageFile:
    """An image whose file is in memory and whose pixels are not: they are decoded when its turn comes."""

    #: As `PIL.Image.open` gives it, before anything asked for a pixel.
    opened: Any

    def decode(self) -> Any:
        """A `PIL.Image.Image` in RGB, the way up that its camera noted. Raises `InvalidInputError`."""
        return decode(self.opened)


@runtime_checkable
class Model(Protocol):
    """Five methods. The constructor is given those of `alias`, `path`, `dtype` and `revision` that it names.

    Five more are optional. `batch_key(prepared) -> Hashable`: items share a batch only when their keys are equal, and
    without it, all do. `memory() -> int`: bytes of the loaded weights; without it, what their files have.
    `sample(cost) -> item`: something to compute that costs about so much; with it, the memory that batches take on a
    GPU is measured when the model is loaded. `to(device)`: moves the weights; with it, they may wait in host memory.
    `unload()`: the model is evicted, nobody uses it any more, and its weights' memory is wanted; without it, that is
    free once Python has collected the model.
    """

    def load(self, device: str) -> None:
        """Read the weights and put them on `device` (`"cpu"`, `"cuda:0"`). Called once, on the loader thread."""

    def preprocess(self, item: Any) -> Any:
        """Make one item ready for a batch. Called in the task; raise `InvalidInputError` and only that task fails."""

    def cost(self, item: Any) -> int:
        """The size of one *preprocessed* item in whatever unit `forward` pays for: tokens, pixels. At least 1."""

    def forward(self, batch: Sequence[Any]) -> Sequence[Any]:
        """Compute a batch of preprocessed items. Returns one output per item, in the same order.

        A tensor of a GPU, its first dimension the items, or a list of such tensors, is brought to the host without
        waiting for it, while other tasks go on.
        """

    def postprocess(self, output: Any) -> Any:
        """Turn one output into what the task receives."""
