"""torch's grad, inference and autocast modes, and the current CUDA device, kept apart per task.

They belong to the thread, and all tasks share one. In: the modes as a task left them when it parked. Out: the
thread's defaults while other code runs, and the task's own modes again when it resumes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from legit_worker.device.loaded import loaded_torch


def suspend() -> Callable[[], None]:
    """Put the thread's defaults back. Returns what restores the caller's modes. Does nothing until torch is loaded."""
    torch = loaded_torch()
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
    undo += _suspend_cuda_device(torch)

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


def _suspend_cuda_device(torch: Any) -> list[Callable[[], None]]:
    """Only where CUDA already runs: asking must not start it."""
    if not torch.cuda.is_initialized() or torch.cuda.current_device() == 0:
        return []
    device = torch.cuda.current_device()
    torch.cuda.set_device(0)
    return [lambda: torch.cuda.set_device(device)]


def _nothing() -> None:
    pass
