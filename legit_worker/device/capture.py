"""Records a computation as a CUDA graph, and computes it again by one call.

In: a function of tensors on the GPU. Out: a `Recording`, whose `replay` launches the same kernels for other values.

torch launches a batch kernel by kernel. For a small model this takes longer than the kernels: 4.5 ms for MiniLM on an
H200. A graph has all of them, and its launch is one call.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from legit_worker.device.memory import recording


class HoldsRecordings(Protocol):
    """Whoever has recordings."""

    def forget(self) -> None:
        """Let go of all of them."""


class Recording:
    """A recorded computation."""

    def __init__(self, graph: Any, inputs: Mapping[str, Any], output: Any, stream: Any) -> None:
        """`stream`: for which torch's allocator took its memory."""
        self._graph, self._inputs, self._stream = graph, inputs, stream
        #: At an address of its own, to which the next replay of any recording may write.
        self._output = output
        self._replays = 0
        #: Before and after the second replay: the first one also brings the graph to the GPU.
        self._began, self._ended = (_cuda().Event(enable_timing=True) for _ in range(2))

    def replay(self, values: Mapping[str, Any]) -> Any:
        """Queue its kernels on the current stream, for these values of its inputs. Returns the output."""
        self._replays += 1
        if self._replays == 2:
            self._began.record()
        for name, place in self._inputs.items():
            value = values[name]
            place.copy_(value if value.is_cuda else value.pin_memory(), non_blocking=True)
        self._graph.replay()
        output = self._output.clone()
        if self._replays == 2:
            self._ended.record()
        # Before the allocator unmaps the memory of graphs that are gone, it waits for this stream alone.
        self._stream.wait_stream(_cuda().current_stream(self._output.device))
        return output

    @property
    def seconds(self) -> float | None:
        """Seconds of the GPU for one replay; None if that is not known yet. Does not wait."""
        if self._replays < 2 or not self._ended.query():
            return None
        return float(self._began.elapsed_time(self._ended)) / 1000


class Recorder:
    """One GPU's recordings. They share their memory, so all replays are on the stream of batches, one after another.

    `CudaDevice` has one, and lets one thread at a time call it.
    """

    def __init__(self, device: str, is_loading: Callable[[], bool]) -> None:
        self._device, self._is_loading = device, is_loading
        self._holders: weakref.WeakSet[Any] = weakref.WeakSet()
        self._recordings: weakref.WeakSet[Recording] = weakref.WeakSet()
        #: Where the recordings have their memory. torch takes no recording in one that has none left.
        self._pool: Any = None
        self._kept = 0

    def __repr__(self) -> str:
        return f"<Recorder on {self._device}, {self.kept:,} bytes>"

    @property
    def kept(self) -> int:
        """Bytes of torch's allocator that recordings keep for their tensors. The last one that goes gives them back."""
        return self._kept if self._recordings else 0

    @property
    def may_replay(self) -> bool:
        """Whether the calling thread is on the stream of batches."""
        cuda = _cuda()
        return bool(cuda.current_stream(self._device) == cuda.default_stream(self._device))

    def record(
        self, holder: HoldsRecordings, compute: Callable[[Mapping[str, Any]], Any], inputs: Mapping[str, Any]
    ) -> Recording | None:
        """Record what `compute` does with tensors like these. Nothing is computed yet. None while weights are read.

        What it does must not depend on their values, so it gets zeros. Raises what `compute` raises, and torch's error
        if it waits for the GPU. `holder` is told when the memory is needed.
        """
        import torch

        with recording:
            if self._is_loading():  # whose thread may lack memory, and torch's allocator can't look for it now
                return None
            before = torch.cuda.memory_reserved(self._device)
            own = {name: torch.zeros_like(value) for name, value in inputs.items()}
            graph, output = self._captured(lambda: compute(own))
            if not isinstance(output, torch.Tensor):
                raise TypeError(f"it gives a {type(output).__name__} and no tensor")
            self._kept = self.kept + max(0, torch.cuda.memory_reserved(self._device) - before)
        found = Recording(graph, own, output, self._stream)
        self._holders.add(holder)
        self._recordings.add(found)
        return found

    def _captured(self, compute: Callable[[], Any]) -> tuple[Any, Any]:
        cuda = _cuda()
        graph, stream = cuda.CUDAGraph(), self._stream
        if self._pool is None or not self._recordings:
            self._pool = cuda.graph_pool_handle()
        stream.wait_stream(cuda.current_stream(self._device))
        with cuda.stream(stream):
            self._warm_up()
            try:
                # `thread_local`: other threads go on meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    output = compute()
                except BaseException:
                    with suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
            except BaseException:
                self._clean_up()
                raise
        return graph, output

    def _clean_up(self) -> None:
        """After a failure, torch before 2.13 would record on for ever, and never give memory back again."""
        import torch

        with suppress(RuntimeError, AttributeError):  # it has ended; torch 2.2 has another name for it
            torch._C._cuda_endAllocateToPool(torch.device(self._device).index, self._pool)
        self._pool = None  # the next recordings have another one: this one stays as it is

    def forget(self) -> None:
        """Let go of all recordings: a batch lacks their memory. What they have is then the allocator's, for later."""
        for holder in list(self._holders):
            holder.forget()
        self._holders.clear()

    @functools.cached_property
    def _stream(self) -> Any:
        """A stream for recording."""
        import torch

        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def _warm_up(self) -> None:
        """Have cuBLAS make this thread's workspace for this stream: else that would be in the recordings' memory."""
        import torch

        few = torch.ones(8, 8, device=self._device)
        torch.nn.functional.linear(few, few, few[0])


def _cuda() -> Any:
    import torch

    return torch.cuda
