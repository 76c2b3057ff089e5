"""A device that computes nothing and keeps accounts of its memory.

In: bytes, by owner. Out: the errors and the numbers that a real device of this size would give.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from legit_worker.device.devices import Device, Launch
from legit_worker.errors import DeviceOutOfMemoryError

#: The bytes of a simulated device if nobody chose its size: it never fills.
ENDLESS = 2**62


@dataclass
class Ledger:
    """A simulated device's memory: bytes by owner. It refuses to overdraw, and remembers the most bytes in use.

    Any thread may call it.
    """

    #: The device's bytes.
    total: int
    owners: dict[str, int] = field(default_factory=dict)
    #: The most bytes that were ever in use.
    peak: int = 0
    #: The most bytes in use since `SimulatedDevice.launch` last reset this.
    recent_peak: int = 0
    # Re-entrant: the garbage collector may end a model during `take`, which gives the model's bytes back.
    _lock: Any = field(default_factory=threading.RLock, repr=False, compare=False)

    @property
    def used(self) -> int:
        """Bytes in use."""
        return sum(self.owners.values())

    @property
    def free(self) -> int:
        """Bytes left."""
        return self.total - self.used

    def take(self, owner: str, size: int) -> None:
        """Enter `size` bytes for `owner`. Raises `DeviceOutOfMemoryError` if they are not free."""
        with self._lock:
            if size > self.free:
                raise DeviceOutOfMemoryError(
                    f"{owner} needs {size} bytes, {self.free} of {self.total} are free: "
                    f"{', '.join(f'{name} has {held}' for name, held in self.owners.items()) or 'nobody has any'}"
                )
            self.owners[owner] = self.owners.get(owner, 0) + size
            self.peak = max(self.peak, self.used)
            self.recent_peak = max(self.recent_peak, self.used)

    def give_back(self, owner: str, size: int) -> None:
        """Enter that `owner` returned `size` of its bytes."""
        with self._lock:
            held = self.owners.get(owner, 0)
            if size > held:
                raise ValueError(f"{owner} gives back {size} bytes and has {held}")
            self.owners[owner] = held - size

    @contextmanager
    def held(self, owner: str, size: int) -> Iterator[None]:
        """Enter `size` bytes while the block runs: activations."""
        self.take(owner, size)
        try:
            yield
        finally:
            self.give_back(owner, size)


class SimulatedDevice(Device):
    """Tells what memory a batch took, as a GPU would."""

    tells_memory = True

    def __init__(self, ledger: Ledger) -> None:
        super().__init__("simulated")
        self.ledger = ledger

    def launch(self, compute: Callable[[], Any]) -> Launch:
        """Compute a batch, and read the ledger's peak. Raises the errors of `compute`."""
        before = self.ledger.recent_peak = self.ledger.used
        start = monotonic()
        outputs = compute()
        return Launch(outputs=outputs, seconds=monotonic() - start, peak=self.ledger.recent_peak - before)

    def taken(self) -> int:
        """Bytes in use."""
        return self.ledger.used


@functools.cache
def simulated_device() -> SimulatedDevice:
    """Return this process's one simulated device."""
    return SimulatedDevice(Ledger(ENDLESS))
