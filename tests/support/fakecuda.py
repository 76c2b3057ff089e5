"""`torch.cuda` without a GPU: exactly the calls that `device/cuda.py` makes, on a clock that the test turns.

In: a torch for the CPU. Out: the same module with those names replaced for a while, and a note of each call.
"""

from __future__ import annotations

import contextlib
import threading
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU and whose values are on the host. Copies from it find them."""

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> OnGpu:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device="cuda:0")

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default:
            raise NotImplementedError(f"the fake GPU can only be copied from, not {func}")
        return func(*[arg.values if isinstance(arg, OnGpu) else arg for arg in args], **(kwargs or {}))


#: Bytes that are free, if the driver is asked: no test of this fake is about a budget.
PLENTY = 2**40


@dataclass
class FakeCuda:
    """What the GPU did, and what it will do."""

    calls: list[str] = field(default_factory=list)
    #: Set when the GPU is done with all that was launched.
    done: threading.Event = field(default_factory=threading.Event)
    #: What every call answers from now on; the context is broken.
    broken: str | None = None
    total: int = 1_000_000
    allocated: int = 1000
    peak: int = 1000
    #: Of all its memory, what the allocator may have.
    share: float = 1.0
    #: How long it takes over each batch, one after another, and until when it has work.
    seconds: float = 0.0
    busy_until: float = 0.0
    #: Batches that were launched and not waited for to the end, by the times at which they will be done.
    due: list[float] = field(default_factory=list)

    @property
    def in_flight(self) -> int:
        """Batches that it has yet to do."""
        return sum(when > time.monotonic() for when in self.due)

    def launched(self) -> float:
        """It has one more batch. Returns when that will be done."""
        self.busy_until = max(self.busy_until, time.monotonic()) + self.seconds
        self.due.append(self.busy_until)
        return self.busy_until

    def note(self, call: str) -> None:
        """One call of the driver."""
        self.calls.append(call)
        self.answer()

    def answer(self) -> None:
        """What it says to any call."""
        if self.broken:
            raise torch.AcceleratorError(self.broken)

    def hold(self, share: float) -> None:
        """The allocator is told what it may have."""
        self.answer()
        self.share = share

    @contextlib.contextmanager
    def scope(self, call: str) -> Iterator[None]:
        """One that is entered and left."""
        self.calls.append(f"[{call}")
        yield
        self.calls.append(f"{call}]")

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In place of the real names."""
        fake = self

        class Event:
            def __init__(self, **options: Any) -> None:
                self.name = "ended" if options.get("blocking") else "began"
                assert options["enable_timing"]

            def record(self) -> None:
                self.due = fake.launched() if self.name == "ended" else 0.0
                fake.note(f"record {self.name}")

            def synchronize(self) -> None:
                assert fake.done.wait(30)
                time.sleep(max(0.0, self.due - time.monotonic()))
                fake.note(f"wait for {self.name}")

            def elapsed_time(self, other: Event) -> float:
                assert (self.name, other.name) == ("began", "ended")
                return 250.0

        class Stream:
            def __init__(self, device: str) -> None:
                self.device = device

            def synchronize(self) -> None:
                fake.note("stream done")

            def wait_stream(self, other: str) -> None:
                fake.note(f"wait for stream {other}")

        def empty(*size: Any, **options: Any) -> torch.Tensor:
            if options.pop("pin_memory", False):
                fake.note("pinned")
            return real_empty(*size, **options)

        def pin(tensor: torch.Tensor) -> torch.Tensor:
            fake.note("pinned")
            return tensor

        real_empty = torch.empty
        names = {
            "Event": Event,
            "Stream": Stream,
            "stream": lambda stream: fake.scope(f"stream of {stream.device}"),
            "device": lambda name: fake.scope(name),
            "is_initialized": lambda: True,
            "reset_peak_memory_stats": lambda: setattr(fake, "peak", fake.allocated),
            "memory_stats_as_nested_dict": lambda name: {
                "allocated_bytes": {"all": {"current": fake.allocated, "peak": fake.peak}}
            },
            "current_stream": lambda name: f"of the batches on {name}",
            "get_device_properties": lambda name: types.SimpleNamespace(total_memory=fake.total),
            "set_per_process_memory_fraction": lambda share, name: fake.hold(share),
            "memory_reserved": lambda name: fake.allocated + 500,
            "mem_get_info": lambda name: (PLENTY, PLENTY),
            "synchronize": lambda name: fake.note("synchronize"),
            "empty_cache": lambda: fake.note("empty cache"),
            "current_device": lambda: 0,
        }
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
