"""What a worker may take of its device, as others take theirs."""

from __future__ import annotations

import pytest

from legit_worker.device import cuda, vram
from legit_worker.device.capture import Recorder
from legit_worker.models import budget
from legit_worker.models.budget import DeviceBudget
from legit_worker.settings import Amount, Settings

GPU = vram.Gpu("GPU-1", "a GPU", 0)


class World:
    """A GPU of 1,000 bytes, as NVML and torch's allocator would tell."""

    def __init__(self) -> None:
        self.others = 0
        self.reserved = 0
        self.now = 0.0

    def memory(self, gpu: vram.Gpu) -> vram.Memory:
        return vram.Memory(total=1000, free=1000 - self.others - self.reserved, mine=None)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """The one GPU."""
    one = World()
    monkeypatch.setattr(cuda, "gpu", lambda setting: GPU)
    monkeypatch.setattr(vram, "memory", one.memory)
    monkeypatch.setattr(cuda.CudaDevice, "taken", lambda device: one.reserved)
    monkeypatch.setattr(budget, "monotonic", lambda: one.now)
    return one


def test_what_torch_keeps_for_later_is_not_lost(world: World) -> None:
    subject = DeviceBudget(Settings(device="cuda"))
    world.reserved = 400
    assert subject.bytes(weights=100) == 900


def test_what_cuda_graphs_keep_is_neither_for_weights_nor_for_batches(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = DeviceBudget(Settings(device="cuda", vram_limit=Amount(500)))
    world.reserved = 400
    assert subject.bytes(weights=100) == 500
    monkeypatch.setattr(Recorder, "kept", 150)
    assert subject.bytes(weights=100) == 350


def test_a_batch_that_lacks_memory_gets_what_cuda_graphs_keep(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.reserved = 400
    monkeypatch.setattr(Recorder, "forget", lambda recorder: setattr(world, "reserved", 300))
    assert DeviceBudget(Settings(device="cuda")).give_back() == 100


def test_what_others_had_lately_is_left_to_them_for_a_while(world: World) -> None:
    subject = DeviceBudget(Settings(device="cuda"))
    world.others = 300
    assert subject.bytes(0) == 600
    world.others = 100
    assert subject.bytes(0) == 600
    world.now = budget.GROWTH_SECONDS + 1
    assert subject.bytes(0) == 800
    world.others = 500
    assert subject.bytes(0) == 400


def test_it_is_told_in_parts_that_make_the_whole(world: World) -> None:
    world.others, world.reserved = 300, 200
    subject = DeviceBudget(Settings(device="cuda", vram_headroom=Amount(5, "%")))
    report = subject.report(weights=150)
    assert report == {"budget": 650, "total": 1000, "others": 300, "headroom": 50, "free": 500}


def test_what_is_remembered_of_others_stays_small(world: World) -> None:
    subject = DeviceBudget(Settings(device="cuda"))
    for number in range(10_000):
        world.now, world.others = number / 100, 300 + number % 7
        subject.bytes(0)
    assert len(subject._others) <= 7
    assert subject.bytes(0) == 1000 - 306 - 100


def test_threads_that_read_at_once_do_not_disturb_each_other(world: World) -> None:
    subject = DeviceBudget(Settings(device="cuda"))

    class Interrupted(float):
        """A time at whose look back another thread reads."""

        def __sub__(self, other: float) -> float:
            world.now, world.others = float(self), 500
            assert subject.bytes(0) == 400
            return float(self) - other

    world.others = 300
    assert subject.bytes(0) == 600
    world.now, world.others = Interrupted(budget.GROWTH_SECONDS + 1), 100
    assert subject.bytes(0) is not None
    assert subject.bytes(0) is not None


def test_an_nvml_that_fails_for_a_while_is_asked_again_and_the_log_says_so_once(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    subject = DeviceBudget(Settings(device="cuda"))
    assert subject.bytes(0) == 900
    for outage in (1, 2):
        with monkeypatch.context() as broken:
            broken.setattr(vram, "memory", lambda gpu: (_ for _ in ()).throw(vram.VramUnknownError("GPU is lost")))
            assert {subject.bytes(0) for _ in range(720)} == {900}
        assert caplog.text.count("GPU is lost") == outage
        assert subject.bytes(0) == 900
        assert caplog.text.count("tells of the GPU's memory again") == outage
    world.others = 200
    assert subject.bytes(0) == 700


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_without_an_nvml_cuda_tells_once_it_runs(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, device: str
) -> None:
    def mute(setting: str) -> vram.Gpu:
        raise vram.VramUnknownError("free GPU memory is unknown: there is no NVML")

    monkeypatch.setattr(cuda, "gpu", mute)
    monkeypatch.setattr(cuda.CudaDevice, "memory", lambda one: world.memory(GPU) if one.taken() else None)
    subject = DeviceBudget(Settings(device=device))
    assert subject.bytes(0) is None
    assert ("there is no NVML" in caplog.text) is (device == "cuda")
    world.others, world.reserved = 300, 200
    assert subject.bytes(150) == 1000 - 300 - 100
    assert subject.most() == 900
    assert subject.bytes(150) == 600
    assert caplog.text.count("there is no NVML") == 1
    with subject.turn():
        assert subject.report(150)["budget"] == 600


def test_a_machine_without_a_gpu_and_without_an_nvml_says_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def mute(setting: str) -> vram.Gpu:
        raise vram.VramUnknownError("free GPU memory is unknown: there is no NVML")

    monkeypatch.setattr(cuda, "gpu", mute)
    subject = DeviceBudget(Settings(device="auto"))
    assert subject.bytes(0) is None
    assert subject.most() is None
    assert caplog.text == ""
