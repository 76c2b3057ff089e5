"""What the engine needs of a model.

In: items from tasks. Out: one output per item. A user's own model is any class with these five methods, named in
settings as `module:Class`. It need not import anything from here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

#: A call of `encode` or `predict`: the items to compute, and the function that makes the result of their outputs.
Plan = tuple[list[Any], Callable[[list[Any]], Any]]


@runtime_checkable
class Model(Protocol):
    """Five methods. Of `alias`, `path`, `dtype` and `revision`, the constructor gets the ones that it names.

    More are optional. `batch_key(prepared) -> Hashable`: items share a batch only if their keys are equal; without it,
    all may. `identity(prepared) -> Hashable`: of items with equal keys and identities one is computed, and each gets
    its output; without it, or if it is None, all are computed. `memory() -> int`: bytes of the loaded weights; without
    it, the size of their files. `sample(cost) -> item`: an item of about this cost; with it, the load measures the
    memory that batches take on a GPU. `to(device)`: moves the weights; with it, they may wait in the host's memory.
    `unload()`: frees the weights' memory when the model is evicted and nobody uses it; without it, Python's collector
    does. `plan_encode(inputs, **options) -> Plan`, and the same for `encode_query`, `encode_document` and `predict`:
    with it, handles of the model have that method.
    """

    def load(self, device: str) -> None:
        """Read the weights and put them on `device` (`"cpu"`, `"cuda:0"`). Runs once, on the loader thread."""

    def preprocess(self, item: Any) -> Any:
        """Make one item ready for a batch. Runs in the task: if it raises, only that task fails.

        It may call another model; the methods below may not.
        """

    def cost(self, item: Any) -> int:
        """The size of one *preprocessed* item, in the unit that `forward` pays for: tokens, pixels. At least 1."""

    def forward(self, batch: Sequence[Any]) -> Sequence[Any]:
        """Compute a batch of preprocessed items. Returns one output per item, in the same order.

        The output may be a tensor on a GPU whose first dimension is the items, or a list of such tensors. The engine
        copies it to the host while other tasks go on.
        """

    def postprocess(self, output: Any) -> Any:
        """Turn one output into what the task receives."""
