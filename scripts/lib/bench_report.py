"""Shows tables on the terminal, and writes them, with the machine that they are from, as JSON and as a picture.

In: `Table`s and `Point`s. Out: text, a JSON file, and a PNG that `bench_plot.py` draws in an environment of its own.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import rich.table
from bench_contenders import CONFIGURATIONS
from bench_environments import ROOT, UnavailableError, plain_environment, python_of
from bench_figures import Point, Spread, Table
from processes import Processes
from rich.console import Console

#: Releases that a figure depends on most.
PACKAGES = ("celery", "kombu", "redis", "torch", "transformers", "sentence-transformers", "legit-worker")
#: Seconds for a picture.
DRAW_SECONDS = 120


class Report:
    """What a run has found so far."""

    def __init__(self, console: Console, *, full: bool, rounds: int, missing: dict[str, str]) -> None:
        self._console, self._missing = console, missing
        self._about = {
            "full": full,
            "rounds": rounds,
            "started": _now(),
            "load_before": os.getloadavg()[0],
        } | _machine()
        self._tables: list[Table] = []
        self._points: list[Point] = []
        self._ran: set[str] = set()

    def add(self, tables: Sequence[Table], points: Sequence[Point]) -> None:
        self._tables += tables
        self._points += points
        for table in tables:
            self._ran |= {row.name for row in table.rows}
            self._console.print(_shown(table))
            for verdict in table.judge():
                mark = "[green]✓" if verdict.reached else "[red]✗"
                self._console.print(f"{mark} {verdict.told}[/] (target {verdict.target})")

    def show_configurations(self) -> None:
        """What was compared, and what is not available with its reason."""
        table = rich.table.Table("configuration", "setting", title="Compared", title_justify="left", title_style="")
        for one in self._configurations():
            setting = f"[yellow]not available: {one['missing']}[/]" if one["missing"] else one["setting"]
            table.add_row(one["name"], setting)
        if table.row_count:
            self._console.print(table)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        contents = self._about | {
            "configurations": self._configurations(),
            "tables": [table.to_json() for table in self._tables],
            "poisson": [asdict(point) for point in self._points],
        }
        path.write_text(json.dumps(contents, indent=1) + "\n")

    def _configurations(self) -> list[dict[str, Any]]:
        return [
            {"name": one.name, "setting": one.setting, "missing": self._missing.get(one.name)}
            for one in CONFIGURATIONS
            if one.name in self._ran or one.name in self._missing
        ]


def draw(processes: Processes, source: Path, target: Path) -> None:
    """A picture of what `write` wrote. Raises `UnavailableError`."""
    script = str(Path(__file__).with_name("bench_plot.py"))
    command = [str(python_of(processes, "plot")), script, str(source), str(target)]
    process = processes.start("plot", command, plain_environment())
    if process.wait(DRAW_SECONDS):
        raise UnavailableError(process.tail())


def _shown(table: Table) -> rich.table.Table:
    shown = rich.table.Table(title=f"\n{table.title}", title_justify="left", title_style="")
    shown.add_column("", no_wrap=True)
    references = [name for name in table.references if table.row(name)]
    further = list(dict.fromkeys(title for row in table.rows for title in row.more))
    for title in (table.unit, *(f"times {name}" for name in references), *further):
        shown.add_column(title, justify="right", no_wrap=True)
    for row in table.rows:
        ratios = [ratio.show(".2f") if (ratio := table.ratio(row, name)) else "" for name in references]
        more = [f"{row.more[title]:.4g}" if title in row.more else "" for title in further]
        values = Spread.of(row.values)
        shown.add_row(row.name, values.show(",.0f" if values.median >= 100 else ".3g"), *ratios, *more)
    return shown


def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """None outside a checkout."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
