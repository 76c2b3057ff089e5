"""torch, if the process has imported it: a look must neither import it nor start CUDA.

In: this process. Out: the module, or None.
"""

from __future__ import annotations

import sys
from typing import Any


def loaded_torch() -> Any:
    """Return torch if its import is over; else None: the loader thread may still import it."""
    torch: Any = sys.modules.get("torch")
    return None if torch is None or torch.__spec__._initializing else torch


def started_cuda() -> Any:
    """Return `torch.cuda` if CUDA runs in this process; else None."""
    torch = loaded_torch()
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
