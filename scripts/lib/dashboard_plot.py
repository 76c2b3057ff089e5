"""Draws the dashboard's panels from a Prometheus, for readers who have no Grafana. Needs matplotlib.

    python scripts/lib/dashboard_plot.py http://localhost:9090 MINUTES PNG

In: a Prometheus that has scraped workers. Out: each panel in its place, with the answer to its own queries. Grafana has
no part in it: colours, axes and legends are this script's.
"""

from __future__ import annotations

import json
import re
import sys
import time
import urllib.parse
import urllib.request
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plot
from dashboard import PANELS, WIDTH, Panel, plain

#: Panels beside each other.
COLUMNS = 24 // WIDTH
#: Seconds between two points, as often as deploy/prometheus scrapes.
STEP = 15
#: Curves that a legend names at most.
NAMED = 6


def main(url: str, minutes: float, target: str) -> None:
    rows = -(-len(PANELS) // COLUMNS)
    figure, axes = plot.subplots(rows, COLUMNS, figsize=(14, 2.3 * rows), layout="constrained")
    end = time.time()
    for axis, panel in zip(axes.flat, PANELS, strict=False):
        _draw(axis, panel, url, end - 60 * minutes, end)
    for axis in axes.flat[len(PANELS) :]:
        axis.set_axis_off()
    figure.savefig(target, dpi=75)


def _draw(axis: Any, panel: Panel, url: str, start: float, end: float) -> None:
    axis.set_title(f"{panel.title} ({panel.unit})", fontsize=9, loc="left")
    for legend, query in panel.queries.items():
        for series in _ask(url, plain(query), start, end):
            labels = series["metric"]
            name = re.sub(r"{{(\w+)}}", lambda found, labels=labels: labels.get(found[1], ""), legend)
            minutes, values = zip(*(((at - start) / 60, float(value)) for at, value in series["values"]), strict=True)
            axis.plot(minutes, values, linewidth=1.2, label=name)
    axis.set_xlim(0, (end - start) / 60)
    axis.set_ylim(bottom=0)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.lines:
        axis.legend(handles=axis.lines[:NAMED], fontsize=7, frameon=False)


def _ask(url: str, query: str, start: float, end: float) -> list[dict[str, Any]]:
    """The series that a query gives over that time."""
    parameters = urllib.parse.urlencode({"query": query, "start": start, "end": end, "step": STEP})
    with urllib.request.urlopen(f"{url}/api/v1/query_range?{parameters}") as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return found


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3])
