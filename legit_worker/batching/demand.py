"""What the tasks of late asked of each model. Pure.

In: each call's items, as they arrive. Out: what one more task is likely to bring.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

#: Arrivals remembered: enough to see every model that a mix of tasks calls, few enough to follow a mix that changes.
ARRIVALS = 256


class Demand:
    """Calls, items and cost of the last arrivals, by model. Lives on the main thread, inside the engine."""

    def __init__(self) -> None:
        self._arrivals: deque[tuple[str, int, int, int]] = deque()
        self._calls = 0
        self._items: Counter[str] = Counter()
        self._cost: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<Demand: of {self._calls} calls, cost {dict(self._cost)}>"

    def arrived(self, alias: str, costs: Sequence[int], *, is_new: bool) -> None:
        """Items of a call for this model; `is_new` for the first ones of the call."""
        self._enter(alias, int(is_new), len(costs), sum(costs))
        self._arrivals.append((alias, int(is_new), len(costs), sum(costs)))
        if len(self._arrivals) > ARRIVALS:
            gone, calls, items, cost = self._arrivals.popleft()
            self._enter(gone, -calls, -items, -cost)

    def _enter(self, alias: str, calls: int, items: int, cost: int) -> None:
        self._calls += calls
        self._items[alias] += items
        self._cost[alias] += cost

    def cost_per_call(self, alias: str) -> float:
        """Cost that one more call, whichever model it is for, is likely to bring to this one."""
        return self._cost[alias] / max(1, self._calls)

    def cost_per_item(self, alias: str) -> int:
        """What an item for this model costs on average, rounded up; at least 1."""
        return max(1, -(-self._cost[alias] // max(1, self._items[alias])))
