"""What figures are: spreads over rounds, ratios within a round, targets, and when a Poisson load sends. Pure.

In: numbers that were measured, one per round. Out: `Table`s, which `bench_report.py` shows and writes.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

#: The names that ratios refer to.
OURS, OPENVINO, BFLOAT16 = "legit_worker", "legit_worker, OpenVINO", "legit_worker, OpenVINO bfloat16"
STOCK, OFFLINE = "stock solo", "offline encode"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A number that was measured once per round."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(low=min(values), median=statistics.median(values), high=max(values))

    def show(self, form: str) -> str:
        return f"[bold]{self.median:{form}}[/] ({self.low:{form}} - {self.high:{form}})"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One configuration in one table."""

    name: str
    #: One per round.
    values: list[float]
    #: Further numbers, by their column's title.
    more: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a target is reached."""

    reached: bool
    #: What was measured, in words.
    told: str
    target: str


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the project promises of a ratio's median."""

    table: str
    name: str
    reference: str
    bound: float
    #: Whether less is better.
    at_most: bool = False

    def judge(self, ratio: float) -> Verdict:
        reached = ratio <= self.bound if self.at_most else ratio >= self.bound
        told = f"{self.table}: {self.name} is {ratio:.2f} times {self.reference}"
        return Verdict(reached=reached, told=told, target=f"{'≤' if self.at_most else '≥'} {self.bound:g}")


#: Ahead means ahead; the others are the project's own aims on two CPU cores.
TARGETS = (
    Target(table="noop", name=OURS, reference=STOCK, bound=3),
    Target(table="short", name=OURS, reference=STOCK, bound=6),
    Target(table="short", name=OURS, reference=OFFLINE, bound=0.9),
    Target(table="short", name=OPENVINO, reference=OFFLINE, bound=1.2),
    Target(table="mixed", name=OURS, reference=STOCK, bound=2.1),
    Target(table="mixed", name=OURS, reference=OFFLINE, bound=1.05),
    Target(table="mixed", name=OPENVINO, reference=OFFLINE, bound=1.6),
    Target(table="mixed", name=BFLOAT16, reference=OFFLINE, bound=3),
    *(
        Target(table=kind, name=OURS, reference=peer, bound=1)
        for kind in ("short", "mixed")
        for peer in ("celery-batches", "Infinity over HTTP", "Infinity in process")
    ),
    Target(table="latency, short", name=OURS, reference=STOCK, bound=1.05, at_most=True),
    Target(table="latency, mixed", name=OURS, reference=STOCK, bound=1.05, at_most=True),
    Target(table="memory", name=OURS, reference=STOCK, bound=0.5, at_most=True),
)


@dataclass(kw_only=True)
class Table:
    """One table of a report. The rows have their values in the same rounds."""

    name: str
    #: What was measured, and how often.
    title: str
    #: Of the values.
    unit: str
    rows: list[Row]
    #: Rows that the others are divided by, if they are there.
    references: tuple[str, ...] = (STOCK,)
    verdicts: list[Verdict] = field(default_factory=list)

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    def ratio(self, row: Row, reference: str) -> Spread | None:
        """Round by round, so that a machine that slows down slows both sides of a ratio."""
        other = self.row(reference)
        return None if other is None else Spread.of(ratios(row.values, other.values))

    def judge(self) -> list[Verdict]:
        """The table's own verdicts, and those of `TARGETS`."""
        return self.verdicts + [verdict for target in TARGETS if (verdict := self._judge(target))]

    def _judge(self, target: Target) -> Verdict | None:
        row = self.row(target.name) if target.table == self.name else None
        ratio = row and self.ratio(row, target.reference)
        return target.judge(ratio.median) if ratio else None

    def to_json(self) -> dict[str, Any]:
        rows = [asdict(row) | {"spread": asdict(Spread.of(row.values))} | self._ratios(row) for row in self.rows]
        return asdict(self) | {"rows": rows, "verdicts": [asdict(verdict) for verdict in self.judge()]}

    def _ratios(self, row: Row) -> dict[str, Any]:
        found = {name: self.ratio(row, name) for name in self.references}
        return {"ratios": {name: asdict(ratio) for name, ratio in found.items() if ratio}}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One open-loop run. Seconds, and tasks a second."""

    name: str
    #: The part of the capacity that was offered.
    load: float
    offered: float
    achieved: float
    p50: float
    p99: float


def ratios(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Each round's value, divided by the reference's of the same round."""
    return [one / other for one, other in zip(values, reference, strict=True)]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that is not exceeded by `share` of the values."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def poisson_times(rate: float, count: int, seed: int) -> list[float]:
    """Seconds from the start at which `count` tasks are sent, each for itself, and `rate` a second on average."""
    choose = random.Random(seed)
    return list(itertools.accumulate(choose.expovariate(rate) for _ in range(count)))
