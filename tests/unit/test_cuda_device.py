"""The CUDA path over a fake of the calls that it makes of torch; `tests/gpu` has a real one."""

from __future__ import annotations

import importlib.machinery
import os
import sys
import threading
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from budgets import Limited
from fakecuda import FakeCuda, OnGpu

from legit_worker.device import cuda
from legit_worker.device.capture import Recorder
from legit_worker.device.cuda import CudaDevice, prepare_environment, tf32, to_device
from legit_worker.device.memory import give_back_cached, recording
from legit_worker.device.vram import VramUnknownError
from legit_worker.models.handle import outcome
from legit_worker.models.registry import Registry
from legit_worker.settings import ModelSettings


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A GPU that waits for the test to say that it is done."""
    fake = FakeCuda()
    fake.install(monkeypatch)
    cuda.cuda_device.cache_clear()
    return fake


def test_a_launch_returns_before_the_gpu_is_done_and_has_its_outputs_afterwards(gpu: FakeCuda) -> None:
    launch = CudaDevice("cuda:1").launch(lambda: OnGpu(torch.tensor([[1.0], [2.0]])))
    assert not launch.is_done
    assert gpu.calls == ["[cuda:1", "record began", "pinned", "record ended", "cuda:1]"]
    gpu.done.set()
    launch.wait()
    assert (launch.is_done, launch.error, launch.seconds) == (True, None, 0.25)
    assert launch.outputs.tolist() == [[1.0], [2.0]]
    assert launch.outputs.device.type == "cpu"


def test_outputs_may_be_a_list_of_tensors_or_no_tensors_at_all(gpu: FakeCuda) -> None:
    gpu.done.set()
    several = CudaDevice("cuda").launch(lambda: [OnGpu(torch.tensor([1.0])), torch.tensor([2.0])])
    assert [output.tolist() for output in several.outputs] == [[1.0], [2.0]]
    assert CudaDevice("cuda").launch(lambda: ["a", 3]).outputs == ["a", 3]


class Found(NamedTuple):
    score: Any
    label: str


def test_tuples_among_outputs_are_those_of_a_cpu(gpu: FakeCuda) -> None:
    gpu.done.set()
    launch = CudaDevice("cuda").launch(lambda: [Found(OnGpu(torch.tensor(1.0)), "a"), (OnGpu(torch.tensor(2.0)), "b")])
    named, plain = launch.outputs
    assert (named.score.device.type, float(named.score), named.label) == ("cpu", 1.0, "a")
    assert (type(plain), float(plain[0]), plain[1]) == (tuple, 2.0, "b")


def test_a_launch_knows_what_it_took_beside_what_was_there(gpu: FakeCuda) -> None:
    def compute() -> list[str]:
        gpu.peak = gpu.allocated + 64
        return ["output"]

    assert CudaDevice("cuda").launch(compute).peak == 64


def test_what_compute_raises_is_raised_at_once(gpu: FakeCuda) -> None:
    def compute() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    device = CudaDevice("cuda")
    for _ in range(2):  # and nothing stays locked
        with pytest.raises(torch.OutOfMemoryError):
            device.launch(compute)


def test_an_error_that_the_gpu_meets_later_is_the_launchs(gpu: FakeCuda) -> None:
    device = CudaDevice("cuda")
    launch = device.launch(lambda: OnGpu(torch.tensor([1.0])))
    gpu.broken = "CUDA error: an illegal memory access was encountered"
    gpu.done.set()
    launch.wait()
    assert launch.is_done
    assert "illegal memory access" in str(launch.error)
    assert launch.error is not None
    assert device.is_lost(launch.error)


def test_an_error_after_which_the_gpu_still_answers_is_only_its_batchs(gpu: FakeCuda) -> None:
    device = CudaDevice("cuda")
    assert not device.is_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert "synchronize" in gpu.calls
    gpu.calls.clear()
    assert not device.is_lost(ValueError("no business of the GPU's"))
    assert gpu.calls == []


def test_weights_come_by_a_stream_of_their_own_and_are_there_in_the_end(gpu: FakeCuda) -> None:
    device = CudaDevice("cuda")
    for _ in range(2):
        with device.loading():
            gpu.note("copy weights")
    first, *rest = ["[stream of cuda:0", "copy weights", "stream of cuda:0]", "stream done"]
    # Memory of evicted weights, which an abandoned batch may still read, is written again here.
    assert gpu.calls == ["wait for stream of the batches on cuda:0", first, *rest] * 2
    assert device._loading_stream is device._loading_stream


def test_the_allocator_is_held_to_the_limit_but_while_weights_are_read(gpu: FakeCuda) -> None:
    device = CudaDevice("cuda")
    device.hold(250_000)
    assert gpu.share == 0.25
    with device.loading():
        assert gpu.share == 1.0
        device.hold(500_000)
        assert gpu.share == 1.0
    assert gpu.share == 0.5
    device.hold(None)
    assert gpu.share == 1.0
    gpu.broken = "CUDA error: an illegal memory access was encountered"
    device.hold(250_000)  # whoever launches next is told
    gpu.broken = None
    device.hold(2 * gpu.total)
    assert gpu.share == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 3), (100, 33)], ids=str)
def test_a_tensor_is_copied_part_by_part(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.randint(0, 2, shape).to(dtype)
    copy = cuda.copied(values, torch.device("cpu"), torch.empty(64, dtype=torch.uint8))
    assert copy.dtype == dtype
    assert torch.equal(copy, values)
    assert copy.data_ptr() != values.data_ptr() or not values.numel()


def test_a_module_on_a_cpu_is_moved_as_torch_does_it() -> None:
    module = torch.nn.Linear(3, 2)
    weight = module.weight
    cuda.move(module, "cpu")
    assert module.weight is weight


def test_what_torchs_allocator_keeps_is_ours(gpu: FakeCuda) -> None:
    assert CudaDevice("cuda").taken() == 1500


def test_without_cuda_nothing_is_taken_and_nothing_is_lost() -> None:
    assert CudaDevice("cuda").taken() == 0
    assert not CudaDevice("cuda").is_lost(RuntimeError("CUDA error"))


def test_a_gpu_that_torch_does_not_see_is_told_with_the_setting() -> None:
    said = r"LEGIT_WORKER_DEVICE is cuda:99, and torch .* sees \d+ GPUs: install .* or set LEGIT_WORKER_DEVICE=cpu"
    with pytest.raises(VramUnknownError, match=said), CudaDevice("cuda:99").loading():
        pass


class Destination:
    """A `torch.device` of CUDA, to which a tensor of this torch can't go."""

    type = "cuda"


def test_features_go_to_a_gpu_by_pinned_memory(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[Any, bool]] = []

    def to(tensor: torch.Tensor, device: Any, non_blocking: bool = False) -> torch.Tensor:
        moved.append((device, non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", to)
    device = Destination()
    features = to_device({"input_ids": torch.tensor([[1, 2]]), "modality": "text"}, device)
    assert features["modality"] == "text"
    assert moved == [(device, True)]
    assert gpu.calls == ["pinned"]


def test_features_on_a_cpu_are_not_pinned(gpu: FakeCuda) -> None:
    to_device({"input_ids": torch.tensor([[1, 2]])}, torch.device("cpu"))
    assert gpu.calls == []


def test_tf32_is_for_the_block_alone() -> None:
    before = torch.get_float32_matmul_precision()
    with tf32():
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


def test_the_operators_choice_of_allocator_and_order_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_DEVICE_ORDER", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    prepare_environment()
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    prepare_environment()
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ


class Measured:
    """A user's model on the GPU, of 100 bytes, that takes 20 bytes for each padded unit of a batch."""

    fake: FakeCuda

    def load(self, device: str) -> None:
        assert device == "cuda"
        assert threading.current_thread().name == "legit-loader"
        Measured.fake.note("load")

    def memory(self) -> int:
        return 100

    def sample(self, cost: int) -> str:
        return "x" * cost

    def preprocess(self, item: str) -> str:
        return item

    def cost(self, item: str) -> int:
        return len(item)

    def forward(self, batch: Sequence[str]) -> OnGpu:
        Measured.fake.peak = Measured.fake.allocated + 20 * len(batch) * max(map(len, batch))
        return OnGpu(torch.tensor([[len(item)] for item in batch]))

    def postprocess(self, output: torch.Tensor) -> Any:
        return output.tolist()


def test_a_models_batches_are_measured_when_it_is_loaded_and_bounded_by_what_is_left(gpu: FakeCuda) -> None:
    gpu.done.set()
    Measured.fake = gpu
    budget = 100 + 120_000
    spec = ModelSettings(kind=f"{__name__}:Measured")
    registry = Registry({"mine": spec}, lambda: "cuda", Limited(budget))
    entry = registry.get("mine")
    request = registry.residency.request(entry)
    model = outcome(request)
    assert entry.reserve == pytest.approx(1.2 * 20 * 16 * 256, rel=0.01)
    # 120,000 bytes are left, 20 bytes a unit, 1.2 for the unforeseen.
    assert 4800 <= model.largest_cost(100) <= 5000
    assert model.compute(["one", "three"]).outputs.tolist() == [[3], [5]]
    assert gpu.calls.index("[stream of cuda:0") < gpu.calls.index("load") < gpu.calls.index("stream of cuda:0]")
    assert gpu.calls.index("stream done") < gpu.calls.index("record began"), "batches are tried where they will run"


def test_a_torch_that_is_being_imported_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader thread imports it, while the main thread looks what CUDA has."""
    half = types.ModuleType("torch")
    half.__spec__ = importlib.machinery.ModuleSpec("torch", None)
    half.__spec__._initializing = True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", half)
    assert CudaDevice("cuda").taken() == 0
    assert not CudaDevice("cuda").is_lost(RuntimeError("CUDA error"))
    give_back_cached()


class Holder:
    """Has recordings."""

    def __init__(self) -> None:
        self.recordings: list[Any] = []

    def forget(self) -> None:
        self.recordings.clear()


class Graph:
    """A graph that notes what torch is told. What it computes is kept by the one who recorded it."""

    def __init__(self, gpu: FakeCuda) -> None:
        self._gpu = gpu

    def capture_begin(self, **options: Any) -> None:
        assert options == {"pool": "a pool", "capture_error_mode": "thread_local"}
        self._gpu.note("capture")

    def capture_end(self) -> None:
        self._gpu.note("captured")

    def replay(self) -> None:
        self._gpu.note("replay")


@pytest.fixture
def recording_gpu(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """The same, with CUDA graphs, whose streams and pool have names."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(gpu))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "a pool")
    monkeypatch.setattr(Recorder, "_warm_up", lambda recorder: gpu.note("warm up"))
    gpu.total = 10_000
    return gpu


def test_what_graphs_keep_is_no_room_for_weights_and_not_out_of_the_allocators_bound(recording_gpu: FakeCuda) -> None:
    def compute(own: Any) -> torch.Tensor:
        recording_gpu.allocated += 400
        return own["x"] * 2

    device, holder = cuda.cuda_device("cuda"), Holder()
    holder.recordings.append(device.recorder.record(holder, compute, {"x": torch.ones(2)}))
    assert recording_gpu.calls == [
        "wait for stream of the batches on cuda:0",
        *("[stream of cuda:0", "warm up", "capture", "captured", "stream of cuda:0]"),
    ]
    assert device.recorder.kept == 400
    device.hold(1000)
    assert recording_gpu.share == pytest.approx(0.14)
    device.forget_recordings()
    assert (holder.recordings, device.recorder.kept) == ([], 0)


@pytest.mark.parametrize(("name", "numbered"), [("cuda", "cuda:0"), ("cuda:1", "cuda:1")])
def test_memory_is_given_back_while_its_gpu_is_the_current_one(gpu: FakeCuda, name: str, numbered: str) -> None:
    """Torch waits for the work of the current one before it unmaps memory."""
    give_back_cached(name)
    assert gpu.calls == [f"[{numbered}", "empty cache", f"{numbered}]"]


def test_the_stream_of_recordings_waits_for_each_replay(recording_gpu: FakeCuda) -> None:
    """Torch's allocator waits for it before it unmaps the memory of graphs that are gone, and for no other stream."""
    recorder = cuda.cuda_device("cuda").recorder
    recording_ = recorder.record(Holder(), lambda own: own["x"] * 2, {"x": torch.ones(2)})
    assert recording_ is not None
    recording_gpu.calls.clear()
    recording_.replay({"x": torch.ones(2)})
    assert recording_gpu.calls == ["pinned", "replay", "wait for stream of the batches on cpu"]


def test_nothing_is_recorded_while_weights_are_read_or_memory_is_given_back(recording_gpu: FakeCuda) -> None:
    device = cuda.cuda_device("cuda")

    def record() -> Any:
        return device.recorder.record(Holder(), lambda own: own["x"] * 2, {"x": torch.ones(2)})

    with device.loading():
        assert record() is None
    assert record() is not None
    with recording:
        giver = threading.Thread(target=give_back_cached)
        giver.start()
        giver.join(0.05)
        assert "empty cache" not in recording_gpu.calls
    giver.join()
    assert "empty cache" in recording_gpu.calls


def test_after_a_recording_that_failed_torchs_allocator_goes_on(
    recording_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(own: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    def end(index: int, pool: str) -> None:
        recording_gpu.note(f"end of {pool} on {index}")
        raise RuntimeError("it has ended before")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    recorder = cuda.cuda_device("cuda").recorder
    with pytest.raises(RuntimeError, match="not permitted"):
        recorder.record(Holder(), fail, {"x": torch.ones(2)})
    assert recording_gpu.calls[-3:] == ["capture", "captured", "end of a pool on 0"]
    assert recorder.kept == 0
