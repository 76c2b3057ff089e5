"""How much memory this worker may take of its device.

In: the settings, what is free now by NVML, and what this process has. Out: bytes for weights and activations together.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from legit_worker.device import cuda, vram
from legit_worker.device.devices import Device
from legit_worker.device.memory import give_back_cached
from legit_worker.device.simulated import simulated_device
from legit_worker.settings import Settings

logger = logging.getLogger(__name__)

#: Seconds for which the most that other processes had of the GPU is left to them: they grew into it once, and will
#: again with their next large batch.
GROWTH_SECONDS = 600.0


class Budget:
    """Any thread may ask. Reads NVML each time: what is free changes with every other process on the GPU."""

    def __init__(self, chosen: Settings) -> None:
        self._chosen = chosen
        self._gpu: vram.Gpu | None = None
        self._is_unknown = not chosen.device.startswith(("auto", "cuda"))
        #: As NVML told last.
        self._seen: vram.Memory | None = None
        #: When others had how many bytes, each more than all that came later: the first is the most.
        self._others: deque[tuple[float, int]] = deque()

    def __call__(self, weights: int) -> int | None:
        """Bytes in all, of which `weights` are taken already; None where nothing bounds them.

        What is free on the GPU now and what this process has of it, less the headroom, and less what others grow into;
        at most `LEGIT_WORKER_VRAM_LIMIT`. Without a GPU, or an NVML that tells, that limit alone.
        """
        limit = self._chosen.vram_limit
        # NVML and torch are asked one after the other: what torch gives back in between is not another's.
        before = self._taken()
        found = self._memory()
        if found is None:
            return None if limit is None or limit.unit == "%" else limit.of(0)
        ours = max(weights, before, self._taken())
        headroom = self._chosen.vram_headroom.of(found.total)
        if found.free < headroom and ours > weights:
            give_back_cached()  # what torch keeps for later may be in the wrong places
        most = max(0, found.free + ours - headroom - self._growth(found.used - ours))
        return most if limit is None else min(most, limit.of(found.total))

    def hold(self, limit: int | None) -> None:
        """Keep the device's allocator within so many bytes; None: let it have what there is."""
        if self._chosen.device.startswith(("auto", "cuda")):
            self._device().hold(limit)

    def _taken(self) -> int:
        return 0 if self._is_unknown else self._device().taken()

    def _device(self) -> Device:
        device = self._chosen.device
        return cuda.cuda_device("cuda" if device == "auto" else device)

    def report(self, weights: int) -> dict[str, int]:
        """Of the whole device, in bytes: `total`, what `others` have, what is `free`, and the `headroom` in that.

        Nothing where NVML does not tell. The process's own CUDA context counts as another's, unless NVML tells whose
        memory is whose. A simulated device tells its `peak`, too.
        """
        if self._chosen.device == "simulated":
            ledger = simulated_device().ledger
            return {"total": ledger.total, "others": 0, "headroom": 0, "free": ledger.free, "peak": ledger.peak}
        found = self._memory()
        if found is None:
            return {}
        ours = max(weights, self._taken(), found.mine or 0)
        return {
            "total": found.total,
            "others": max(0, found.used - ours),
            "headroom": self._chosen.vram_headroom.of(found.total),
            "free": found.free,
        }

    @contextmanager
    def turn(self) -> Iterator[None]:
        """While a load goes on, no other worker of this machine begins one on the same GPU."""
        if self._memory() is None or self._gpu is None:
            yield
        else:
            with vram.turn(self._gpu):
                yield

    def _growth(self, others: int) -> int:
        """How many bytes more others had lately than they have now."""
        now = monotonic()
        while self._others and self._others[-1][1] <= others:
            self._others.pop()
        self._others.append((now, others))
        while self._others[0][0] < now - GROWTH_SECONDS:
            self._others.popleft()
        return self._others[0][1] - others

    def _memory(self) -> vram.Memory | None:
        """Of the GPU that models are on; None where there is none, or it is unknown."""
        if self._is_unknown:
            return None
        try:
            if self._gpu is None:
                self._gpu = cuda.gpu(self._chosen.device)
            if self._gpu is not None:
                self._seen = vram.memory(self._gpu)
                return self._seen
        except vram.VramUnknownError as error:
            if self._seen is not None:  # it told before, and may again
                logger.warning("%s; going by what it told last", error)
                return self._seen
            if self._chosen.device != "auto":
                logger.warning("%s", error)
        self._is_unknown = True
        return None
