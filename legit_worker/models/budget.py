"""How much memory this worker may take of its device.

In: the settings, what is free now by NVML, and what this process has. Out: bytes for weights and activations together.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import monotonic
from typing import Protocol

from legit_worker.device import cuda, vram
from legit_worker.device.memory import give_back_cached
from legit_worker.device.simulated import simulated_device
from legit_worker.settings import Settings

logger = logging.getLogger(__name__)

#: Seconds for which the most that other processes had of the GPU is left to them: they grew into it once, and will
#: again with their next large batch.
GROWTH_SECONDS = 600.0

#: What an operator reads if NVML tells nothing of a GPU that is used.
MUTE = (
    "%s. Until then the worker goes by what CUDA says is free, which it can ask once a model is loaded: the first load "
    "has no bound, and workers of one GPU do not take turns"
)


class Budget(Protocol):
    """What `Residency` asks about a device's memory. Any thread may ask."""

    def bytes(self, weights: int) -> int | None:
        """Bytes in all that may be taken now, of which `weights` are taken already; None if nothing bounds them."""

    def most(self) -> int | None:
        """The most that `bytes` can ever be, whatever other processes give back; None if nothing bounds it."""

    def hold(self, limit: int | None) -> None:
        """Keep the device's allocator within this many bytes; None: let it have all there is."""

    def give_back(self) -> int:
        """Have the device's allocator return the memory that it keeps for later. How many bytes came back."""

    def report(self, weights: int) -> dict[str, int | None]:
        """As `inspect stats` shows it, in bytes: the `budget`, and what is known of the device. Changes nothing."""

    def turn(self) -> AbstractContextManager[None]:
        """Held while weights are read: no other worker of this machine begins to read on the same device."""


class Unbounded:
    """A budget without any bound."""

    def bytes(self, weights: int) -> int | None:
        """No bound."""
        return self.most()

    def most(self) -> int | None:
        """No bound."""
        return None

    def hold(self, limit: int | None) -> None:
        """There is no allocator to hold."""

    def give_back(self) -> int:
        """There is nothing to give back."""
        return 0

    def report(self, weights: int) -> dict[str, int | None]:
        """No bound."""
        return {"budget": self.bytes(weights)}

    def turn(self) -> AbstractContextManager[None]:
        """Nobody shares the device."""
        return nullcontext()


class DeviceBudget:
    """Reads NVML each time: what is free changes with every other process on the GPU.

    If NVML tells nothing, CUDA is asked, once it runs in this process. Without a GPU, and before that,
    `LEGIT_WORKER_VRAM_LIMIT` alone is the bound.
    """

    def __init__(self, chosen: Settings) -> None:
        self._chosen = chosen
        self._gpu: vram.Gpu | None = None
        self._is_unknown = not cuda.may_be_gpu(chosen.device)
        # NVML never told anything, and why.
        self._is_nvml_mute, self._why = False, ""
        # NVML told something before, and does not now.
        self._is_nvml_away = False
        #: As NVML told last, or CUDA.
        self._seen: vram.Memory | None = None
        #: When others had how many bytes, each more than all that came later: the first is the most.
        self._others: tuple[tuple[float, int], ...] = ()

    def bytes(self, weights: int) -> int | None:
        """What is free on the GPU and what this process has, less the headroom, less what others grow into."""
        # NVML and torch are asked one after the other: what torch gives back in between is not another's.
        before = self._taken()
        found = self._memory()
        if found is None:
            return self.most()
        ours = max(weights, before, self._taken())
        if found.free < self._headroom(found) and ours > weights:
            give_back_cached(self._device().name)  # what torch keeps for later may be in the wrong places
        self._note(found.used - ours)
        return self._allowed(found, ours)

    def most(self) -> int | None:
        """The limit, or the device's size less the headroom. Asks nobody: the size is known since `bytes` was."""
        limit, found = self._chosen.vram_limit, self._seen
        if self._is_unknown or found is None:
            return None if limit is None or limit.unit == "%" else limit.of(0)
        usable = found.total - self._headroom(found)
        return usable if limit is None else min(usable, limit.of(found.total))

    def hold(self, limit: int | None) -> None:
        """Torch's allocator, if the device may be a GPU."""
        if cuda.may_be_gpu(self._chosen.device):
            self._device().hold(limit)

    def give_back(self) -> int:
        """Torch's allocator returns its cache, and what CUDA graphs have."""
        before = self._taken()
        if not self._is_unknown:
            self._device().forget_recordings()
            give_back_cached(self._device().name)
        return max(0, before - self._taken())

    def report(self, weights: int) -> dict[str, int | None]:
        """Of the whole device, in bytes: `total`, what `others` have, what is `free`, and the `headroom` in that.

        The `budget` alone if NVML does not tell. The process's own CUDA context counts as another's, unless NVML tells
        whose memory is whose. A simulated device tells its `peak`, too.
        """
        if self._chosen.device == "simulated":
            ledger = simulated_device().ledger
            device = {"total": ledger.total, "others": 0, "headroom": 0, "free": ledger.free, "peak": ledger.peak}
            return {"budget": self.most(), **device}
        found = self._memory()
        if found is None:
            return {"budget": self.most()}
        ours = max(weights, self._taken())
        return {
            "budget": self._allowed(found, ours),
            "total": found.total,
            "others": max(0, found.used - max(ours, found.mine or 0)),
            "headroom": self._headroom(found),
            "free": found.free,
        }

    @contextmanager
    def turn(self) -> Iterator[None]:
        """By a lock file for each GPU."""
        if self._memory() is None or self._gpu is None:
            yield
        else:
            with vram.turn(self._gpu, self._chosen.lock_dir):
                yield

    def _allowed(self, found: vram.Memory, ours: int) -> int:
        free = found.free + ours - self._headroom(found) - self._growth(found.used - ours)
        limit = self._chosen.vram_limit
        most = free if limit is None else min(free, limit.of(found.total))
        return max(0, most - self._device().recorder.kept)

    def _headroom(self, found: vram.Memory) -> int:
        return self._chosen.vram_headroom.of(found.total)

    def _taken(self) -> int:
        return 0 if self._is_unknown else self._device().taken()

    def _device(self) -> cuda.CudaDevice:
        return cuda.cuda_device(cuda.name_of(self._chosen.device))

    def _note(self, others: int) -> None:
        """Remember what others have now, and forget what they had long ago. Any thread may do that at any time."""
        now = monotonic()
        more = ((at, size) for at, size in self._others if size > others and at >= now - GROWTH_SECONDS)
        self._others = (*more, (now, others))

    def _growth(self, others: int) -> int:
        """How many bytes more others had lately than they have now."""
        since = monotonic() - GROWTH_SECONDS
        most = next((size for seen_at, size in self._others if seen_at >= since), 0)
        return max(0, most - others)

    def _memory(self) -> vram.Memory | None:
        """Of the GPU that models are on, by NVML, or by CUDA if NVML tells nothing; None if nobody tells."""
        if self._is_unknown:
            return None
        if self._is_nvml_mute:
            return self._by_cuda()
        try:
            self._gpu = self._gpu or cuda.gpu(self._chosen.device)
            if self._gpu is None:
                self._is_unknown = True  # `auto`, and no GPU
                return None
            self._seen = vram.memory(self._gpu)
        except vram.VramUnknownError as error:
            return self._without_nvml(error)
        if self._is_nvml_away:
            self._is_nvml_away = False
            logger.warning("NVML tells of the GPU's memory again")
        return self._seen

    def _without_nvml(self, error: vram.VramUnknownError) -> vram.Memory | None:
        if self._seen is not None:  # it told before, and may again
            if not self._is_nvml_away:  # it is asked every few seconds, and a new driver stays unknown until a reboot
                self._is_nvml_away = True
                logger.warning("%s; going by what it told last", error)
            return self._seen
        self._is_nvml_mute, self._why = True, str(error)
        if self._chosen.device != "auto":  # which may mean the CPU
            logger.warning(MUTE, error)
        return self._by_cuda()

    def _by_cuda(self) -> vram.Memory | None:
        found = self._device().memory()
        if found is not None and self._seen is None and self._chosen.device == "auto":
            logger.warning(MUTE, self._why)
        self._seen = found or self._seen
        return self._seen
