"""What a model is, to the engine.

In: items from tasks. Out: one output per item. A user's own model is any class with these five methods, named in
settings as `module:Class`; it need not import anything from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Model(Protocol):
    """Five methods. The constructor is given those of `alias`, `path`, `dtype` and `revision` that it names.

    Two more are optional: `batch_key(prepared) -> Hashable`, since items share a batch only when their keys are
    equal (default: all do), and `load_seconds`-style extras, which nobody calls.
    """

    def load(self, device: str) -> None:
        """Read the weights and put them on `device` (`"cpu"`, `"cuda:0"`). Called once, on the loader thread."""

    def preprocess(self, item: Any) -> Any:
        """Make one item ready for a batch. Called in the task; raise `InvalidInputError` and only that task fails."""

    def cost(self, item: Any) -> int:
        """The size of one *preprocessed* item in whatever unit `forward` pays for: tokens, pixels. At least 1."""

    def forward(self, batch: Sequence[Any]) -> Sequence[Any]:
        """Compute a batch of preprocessed items. Returns one output per item, in the same order."""

    def postprocess(self, output: Any) -> Any:
        """Turn one output into what the task receives."""
