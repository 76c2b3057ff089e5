"""What computes batches: `Device` is a CPU; `cuda` and `simulated` have the other two devices.

In: a function that computes a batch. Out: a `Launch`, whose outputs are there at once, or after a wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from time import monotonic
from typing import Any


@dataclass(eq=False, kw_only=True)
class Launch:
    """A batch that a device got. Read its outputs, seconds, peak and error only when it is done."""

    #: The result of `forward`, on the host.
    outputs: Any
    #: The seconds of the device.
    seconds: float
    #: The most bytes of the device that it used beside the weights; None if the device does not tell.
    peak: int | None = None
    #: The seconds of the calling thread for the launch.
    host_seconds: float = 0.0
    #: Whether it is over. Any thread may ask.
    is_done: bool = True
    #: Why it failed after its launch. If `forward` itself fails, it raises.
    error: Exception | None = None

    def wait(self) -> None:
        """Wait until it is over, with or without an error. Any thread may call this once."""


class Device:
    """A CPU, and the base of every device. Any thread may ask it; it gets one batch at a time."""

    #: Whether a launch knows its peak.
    tells_memory = False

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def launch(self, compute: Callable[[], Any]) -> Launch:
        """Compute a batch. Raises the errors of `compute`, which may itself return a launch that is under way."""
        start = monotonic()
        outputs = compute()
        if isinstance(outputs, Launch):
            return outputs
        return Launch(outputs=outputs, seconds=monotonic() - start)

    def loading(self) -> AbstractContextManager[object]:
        """Return a context that the loader thread holds while it reads weights."""
        return nullcontext()

    def taken(self) -> int:
        """Return the bytes of the device that this process has, in use or kept for later; 0 if that is unknown."""
        return 0

    def hold(self, limit: int | None) -> None:
        """Let this process have at most this many bytes of the device, if that can be enforced; None sets no limit."""

    def is_lost(self, error: BaseException) -> bool:
        """Tell whether the device can't compute any more, after a batch ended in this error."""
        return False
