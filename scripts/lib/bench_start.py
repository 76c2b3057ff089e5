"""`start-up`: from the command to `ready`, and to the first answer; and what `import legit_worker` costs a client.

In: a `Bench`. Out: tables in milliseconds. The first task waits in the queue already when the command is given.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

from bench_contenders import PATH
from bench_figures import OURS, STOCK, Row, Spread, Table, Verdict
from bench_modes import Bench
from celery import Celery
from measure import QUEUE, STAGING, STUCK_SECONDS, StuckError, collect, stage
from services import Side, start_broker, start_side, worker_environment

#: Seconds between two looks at a worker that starts.
LOOK_SECONDS = 0.005
#: What a client does before it sends, and what it does besides in a project that installs this package.
CLIENT = "import time; t = time.perf_counter(); from celery import Celery; "
APP = "app = Celery('x', broker='redis://', backend='redis://'); app.amqp, app.backend; "
OURS_TOO = "import legit_worker; legit_worker.install(app); "
TELL = "print(time.perf_counter() - t)"
#: Milliseconds that a client's import may take beyond Celery's own.
IMPORT_TARGET = 60
#: Fresh clients in each round.
CLIENTS = 5
SIDES = {
    OURS: ("legit_worker", {"LEGIT_WORKER_MODELS__MINILM__PATH": PATH}),
    STOCK: ("stock_project", {"MODEL_PATH": PATH}),
}


def start_up(bench: Bench, mode: str) -> list[Table]:
    bench.stop_all()
    broker = start_broker(bench.processes, "valkey-start")
    ready: dict[str, list[float]] = {name: [] for name in SIDES}
    answered: dict[str, list[float]] = {name: [] for name in SIDES}
    with bench.progress() as progress:
        bar = progress.add_task(mode, total=bench.rounds * len(SIDES))
        for _ in range(bench.rounds):
            for number, name in enumerate(SIDES):
                progress.update(bar, description=f"{mode}: {name}")
                seconds = _start(bench, name, f"{broker}/{number}")
                ready[name].append(1000 * seconds[0])
                answered[name].append(1000 * seconds[1])
                progress.advance(bar)
    names = {"from the command to `ready`": ready, "from the command to the first answer": answered}
    tables = [
        _table(f"start-up, {what}", f"{what}, {bench.rounds} rounds in turn", found) for what, found in names.items()
    ]
    return [*tables, _imports(bench)]


def _start(bench: Bench, name: str, url: str) -> tuple[float, float]:
    """Seconds until the worker is ready, and until its first answer."""
    project, variables = SIDES[name]
    client = _client(url)
    keys = stage(client, ["a text"])
    store: Any = client.client.backend.client
    store.rename(STAGING, QUEUE)
    started = time.perf_counter()
    options = ("--pool=solo", "--loglevel=INFO")
    side = start_side(bench.processes, f"{name} start", project, url, variables, options)
    _until(side, lambda: b" ready." in side.worker.log.read_bytes())
    ready = time.perf_counter() - started
    _until(side, lambda: store.exists(*keys))
    answered = time.perf_counter() - started
    collect(side, keys)
    side.worker.kill()
    store.flushdb()
    return ready, answered


def _client(url: str) -> Side:
    """Something to send with, before there is a worker."""
    worker: Any = None
    return Side(name="client", client=Celery(broker=url, backend=url), worker=worker, url=url)


def _until(side: Side, reached: Any) -> None:
    deadline = time.monotonic() + STUCK_SECONDS
    while not reached():
        side.worker.check()
        if time.monotonic() > deadline:
            raise StuckError(
                f"{side.name} is not up after {STUCK_SECONDS} s. The end of its log:\n{side.worker.tail()}"
            )
        time.sleep(LOOK_SECONDS)


def _imports(bench: Bench) -> Table:
    programs = {OURS: CLIENT + APP + OURS_TOO + TELL, STOCK: CLIENT + APP + TELL}
    found: dict[str, list[float]] = {name: [] for name in programs}
    environment = worker_environment(bench.processes, "redis://")
    with bench.console.status("start-up: imports of a client"):
        for _ in range(bench.rounds * CLIENTS):
            for name, program in programs.items():
                done = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True)
                found[name].append(1000 * float(done.stdout))
    table = _table(
        "imports", f"a client's imports and its app, {bench.rounds * CLIENTS} fresh processes in turn", found
    )
    beyond = Spread.of([one - other for one, other in zip(found[OURS], found[STOCK], strict=True)]).median
    told = f"imports: legit_worker takes {beyond:.0f} ms beyond Celery's own"
    table.verdicts.append(Verdict(reached=beyond <= IMPORT_TARGET, told=told, target=f"≤ {IMPORT_TARGET}"))
    return table


def _table(name: str, title: str, found: dict[str, list[float]]) -> Table:
    rows = [Row(name=one, values=values) for one, values in found.items()]
    return Table(name=name, title=title, unit="ms", rows=rows)
