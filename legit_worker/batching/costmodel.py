"""Predicts what a batch takes, seconds or bytes, from the batches that ran. Pure: it is told both, it measures nothing.

In: `(count, longest, seconds)` of each batch. Out: predicted seconds, and the largest batch that fits a bound on them.
For memory, read bytes for seconds.
"""

from __future__ import annotations

import sys
from itertools import combinations
from math import isfinite
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

#: Batches remembered per model: enough to see several lengths, few enough to follow a device that slows down.
MEMORY = 64

#: When this many batches in a row took this many times as long as predicted, or as little, the device has changed: say,
#: other programs begin to use the machine. What was seen before is forgotten, or small batches would follow for long.
SURPRISES, SURPRISING = 3, 2.0

#: Batches that tell all three terms apart; a fit to fewer would follow noise.
ENOUGH = 6

#: The prior, in seconds per batch, per padded unit, and per padded unit times length: a small transformer on two CPU
#: cores.
PRIOR = np.array((4e-3, 1.2e-4, 1e-8))

#: Items in a batch that nothing bounds.
UNBOUNDED = 1_000_000

#: The same in bytes of activations: a small transformer in float32, whose kernels keep no matrix of attention.
BYTES_PRIOR = np.array((0.0, 2e4, 1.0))

#: How much larger the largest must be than the smallest before the batches tell a term of the formula apart.
VARIED = 2

#: Seconds that a batch takes at least: CUDA measures half of this, and a batch without kernels took 0.
SHORTEST = 1e-6

#: The three terms.
LAUNCH, UNIT, LENGTH = range(3)


class CostModel:
    """`seconds = a + b * padded + c * padded * longest`, all three never negative.

    `a` is the launch, `b` the matrix products, `c` the attention, quadratic in length. Two per model: the engine's, in
    seconds, on the main thread; and the entry's, in bytes, taught by the loader thread before the model is there, and
    by the main thread afterwards.

    Fewer than `enough` batches, or batches of one size, don't tell the launch from the rest. `predict` then follows the
    prior, and whatever bounds a batch (`at_most`, `largest`, `launch_seconds`) counts all of the time as the items'.
    """

    def __init__(self, prior: NDArray[np.float64] = PRIOR, enough: int = 2) -> None:
        self._prior = prior
        # Batches from which on a fit is better than the prior.
        self._enough = enough
        # A row per batch, as it was observed.
        self._seen = np.empty((0, 3))
        self._fit = self._cautious = _law(prior)
        # While all batches have about as many items: the most items, the largest padded cost, the most seconds.
        self._alike: tuple[int, int, float] | None = None
        # Batches in a row that took much longer than predicted, counted upwards, or much less, counted downwards.
        self._surprises = 0

    def __repr__(self) -> str:
        a, b, c = self._fit
        return f"<CostModel {a:.2e} + {b:.2e}·padded + {c:.2e}·padded·longest, from {len(self._seen)} batches>"

    @overload
    def predict(self, count: float, longest: float) -> float: ...
    @overload
    def predict(self, count: NDArray[np.int64], longest: NDArray[np.int64]) -> NDArray[np.floating[Any]]: ...
    def predict(
        self, count: float | NDArray[np.int64], longest: float | NDArray[np.int64]
    ) -> float | NDArray[np.floating[Any]]:
        """Seconds for a batch of `count` items padded to `longest` cost units. Works on arrays."""
        a, b, c = self._fit
        return a + count * (longest * (b + c * longest))

    def at_most(self, count: int, longest: int) -> float:
        """The same, and what the batches have not shown counts as the items' time."""
        a, b, c = self._cautious
        return a + count * (longest * (b + c * longest))

    def observe(self, count: float, longest: float, seconds: float) -> None:
        """Learn from a batch that ran. Errors are relative, so a batch of 0 seconds would count without end."""
        if not isfinite(seconds):
            return
        seconds = max(seconds, SHORTEST)
        self._seen = np.vstack([self._seen, (count, longest, seconds)])[-MEMORY:]
        if self._is_changed(self.predict(count, longest), seconds):
            self._seen = self._seen[-SURPRISES:]
        seen = self._seen
        if len(seen) >= self._enough and _differ(seen[:, 0] * seen[:, 1]):
            self._fit = self._cautious = _law(_fit(seen, self._prior))
        else:
            # The slowest of the last ones counts, since bounds must hold. A first batch that was slow by itself is
            # soon not among them.
            last = seen[-ENOUGH:]
            self._fit = _law(self._prior * _slowest(last, self._prior))
            each = self._prior * (0, 1, 1)
            self._cautious = _law(each * _slowest(last, each))

        counts, lengths, took = seen.T
        self._alike = None
        if not _differ(counts):
            self._alike = int(counts.max()), int((counts * lengths).max()), float(took.max())

    def _is_changed(self, predicted: float, seconds: float) -> bool:
        """Whether this batch is one too many that has nothing to do with those before."""
        if seconds > SURPRISING * predicted:
            self._surprises = max(0, self._surprises) + 1
        elif seconds < predicted / SURPRISING:
            self._surprises = min(0, self._surprises) - 1
        else:
            self._surprises = 0
        return abs(self._surprises) >= SURPRISES

    @property
    def is_known(self) -> bool:
        """Whether any batch was seen."""
        return len(self._seen) > 0

    @property
    def launch_seconds(self) -> float:
        """What any batch takes, however small; 0 until batches of several sizes have shown it."""
        return self._cautious[LAUNCH]

    def worth_a_try(self, longest: int, seconds: float) -> int:
        """How many items to try, padded to `longest`, if all batches had about as many items; else 0.

        Twice as many as before: what more items take is not known. 0 also if batches took longer than `seconds`
        already, unless single items did: then only a batch of two tells whether that is the launch.
        """
        if self._alike is None:
            return 0
        most, padded, slowest = self._alike
        if most > 1 and slowest > seconds:
            return 0
        return min(2 * most, max(2, 2 * padded // longest))

    def largest(self, longest: int, seconds: float) -> int:
        """The most items padded to `longest` whose batch takes `seconds` at most; at least 1."""
        a, b, c = self._cautious
        each = longest * (b + c * longest)
        return max(1, int((seconds - a) / each)) if each > 0 else UNBOUNDED


def _law(terms: NDArray[np.float64]) -> tuple[float, float, float]:
    a, b, c = map(float, terms)
    return a, b, c


def _differ(sizes: NDArray[np.float64]) -> bool:
    return bool(sizes.max() >= VARIED * sizes.min())


def _slowest(seen: NDArray[np.float64], prior: NDArray[np.float64]) -> float:
    """How many times slower than the prior the slowest batch was."""
    return float((seen[:, 2] / (_features(seen) @ prior)).max())


def _features(seen: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the three terms multiply, a row per batch."""
    count, longest, _ = seen.T
    return np.stack([np.ones_like(count), count * longest, count * longest**2], axis=1)


def _fit(seen: NDArray[np.float64], prior: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares on relative errors, with no term below zero (Lawson and Hanson, 1974).

    Few batches, or batches of one length, don't tell attention from the rest: it keeps the prior's ratio to the rest.
    """
    features = _features(seen) / seen[:, 2][:, None]
    told = [LAUNCH, UNIT, LENGTH]
    if len(seen) < ENOUGH or not _differ(seen[:, 1]):
        told.remove(LENGTH)
        ratio = prior[LENGTH] / prior[UNIT]
        features[:, UNIT] += ratio * features[:, LENGTH]
    best = np.zeros(3)
    scale = features[:, told].max(axis=0)
    best[told] = nearest_to_one(features[:, told] / scale) / scale
    if LENGTH not in told:
        best[LENGTH] = ratio * best[UNIT]
    return best


def nearest_to_one(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """The terms, none of them negative, that bring each row's sum nearest to 1.

    Asks scipy if a model's library has imported it already: its solver takes a third of the time. To import it here
    would keep the main thread between two batches. While a loader thread imports it, the module lacks its solver.
    """
    if nnls := getattr(sys.modules.get("scipy.optimize"), "nnls", None):
        solution: NDArray[np.float64] = nnls(rows, np.ones(len(rows)))[0]
        return solution
    return best_choice(rows)


def best_choice(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same without scipy: of all choices of terms, the best that has none below zero."""
    columns = range(rows.shape[1])
    best, error = np.zeros(len(columns)), np.inf
    for chosen in (list(some) for size in reversed(columns) for some in combinations(columns, size + 1)):
        solution = np.linalg.lstsq(rows[:, chosen], np.ones(len(rows)), rcond=None)[0]
        off = float(((rows[:, chosen] @ solution - 1) ** 2).sum())
        if (solution >= 0).all() and off < error:
            best, error = np.zeros(len(columns)), off
            best[chosen] = solution
            if len(chosen) == len(columns):
                break  # no choice of fewer terms is better
    return best
