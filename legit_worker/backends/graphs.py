"""A model's forward pass as OpenVINO graphs: converts a torch module, compiles its graphs, and computes batches.

In: a torch module and an example of its features; later batches of features. Out: a graph; a launch for each batch,
which OpenVINO computes on its own threads, without the interpreter lock.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import numpy as np
import torch

from legit_worker.device import in_flight
from legit_worker.device.cpu import KERNELS
from legit_worker.device.devices import Launch
from legit_worker.device.streams import division
from legit_worker.errors import BackendError

#: A model's features by name, as its library gives them to its modules.
Features = Mapping[str, Any]

#: The precision in which OpenVINO computes, by `DTYPE`. If none is given, it takes bfloat16 on a CPU that has it. The
#: layers of an int8 graph that are not quantized compute in float32.
PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}

#: The most bytes of weights of a graph that streams compute, too (`device.streams`): it has the weights once more.
MOST_BYTES = 200_000_000

#: Bytes of a weight, by `DTYPE`.
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 4}


@functools.cache
def library() -> Any:
    """Return OpenVINO, without its telemetry: a thread of it forks this process for each event that it sends.

    The smallest conversion was ten forks. Each waits for the batches in flight, and may meet a fork of a task.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as if it was not installed
    import openvino

    return openvino


@functools.cache
def core() -> Any:
    """Return this process's one OpenVINO."""
    return library().Core()


def has_bfloat16() -> bool:
    """Tell whether this CPU multiplies bfloat16."""
    return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def tensors_of(features: Features) -> dict[str, torch.Tensor]:
    """Return the features that are tensors, in a fixed order."""
    return {name: value for name, value in sorted(features.items()) if isinstance(value, torch.Tensor)}


class Rows(torch.nn.Module):
    """A module from a batch's tensors, in their order, to its rows. Other features are the example's."""

    def __init__(self, module: torch.nn.Module, compute: Callable[[dict[str, Any]], Any], example: Features) -> None:
        super().__init__()
        self.module = module  # so that a trace knows its weights
        self._compute = compute
        self._names = list(tensors_of(example))
        self._others = {name: value for name, value in example.items() if name not in self._names}

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self._compute({**self._others, **dict(zip(self._names, tensors, strict=True))})


def convert(module: torch.nn.Module, compute: Callable[[dict[str, Any]], Any], example: Features) -> Any:
    """Return the graph of `compute`, which uses `module`, for batches of any size and length.

    `example`: features of two items of different lengths. Raises `BackendError` with OpenVINO's reason. The graph
    shares the module's weights.
    """
    tensors = tensors_of(example)
    try:
        with quietly(), torch.no_grad():
            rows = Rows(module, compute, example).eval()
            rows(*tensors.values())  # some modules note a dimension in their first batch, which would be the trace's
            graph = library().convert_model(rows, example_input=tuple(tensors.values()))
    except Exception as error:
        raise BackendError(f"OpenVINO can't convert it: {type(error).__name__}: {first_line(error)}") from error
    if len(graph.inputs) != len(tensors):
        raise BackendError(f"its graph reads {len(graph.inputs)} of the {len(tensors)} features {', '.join(tensors)}")
    for port, name in zip(graph.inputs, tensors, strict=True):
        port.get_tensor().set_names({name})
    return graph


def first_line(error: BaseException) -> str:
    """Return the line of an error that says the most: OpenVINO puts its own sources, and what it tried, before it."""
    lines = [stripped for line in str(error).splitlines() if (stripped := line.strip())]
    after = lines[lines.index("Exception:") + 1 :] if "Exception:" in lines else lines
    return next((line for line in after if "/src/" not in line and "Exception from" not in line), str(error))


@contextmanager
def quietly() -> Iterator[None]:
    """Keep out of the log what a trace says of each Python condition. The comparison finds a wrong one."""
    libraries = [logging.getLogger(name) for name in ("transformers", "sentence_transformers")]
    before = [library.level for library in libraries]
    for library in libraries:
        library.setLevel(logging.ERROR)
    # A task that runs meanwhile sets the process's filters of warnings. Celery's worker logs what passes them.
    logged, here = logging.getLogger("py.warnings"), threading.get_ident()

    def is_elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != here

    logged.addFilter(is_elsewhere)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logged.removeFilter(is_elsewhere)
        for library, level in zip(libraries, before, strict=True):
            library.setLevel(level)


def quantized(graph: Any, batches: Sequence[Features]) -> Any:
    """Return the graph with int8 products, whose ranges are those that these batches need. Needs `nncf`."""
    import nncf

    with quietly():
        data = nncf.Dataset([_arrays(batch) for batch in batches])
        return nncf.quantize(graph, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches))


def _arrays(features: Features) -> dict[str, Any]:
    return {name: np.ascontiguousarray(value.numpy()) for name, value in tensors_of(features).items()}


@dataclass(eq=False, kw_only=True)
class Inference(Launch):
    """A batch that OpenVINO's threads compute. Its outputs are copied from OpenVINO's memory when it is done."""

    count: int
    graph: Graph
    request: Any
    began: float
    #: OpenVINO reads the batch from here.
    arrays: dict[str, Any]
    #: A signal's handler may fork on the thread that has it.
    _waiting: threading.RLock = field(default_factory=threading.RLock)

    def __len__(self) -> int:
        return self.count

    def wait(self) -> None:
        """Wait without the interpreter lock. Any thread may, and several may at once."""
        with self._waiting:
            if self.is_done:
                return
            try:
                self.request.wait()
                if self.is_done:  # by such a fork
                    return
                self.outputs = _rows_of(self.request)
                self.seconds = self.graph.seconds_until(self.began, self.began + self.request.latency / 1000)
                self.graph.give_back(self.request)
            except Exception as error:
                self.error = error
            finally:
                self.arrays = {}
                self.is_done = True
                in_flight.landed(self)


def _rows_of(request: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(request.get_output_tensor(0).data))


class Graph:
    """One compiled graph. Any thread may call it: each batch has a request of its own."""

    def __init__(self, graph: Any, dtype: str) -> None:
        self._graph, self._dtype = graph, dtype
        self.names = frozenset(port.get_any_name() for port in graph.inputs)
        constants = [node for node in graph.get_ops() if node.get_type_name() == "Constant"]
        self.memory = sum(node.get_byte_size() for node in constants) * WEIGHT_BYTES[dtype] // 4
        self._compiled = core().compile_model(graph, "CPU", _options(dtype))
        self._requests: list[Any] = []
        # The same graph for several batches at a time, each with a part of the threads; None without streams.
        self._divided: Any = None
        self._requests_beside: list[Any] = []
        self._process = os.getpid()
        # When the batch before was done: one that was handed over meanwhile began then.
        self._ended = 0.0

    def launch(self, features: Features, count: int) -> Launch:
        """Begin a batch. In a forked child, which has none of OpenVINO's threads, compute it at once."""
        arrays = _arrays(features)
        if os.getpid() != self._process:
            return _computed(self._compiled.create_infer_request(), arrays)
        request = self._requests.pop() if self._requests else self._compiled.create_infer_request()
        inference = Inference(
            outputs=None,
            seconds=0.0,
            is_done=False,
            count=count,
            graph=self,
            request=request,
            began=monotonic(),
            arrays=arrays,
        )
        with in_flight.handing_over(inference):
            request.start_async(arrays, share_inputs=True)
        inference.host_seconds = monotonic() - inference.began
        return inference

    def divide(self, *, wanted: bool) -> None:
        """Let this process's streams compute it, too, if it has any and the graph is small. Called once."""
        streams, threads = division()
        if wanted and streams and self.memory <= MOST_BYTES:
            options = _options(self._dtype, streams=streams, threads=streams * threads)
            self._divided = core().compile_model(self._graph, "CPU", options)
            self.memory *= 2
        self._graph = None  # it may hold torch's weights

    def computation(self, features: Features) -> Callable[[], Launch] | None:
        """What computes a batch on a stream's thread, which waits for OpenVINO's; None if streams don't compute it."""
        if self._divided is None or os.getpid() != self._process:
            return None
        return functools.partial(self._compute_beside, _arrays(features))

    def _compute_beside(self, arrays: dict[str, Any]) -> Launch:
        try:
            request = self._requests_beside.pop()
        except IndexError:  # one more stream than before
            request = self._divided.create_infer_request()
        launch = _computed(request, arrays)
        self._requests_beside.append(request)
        return launch

    @property
    def computes_beside(self) -> bool:
        """Whether `computation` gives something."""
        return self._divided is not None

    def seconds_until(self, began: float, ended: float) -> float:
        """Return the seconds of a batch that was handed over at `began` and was done at `ended`."""
        start, self._ended = max(began, self._ended), ended
        return max(0.0, ended - start)

    def give_back(self, request: Any) -> None:
        """Keep a request for the next batch."""
        self._requests.append(request)


class _Computed(Launch):
    """A batch that was computed at once."""

    def __len__(self) -> int:
        return len(self.outputs)


def _computed(request: Any, arrays: dict[str, Any]) -> Launch:
    request.infer(arrays, share_inputs=True)
    return _Computed(outputs=_rows_of(request), seconds=request.latency / 1000)


def _options(dtype: str, *, streams: int = 1, threads: int = 0) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": streams,
        # As many as torch's, which is by the cores that this process may use.
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        # Another worker of this machine would pin its threads to the same cores.
        "ENABLE_CPU_PINNING": False,
        # It keeps a kernel for each shape, 5,000 by default.
        "CPU_RUNTIME_CACHE_CAPACITY": KERNELS,
    }


class Graphs:
    """A model's compiled graphs, one for each kind of input."""

    def __init__(self, graphs: Sequence[Any], dtype: str) -> None:
        self.dtype = dtype
        self._graphs = [Graph(graph, dtype) for graph in graphs]
        self._by_names = {graph.names: graph for graph in self._graphs}

    @property
    def memory(self) -> int:
        """Bytes of their weights."""
        return sum(graph.memory for graph in self._graphs)

    def launch(self, features: Features, count: int) -> Launch:
        """Begin a batch of `count` items. Raises `BackendError` if the load has converted no such input."""
        return self._of(features).launch(features, count)

    @property
    def computes_beside(self) -> bool:
        """Whether `computation` gives something for any batch."""
        return all(graph.computes_beside for graph in self._graphs)

    def divide(self, *, wanted: bool) -> None:
        """Let this process's streams compute them, too, where that is worth its memory. Called once."""
        for graph in self._graphs:
            graph.divide(wanted=wanted)

    def computation(self, features: Features) -> Callable[[], Launch] | None:
        """What computes a batch on a stream's thread; None if `launch` must. Raises `BackendError` as `launch` does."""
        return self._of(features).computation(features)

    def _of(self, features: Features) -> Graph:
        graph = self._by_names.get(frozenset(tensors_of(features)))
        if graph is None:
            names = ", ".join(tensors_of(features))
            raise BackendError(f"openvino has no graph for an input with {names}: set this model's BACKEND=torch")
        return graph

    def compute(self, features: Features) -> torch.Tensor:
        """Compute a batch and wait for it."""
        launch = self.launch(features, 0)
        launch.wait()
        if launch.error is not None:
            raise launch.error
        rows: torch.Tensor = launch.outputs
        return rows
