"""legit_worker against stock Celery and other ways to serve a model, on this machine, in one run, with the same texts.

In: options (`scripts/bench --help`). Out: tables on the terminal, `build/bench.json` with every number behind them, and
in a full run or with `--png` a picture. `docs/benchmark.md` tells what each mode means.

`bench_contenders.py` has the table of configurations, the other `bench_*.py` the modes, `bench_report.py` the report.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench_contenders import CONFIGURATIONS
from bench_environments import ROOT, UnavailableError
from bench_fairness import fairness
from bench_figures import Point, Table
from bench_memory import memory
from bench_modes import Bench, latency, throughput
from bench_poisson import poisson
from bench_report import Report, draw
from bench_start import start_up
from processes import Processes
from rich.console import Console

#: Rounds of a quick and of a full run.
ROUNDS = (2, 3)
#: Load average of the last minute above which a machine isn't idle enough to measure on.
QUIET_LOAD = 0.5

#: The modes that share contenders come first.
MODES: dict[str, Callable[[Bench, str], Any]] = {
    "noop": throughput,
    "short": throughput,
    "mixed": throughput,
    "lists": throughput,
    "two-models": throughput,
    "latency": latency,
    "fairness": fairness,
    "poisson": poisson,
    "memory": memory,
    "start-up": start_up,
}
#: What a run without arguments measures, in less than five minutes.
QUICK = ("noop", "short", "mixed", "latency", "start-up")

#: Columns of a table in a file or a pipe, which have no width of their own.
WIDTH = 140

console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)


def main(processes: Processes, arguments: Sequence[str]) -> int:
    options = _options(arguments)
    _warn_of_company()
    rounds = options.rounds or ROUNDS[options.full]
    bench = Bench(
        processes=processes,
        console=console,
        full=options.full,
        rounds=rounds,
        tasks=options.tasks,
        only=options.only,
    )
    report = Report(console, full=options.full, rounds=rounds, missing=bench.missing)
    for mode in _modes(options):
        _add(report, MODES[mode](bench, mode))
        report.write(options.json)  # after each mode, so that an interrupted run leaves what it has
    report.show_configurations()
    console.print(f"The numbers are in {options.json}")
    if options.png or options.full:
        return _picture(processes, options)
    return 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    names = [one.name for one in CONFIGURATIONS]
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="legit_worker against stock Celery, in turn. Without arguments: some minutes, and no installation.",
        epilog=f"Configurations: {', '.join(names)}.",
    )
    parser.add_argument("modes", nargs="*", metavar="MODE", help=f"{', '.join(MODES)} (default: {', '.join(QUICK)})")
    parser.add_argument("--full", action="store_true", help="all modes, more tasks, and peers, which it installs first")
    parser.add_argument(
        "--only", action="append", metavar="NAME", choices=names, help="this configuration and stock solo"
    )
    parser.add_argument("--tasks", type=_positive, metavar="N", help="tasks of one run (default: as its mode needs)")
    parser.add_argument(
        "--rounds", type=_positive, metavar="N", help=f"turns of each (default: {ROUNDS[0]}, full: {ROUNDS[1]})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", default=ROOT / "build" / "bench.json")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw a picture (full: build/bench.png)")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.modes) - set(MODES)):
        parser.error(f"{unknown[0]!r} is no mode: choose from {', '.join(MODES)}")
    options.json = options.json.absolute()
    return options


def _modes(options: argparse.Namespace) -> list[str]:
    chosen = options.modes or (MODES if options.full else QUICK)
    return [mode for mode in MODES if mode in chosen]


def _positive(value: str) -> int:
    if int(value) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return int(value)


def _warn_of_company() -> None:
    """Says so when other programs are at work: torch's threads wait for each other, and suffer more than most."""
    load = os.getloadavg()[0]
    if load > QUIET_LOAD:
        console.print(f"[yellow]The load average is {load:.1f}: other programs run here, and will be measured too.[/]")


def _add(report: Report, found: list[Table] | tuple[list[Table], list[Point]]) -> None:
    tables, points = found if isinstance(found, tuple) else (found, [])
    report.add(tables, points)


def _picture(processes: Processes, options: argparse.Namespace) -> int:
    target = (options.png or options.json.with_suffix(".png")).absolute()
    try:
        draw(processes, options.json, target)
    except UnavailableError as error:
        console.print(f"[yellow]There is no picture: {error}[/]")
        return 1
    console.print(f"The picture is {target}")
    return 0
