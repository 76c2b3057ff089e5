"""torch's thread-bound modes, kept apart per task."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from legit_worker.device import modes


def seen() -> tuple[object, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
    )


MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.float16),
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
