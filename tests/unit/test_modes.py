"""torch's modes and defaults, kept apart per task."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from legit_worker.device import modes


def seen() -> tuple[object, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_float32_matmul_precision(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch._C._len_torch_function_stack(),
        type(torch.ones(1)),
        torch.ones(1).device,
    )


class Passing(TorchFunctionMode):
    """Changes nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@contextmanager
def precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.float16),
    "device": lambda: torch.device("meta"),
    "function mode": Passing,
    "dispatch mode": FakeTensorMode,
    "default device": default_device,
    "default dtype": default_dtype,
    "precision": precision,
}


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_off_while_its_task_is_parked_and_on_again_after(mode: str) -> None:
    defaults = seen()
    with MODES[mode]():
        inside = seen()
        restore = modes.suspend()
        assert seen() == defaults
        restore()
        assert seen() == inside
    assert seen() == defaults


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("second", MODES)
def test_tasks_may_resume_and_end_in_another_order_than_they_parked(first: str, second: str) -> None:
    defaults = seen()
    a, b = MODES[first](), MODES[second]()
    a.__enter__()
    a_inside = seen()
    a_resume = modes.suspend()
    b.__enter__()
    b_inside = seen()
    b_resume = modes.suspend()

    a_resume()
    assert seen() == a_inside
    a.__exit__(None, None, None)
    assert seen() == defaults
    b_resume()
    assert seen() == b_inside
    b.__exit__(None, None, None)
    assert seen() == defaults


def test_a_task_may_park_while_the_loader_thread_is_importing_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    half = ModuleType("torch")
    half.__spec__ = ModuleSpec("torch", None)
    half.__spec__._initializing = True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", half)
    modes.suspend()()


def test_others_find_what_was_set_before_the_task_began() -> None:
    """A project may set a default device or a precision for all its tasks, when it is imported."""
    with default_dtype(), precision(), default_device():
        projects, others = seen(), modes.found()
        with torch.device("cpu"):
            own = seen()
            assert own != projects
            restore = modes.suspend(others)
            assert seen() == projects
            restore()
            assert seen() == own
        torch.set_default_dtype(torch.float16)
        restore = modes.suspend(others)
        assert seen() == projects
        restore()
        assert torch.get_default_dtype() == torch.float16


def test_two_ways_to_set_a_precision_at_once_are_left_alone() -> None:
    """torch refuses to say what holds then."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has one way")
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        modes.suspend(modes.found())()
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_the_default_dtype_of_a_load_is_no_tasks() -> None:
    """transformers sets it for the whole process, on the loader thread, while tasks park and go on."""
    try:
        with modes.loading():
            torch.set_default_dtype(torch.bfloat16)
            assert modes.found().dtype is None
            restore = modes.suspend()
            assert torch.get_default_dtype() is torch.bfloat16
            torch.set_default_dtype(torch.float32)
        restore()
        assert torch.get_default_dtype() is torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_a_task_sets_during_a_load_is_put_aside_all_the_same() -> None:
    try:
        with modes.loading():
            torch.set_default_dtype(torch.float64)
            restore = modes.suspend()
            assert torch.get_default_dtype() is torch.float32
            restore()
            assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
