"""What `install(app)` changes, and when it changes nothing: pools, configuration, bootsteps, command lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from harness import Broker, StartWorker, poll, run_python

SOLO = "celery.concurrency.solo:TaskPool"
MODEL_POOL = "legit_worker.pool.pool:ModelPool"
ENABLED = {"LEGIT_WORKER_ENABLED": "1"}
SIM = {"LEGIT_WORKER_MODELS__SIM__KIND": "simulated"}
CUSTOM_POOL = {"CELERY_CUSTOM_WORKER_POOL": "legit_worker.pool:ModelPool"}

#: All that decides how a worker of this app behaves, before it connects to a broker.
DESCRIBE = """
import json, os, sys
import celery.signals
from celery.worker.control import Panel
from project import app

CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")

worker = app.Worker(hostname="w@h", pool="solo")
names = [name for name in celery.signals.__all__ if hasattr(getattr(celery.signals, name), "receivers")]
print(json.dumps({
    "pool": f"{worker.pool_cls.__module__}:{worker.pool_cls.__qualname__}",
    "concurrency": worker.concurrency,
    "prefetch": worker.prefetch_multiplier,
    "conf": {key: repr(value) for key, value in sorted(app.conf.items())},
    "changes": {key: repr(value) for key, value in sorted(app.conf.changes.items())},
    "steps": sorted(worker.blueprint.steps),
    "added": {kind: [str(step) for step in steps] for kind, steps in sorted(app.steps.items())},
    "tasks": sorted(app.tasks),
    "answers": sorted(Panel.data),
    "backend": type(app.backend).__name__,
    "transport": app.connection().transport_cls,
    "receivers": {name: len(getattr(celery.signals, name).receivers or []) for name in names},
    "caches": {name: os.environ.get(name) for name in CACHES},
    "heavy": sorted({"torch", "greenlet", "numpy", "pynvml"} & set(sys.modules)),
}))
"""


def describe(broker: Broker, **environment: str) -> dict[str, Any]:
    """A worker of the project, as `DESCRIBE` sees it."""
    described: dict[str, Any] = json.loads(run_python(DESCRIBE, broker, SIM | environment))
    return described


def test_install_changes_nothing_unless_it_is_enabled(broker: Broker) -> None:
    assert describe(broker) == describe(broker, PROJECT_INSTALL="0")


def test_install_changes_nothing_when_it_is_disabled_in_so_many_words(broker: Broker) -> None:
    assert describe(broker, LEGIT_WORKER_ENABLED="0") == describe(broker, PROJECT_INSTALL="0")


def test_install_that_is_enabled_changes_the_pool(broker: Broker) -> None:
    described = describe(broker, **ENABLED)
    assert described["pool"] == MODEL_POOL
    assert described != describe(broker)


BOTH = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}
NEITHER = dict.fromkeys(BOTH)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        pytest.param({}, NEITHER, id="off"),
        pytest.param(ENABLED, BOTH, id="on"),
        pytest.param({"LEGIT_WORKER_ROLE": "prep"}, NEITHER, id="prep"),
        pytest.param(
            ENABLED | {"LRU_CACHE_CAPACITY": "7"}, BOTH | {"LRU_CACHE_CAPACITY": "7"}, id="a choice of the operator's"
        ),
        pytest.param(
            ENABLED | {"DNNL_PRIMITIVE_CACHE_CAPACITY": "7"},
            BOTH | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": None},
            id="by oneDNN's old name",
        ),
    ],
)
def test_onednns_caches_are_bounded_once_it_is_enabled_and_the_operators_choice_beats_it(
    broker: Broker, environment: dict[str, str], expected: dict[str, str | None]
) -> None:
    caches = describe(broker, **environment)["caches"]
    assert {name: caches[name] for name in BOTH} == expected


@pytest.mark.parametrize(("chosen", "expected"), [({}, True), ({"PROJECT_ACKS_LATE": "0"}, False)])
def test_late_acks_are_the_default_and_the_projects_choice_beats_it(
    broker: Broker, chosen: dict[str, str], expected: bool
) -> None:
    assert describe(broker, **ENABLED, **chosen)["conf"]["task_acks_late"] == repr(expected)


def test_a_project_without_the_variable_runs_the_stock_solo_pool(start_worker: StartWorker) -> None:
    worker = start_worker(environment=SIM)
    assert worker.pool()["implementation"] == SOLO
    assert worker.ask("no_model", 1) == 2


@pytest.mark.parametrize(
    ("pool", "environment"),
    [
        pytest.param("--pool=solo", ENABLED, id="an explicit solo"),
        pytest.param("-Psolo", ENABLED, id="the short form"),
        pytest.param("--pool=custom", ENABLED | CUSTOM_POOL, id="a custom pool and install"),
        pytest.param("--pool=custom", CUSTOM_POOL, id="a custom pool alone"),
    ],
)
def test_the_same_command_runs_model_pool_once_it_is_enabled(
    start_worker: StartWorker,
    pool: str,
    environment: dict[str, str],
    simulated: Callable[[Any], list[float]],
) -> None:
    worker = start_worker(pool=pool, environment=SIM | environment | {"LEGIT_WORKER_WINDOW": "32"})
    results = [worker.send("one", number) for number in range(100)]
    assert worker.answers(results) == [simulated(number) for number in range(100)]
    poll(lambda: worker.stats()["prefetch_count"] == 32, "the whole window")
    stats = worker.stats()
    assert stats["pool"]["implementation"] == MODEL_POOL
    assert stats["pool"]["window"] == 32
    assert stats["pool"]["batches"] < stats["pool"]["items"] == 100


def test_a_project_that_chose_solo_in_its_settings_runs_model_pool(start_worker: StartWorker) -> None:
    worker = start_worker(pool=None, environment=SIM | ENABLED | {"PROJECT_POOL": "solo"})
    assert worker.pool()["implementation"] == MODEL_POOL


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_another_pool_is_respected_with_a_warning_that_models_are_called_directly(
    start_worker: StartWorker, pool: str, simulated: Callable[[Any], list[float]]
) -> None:
    worker = start_worker("project", "--concurrency=2", pool=f"--pool={pool}", environment=SIM | ENABLED)
    results = [worker.send("one", number) for number in range(20)]
    assert worker.answers(results) == [simulated(number) for number in range(20)]
    assert pool.replace("threads", "thread") in worker.pool()["implementation"]
    warnings = [line for line in worker.log.splitlines() if "WARNING" in line and "call models directly" in line]
    assert len(warnings) == 1
    assert "--pool=solo" in warnings[0]


def test_a_worker_of_the_ready_made_app_can_be_switched_off(start_worker: StartWorker) -> None:
    worker = start_worker("legit_worker", environment=SIM | {"LEGIT_WORKER_ENABLED": "0"})
    assert worker.pool()["implementation"] == SOLO


BAD_SETTINGS = [
    ("project", "LEGIT_WORKER_WINDOW", "many"),
    ("project", "LEGIT_WORKER_WIDNOW", "3"),
    ("legit_worker", "LEGIT_WORKER_MODELS__SIM__KIDN", "simulated"),
]


def test_a_bad_setting_stops_the_worker_with_the_variables_name(start_worker: StartWorker) -> None:
    workers = [
        start_worker(project, environment=SIM | ENABLED | {name: value}, wait=False)
        for project, name, value in BAD_SETTINGS
    ]
    for worker, (_, name, _value) in zip(workers, BAD_SETTINGS, strict=True):
        assert worker.wait() != 0
        assert name in worker.log
        assert "Traceback" not in worker.log


def test_while_it_is_off_not_even_a_bad_setting_changes_anything(start_worker: StartWorker) -> None:
    worker = start_worker(environment={"LEGIT_WORKER_WINDOW": "many"})
    assert worker.ask("no_model", 1) == 2


def test_a_worker_whose_tasks_would_share_one_request_says_so_and_ends(start_worker: StartWorker) -> None:
    environment = SIM | {"LEGIT_WORKER_ENABLED": "1", "USE_FAST_LOCALS": "1"}
    worker = start_worker(environment=environment, wait=False)
    assert worker.wait() != 0
    assert "USE_FAST_LOCALS gives all tasks one request; unset it" in worker.log
