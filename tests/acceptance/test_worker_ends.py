"""Each way in which a worker is told to end, at each moment: what runs ends or goes back, and nothing runs twice.

The stock sides are solo, for a warm shutdown, and prefork, for a soft and a cold one, which solo does not have.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import TimeLimitExceeded
from celery.result import AsyncResult
from harness import StartWorker, poll
from journal import Journal, Life, begin_life
from needs import find_server, missing

TERM, QUIT, INT = signal.SIGTERM, signal.SIGQUIT, signal.SIGINT

#: Tasks that run at once, and all.
WINDOW, TASKS = 3, 6

MODELS = {"LEGIT_WORKER_MODELS__BUSY__KIND": "stopping:Busy"}

#: The pools: the side of the harness, and the arguments.
POOLS: dict[str, tuple[str, list[str]]] = {
    "solo": ("stock", []),
    "prefork": ("stock", ["--pool=prefork", f"--concurrency={WINDOW}"]),
    "modelpool": ("modelpool", []),
    "modelpool on RabbitMQ": ("modelpool", []),
}


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a worker is told to end."""

    signals: tuple[signal.Signals, ...]
    #: Whether tasks that run may end.
    patient: bool
    exit_codes: tuple[int, ...] = (0,)
    soft_seconds: float = 0.0
    environment: tuple[tuple[str, str], ...] = ()


WAYS = {
    "TERM": Way(signals=(TERM,), patient=True),
    "INT": Way(signals=(INT,), patient=True, exit_codes=(1,)),
    "QUIT with soft shutdown": Way(signals=(QUIT,), patient=True, soft_seconds=5),
    "TERM as QUIT with soft shutdown": Way(
        signals=(TERM,), patient=True, soft_seconds=5, environment=(("REMAP_SIGTERM", "SIGQUIT"),)
    ),
    "QUIT": Way(signals=(QUIT,), patient=False),
    "TERM and QUIT": Way(signals=(TERM, QUIT), patient=False),
    # The first one's 1, unless the second comes before the worker's loop has come round.
    "INT twice": Way(signals=(INT, INT), patient=False, exit_codes=(0, 1)),
    "QUIT twice with soft shutdown": Way(signals=(QUIT, QUIT), patient=False, soft_seconds=300),
}

#: What a worker says once it has heard a signal; the next one comes only then.
HEARD = {TERM: "worker: Warm shutdown", INT: "Hitting Ctrl+C again", QUIT: "Initiating Soft Shutdown"}

#: When the signal comes: seconds that each task takes for itself, and what happened by then. All that will begin have:
#: where one is just about to, its `STARTED` may be stored after the `RETRY` that a cold shutdown stores, on any pool.
MOMENTS: dict[str, tuple[float, Callable[[Journal], bool]]] = {
    "during the load": (0.0, lambda journal: len(journal.happened("begins")) == WINDOW),
    "in a batch": (0.0, lambda journal: any(what == "computes" for _, what, *_ in journal.notes())),
    "in a task's own code": (0.4, lambda journal: bool(journal.happened("goes on"))),
}

#: Celery's own prefork pool breaks where the signal meets what a child just said, which each does when it begins.
LATER = {name: moment for name, moment in MOMENTS.items() if name != "during the load"}

#: Under solo one task runs at a time.
ONE = {"during the load": (0.0, lambda journal: bool(journal.happened("begins")))}

MOMENTS_OF: dict[str, dict[str, tuple[float, Callable[[Journal], bool]]]] = {"prefork": LATER, "solo": LATER | ONE}

SOFT = "QUIT with soft shutdown"

CASES = [
    *(("modelpool", way) for way in WAYS),
    *(("modelpool on RabbitMQ", way) for way in (SOFT, "QUIT")),
    *(("solo", way) for way in ("TERM", "INT")),
    *(("prefork", way) for way in (SOFT, "QUIT")),
]


@dataclass(frozen=True)
class Heirs:
    """The workers, one for each kind of broker, that get what others leave behind."""

    start: StartWorker
    servers: Any
    folder: Path
    lives: dict[str, Life] = field(default_factory=dict)

    def of(self, pool: str) -> Life:
        """The one that meets this pool's workers."""
        where = "rabbitmq" if pool.endswith("RabbitMQ") else "redis"
        if where not in self.lives:
            (self.folder / where).mkdir(exist_ok=True)
            self.lives[where] = begin_life(
                self.start,
                self.folder / where,
                "modelpool",
                broker=self.servers.fresh(broker_url=rabbitmq_url() if where == "rabbitmq" else None),
                project="stopping",
                **MODELS,
            )
        return self.lives[where]


@pytest.fixture(scope="module")
def heirs(start_module_worker: StartWorker, servers: Any, tmp_path_factory: pytest.TempPathFactory) -> Heirs:
    """Started as they are needed."""
    return Heirs(start_module_worker, servers, tmp_path_factory.mktemp("heirs"))


def begin(start: StartWorker, heir: Life, folder: Path, pool: str, soft_seconds: float, **settings: str) -> Life:
    """A worker that is to end, on a queue of its own at its heir's broker."""
    side, arguments = POOLS[pool]
    folder.mkdir(exist_ok=True)
    return begin_life(
        start,
        folder,
        side,
        *arguments,
        broker=dataclasses.replace(heir.worker.broker, queue=f"tests-{uuid.uuid4().hex[:12]}"),
        project="stopping",
        conf={"worker_soft_shutdown_timeout": soft_seconds},
        wait=False,
        LEGIT_WORKER_WINDOW=str(WINDOW),
        **(MODELS | settings),
    )


def end(life: Life, way: Way) -> None:
    """Tell it."""
    for number, name in enumerate(way.signals):
        if number:
            life.worker.wait_for_log(HEARD[way.signals[number - 1]])
        life.worker.signal(name)


def inherit(heir: Life, life: Life) -> None:
    """Have the heir take from the other's queue, and wait until it has all that was there."""
    heir.worker.wait_until_it_hears()
    heir.worker.client.control.add_consumer(life.worker.broker.queue, destination=[heir.worker.name], reply=True)
    heir.worker.answer(life.send("no_model", 1))


@pytest.mark.parametrize(("pool", "name"), CASES, ids=[f"{pool} {way}" for pool, way in CASES])
def test_no_task_is_lost_and_none_that_began_early_or_ended_runs_again(
    start_worker: StartWorker, heirs: Heirs, tmp_path: Path, pool: str, name: str
) -> None:
    """All moments at once, each with a worker of its own."""
    way, heir, released = WAYS[name], heirs.of(pool), tmp_path / "released"
    # What is to be given up must not end before the last signal comes, however slow the machine.
    path = "" if way.patient else str(released)
    if (pool, name) == ("prefork", SOFT) and not heir.worker.broker.stores_results:
        pytest.skip("after it prefork says RETRY of tasks that ended, and of messages the last one counts")
    moments = MOMENTS_OF.get(pool, MOMENTS)
    lives, sent = {}, {}
    for moment, (seconds, _) in moments.items():
        life = begin(start_worker, heir, tmp_path / moment, pool, way.soft_seconds, **dict(way.environment))
        lives[moment] = life
        names = [("late", "early")[number % 2] for number in range(TASKS)]
        sent[moment] = [life.send(name, f"text {number}", seconds, path) for number, name in enumerate(names)]
    for moment, (_, has_come) in moments.items():
        life = lives[moment]
        poll(functools.partial(has_come, life.journal), moment)
        end(life, way)
    for moment, life in lives.items():
        assert life.worker.wait() in way.exit_codes, moment
        if side_of(pool) == "modelpool":
            assert "Traceback" not in life.worker.log
    released.touch()
    for moment, life in lives.items():
        inherit(heir, life)
        check(life, heir, sent[moment], way)


@pytest.mark.parametrize("name", ["QUIT", "TERM and QUIT"])
def test_a_load_that_is_in_a_librarys_own_code_does_not_keep_a_worker_from_its_end(
    start_worker: StartWorker, heirs: Heirs, tmp_path: Path, name: str
) -> None:
    """Python's end would unwind the loader's thread in C++, which ends the process by an abort, or never."""
    models = {"LEGIT_WORKER_MODELS__BUSY__KIND": "stopping:Deep"}
    life = begin(start_worker, heirs.of("modelpool"), tmp_path / "deep", "modelpool", 0, **models)
    life.send("late", "text", 0.0)
    poll(lambda: any(what == "loads" for _, what, *_ in life.journal.notes()), "the load to begin")
    end(life, WAYS[name])
    assert life.worker.wait() in WAYS[name].exit_codes
    assert "terminate called" not in life.worker.log


def side_of(pool: str) -> str:
    return POOLS[pool][0]


def check(life: Life, heir: Life, sent: list[AsyncResult[Any]], way: Way) -> None:
    """What became of each task."""
    begun, ended = life.journal.happened("begins"), life.journal.happened("ends")
    assert len(set(begun)) == len(begun)
    assert begun
    assert len(begun) < TASKS or life.side == "stock"  # on RabbitMQ, solo runs all that its connection had read
    given_up = set(begun) - set(ended)
    assert bool(given_up) is not way.patient
    early = {result.id for number, result in enumerate(sent) if number % 2}
    lost = given_up & early
    expected = {result.id for result in sent} - set(ended) - lost
    heir.worker.settle([result for result in sent if result.id not in lost])
    again = [task for task in heir.journal.happened("begins") if task in {result.id for result in sent}]
    assert sorted(again) == sorted(expected), "each of these once, and no other"
    for number, result in enumerate(sent):
        assert result.state == ("RETRY" if result.id in lost else "SUCCESS")
        assert result.id in lost or result.result == f"TEXT {number}"


def rabbitmq_url() -> str:
    """Of the RabbitMQ that a few tests want, whatever the others use."""
    url = os.environ.get("LEGIT_TEST_AMQP_URL") or missing("LEGIT_TEST_AMQP_URL is not set")
    find_server(url)
    return url


@pytest.mark.parametrize("pool", ["prefork", "modelpool"])
def test_a_soft_shutdown_lets_end_what_can_and_gives_the_rest_back(
    start_worker: StartWorker, heirs: Heirs, tmp_path: Path, pool: str
) -> None:
    heir, file = heirs.of(pool), tmp_path / "file"
    life = begin(start_worker, heir, tmp_path, pool, soft_seconds=3)
    long = life.send("waits_for", str(file))
    quick = [life.send("late", f"text {number}") for number in range(2)]
    poll(lambda: len(life.journal.happened("begins")) == 2 and life.journal.happened("waits"), "all to begin")
    poll(lambda: life.journal.happened("goes on"), "the load")
    life.worker.signal(QUIT)
    assert life.worker.wait() == 0
    assert sorted(life.journal.happened("acks")) == sorted(result.id for result in quick)
    assert [result.result for result in quick] == ["TEXT 0", "TEXT 1"]
    file.touch()
    inherit(heir, life)
    assert heir.worker.answer(long) == "it came"
    assert not {result.id for result in quick} & set(heir.journal.happened("begins")), "these had ended"


@pytest.mark.parametrize("task", ["late", "early"])
def test_a_hard_limit_that_passes_in_a_soft_shutdown_is_the_tasks_end(
    start_worker: StartWorker, heirs: Heirs, tmp_path: Path, task: str
) -> None:
    life = begin(start_worker, heirs.of("modelpool"), tmp_path, "modelpool", soft_seconds=10)
    long = life.send(task, "text", 60.0, time_limit=1)
    life.journal.wait_for(long.id, "goes on")
    life.worker.signal(QUIT)
    assert life.worker.wait() == 0
    assert (long.state, type(long.result)) == ("FAILURE", TimeLimitExceeded)
    assert life.journal.happened("acks") == [long.id]


@pytest.mark.parametrize(("pool", "soft_seconds"), [("prefork", 1.0), ("modelpool", 1.0), ("modelpool", 0.0)])
def test_a_task_whose_own_code_does_not_end_goes_back_too(
    start_worker: StartWorker, heirs: Heirs, tmp_path: Path, pool: str, soft_seconds: float
) -> None:
    """It has the thread that would end it."""
    heir, file = heirs.of(pool), tmp_path / "file"
    life = begin(start_worker, heir, tmp_path, pool, soft_seconds)
    long = life.send("late", "text", 0.0, str(file))
    life.journal.wait_for(long.id, "goes on")
    life.worker.signal(QUIT)
    assert life.worker.wait() == 0
    assert pool == "prefork" or life.journal.happened("cleans up") == [long.id], "a process that is killed does not"
    file.touch()
    inherit(heir, life)
    assert heir.worker.answer(long) == "TEXT"
