"""Batches without padding: the rows of the padded batch, and layers that see the texts' tokens alone."""

from __future__ import annotations

import logging
import os
import threading
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build_cross_encoder, build_dense, build_sparse
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from legit_worker.backends import traced as tracing
from legit_worker.backends.traced import ByPython, Traced, trace
from legit_worker.backends.unpadded import NAME, without_padding
from legit_worker.errors import BackendError
from legit_worker.models.features import collate as join
from legit_worker.models.kinds import SparseEmbedding, TextEmbedding
from legit_worker.models.reranker import Reranker

VOCABULARY, WIDTH, FIRST = 60, 32, 5

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 300,
    "pad_token_id": 0,
}

#: Options of a kind beside `SMALL`.
OPTIONS: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": WIDTH, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "esm": {"mask_token_id": 1, "token_dropout": False},
    "modernbert": dict.fromkeys(("eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 1),
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 16},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
}

ALLOW = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "nomic_bert", "esm")
#: Their tokens attend to a part of the text, or know where they stand.
REFUSE = ("modernbert", "gemma3_text", "mpnet", "deberta-v2")

LENGTHS = ([3, 9, 3, 1, 20], [7], [4, 4, 4], [30, 2], [2, 30], [1, 1, 2])


class Tokenizer:
    pad_token_id = pad_token_type_id = 0

    def __init__(self, padding_side: str) -> None:
        self.padding_side = padding_side


class Mean(torch.nn.Module):
    """The mean of a text's tokens' vectors, by a model of transformers."""

    def __init__(self, kind: str, of: Any = AutoModel) -> None:
        super().__init__()
        torch.manual_seed(1)
        options = {**SMALL, **OPTIONS.get(kind, {})}
        self.model = of.from_config(AutoConfig.for_model(kind, **options))
        for weight in self.model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.3)
        self.eval()

    def forward(self, features: dict[str, Any]) -> torch.Tensor:
        mask = features["attention_mask"].unsqueeze(-1)
        tokens = self.model(**features)[0]
        rows: torch.Tensor = (tokens * mask).sum(1) / mask.sum(1)
        return rows

    def layers(self) -> Sequence[torch.nn.Module]:
        return next(part for part in self.modules() if isinstance(part, torch.nn.ModuleList))  # type: ignore[return-value]


def text(length: int) -> dict[str, Any]:
    ids = [FIRST + (7 * length + number) % (VOCABULARY - FIRST) for number in range(length)]
    return {"input_ids": ids, "attention_mask": [1] * length}


def collate(items: Sequence[Any], padding_side: str = "right") -> dict[str, Any]:
    return join(items, Tokenizer(padding_side))


def batch(lengths: Sequence[int], padding_side: str = "right") -> dict[str, Any]:
    return collate([text(length) for length in lengths], padding_side)


@pytest.fixture(autouse=True)
def no_other_tests_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_kept", defaultdict(list))


def seen(module: Mean) -> list[int]:
    """How many tokens the last layer gets, of each batch from now on."""
    counts: list[int] = []
    linear = [part for part in module.layers()[-1].modules() if isinstance(part, torch.nn.Linear)][-1]
    linear.register_forward_pre_hook(lambda _, given: counts.append(given[0].shape[:-1].numel()))
    return counts


def made(module: Mean) -> Traced:
    return trace(module, module, collate, [text(length) for length in (2, 3, 3, 5, 8, 13, 40, 200)], name="small")


@pytest.mark.parametrize("kind", ALLOW)
@torch.no_grad()
def test_the_rows_are_those_of_the_padded_batch_and_the_layers_see_no_padding(kind: str) -> None:
    module = Mean(kind)
    way, counts = without_padding(module, module), seen(module)
    assert way is not None
    for lengths in LENGTHS:
        expected = module(batch(lengths))
        counts.clear()
        torch.testing.assert_close(way(batch(lengths)), expected, rtol=1e-4, atol=1e-5)
        assert counts == [sum(lengths)]
    script = made(module)
    assert not script.pads
    for lengths in LENGTHS:
        torch.testing.assert_close(script.compute(batch(lengths)), module(batch(lengths)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_padding_may_be_on_the_left() -> None:
    module = Mean("roberta")  # it counts its places by the mask
    way = without_padding(module, module)
    assert way is not None
    for lengths in LENGTHS:
        given = batch(lengths, "left")
        torch.testing.assert_close(way(dict(given)), module(dict(given)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", REFUSE)
@torch.no_grad()
def test_where_a_token_does_not_see_all_of_its_text_alike_batches_are_padded(kind: str) -> None:
    module = Mean(kind)
    expected = module(batch([3, 200]))
    script = made(module)
    assert script.pads
    torch.testing.assert_close(script.compute(batch([3, 200])), expected, rtol=1e-4, atol=1e-5)
    assert not any("forward" in vars(layer) for layer in module.layers())
    assert module.model.config._attn_implementation != "legit_worker_runs"


@torch.no_grad()
def test_a_module_is_as_it_was_when_a_batch_is_over_also_by_an_error() -> None:
    module = Mean("bert")
    way, given = without_padding(module, module), batch([3, 9])
    assert way is not None
    expected, before = module(given), module.model.config._attn_implementation
    way(given)
    with pytest.raises(IndexError):
        way(given | {"input_ids": given["input_ids"] + VOCABULARY})
    assert module.model.config._attn_implementation == before
    assert torch.equal(module(given), expected)


class TornAttention:
    """A configuration that a signal's handler interrupts once, when it gets its attention back."""

    def __init__(self, of: Any) -> None:
        self.__dict__.update(of=of, is_torn=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.of, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if value != NAME and not self.is_torn:
            self.__dict__["is_torn"] = True
            raise TimeoutError("by a handler")
        setattr(self.of, name, value)


@torch.no_grad()
def test_a_module_is_as_it_was_if_a_handler_raises_while_it_is_restored() -> None:
    module, given = Mean("bert"), batch([3, 9])
    expected, config = module(given), module.model.config
    torn: Any = TornAttention(config)
    for part in module.modules():
        if getattr(part, "config", None) is config:
            part.config = torn
    way, before = without_padding(module, module), config._attn_implementation
    assert way is not None
    with pytest.raises(TimeoutError, match="by a handler"):
        way(given)
    assert config._attn_implementation == before
    assert torch.equal(module(given), expected)


@torch.no_grad()
def test_a_child_that_is_forked_while_a_thread_computes_a_batch_has_the_module_as_it_was() -> None:
    module, given = Mean("bert"), batch([3, 9])
    way, expected = without_padding(module, module), module(given)
    assert way is not None
    before = module.model.config._attn_implementation
    begun, may_go_on = threading.Event(), threading.Event()

    def stop(*_: Any) -> None:
        begun.set()
        may_go_on.wait(10)

    module.layers()[-1].register_forward_pre_hook(stop)
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(way(dict(given)).detach()))
    thread.start()
    assert begun.wait(10)
    if not (child := os.fork()):  # which has no threads of OpenMP, so it computes nothing
        is_changed = any("forward" in vars(layer) for layer in module.layers())
        os._exit(int(is_changed or module.model.config._attn_implementation != before))
    may_go_on.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_configuration_of_another_library_is_left_alone() -> None:
    module = Mean("bert")
    module.config = {"pooling": "mean"}
    assert not made(module).pads


def test_layers_with_much_behind_them_or_that_another_library_changed_are_left_alone() -> None:
    assert without_padding(Mean("bert", AutoModelForMaskedLM), lambda features: features["rows"]) is None
    assert without_padding(torch.nn.Sequential(Mean("bert"), Mean("bert")), lambda features: features["rows"]) is None
    assert without_padding(torch.nn.Linear(3, 3), lambda features: features["rows"]) is None
    module = Mean("bert")
    first = module.layers()[0]
    first.forward = first.forward  # as accelerate's hooks do
    assert without_padding(module, module) is None


class Large(Mean):
    """One that is too large for a trace."""


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> Large:
    monkeypatch.setattr(tracing, "MOST_WEIGHTS", 0)
    return Large("bert")


@torch.no_grad()
def test_a_large_module_computes_no_padding_by_its_own_python(large: Large) -> None:
    subject, counts = made(large), seen(large)
    assert isinstance(subject, ByPython)
    assert not subject.pads
    assert not subject.computes_beside
    assert subject.report() == {"unpadded": True}
    for lengths in LENGTHS:
        expected = large(batch(lengths))
        counts.clear()
        assert torch.allclose(subject.compute(batch(lengths)), expected, atol=1e-5)
        assert counts == [sum(lengths)]


@torch.no_grad()
def test_a_large_module_whose_way_fails_later_pads_from_then_on(
    large: Large, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "legit_worker.backends.traced")
    subject = made(large)
    monkeypatch.setattr(subject, "_script", lambda *tensors: 1 / 0)
    given = batch([3, 9])
    assert torch.equal(subject.compute(dict(given)), large(given))
    assert "the way without padding computes no more" in caplog.text
    assert "ZeroDivisionError" in str(subject.report()["unpadded"])


def test_a_large_module_that_pads_has_no_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "MOST_WEIGHTS", 0)
    with pytest.raises(BackendError, match="would gain little"):
        made(Mean("bert", AutoModelForMaskedLM))


# The built-in kinds.

TEXTS = [
    "a dog",
    "the dogs are out and the cats stay in the house",
    "rain",
    "a text of some more words than the others",
]


@pytest.mark.parametrize("most", [50_000_000, 0], ids=["small", "large"])
def test_texts_and_pairs_of_all_lengths_share_a_batch_and_longer_ones_than_were_compared_do_not(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "MOST_WEIGHTS", most)
    for kind, build, inputs in (
        (TextEmbedding, build_dense, TEXTS),
        (Reranker, build_cross_encoder, [(TEXTS[0], one) for one in TEXTS]),
    ):
        folder = build(tmp_path / kind.__name__)
        model, plain = kind(str(folder), torchscript=True), kind(str(folder))
        model.load("cpu")
        plain.load("cpu")
        items = [model.preprocess(one) for one in inputs]
        assert model.backend["unpadded"] is True
        assert not any(map(model.pads, items))
        assert all(plain.pads(item) for item in items)
        assert len(set(map(model.batch_key, items))) == 1
        for _ in range(3):
            torch.testing.assert_close(model.forward(items), plain.forward(items), rtol=1e-4, atol=1e-5)
        script = model._backend.traced
        assert script is not None
        monkeypatch.setattr(script, "longest", min(item.cost for item in items))
        assert sum(map(model.pads, items)) == len(items) - 1
        assert len(set(map(model.batch_key, items))) == 2
        script.obstacle = "rows differ"
        assert all(map(model.pads, items))


def test_a_sparse_models_batches_are_padded_since_its_vocabulary_is_behind_its_layers(tmp_path: Path) -> None:
    model = SparseEmbedding(str(build_sparse(tmp_path / "sparse")), torchscript=True)
    model.load("cpu")
    assert model.backend == {"backend": "torch", "torchscript": True}
    assert model.pads(model.preprocess("a dog"))
