"""The project of routed results, and a task that tells how much the worker remembers.

In: as `routed`. Out: its tasks, and the number of blocks of memory that Python has in use.
"""

from __future__ import annotations

import gc
import sys

from routed import app


@app.task(name="blocks")
def blocks() -> int:
    """Once what nobody refers to any more is gone."""
    while gc.collect():
        pass
    return sys.getallocatedblocks()
