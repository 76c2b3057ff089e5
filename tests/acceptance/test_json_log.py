"""`LEGIT_WORKER_LOG=json`: what the real command writes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from harness import SIMULATED, StartWorker, Worker, poll

JSON = {"LEGIT_WORKER_ENABLED": "1", "LEGIT_WORKER_LOG": "json", **SIMULATED}


def lines(worker: Worker) -> list[dict[str, Any]]:
    """All that the worker wrote, but for a line that is being written."""
    whole, _, _ = worker.log.rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def line(worker: Worker, **fields: Any) -> dict[str, Any]:
    """The one line that has these."""

    def found() -> dict[str, Any] | None:
        return next((one for one in lines(worker) if fields.items() <= one.items()), None)

    one = poll(found, f"a line with {fields}")
    assert one is not None
    return one


def ask(worker: Worker, task: str, *args: Any, app: str = "vodmanager") -> str:
    result = worker.client.send_task(task, args, headers={"app": app})
    worker.settle([result])
    return str(result.id)


@pytest.mark.parametrize("pool", ["--pool=solo", "--pool=prefork"])
def test_each_line_is_an_object_that_names_its_task(start_worker: StartWorker, pool: str) -> None:
    worker = start_worker("logging_own", "--concurrency=1", pool=pool, environment=JSON)
    good = ask(worker, "one", "a secret")
    done = line(worker, task_id=good, task="one", app="vodmanager", level="INFO", model="sim")
    assert done["logger"] == "celery.app.trace"
    assert done["message"].startswith(f"Task one[{good}] succeeded")
    assert done["runtime"] >= 0
    assert done["time"].endswith("Z")
    assert line(worker, task_id=good, logger="celery.worker.strategy")["message"].endswith("received")
    bad = ask(worker, "raises_before", "no such key")
    failed = line(worker, task_id=bad, task="raises_before", level="ERROR")
    assert "model" not in failed, "the task before called one"
    error = failed["exception"]
    assert (error["type"], error["message"]) == ("KeyError", "'no such key'")
    assert error["traceback"].rstrip().endswith("KeyError: 'no such key'")
    said = ask(worker, "says", "hello")
    assert line(worker, task_id=said, logger="a.library", message="hello to the library")["colour"] == "red"
    assert line(worker, task_id=said, logger="celery.redirected")["message"] == "hello to the output"
    assert worker.stop() == 0
    assert line(worker, message="worker: Warm shutdown (MainProcess)", level="INFO", logger="celery.apps.worker")
    assert all({"time", "level", "logger", "message"} <= one.keys() for one in lines(worker))


@pytest.mark.parametrize("own", ["setup", "after", "handlers"])
def test_a_project_that_sets_up_its_own_log_keeps_it(start_worker: StartWorker, own: str) -> None:
    worker = start_worker("logging_own", environment={**JSON, "PROJECT_LOGGING": own})
    ask(worker, "says", "hello")
    worker.wait_for_log("own: hello to the library")


def test_without_install_the_pool_writes_it(start_worker: StartWorker) -> None:
    custom = {"CELERY_CUSTOM_WORKER_POOL": "legit_worker.pool:ModelPool", "PROJECT_INSTALL": "0"}
    worker = start_worker("logging_own", pool="--pool=custom", environment={**JSON, **custom})
    task = ask(worker, "one", 1)
    worker.wait_for_log(f"[{task}] succeeded")
    (done,) = [text for text in worker.log.splitlines() if f"[{task}] succeeded" in text]
    assert json.loads(done)["model"] == "sim"
