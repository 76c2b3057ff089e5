"""What this process's broker room counts for metrics: renewed and recovered messages, and dead ones.

The main thread and the lease's may both write. Neither waits for the other: a number may be one too small.
"""

from __future__ import annotations

from collections import Counter

#: By what happened to messages: `poisoned`, `unreadable`, `renewed`, `recovered`.
tally: Counter[str] = Counter()
