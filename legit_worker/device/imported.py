"""What the process has imported, and torch's CUDA if it runs: a look must neither import a library nor start CUDA.

In: this process. Out: the module, or None.
"""

from __future__ import annotations

import sys
from typing import Any


def imported(name: str) -> Any:
    """Return a module if its import is over; else None: another thread may still import it."""
    module = sys.modules.get(name)
    return None if module is None or getattr(module.__spec__, "_initializing", False) else module


def started_cuda() -> Any:
    """Return `torch.cuda` if CUDA runs in this process; else None."""
    torch = imported("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
