"""What computes batches: this module's `Device` is a CPU; `cuda` and `simulated` have the other two.

In: a function that computes a batch. Out: a `Launch`, whose outputs are there at once, or once it was waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from time import monotonic
from typing import Any


@dataclass(eq=False, kw_only=True)
class Launch:
    """A batch that was handed to a device. Outputs, seconds and peak are those of the end, and not read before."""

    #: What `forward` returned, on the host.
    outputs: Any
    #: That the device took.
    seconds: float
    #: The most bytes that it had of the device beside the weights; None where the device does not tell.
    peak: int | None = None
    #: That the calling thread took to hand it over.
    host_seconds: float = 0.0
    #: Whether it is over. Any thread may ask.
    is_done: bool = True
    #: Why it failed; only for one that was not done when it was handed over, whose `forward` raises otherwise.
    error: Exception | None = None

    def wait(self) -> None:
        """Until it is over, however it ends. Any thread may call it, and none needs to twice."""


class Device:
    """A CPU, and what every device answers. Any thread may ask; one batch at a time is handed to it."""

    #: Whether a launch knows its peak.
    tells_memory = False

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def launch(self, compute: Callable[[], Any]) -> Launch:
        """Compute a batch. Raises what `compute` raises."""
        start = monotonic()
        outputs = compute()
        return Launch(outputs=outputs, seconds=monotonic() - start)

    def loading(self) -> AbstractContextManager[object]:
        """Held by the loader thread while it reads weights."""
        return nullcontext()

    def taken(self) -> int:
        """Bytes that this process has of the device, in use or kept for later; 0 where that is unknown."""
        return 0

    def hold(self, limit: int | None) -> None:
        """Have at most so many bytes of the device from now on, where it can be held to that; None: what it has."""

    def is_lost(self, error: BaseException) -> bool:
        """Whether nothing can be computed here any more, after a batch ended in this error."""
        return False
