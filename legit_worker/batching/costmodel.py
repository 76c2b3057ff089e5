"""Predicts what a batch takes, seconds or bytes, from the batches that ran. Pure: it is told both, it measures nothing.

In: `(count, longest, seconds)` of each batch. Out: predicted seconds, and the largest batch that fits a bound on them.
For memory, read bytes for seconds.
"""

from __future__ import annotations

from collections import deque
from itertools import combinations
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

#: Batches remembered per model: enough to see several lengths, few enough to follow a device that slows down.
MEMORY = 64

#: Below this many batches a fit would follow noise; the prior answers, scaled to the batches that ran.
ENOUGH = 6

#: The prior, in seconds per batch, per padded unit, and per padded unit times length: a small transformer on two CPU
#: cores.
PRIOR = np.array((4e-3, 1.2e-4, 1e-8))

#: The same in bytes of activations: a small transformer in float32, whose kernels keep no matrix of attention.
BYTES_PRIOR = np.array((0.0, 2e4, 1.0))

#: Items in the first batch of all, which nothing is known about.
FIRST_BATCH = 8

#: The share of a batch's time that its launch may take. A smaller share would mean longer batches, which the next
#: task waits for, for less than this much more throughput.
LAUNCH_SHARE = 0.05

#: Seconds of a batch that is short enough for anyone. On a CPU larger batches gain by more than the launch they save,
#: which the model doesn't know: with MiniLM, batches this long are about 5 % faster per item than ones of a third.
SHORT = 0.15


#: All choices of the three terms, the whole of them first.
TERMS = tuple(terms for size in (3, 2, 1) for terms in combinations(range(3), size))


class CostModel:
    """`seconds = a + b * padded + c * padded * longest`, all three never negative.

    `a` is the launch, `b` the matrix products, `c` the attention, quadratic in length. Two per model: the engine's, in
    seconds, on the main thread; and the entry's, in bytes, taught by the loader thread before the model is there, and
    by the main thread afterwards.
    """

    def __init__(self, prior: NDArray[np.float64] = PRIOR) -> None:
        self._prior = prior
        self._seen: deque[tuple[int, int, float]] = deque(maxlen=MEMORY)
        self._fit = prior

    def __repr__(self) -> str:
        a, b, c = self._fit
        return f"<CostModel {a:.2e} + {b:.2e}·padded + {c:.2e}·padded·longest, from {len(self._seen)} batches>"

    @overload
    def predict(self, count: int, longest: int) -> float: ...
    @overload
    def predict(self, count: NDArray[np.int64], longest: int) -> NDArray[np.floating[Any]]: ...
    def predict(self, count: int | NDArray[np.int64], longest: int) -> float | NDArray[np.floating[Any]]:
        """Seconds for a batch of `count` items padded to `longest` cost units. Works on an array of counts."""
        a, b, c = (float(term) for term in self._fit)
        return a + count * (longest * (b + c * longest))

    def observe(self, count: int, longest: int, seconds: float) -> None:
        """Learn from a batch that ran."""
        self._seen.append((count, longest, seconds))
        seen = np.array(self._seen)
        self._fit = _fit(seen) if len(seen) >= ENOUGH else self._scaled_prior(seen)

    def _scaled_prior(self, seen: NDArray[np.float64]) -> NDArray[np.float64]:
        """The prior of a device that is so many times faster or slower. The slowest batch counts: bounds must hold."""
        scaled: NDArray[np.float64] = self._prior * (seen[:, 2] / (_features(seen) @ self._prior)).max()
        return scaled

    @property
    def is_known(self) -> bool:
        """Whether any batch was seen."""
        return bool(self._seen)

    def worth_a_try(self, seconds: float) -> int:
        """How many items to try, where all batches had about as many and what more of them take is not known; else 0.

        Not where they took longer than `seconds` already.
        """
        counts = [count for count, _, _ in self._seen]
        if not counts or max(counts) >= 2 * min(counts):
            return 0
        slowest = max(took for _, _, took in self._seen)
        return 2 * max(counts) if slowest <= seconds or max(counts) == 1 else 0

    @property
    def launch_seconds(self) -> float:
        """What any batch takes, however small."""
        return float(self._fit[0])

    @property
    def launch_share_seconds(self) -> float:
        """Of what lasts so long, the launch is `LAUNCH_SHARE`."""
        return self.launch_seconds / LAUNCH_SHARE

    @property
    def enough_seconds(self) -> float:
        """How long a batch must be for its launch to matter little."""
        return max(SHORT, self.launch_share_seconds)

    def largest(self, longest: int, seconds: float) -> int:
        """The most items padded to `longest` whose batch is predicted to end within `seconds`; at least 1."""
        if not self._seen:
            return FIRST_BATCH
        a, b, c = self._fit
        each = longest * (b + c * longest)
        return max(1, int((seconds - a) / each)) if each > 0 else 1_000_000


def _features(seen: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the three terms multiply, a row per batch."""
    count, longest, _ = seen.T
    return np.stack([np.ones_like(count), count * longest, count * longest**2], axis=1)


def _fit(seen: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares on relative errors with no term below zero: of all choices of terms, the best that has none."""
    features = _features(seen) / seen[:, 2][:, None]
    best, error = np.zeros(3), np.inf
    for terms in TERMS:
        chosen = list(terms)
        solution = np.linalg.lstsq(features[:, chosen], np.ones(len(seen)), rcond=None)[0]
        off = float(((features[:, chosen] @ solution - 1) ** 2).sum())
        if (solution >= 0).all() and off < error:
            best, error = np.zeros(3), off
            best[chosen] = solution
        if len(chosen) == 3 and error < np.inf:
            break  # nothing with fewer terms is better
    return best
