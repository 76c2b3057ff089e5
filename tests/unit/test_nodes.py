"""Workers that share their settings: each has a device, models and queues, and tasks go to where their model is."""

from __future__ import annotations

import os
import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from drivers import Nvml

from legit_worker import prep_tasks, routes, settings, tasks
from legit_worker.device import cuda, vram
from legit_worker.errors import SettingsError
from legit_worker.settings.values import BUILT_IN_TASKS

TWO = {
    "LEGIT_WORKER_MODELS__SMALL__KIND": "simulated",
    "LEGIT_WORKER_MODELS__TEXT_EMBED__PATH": "/models/text",
    "LEGIT_WORKER_MODELS__RANKER__KIND": "rerank",
    "LEGIT_WORKER_MODELS__RANKER__PATH": "/models/ranker",
    "LEGIT_WORKER_WORKERS__GPU0__DEVICE": "cuda:0",
    "LEGIT_WORKER_WORKERS__GPU0__MODELS": "small,text-embed",
    "LEGIT_WORKER_WORKERS__GPU1__DEVICE": "GPU-aaaa",
    "LEGIT_WORKER_WORKERS__GPU1__MODELS": "ranker",
    "LEGIT_WORKER_TASKS__EMBED_TEXT": '{"old.embed": {"which": "model"}}',
}


def test_a_worker_has_its_own_device_and_models() -> None:
    chosen = settings.load(TWO | {"LEGIT_WORKER_NODE": "gpu1"})
    assert (chosen.device, list(chosen.models)) == ("GPU-aaaa", ["ranker"])
    assert settings.load(TWO | {"LEGIT_WORKER_NODE": "gpu0"}).device == "cuda:0"
    assert len(settings.load(TWO).models) == 3
    assert len(settings.load(TWO | {"LEGIT_WORKER_NODE": "gpu1"}, is_whole=True).models) == 3


def test_a_name_that_stands_for_nothing_stops_the_worker() -> None:
    with pytest.raises(
        SettingsError, match="WORKERS__GPU1__MODELS names 'nosuch', which is no model; there are: small"
    ):
        settings.load(TWO | {"LEGIT_WORKER_WORKERS__GPU1__MODELS": "nosuch"})
    with pytest.raises(
        SettingsError, match="NODE='gpu7' is none of the workers in the settings; there are: gpu0, gpu1"
    ):
        settings.load(TWO | {"LEGIT_WORKER_NODE": "gpu7"})
    with pytest.raises(SettingsError, match=r"with \{model\} in it"):
        settings.load(TWO | {"LEGIT_WORKER_MODEL_QUEUES": "models"})


def test_a_worker_takes_its_name_from_the_command_line_unless_it_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEGIT_WORKER_NODE", "")  # and is not set after the test
    assert settings.take_name("GPU1@host", settings.load(TWO))
    assert os.environ["LEGIT_WORKER_NODE"] == "gpu1"
    assert not settings.take_name("other@host", settings.load(TWO))
    assert not settings.take_name("gpu0@host", settings.load(TWO | {"LEGIT_WORKER_NODE": "gpu1"}))


def test_a_worker_whose_name_no_setting_has_says_so() -> None:
    (said,) = settings.strange_name("worker-gpu0@host", settings.load(TWO))
    assert "'worker-gpu0', and the settings tell of gpu0, gpu1" in said
    assert said.endswith("-n gpu0@%h")
    assert not list(settings.strange_name("gpu0@host", settings.load(TWO | {"LEGIT_WORKER_NODE": "gpu0"})))
    assert not list(settings.strange_name("prep@host", settings.load(TWO | {"LEGIT_WORKER_ROLE": "prep"})))
    assert not list(settings.strange_name("celery@host", settings.load({})))


@pytest.fixture(autouse=True)
def fresh_routes() -> None:
    """A process reads its settings once."""
    routes._chosen.cache_clear()


@pytest.mark.parametrize(
    ("task", "args", "kwargs", "queue"),
    [
        ("legit_worker.embed_text", ["a text"], {"model": "Text-Embed"}, "legit.text_embed"),
        ("legit_worker.embed_text", ["a text", "small"], {}, "legit.small"),
        ("legit_worker.embed_text", ["a text"], {}, "legit.text_embed"),
        ("legit_worker.rerank", ["a query", []], None, "legit.ranker"),
        ("old.embed", ["a text"], {"which": "small"}, "legit.small"),
        ("legit_worker.embed_text", ["a text"], {"model": "nosuch"}, None),
        ("a.project's", ["a text"], {"model": "small"}, None),
    ],
)
def test_a_task_goes_to_its_models_queue(
    monkeypatch: pytest.MonkeyPatch, task: str, args: list[Any], kwargs: Any, queue: str | None
) -> None:
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    assert routes.by_model(task, args, kwargs, {}) == (None if queue is None else {"queue": queue})


def test_what_is_routed_and_has_aliases_is_each_built_in_task() -> None:
    assert set(routes.BUILT_IN) == set(BUILT_IN_TASKS) == set(tasks.BUILT_IN)


@pytest.mark.parametrize("task", tasks.BUILT_IN)
def test_each_built_in_task_and_its_alias_go_to_the_queue_of_the_one_model_of_its_kind(
    monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    class Asked(Exception):  # noqa: N818 it is no error
        pass

    class Asks:
        def __init__(self, model: str | None, kind: str) -> None:
            raise Asked(model, kind)

    for module in (tasks, prep_tasks):
        monkeypatch.setattr(module, "Handle", Asks)
    place = list(signature(tasks.BUILT_IN[task]).parameters).index("model")
    arguments: dict[str, list[Any]] = {"classify": [["text", "text"]], "rerank": ["text", ["text"]]}
    with pytest.raises(Asked) as asked:
        tasks.BUILT_IN[task](*arguments.get(task, ["text"]))
    kind = asked.value.args[1]
    monkeypatch.setenv("LEGIT_WORKER_MODELS__OF_ITS_KIND__KIND", kind)
    monkeypatch.setenv("LEGIT_WORKER_MODELS__OF_ITS_KIND__PATH", "/models/one")
    monkeypatch.setenv("LEGIT_WORKER_MODELS__SIM__KIND", "simulated")
    monkeypatch.setenv("LEGIT_WORKER_WORKERS__GPU0__MODELS", "of_its_kind,sim")
    monkeypatch.setenv(f"LEGIT_WORKER_TASKS__{task.upper()}", "old.name")
    for name in (f"legit_worker.{task}", "old.name"):
        assert routes.by_model(name, ["text", "text"][:place], {}, {}) == {"queue": "legit.of_its_kind"}
        assert routes.by_model(name, [*["text", "text"][:place], "sim"], {}, {}) == {"queue": "legit.sim"}


def uuids(monkeypatch: pytest.MonkeyPatch, *found: str) -> None:
    gpus = tuple(vram.Gpu(uuid, "T4", number) for number, uuid in enumerate(found))
    monkeypatch.setattr(vram, "all_gpus", lambda: gpus)
    monkeypatch.setattr(cuda, "started_cuda", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # and is as before after the test
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize("device", ["GPU-bbbb", "GPU-b", "MIG-cccc"])
def test_a_uuid_shows_cuda_that_gpu_alone(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    uuids(monkeypatch, "GPU-aaaa", "GPU-bbbb", "MIG-cccc")
    cuda.show_only(device)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == device
    found = cuda.gpu(device)
    assert found is not None
    assert found.uuid.startswith(device)
    assert cuda.name_of(device) == "cuda:0"


def test_a_uuid_that_cuda_is_not_to_show_is_refused_and_one_of_several_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uuids(monkeypatch, "GPU-aaaa", "GPU-bbbb")
    with pytest.raises(vram.VramUnknownError, match="LEGIT_WORKER_DEVICE=GPU-cccc, and CUDA shows this process: none"):
        cuda.show_only("GPU-cccc")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(
        vram.VramUnknownError, match="LEGIT_WORKER_DEVICE=GPU-bbbb, and CUDA shows this process: GPU-aaaa"
    ):
        cuda.show_only("GPU-bbbb")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert cuda.name_of("GPU-aaaa") == "cuda:1"


@pytest.mark.parametrize(("device", "found"), [("cuda:2", 2), ("cuda:1", 1), ("cuda", 0), ("cuda:0", 0)])
def test_a_number_that_no_gpu_has_is_refused(monkeypatch: pytest.MonkeyPatch, device: str, found: int) -> None:
    uuids(monkeypatch, *("GPU-aaaa", "GPU-bbbb")[:found])
    said = f"LEGIT_WORKER_DEVICE={device}, and CUDA shows {found} GPUs to this process"
    with pytest.raises(vram.VramUnknownError, match=said):
        cuda.check_number(device)
    uuids(monkeypatch, "GPU-aaaa", "GPU-bbbb", "GPU-cccc")
    cuda.check_number(device)
    uuids(monkeypatch)
    cuda.show_only(device)  # a process that computes nothing may be kept off the GPU
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_a_number_counts_what_cuda_is_to_show(monkeypatch: pytest.MonkeyPatch) -> None:
    uuids(monkeypatch, "GPU-aaaa", "GPU-bbbb")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    cuda.check_number("cuda:0")
    with pytest.raises(vram.VramUnknownError, match=r"CUDA shows 1 GPUs to this process \(cuda:0 is GPU-b"):
        cuda.check_number("cuda:1")


@pytest.mark.parametrize("device", ["auto", "cpu", "simulated"])
def test_a_device_that_names_no_gpu_needs_none(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    uuids(monkeypatch)
    cuda.check_number(device)


def test_a_uuid_is_taken_on_trust_if_nvml_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    uuids(monkeypatch)

    def mute() -> None:
        raise vram.NvmlMuteError("no driver")

    monkeypatch.setattr(vram, "all_gpus", mute)
    cuda.show_only("GPU-aaaa")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-aaaa"
    assert cuda.name_of("GPU-aaaa") == "cuda:0"
    cuda.check_number("cuda:7")


def test_the_driver_knows_the_uuid(tmp_path: Path) -> None:
    """As a worker's process asks it."""
    nvml = Nvml.build(tmp_path)
    world = f"gpu GPU-aaaa T4 {2**34} {2**33}\ngpu GPU-bbbb T4 {2**34} {2**32}\n"
    code = "from legit_worker.device import cuda, vram; g = cuda.gpu('GPU-bbbb'); print(g.index, vram.memory(g).used)"
    environment = {**os.environ, **nvml.environment(world)}
    finished = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert finished.stdout.split() == ["1", str(2**32)]
