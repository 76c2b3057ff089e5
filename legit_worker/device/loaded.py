"""torch, where somebody else has brought it: asking must neither import it nor start CUDA.

In: this process. Out: the module, or None.
"""

from __future__ import annotations

import sys
from typing import Any


def loaded_torch() -> Any:
    """torch, once its import is over, which the loader thread may be in the middle of; else None."""
    torch: Any = sys.modules.get("torch")
    return None if torch is None or torch.__spec__._initializing else torch


def started_cuda() -> Any:
    """`torch.cuda`, where it runs in this process; else None."""
    torch = loaded_torch()
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
