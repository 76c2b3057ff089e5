"""What weights will take, before they are read; and what counts as reading them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from budgets import Limited
from huggingface_hub import constants
from safetensors.numpy import save_file

from legit_worker.models import loader
from legit_worker.models.registry import Registry
from legit_worker.models.requirements import is_missing_folder
from legit_worker.models.revision import revision_of
from legit_worker.models.sizes import estimate
from legit_worker.prep.texts import model_folder
from legit_worker.settings import ModelSettings, Settings, doubtful

#: 1,000 floats of four bytes, and 10 integers of eight.
TENSORS = {"weight": np.zeros((100, 10), dtype=np.float32), "ids": np.arange(10)}


def spec(path: Path | str, **more: Any) -> ModelSettings:
    return ModelSettings(kind="embed", path=str(path), **more)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(None, 4080), ("auto", 4080), ("float32", 4080), ("tf32", 4080), ("float16", 2080), ("bfloat16", 2080)],
)
def test_floats_count_as_they_are_loaded_and_integers_as_they_are(tmp_path: Path, dtype: Any, size: int) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert estimate(spec(tmp_path, dtype=dtype)) == size


def test_half_precision_files_count_double_where_they_are_loaded_as_float32(tmp_path: Path) -> None:
    save_file({"weight": np.zeros(10, dtype=np.float16)}, tmp_path / "model.safetensors")
    assert estimate(spec(tmp_path, dtype="float32")) == 40


def test_parts_count_together_and_what_is_there_twice_counts_once(tmp_path: Path) -> None:
    for name in ("model-00001-of-00002", "model-00002-of-00002", "consolidated"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    (tmp_path / "2_Dense").mkdir()
    save_file(TENSORS, tmp_path / "2_Dense" / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 9)
    assert estimate(spec(tmp_path)) == 3 * 4080


def test_other_files_count_by_their_size(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 9)
    assert estimate(spec(tmp_path, dtype="float16")) == 9


@pytest.mark.parametrize("content", [b"", b"x" * 7, b"\xff" * 20, b"\x02" + b"\0" * 7 + b"[]"])
def test_a_file_without_a_header_counts_by_its_size(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert estimate(spec(tmp_path)) == len(content)


def test_a_name_on_the_hub_is_looked_up_among_what_was_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("models--somebody--tiny", "models--sentence-transformers--tiny"):
        snapshot = tmp_path / name / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        save_file(TENSORS, snapshot / "model.safetensors")
        (tmp_path / name / "refs").mkdir()
        (tmp_path / name / "refs" / "main").write_text("a" * 40)
    assert estimate(spec("somebody/tiny", dtype="float16")) == 2080
    assert estimate(spec("tiny")) == 4080
    assert model_folder("tiny") == tmp_path / "models--sentence-transformers--tiny" / "snapshots" / ("a" * 40)
    assert revision_of("tiny", None) == "a" * 40
    for unknown in ("somebody/else", "/no/such/folder", "not a name", "a/b/c"):
        assert estimate(spec(unknown)) == 0


class Clocked:
    """A model that takes two seconds to read, by a clock of the test's own."""

    now: ClassVar[float] = 0.0

    def load(self, device: str) -> None:
        assert threading.current_thread().name == "legit-loader"
        Clocked.now += 2

    preprocess = cost = forward = postprocess = None


class Contended(Limited):
    """Other workers have the turn for two minutes."""

    @contextmanager
    def turn(self) -> Iterator[None]:
        Clocked.now += 120
        yield


@pytest.mark.parametrize("kind", ["own:Class", "embed"])
def test_a_path_that_no_folder_can_have_is_no_folder(kind: str) -> None:
    long = "/{" + "'layers': 12, " * 100 + "}"
    chosen = ModelSettings(kind=kind, path=long, revision="v1")
    assert estimate(chosen) == 0
    assert not list(doubtful(Settings(models={"m": chosen})))
    assert is_missing_folder(long)


def test_a_load_takes_as_long_as_reading_and_moving_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who waits for it is patient by that: not by the import of a library, nor by the wait for other workers.

    The log has both, since its line of the beginning comes before the import.
    """
    caplog.set_level("INFO", loader.__name__)

    def find(name: str, imp: Any) -> type[Clocked]:
        Clocked.now += 30
        return Clocked

    monkeypatch.setattr(loader, "symbol_by_name", find)
    monkeypatch.setattr(loader, "monotonic", lambda: Clocked.now)
    models = Registry({"m": ModelSettings(kind="a:Class")}, lambda: "cpu", Contended(None))
    request = models.residency.request(models.get("m"))
    request.future.result(timeout=20)
    assert models.get("m").load_seconds == 2
    assert "model 'm' loaded on cpu in 152.0 s (2.0 s for its weights), 0 MiB" in caplog.messages
