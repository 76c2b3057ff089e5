"""torch's modes and defaults, kept apart per task.

They belong to the thread or to the process, and all tasks share both. In: what a task set, when it parks or calls a
model. Out: what the worker's own code had set, while other code runs; and the task's own again when it goes on.

Kept apart: grad, inference and autocast modes; function and dispatch modes, such as `with torch.device(…)`; the default
device and dtype; the precision of float32 products; the current CUDA device.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from legit_worker.device.imported import imported


@dataclass(frozen=True)
class Found:
    """What other tasks find in torch. The defaults here are torch's own."""

    #: Modes that see every call of a torch function, and every operator: the outermost first.
    function_modes: tuple[Any, ...] = ()
    dispatch_modes: tuple[Any, ...] = ()
    #: The default device, as `torch.set_default_device` and `torch.compile` each note it.
    device: tuple[Any, Any] = (None, None)
    #: None is float32.
    dtype: Any = None
    #: None if torch does not say: a program may have mixed its two ways to set the precision.
    precision: str | None = "highest"


#: Loads that run. One loader thread at a time changes it.
_loads = 0

#: If torch is not imported.
NOTHING_SET = Found()


def found() -> Found:
    """What is set now."""
    torch = imported("torch")
    if torch is None:
        return NOTHING_SET
    function_stack, dispatch_stack = _stacks()
    dtype = torch.get_default_dtype()
    dtype = None if _is_of_load(torch, dtype) else dtype
    return Found(function_stack.modes(), dispatch_stack.modes(), _device(torch), dtype, _precision(torch))


@contextmanager
def loading() -> Iterator[None]:
    """A model is read on this thread: meanwhile, a default dtype of half the size is the load's, and no task's.

    transformers sets the dtype of the whole process while it makes a model (`local_torch_dtype`, 5.24). If a task that
    parks set it back, the model would have weights of another type, and the process might keep that type.
    """
    global _loads
    _loads += 1
    try:
        yield
    finally:
        _loads -= 1


def suspend(others: Found = NOTHING_SET) -> Callable[[], None]:
    """Set what others find. Returns what sets the caller's modes again. Does nothing until torch is imported."""
    torch = imported("torch")
    if torch is None:  # then no task has set a mode yet
        return _nothing
    undo: list[Callable[[], None]] = []
    if torch.is_inference_mode_enabled():
        # The guard's exit sets back what it found, whatever happened in between, so fibers may exit in any order.
        guard = torch.inference_mode(mode=False)
        guard.__enter__()
        undo.append(lambda: guard.__exit__(None, None, None))
    if not torch.is_grad_enabled():
        torch.set_grad_enabled(True)
        undo.append(lambda: torch.set_grad_enabled(False))
    undo += [_suspend_autocast(torch, device) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    undo += _suspend_stacks(torch, others)
    undo += _suspend_defaults(torch, others)
    undo += _suspend_cuda_device(torch)
    if not undo:
        return _nothing

    def restore() -> None:
        for step in reversed(undo):
            step()

    return restore


def _suspend_autocast(torch: Any, device: str) -> Callable[[], None]:
    dtype = torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, False)
    # torch's own defaults: left as it is, the dtype would be what the next task's plain `autocast()` picks up.
    torch.set_autocast_dtype(device, torch.bfloat16 if device == "cpu" else torch.float16)

    def restore() -> None:
        torch.set_autocast_enabled(device, True)
        torch.set_autocast_dtype(device, dtype)

    return restore


class _Stack:
    """One of this thread's two stacks of modes."""

    def __init__(self, count: Callable[[], int], pop: Callable[[], Any], push: Callable[[Any], None]) -> None:
        self.count, self._pop, self._push = count, pop, push

    def modes(self) -> tuple[Any, ...]:
        """The outermost first."""
        if not self.count():
            return ()
        modes = self._take()
        self.set(modes)
        return modes

    def set(self, modes: tuple[Any, ...]) -> None:
        """Have these, and no others."""
        self._take()
        for mode in modes:
            self._push(mode)

    def _take(self) -> tuple[Any, ...]:
        return tuple(self._pop() for _ in range(self.count()))[::-1]


@functools.cache
def _stacks() -> tuple[_Stack, _Stack]:
    """As `torch.overrides` and `torch.utils._python_dispatch` handle them (torch 2.13)."""
    from torch import _C, overrides
    from torch.utils import _python_dispatch as dispatch

    return (
        _Stack(_C._len_torch_function_stack, overrides._pop_mode, overrides._push_mode),
        _Stack(_C._len_torch_dispatch_stack, dispatch._pop_mode, dispatch._push_mode),
    )


def _suspend_stacks(torch: Any, others: Found) -> list[Callable[[], None]]:
    undo: list[Callable[[], None]] = []
    for stack, modes in zip(_stacks(), (others.function_modes, others.dispatch_modes), strict=True):
        if (stack.count() or modes) and (own := stack.modes()) != modes:
            undo.append(functools.partial(stack.set, own))
            stack.set(modes)
    if undo:  # `with torch.device(…)` and the default device are modes, too, and noted besides
        undo.append(functools.partial(_set_device, torch, _device(torch)))
        _set_device(torch, others.device)
    return undo


def _device(torch: Any) -> tuple[Any, Any]:
    noted = sys.modules.get("torch.utils._device")
    return getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None), getattr(noted, "CURRENT_DEVICE", None)


def _set_device(torch: Any, device: tuple[Any, Any]) -> None:
    torch._GLOBAL_DEVICE_CONTEXT.device_context, noted = device
    if "torch.utils._device" in sys.modules:
        sys.modules["torch.utils._device"].CURRENT_DEVICE = noted  # type: ignore[attr-defined]


def _suspend_defaults(torch: Any, others: Found) -> list[Callable[[], None]]:
    undo: list[Callable[[], None]] = []
    dtype, precision = torch.get_default_dtype(), _precision(torch)
    if dtype != (others.dtype or torch.float32) and not _is_of_load(torch, dtype):
        torch.set_default_dtype(others.dtype or torch.float32)
        undo.append(lambda: torch.set_default_dtype(dtype))
    if precision != others.precision and precision and others.precision:
        torch.set_float32_matmul_precision(others.precision)
        undo.append(lambda: torch.set_float32_matmul_precision(precision))
    return undo


def _is_of_load(torch: Any, dtype: Any) -> bool:
    return bool(_loads) and dtype in (torch.float16, torch.bfloat16)


def _precision(torch: Any) -> str | None:
    try:
        return torch.get_float32_matmul_precision()  # type: ignore[no-any-return]
    except RuntimeError:  # `torch.backends.….fp32_precision` was set besides (torch 2.9)
        return None


def _suspend_cuda_device(torch: Any) -> list[Callable[[], None]]:
    """Nothing unless CUDA runs already: the question must not start it."""
    if not torch.cuda.is_initialized() or torch.cuda.current_device() == 0:
        return []
    device = torch.cuda.current_device()
    torch.cuda.set_device(0)
    return [lambda: torch.cuda.set_device(device)]


def _nothing() -> None:
    pass
