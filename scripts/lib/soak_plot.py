"""Draws what `scripts/soak` wrote. Runs in an environment of its own, which has matplotlib.

In: the JSON file, and the PNG to write. Out: one curve for each figure over the minutes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plot


def main(source: Path, target: Path) -> None:
    report = json.loads(source.read_text())
    samples = report["samples"]
    minutes = [sample["seconds"] / 60 for sample in samples]
    names = list(samples[0]["figures"])
    figure, axes = plot.subplots(len(names), 1, figsize=(7, 1.6 * len(names)), sharex=True, layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        values = [sample["figures"][name] for sample in samples]
        axis.plot(minutes, values, color="#1f6fb2", linewidth=1.2)
        axis.set_ylim(0, 1.3 * max(*values, 1))
        axis.set_title(name, fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("minutes", fontsize=9)
    told = f"{report['rate']:.0f} tasks a second, {samples[-1]['done']:,} tasks, {report['loads']} loads of models"
    figure.suptitle(told, fontsize=9, color="#555555")
    figure.savefig(target, dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
