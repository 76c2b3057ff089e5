"""Draws what `scripts/bench` wrote. Runs in an environment of its own, which has matplotlib.

In: the JSON file, and the PNG to write. Out: on the left, how many times stock solo's throughput each configuration
reaches, with the least and the greatest round; on the right, latency against throughput under a random load.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plot

#: The tables of the left side, from top to bottom, and the row that the others are divided by.
MODES, REFERENCE = ("noop", "short", "mixed"), "stock solo"
#: Limits, not peers: what the library does without tasks.
LIMIT, OURS, OTHER = "#bbbbbb", "#1f6fb2", "#e0934a"


def main(source: Path, target: Path) -> None:
    report = json.loads(source.read_text())
    tables = [table for table in report["tables"] if table["name"] in MODES]
    points = report["poisson"]
    sides = bool(tables) + bool(points)
    if not sides:
        sys.exit("there is nothing to draw: run a mode that counts tasks, or poisson")
    height = max(4.0, 0.2 * sum(len(table["rows"]) for table in tables) + 0.4 * len(tables))
    figure, axes = plot.subplots(1, sides, figsize=(6.5 * sides, height), squeeze=False, layout="constrained")
    if tables:
        _bars(axes[0][0], tables)
    if points:
        _curves(axes[0][-1], points)
    machine, run = f"{report['cpu']}, {report['cores']} cores", f"{report['rounds']} rounds, {report['started'][:10]}"
    figure.suptitle(f"{machine} · all-MiniLM-L6-v2 · {run}", fontsize=9, color="#555555")
    figure.savefig(target, dpi=110)


def _bars(axis: Any, tables: list[Any]) -> None:
    place, places, names = 0.0, [], []
    for table in tables:
        axis.text(0, place, f"{table['name']}", fontsize=9, fontweight="bold", va="center")
        place += 1
        for row in table["rows"]:
            ratio = row["ratios"].get(REFERENCE)
            if ratio and row["name"] != REFERENCE:
                _bar(axis, place, row["name"], ratio)
                places.append(place)
                names.append(row["name"])
                place += 1
        place += 0.3
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_yticks(places, names, fontsize=8)
    axis.set_ylim(place, -0.7)
    axis.set_xlim(left=0)
    axis.set_xlabel("throughput, times stock Celery solo (grey: without tasks, a limit)", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def _bar(axis: Any, place: float, name: str, ratio: dict[str, float]) -> None:
    colour = OURS if name.startswith("legit_worker") else LIMIT if name.startswith("offline") else OTHER
    errors = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
    axis.barh(place, ratio["median"], height=0.8, color=colour, xerr=errors, error_kw={"linewidth": 0.8})
    axis.text(ratio["high"], place, f" {ratio['median']:.2f}", va="center", fontsize=8)


def _curves(axis: Any, points: list[Any]) -> None:
    for number, name in enumerate(dict.fromkeys(point["name"] for point in points)):
        loads = sorted({point["load"] for point in points if point["name"] == name})
        these = [[point for point in points if (point["name"], point["load"]) == (name, load)] for load in loads]
        across = [statistics.median(point["achieved"] for point in turn) for turn in these]
        for key, style in (("p50", "-"), ("p99", "--")):
            up = [1000 * statistics.median(point[key] for point in turn) for turn in these]
            label = name if key == "p50" else None
            axis.plot(across, up, style, color=f"C{number}", label=label, marker=".", linewidth=1.2)
    axis.set_yscale("log")
    axis.set_xlabel("tasks per second, short titles that come at random times", fontsize=9)
    axis.set_ylabel("latency, ms (line: median, dashes: p99)", fontsize=9)
    axis.legend(fontsize=8, frameon=False)
    axis.grid(axis="y", color="#eeeeee")
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
