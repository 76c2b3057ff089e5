"""More models than fit: every task is answered, memory is never overdrawn, and swaps are few."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from harness import StartWorker, Worker, poll
from traces import FIT, MODELS, least_loads, skewed

from legit_worker.errors import DeviceOutOfMemoryError

MIB = 2**20

TASKS = 1500


#: Bytes that a batch takes for each unit of its padded cost, and what is reserved for that, at most.
EACH, RESERVE = 8 * 2**10, 40 * MIB


def models(count: int, *, load_seconds: float, limit: int = FIT) -> dict[str, str]:
    """So many models of 100 MiB, a millisecond a batch, and room for a few and a batch."""
    variables = {
        "LEGIT_WORKER_ENABLED": "1",
        "LEGIT_WORKER_DEVICE": "simulated",
        "LEGIT_WORKER_VRAM_LIMIT": str(100 * MIB * limit + RESERVE),
    }
    for number in range(count):
        variables[f"LEGIT_WORKER_MODELS__M{number}__KIND"] = "simulated"
        variables[f"LEGIT_WORKER_MODELS__M{number}__PATH"] = f"0.001,0,{100 * MIB},{load_seconds},{EACH}"
    return variables


@pytest.mark.parametrize("window", ["1024", "64"])
def test_skewed_demand_for_more_models_than_fit(start_worker: StartWorker, window: str) -> None:
    variables = models(MODELS, load_seconds=0.1) | {"LEGIT_WORKER_WINDOW": window}
    worker = start_worker("project", "--loglevel=WARNING", environment=variables, wait=False)
    worker.wait_until_it_hears()
    wanted = skewed(TASKS)
    results = [worker.send("one", f"task {number}", f"m{model}") for number, model in enumerate(wanted)]
    memory = []
    while not all(result.ready() for result in results[-100:]):
        memory.append(worker.pool()["memory"])
        time.sleep(0.1)
    worker.answers(results)
    assert all(result.successful() for result in results)
    pool = worker.pool()
    assert {model["items"] for model in pool["models"].values()} != {0}
    assert sum(model["items"] for model in pool["models"].values()) == TASKS
    assert max(seen["weights"] for seen in memory) <= FIT * 100 * MIB
    # The device refuses to be overdrawn, and never had to.
    assert pool["memory"]["peak"] <= pool["memory"]["total"] == pool["memory"]["budget"]
    assert "out_of_memory" not in pool
    loads = sum(model["loads"] for model in pool["models"].values())
    print(f"window {window}: {loads} loads; in turn, at least {least_loads(wanted, FIT)}")
    assert MODELS <= loads <= 1.5 * least_loads(wanted, FIT)


def test_an_evicted_model_is_out_of_everybodys_hands_before_the_next_is_loaded(
    start_worker: StartWorker, tmp_path: Path
) -> None:
    """A failed task's traceback has it, and Celery's own frames are in a cycle with that."""
    (tmp_path / "weights.bin").write_bytes(b"1")
    variables = {"LEGIT_WORKER_ENABLED": "1", "LEGIT_WORKER_DEVICE": "cpu", "LEGIT_WORKER_VRAM_LIMIT": str(FIT)}
    for number in range(MODELS):
        variables[f"LEGIT_WORKER_MODELS__M{number}__KIND"] = "custom_models:Alive"
        variables[f"LEGIT_WORKER_MODELS__M{number}__PATH"] = str(tmp_path)
    worker = start_worker("project", environment=variables)
    items = ("a task", "a bad task")
    answers = worker.answers([worker.send("one", items[model % 2], f"m{model}") for model in skewed(TASKS)])
    answers = [answer.args[0] if isinstance(answer, Exception) else answer for answer in answers]
    assert set(answers) <= set(range(1, FIT + 1))
    loads = sum(model["loads"] for model in worker.pool()["models"].values())
    assert loads > MODELS, "nothing was evicted: this shows nothing"


def test_batches_are_as_large_as_memory_allows_and_never_larger(start_worker: StartWorker) -> None:
    """A hundred items of 40 units would be one batch; there is room for 50 units, and then for 150."""
    for room, largest in ((50, 1), (150, 3)):
        variables = models(1, load_seconds=1.0, limit=1) | {
            "LEGIT_WORKER_VRAM_LIMIT": str(100 * MIB + round(1.2 * EACH * room)),
        }
        worker = start_worker("project", environment=variables)
        results = [worker.send("one", f"{number} {'word ' * 39}", "m0") for number in range(100)]
        worker.answers(results)
        assert all(result.successful() for result in results)
        pool = worker.pool()
        assert "out_of_memory" not in pool
        assert 100 / largest <= pool["batches"] < 100 / largest + 3
        assert pool["memory"]["peak"] <= pool["memory"]["total"]


def test_evicted_weights_may_wait_in_the_hosts_memory(start_worker: StartWorker) -> None:
    variables = models(2, load_seconds=1.0, limit=1) | {"LEGIT_WORKER_HOST_CACHE": "1GiB"}
    worker = start_worker("project", environment=variables)
    for alias in ("m0", "m1"):
        worker.ask("one", "a task", alias)
    for alias in ("m0", "m1", "m0"):
        worker.ask("one", "a task", alias)
    seconds = re.findall(r"model '(m\d)' loaded on simulated in (\S+) s", worker.log)
    assert [float(took) >= 1.0 for _, took in seconds] == [True, True, False, False, False]
    assert worker.pool()["memory"]["host_cache"] == 100 * MIB


def test_an_item_that_can_not_fit_evicts_nobody_and_one_that_can_evicts_no_more_than_it_needs(
    start_worker: StartWorker,
) -> None:
    variables = models(4, load_seconds=0.0) | {"LEGIT_WORKER_HOST_CACHE": "1GiB"}
    worker = start_worker("project", environment=variables)
    for alias in ("m0", "m1", "m2", "m3"):
        worker.ask("one", "a task", alias)
    never = worker.send("one", "word " * (600 * MIB // EACH), "m3")
    worker.answers([never])
    assert isinstance(never.result, DeviceOutOfMemoryError)
    pool = worker.pool()
    assert {(model["state"], model["loads"]) for model in pool["models"].values()} == {("resident", 1)}
    assert worker.ask("one", "word " * (100 * MIB // EACH), "m3")
    pool = worker.pool()
    states = [model["state"] for model in pool["models"].values()]
    assert states == ["unloaded", "resident", "resident", "resident"]
    assert pool["memory"]["host_cache"] == 100 * MIB


def latencies(worker: Worker, seconds: float) -> list[float]:
    """Of lone tasks for a model that is there, one after another."""
    found, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        started = time.monotonic()
        worker.ask("one", "a task", "m0")
        found.append(time.monotonic() - started)
    return found


def test_a_model_that_is_there_answers_while_another_loads(start_worker: StartWorker) -> None:
    worker = start_worker("project", environment=models(2, load_seconds=3.0, limit=2))
    worker.ask("one", "first", "m0")
    before = latencies(worker, 1)
    other = worker.send("one", "second", "m1")
    during = latencies(worker, 2)
    assert not other.ready()
    assert sorted(during)[len(during) // 2] < 3 * sorted(before)[len(before) // 2] + 0.02
    assert worker.answer(other)


def test_pinned_models_are_there_before_the_worker_is_ready_and_stay(start_worker: StartWorker) -> None:
    variables = models(3, load_seconds=1.0, limit=2) | {"LEGIT_WORKER_MODELS__M1__PIN": "1"}
    worker = start_worker("project", environment=variables)
    assert worker.log.index("model 'm1' loaded") < worker.log.index("ready.")
    for alias in ("m0", "m2", "m0"):
        worker.ask("one", "a task", alias)
    states = {alias: (model["state"], model["loads"]) for alias, model in worker.pool()["models"].items()}
    assert states == {"m0": ("resident", 2), "m1": ("resident", 1), "m2": ("unloaded", 1)}


def test_a_worker_stops_while_its_pinned_models_load(start_worker: StartWorker) -> None:
    variables = models(1, load_seconds=60.0) | {"LEGIT_WORKER_MODELS__M0__PIN": "1"}
    worker = start_worker("project", environment=variables, wait=False)
    worker.wait_for_log("[queues]")
    time.sleep(1)
    worker.stop(seconds=15)


def test_an_idle_model_is_unloaded_and_comes_back(start_worker: StartWorker) -> None:
    variables = models(1, load_seconds=0.0) | {"LEGIT_WORKER_MODELS__M0__KEEP_ALIVE": "0.5"}
    worker = start_worker("project", environment=variables)
    worker.ask("one", "a task", "m0")
    poll(lambda: worker.pool()["models"]["m0"]["state"] == "unloaded", "the model to go")
    assert worker.pool()["memory"]["weights"] == 0
    worker.ask("one", "another", "m0")
    assert worker.pool()["models"]["m0"]["loads"] == 2


def test_a_task_in_an_exclusive_section_gets_its_model_whoever_holds_the_memory(start_worker: StartWorker) -> None:
    # A simulated device would refuse: it has no more than the limit.
    variables = models(2, load_seconds=0.2, limit=1) | {"LEGIT_WORKER_DEVICE": "cpu"}
    variables["LEGIT_WORKER_APPS__ALONE__BATCHING"] = "off"
    worker = start_worker("project", environment=variables)
    many = [worker.send("one", f"task {number}", "m0") for number in range(200)]
    alone = worker.client.send_task("one", ["alone", "m1"], headers={"app": "alone"})
    worker.answers([*many, alone])
    assert all(result.successful() for result in [*many, alone])
