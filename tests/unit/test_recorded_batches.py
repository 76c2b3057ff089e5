"""A model's small batches as CUDA graphs, over a recorder that needs no GPU: which are recorded, and when they are not.

`tests/gpu/test_gpu_graphs.py` has real ones.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import MAX_TOKENS, WORDS, build_cross_encoder, build_dense

from legit_worker.backends import recorded
from legit_worker.backends.recorded import (
    COMPARED,
    COMPARED_EACH,
    LENGTHS,
    MOST_SHAPES,
    MOST_TOKENS,
    RecordedBatches,
    Shape,
    shape_of,
)
from legit_worker.models.backend import Backend
from legit_worker.models.features import Prompted, collate
from legit_worker.models.kinds import TextEmbedding
from legit_worker.models.loaded import RESERVE
from legit_worker.models.reranker import Reranker

CPU = torch.device("cpu")


class Replayed:
    """A recording that computes by what was recorded."""

    def __init__(self, compute: Callable[[Mapping[str, Any]], Any], notes: list[str]) -> None:
        self._compute, self._notes = compute, notes
        self.seconds: float | None = None

    def replay(self, values: Mapping[str, Any]) -> Any:
        self._notes.append("replay")
        return self._compute(values)


class Recorder:
    """A recorder whose graphs are what it was given, or as `spoil` makes of them."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.recordings: list[Replayed] = []
        self.may_replay = True
        self.spoil: Callable[[Any], Any] = lambda rows: rows

    def record(self, holder: Any, compute: Callable[[Mapping[str, Any]], Any], inputs: Mapping[str, Any]) -> Replayed:
        compute({name: torch.zeros_like(value) for name, value in inputs.items()})
        self.notes.append("record")
        self.recordings.append(Replayed(lambda values: self.spoil(compute(values)), self.notes))
        return self.recordings[-1]


class Model:
    """Each text's row is the sum of its tokens that are not padding."""

    def __init__(self, longest: int = 64) -> None:
        self.recorder = Recorder()
        self.shapes: list[tuple[int, ...]] = []
        self.batches = RecordedBatches(self.recorder, self._compute, self._collate, longest)  # type: ignore[arg-type]

    def _compute(self, features: dict[str, Any]) -> torch.Tensor:
        assert features["kind"] == "text"
        self.shapes.append(tuple(features["input_ids"].shape))
        return (features["input_ids"] * features["attention_mask"]).sum(1, keepdim=True).float()

    def _collate(self, texts: Any, length: int) -> dict[str, Any]:
        rows = [text["input_ids"] for text in texts]
        length = max(length, *map(len, rows))
        ids = torch.tensor([row + [99] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "kind": "text"}

    def rows(self, *lengths: int) -> list[float] | None:
        """The rows of texts of these lengths, whose tokens are ones."""
        found = self.batches.rows([{"input_ids": [1] * length} for length in lengths], CPU)
        return None if found is None else found.flatten().tolist()


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape's second batch is recorded, whatever a recording takes."""
    monkeypatch.setattr(RecordedBatches, "_price", property(lambda _: 0.0, lambda _, seconds: None), raising=False)


@pytest.fixture
def model(eager: None) -> Model:
    return Model()


def test_the_second_batch_of_a_shape_is_recorded_and_the_next_ones_are_replayed(model: Model) -> None:
    for lengths in ((3, 5, 7), (1, 8, 2), (4, 4, 6)):
        assert model.rows(*lengths) == list(lengths)
    assert model.recorder.notes == ["record", "replay", "replay"]
    assert model.shapes[2] == (3, 7), "torch's batches have no more padding than they need"
    assert set(model.shapes[3:]) == {(4, 8)}
    assert len(model.batches) == 1


def test_other_shapes_have_recordings_of_their_own(model: Model) -> None:
    for _ in range(3):
        assert model.rows(3) == [3]
        assert model.rows(20, 9) == [20, 9]
    assert len(model.batches) == 2
    assert {(1, 8), (2, 24)} <= set(model.shapes[4:])


def test_prompts_without_end_leave_some_recordings_and_the_one_in_use_stays(model: Model) -> None:
    """A pooling that leaves the prompt out needs one for each length of a prompt, and any call may bring a prompt."""

    def of_prompt(length: int) -> None:
        for _ in range(3):
            assert model.batches.rows([{"input_ids": [1] * 3, "prompt_length": length}], CPU) is not None

    for length in range(1, 2 * MOST_SHAPES):
        of_prompt(length)
        of_prompt(0)
    assert len(model.batches) == MOST_SHAPES
    assert len(model.recorder.recordings) == 2 * MOST_SHAPES


def test_what_is_larger_than_a_recording_is_torchs(model: Model) -> None:
    assert model.rows(*[64] * (MOST_TOKENS // 64 + 1)) is None
    assert model.shapes == []


def test_a_recording_whose_rows_differ_is_the_last_one(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model.recorder.spoil = lambda rows: rows * 1.01
    assert [model.rows(3), model.rows(4), model.rows(5)] == [[3], [4], None]
    assert "the rows of 1 texts of 8 tokens differ by 1.0e-02" in model.batches.obstacle
    assert "not recorded as CUDA graphs" in caplog.text


def test_a_model_whose_rows_change_with_padding_is_not_recorded(model: Model) -> None:
    """As a classifier that takes the last token of the row, since it knows no padding."""
    mean = model._compute

    def last(features: dict[str, Any]) -> torch.Tensor:
        mean(features)
        return features["input_ids"][:, -1:].float()

    model.batches._compute = last
    assert [model.rows(3), model.rows(3)] == [None, None]
    assert "with padding and without differ" in model.batches.obstacle


def test_a_model_that_fails_with_padding_is_torchs(model: Model) -> None:
    def fails(features: dict[str, Any]) -> torch.Tensor:
        raise ValueError("Cannot handle batch sizes > 1 if no padding token is defined.")

    model.batches._compute = fails
    assert model.rows(3) is None
    assert "ValueError: Cannot handle batch sizes" in model.batches.obstacle


def test_rows_that_are_no_numbers_are_not_taken_for_equal(model: Model) -> None:
    model.recorder.spoil = lambda rows: rows * float("nan")
    model.rows(3), model.rows(4)
    assert "differ by nan" in model.batches.obstacle


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("operation not permitted when stream is capturing"), "RuntimeError: operation not permitted"),
        (AttributeError("this driver knows no graphs"), "AttributeError: this driver"),
    ],
)
def test_a_model_that_cannot_be_recorded_stays_with_torch(
    model: Model, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(model.recorder, "record", fail)
    assert [model.rows(3), model.rows(4), model.rows(5)] == [[3], [4], None]
    assert told in model.batches.obstacle


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(recorded, "perf_counter", lambda: self.now)

    def slow(self, function: Any, seconds: float) -> Any:
        """The same function, which takes this long."""

        def slow(*arguments: Any) -> Any:
            self.now += seconds
            return function(*arguments)

        return slow


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_shape_is_recorded_once_its_launches_took_as_long_as_a_recording(clock: Clock) -> None:
    """So a burst of few batches of many shapes takes at most twice as long as it would without graphs."""
    model = Model()
    model.batches._compute = clock.slow(model._compute, 1.0)
    model.recorder.record = clock.slow(model.recorder.record, 2.5)  # type: ignore[method-assign]
    model.rows(3), model.rows(3)  # the first recording tells what one takes: 2.5 s, and its own launches
    taken = model.batches._price
    assert len(model.batches) == 1
    for _ in range(int(taken) + 1):
        assert model.rows(20) == [20]
        assert len(model.batches) == 1
    model.rows(20)
    assert len(model.batches) == 2


def test_a_recording_that_lacks_memory_is_tried_later_and_then_still_later(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory may be there then: torch's allocator gives back nothing that it keeps while a graph is recorded."""
    model = Model()
    tries: list[int] = []

    def fail(*_: Any) -> None:
        tries.append(batch)
        clock.now += 2.0
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.batches._compute = clock.slow(model._compute, 1.0)
    with monkeypatch.context() as full:
        full.setattr(model.recorder, "record", fail)
        for batch in range(20):  # noqa: B007, `fail` reads it
            assert model.rows(3) == [3]
    assert tries == [1, 7, 17]
    assert not model.batches.obstacle
    for _ in range(20):
        assert model.rows(3) == [3]
    assert len(model.batches) == 1


def test_a_graph_that_goes_wrong_later_is_found_and_the_log_says_so(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that reads memory that is another's by now."""
    model.rows(3), model.rows(3)
    model.recorder.spoil = lambda rows: rows * 2
    found = [model.rows(3) for _ in range(COMPARED[0])]
    assert found == [[6]] * (COMPARED[0] - 2) + [[3], None]
    assert "may have wrong results: the rows of 1 texts of 8 tokens differ by 1.0e+00" in caplog.text


def test_graphs_are_compared_again_and_again(model: Model) -> None:
    for _ in range(3 * COMPARED_EACH):
        assert model.rows(3) == [3]
    made, replays = len(model.shapes), model.recorder.notes.count("replay")
    model.recorder.spoil = lambda rows: rows * 2
    for _ in range(COMPARED_EACH):
        model.rows(3)
    assert model.batches.obstacle
    assert len(model.shapes) - made <= replays
    assert model.recorder.notes.count("replay") - replays <= COMPARED_EACH


class Growing(torch.nn.Module):
    """Keeps a table that is another one for each longer text, as some rotary embeddings do."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        super().__init__()
        self.make = make
        self.most = 0
        self.table: Any = None

    def forward(self, length: int) -> None:
        if length > self.most:
            self.most, self.table = length, self.make(length)


@pytest.mark.parametrize("make", [torch.ones, lambda length: {"cos": [torch.ones(length)]}])
def test_what_a_module_keeps_for_a_length_stays_as_long_as_the_graph(model: Model, make: Any) -> None:
    """A graph reads the table that was there when it was recorded. If torch freed it, others would write there."""
    growing = Growing(make)
    rows = model._compute

    def compute(features: dict[str, Any]) -> torch.Tensor:
        growing(features["input_ids"].shape[1])
        return rows(features)

    model.batches._compute, model.batches._module = compute, torch.nn.Sequential(growing)
    model.rows(3), model.rows(3)
    table = growing.table if isinstance(growing.table, torch.Tensor) else growing.table["cos"][0]
    address, gone = table.data_ptr(), weakref.ref(table)
    del table
    assert model.rows(40) == [40]
    assert gone() is None
    (known,) = (one for one in model.batches._shapes.values() if one.recording is not None)
    assert address in [tensor.data_ptr() for tensor in known.read]
    model.batches.forget()
    assert len(model.batches) == 0


def test_a_module_that_grows_in_a_register_of_buffers_is_no_exception() -> None:
    module = torch.nn.Linear(2, 2)
    module.register_buffer("cos", torch.ones(3), persistent=False)
    module.vocabulary = {str(number): number for number in range(100_000)}  # type: ignore[assignment]
    assert [len(tensor) for tensor in recorded._read_by(module)] == [3]


def test_a_graph_that_fails_is_given_up_and_torch_computes_the_batch(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.rows(3), model.rows(3)

    def fail(values: Any) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(model.recorder.recordings[0], "replay", fail)
    assert [model.rows(4), model.rows(4)] == [[4], None]
    assert "launch failure" in model.batches.obstacle


def test_a_graph_that_lacks_memory_is_a_batch_that_does(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever launches then frees what graphs have, and tries again."""
    model.rows(3), model.rows(3)

    def fail(values: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.recorder.recordings[0], "replay", fail)
    with pytest.raises(torch.OutOfMemoryError):
        model.rows(4)
    assert not model.batches.obstacle


@pytest.mark.parametrize("nothing", [0.0, float("nan")])
def test_rows_that_tell_nothing_decide_nothing(model: Model, nothing: float) -> None:
    """As those of a text that the pooling leaves out, or of one that is too much for float16."""
    rows, factor = model._compute, [nothing]
    model.batches._compute = lambda features: rows(features) * factor[0]
    for _ in range(3):
        assert model.rows(3) is None
    assert not model.batches.obstacle
    factor[0] = 1.0
    model.rows(3)
    factor[0] = nothing
    model.rows(3)
    factor[0] = 1.0
    assert (len(model.batches), model.batches.obstacle) == (0, "")
    model.rows(3), model.rows(3)
    assert len(model.batches) == 1


def test_what_ends_the_worker_is_not_kept(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise SystemExit(1)

    monkeypatch.setattr(model.recorder, "record", stop)
    model.rows(3)
    with pytest.raises(SystemExit):
        model.rows(3)


def test_a_shape_for_which_the_gpu_takes_longer_than_the_launch_is_torchs_again(model: Model) -> None:
    model.rows(3), model.rows(3)
    model.recorder.recordings[0].seconds = 100.0
    assert model.rows(3) is None
    assert model.rows(20) == [20]
    assert model.rows(3) is None


def test_nothing_is_replayed_beside_the_stream_of_batches(model: Model) -> None:
    model.rows(3), model.rows(3)
    model.recorder.may_replay = False
    assert model.rows(3) is None


def test_what_can_not_be_recorded_now_is_recorded_later(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as loading:
        loading.setattr(model.recorder, "record", lambda *_: None)
        assert [model.rows(3), model.rows(4)] == [[3], [4]]
    assert [model.rows(5), len(model.batches)] == [[5], 1]


def test_forgotten_recordings_are_made_anew(model: Model) -> None:
    for _ in range(2):
        assert [model.rows(3), model.rows(4), model.rows(5)] == [[3], [4], [5]]
        model.batches.forget()
        assert len(model.batches) == 0
    assert model.recorder.notes.count("record") == 2


@given(st.integers(1, 5000), st.integers(1, 600), st.sampled_from([20, 64, 256, 512, 8192]))
def test_a_shape_holds_its_batch_and_wastes_little(count: int, length: int, longest: int) -> None:
    shape = shape_of(count, length, longest)
    if shape is None:
        assert length > min(longest, LENGTHS[-1]) or 2 * count * max(8, 1.5 * length) > MOST_TOKENS
        return
    assert count <= shape.rows < 2 * count
    assert length <= shape.length <= min(longest, max(8, 2 * length))
    assert shape.rows * shape.length <= MOST_TOKENS


def test_there_are_few_shapes() -> None:
    shapes = {shape_of(count, length, 512) for count in range(1, 600) for length in range(1, 513)}
    assert len(shapes - {None}) < 100
    assert Shape(1, 8) in shapes


def test_their_memory_is_that_which_is_set_aside_for_batches() -> None:
    assert RESERVE[0] * RESERVE[1] >= MOST_TOKENS


def test_weights_on_a_gpu_have_recordings_and_those_that_leave_it_have_none() -> None:
    library = [torch.nn.Linear(1, 1)]
    model: Any = SimpleNamespace(path="mine", library=library, compute=None, max_seq_length=lambda: 256)
    backend = Backend("torch", None, None, records=True)
    backend.moved("cpu", model)
    assert backend.recorded is None
    backend.moved("cuda:0", model)
    first = backend.recorded
    assert backend.report() == {"backend": "torch", "cuda_graphs": 0}
    backend.moved("cuda:0", model)
    assert backend.recorded not in (first, None)
    backend.moved("cpu", model)
    assert backend.report() == {"backend": "torch"}


@pytest.mark.parametrize(("records", "limit"), [(False, 256), (True, None)])
def test_nothing_is_recorded_if_nobody_asked_or_texts_have_no_limit(records: bool, limit: int | None) -> None:
    model: Any = SimpleNamespace(library=[torch.nn.Linear(1, 1)], compute=None, max_seq_length=lambda: limit)
    backend = Backend("torch", None, None, records=records)
    backend.moved("cuda:0", model)
    assert backend.recorded is None


@pytest.mark.parametrize("is_pairs", [False, True])
def test_padded_batches_of_a_network_have_the_rows_of_those_without(
    eager: None, tmp_path: Path, is_pairs: bool
) -> None:
    """Whatever is beside a text in its batch: other texts, copies, padding up to the most tokens that it reads."""
    path = build_cross_encoder(tmp_path) if is_pairs else build_dense(tmp_path)
    model: Any = (Reranker if is_pairs else TextEmbedding)(str(path))
    model.load("cpu")
    recorder, chosen = Recorder(), random.Random(1)
    batches = RecordedBatches(
        recorder,  # type: ignore[arg-type]
        model.compute,
        lambda texts, length: collate(texts, model.library.tokenizer, length),
        MAX_TOKENS,
    )

    def text() -> str:
        return " ".join(chosen.choices(WORDS, k=chosen.choice([1, 4, 20, 100])))

    for _ in range(40):
        items = [model.preprocess((text(), text()) if is_pairs else text()) for _ in range(chosen.randint(1, 6))]
        model._backend.recorded = None
        expected = model.forward(items)
        model._backend.recorded = batches
        assert torch.allclose(model.forward(items), expected, atol=1e-5)
    assert recorder.notes.count("replay") > 20
    assert not batches.obstacle


def test_a_prompt_that_the_pooling_leaves_out_has_graphs_of_its_own(eager: None, tmp_path: Path) -> None:
    """Its number of tokens is no tensor, so a graph keeps the one with which it was recorded."""
    model: Any = TextEmbedding(str(build_dense(tmp_path, include_prompt=False)))
    model.load("cpu")
    batches = RecordedBatches(
        Recorder(),  # type: ignore[arg-type]
        model.compute,
        lambda texts, length: collate(texts, model.library.tokenizer, length),
        MAX_TOKENS,
    )
    text = " ".join(WORDS[:2])
    for prompt in [f"{WORDS[0]} "] * 3 + [f"{WORDS[0]} {WORDS[1]} {WORDS[2]} "] * 3:
        items = [model.preprocess(Prompted(text, prompt))]
        model._backend.recorded = None
        expected = model.forward(items)
        model._backend.recorded = batches
        assert torch.allclose(model.forward(items), expected, atol=1e-5)
    assert len(batches) == 2
