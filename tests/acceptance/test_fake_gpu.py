"""A worker that computes on a GPU, which is a fake: batches overlap its other work, and a broken GPU ends it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from drivers import Nvml
from harness import SIMULATED, Broker, StartWorker, Worker, poll

from legit_worker.errors import DeviceLostError

ON_GPU = SIMULATED | {
    "LEGIT_WORKER_ENABLED": "1",
    "LEGIT_WORKER_DEVICE": "cuda",
    "LEGIT_WORKER_MODELS__GPU__KIND": "fakegpu:OnFakeGpu",
    "LEGIT_WORKER_APPS__ALONE__BATCHING": "off",
}

TASKS = 200

GIB = 2**30


def start(start_worker: StartWorker, broker: Broker | None = None, **settings: str) -> Worker:
    return start_worker("fakegpu", broker=broker, environment=ON_GPU | settings)


def lengths(count: int) -> list[str]:
    return ["x" * (1 + number % 50) for number in range(count)]


def test_each_task_gets_its_own_part_and_the_gpu_has_always_one_batch_behind_the_one_it_is_at(
    start_worker: StartWorker,
) -> None:
    worker = start(start_worker)
    items = lengths(TASKS)
    results = [worker.send("one", item, alias="gpu") for item in items]
    answers = worker.answers(results)
    assert [answer[0] for answer in answers] == list(map(len, items))
    assert max(answer[1] for answer in answers) == 1, "in flight when the next was launched"
    assert worker.pool()["models"]["gpu"]["items"] == TASKS


def test_other_tasks_run_while_the_gpu_computes(start_worker: StartWorker) -> None:
    worker = start(start_worker)
    slow = [worker.send("one", item, alias="gpu") for item in lengths(TASKS)]
    poll(lambda: slow[0].ready(), "the first batch")
    quick = [worker.send("no_model", number) for number in range(20)]
    worker.settle(quick)
    assert not slow[-1].ready(), "all batches were done: this shows nothing"
    worker.settle(slow)


def test_a_task_that_runs_alone_waits_for_the_gpu_itself(start_worker: StartWorker) -> None:
    worker = start(start_worker)
    together = [worker.send("one", item, alias="gpu") for item in lengths(40)]
    alone = [worker.client.send_task("one", [item], {"alias": "gpu"}, headers={"app": "alone"}) for item in lengths(10)]
    answers = worker.answers([*together, *alone])
    assert [answer[0] for answer in answers] == list(map(len, [*lengths(40), *lengths(10)]))


def test_a_warm_shutdown_takes_what_the_gpu_is_still_at(start_worker: StartWorker) -> None:
    worker = start(start_worker)
    results = [worker.send("one", item, alias="gpu") for item in lengths(30)]
    poll(lambda: len(worker.received) == 30, "all tasks to start")
    assert worker.stop() == 0
    assert [result.result[0] for result in results] == list(map(len, lengths(30)))


def test_a_dip_of_free_memory_has_tasks_wait_until_it_is_over(start_worker: StartWorker, tmp_path: Path) -> None:
    """Another process has 15 of 16 GiB for a while; the model takes 2, and 1.6 are headroom."""
    nvml = Nvml.build(tmp_path)
    gpu = f"gpu GPU-aaaa T4 {16 * GIB}"
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(2 * GIB)
    variables = nvml.environment(f"{gpu} {15 * GIB}\n") | {
        "LEGIT_WORKER_MODELS__GPU__PATH": str(tmp_path),
        "PROJECT_GROWTH_SECONDS": "0.5",
    }
    worker = start(start_worker, **variables)
    results = [worker.send("one", item, alias="gpu") for item in lengths(20)]
    poll(lambda: "model 'gpu' has waited" in worker.log, "the log to say what is waited for")
    assert not any(result.ready() for result in results)
    nvml.environment(f"{gpu} {GIB}\n")
    assert [answer[0] for answer in worker.answers(results)] == list(map(len, lengths(20)))


def poisoned(client: Any, count: int, **options: Any) -> list[Any]:
    """Tasks of which one, in the middle, breaks the GPU."""
    items = lengths(count)
    items[count // 2] = "poison"
    return [client.send_task("one", [item], {"alias": "gpu"}, **options) for item in items]


@pytest.mark.parametrize("how", ["together", "alone", "alone among others"])
def test_a_broken_gpu_ends_the_worker_and_its_tasks_go_to_the_next(
    start_worker: StartWorker, servers: Any, how: str
) -> None:
    broker = servers.fresh(redelivery_seconds=1)
    client = broker.client()
    others = (
        [] if how != "alone among others" else [client.send_task("one", ["x"], {"alias": "gpu"}) for _ in range(60)]
    )
    results = others + poisoned(client, 60, headers={} if how == "together" else {"app": "alone"})
    first = start(start_worker, broker, PROJECT_POISON="1")
    assert first.wait() == os.EX_SOFTWARE
    assert "device-side assert" in first.log
    assert "the worker ends, and" in first.log
    second = start(start_worker, broker)
    second.settle(results)
    failed = [result.result for result in results if not result.successful()]
    # Who broke the GPU alone in its batch is told; of several in a batch, nobody is.
    assert all("device-side assert" in str(error) for error in failed)
    assert len(failed) == {"together": 0, "alone": 1}.get(how, len(failed)) <= 1


def test_tasks_that_were_acked_early_fail_with_a_broken_gpu(start_worker: StartWorker, broker: Broker) -> None:
    results = poisoned(broker.client(), 20)
    worker = start(start_worker, broker, PROJECT_POISON="1", PROJECT_ACKS_LATE="0")
    assert worker.wait() == os.EX_SOFTWARE
    broken = [result.result for result in results if result.failed()]
    assert broken
    assert all(isinstance(error, DeviceLostError) for error in broken)
    assert all(result.ready() for result in results if result.id in worker.received)
