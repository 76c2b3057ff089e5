"""One command starts a worker for each GPU, and each task goes to the worker that has its model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import ANSWER_SECONDS, START_SECONDS, Broker, poll
from terminal import Terminal

SETTINGS = {
    "LEGIT_WORKER_DEVICE": "simulated",
    "LEGIT_WORKER_MODELS__SMALL__KIND": "simulated",
    "LEGIT_WORKER_MODELS__LARGE__KIND": "simulated",
    "LEGIT_WORKER_MODELS__IDLE__KIND": "simulated",
    "LEGIT_WORKER_WORKERS__GPU0__MODELS": "small",
    "LEGIT_WORKER_WORKERS__GPU1__MODELS": "large",
    "LEGIT_WORKER_WORKERS__GPU1__DEVICE": "cpu",
}

MULTI = "celery multi {} gpu0 gpu1 -A legit_worker --pool=solo --loglevel=INFO --pidfile=%n.pid --logfile=%n.log"


@pytest.fixture(scope="module")
def terminal(servers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Terminal, Path, Broker]]:
    """Both workers."""
    folder = tmp_path_factory.mktemp("several") / "work"
    broker = servers.fresh()
    found = Terminal(folder, broker, **SETTINGS)
    found.run(MULTI.format("start"))
    try:
        for node in ("gpu0", "gpu1"):
            log = folder / f"{node}.log"
            poll(lambda log=log: log.exists() and "ready." in log.read_text(), f"{node} to be ready", START_SECONDS)
        yield found, folder, broker
        found.run(MULTI.format("stopwait"))
    finally:
        for file in folder.glob("*.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(file.read_text()), signal.SIGKILL)


SEND = """
from legit_worker.celery import app
for alias in {aliases!r}:
    result = app.send_task("legit_worker.embed_text", ["a text"], {{"model": alias}})
    print(len(result.get(timeout={seconds})))
"""


def test_a_task_goes_to_the_worker_that_has_its_model(terminal: tuple[Terminal, Path, Broker]) -> None:
    shell, folder, _ = terminal
    (folder / "send.py").write_text(SEND.format(aliases=["small", "large", "Large"], seconds=ANSWER_SECONDS))
    assert shell.run("python send.py").split() == ["8"] * 3
    logs = [(folder / f"gpu{number}.log").read_text() for number in (0, 1)]
    assert [log.count("received") for log in logs] == [1, 2]
    assert "on simulated: small (simulated)" in logs[0]
    assert "on cpu: large (simulated)" in logs[1]


def test_the_queues_say_who_has_which_model(terminal: tuple[Terminal, Path, Broker]) -> None:
    shell, *_ = terminal

    def answers() -> Any:
        found = json.loads(shell.run("celery -A legit_worker legit queues --json --timeout 3"))
        return found if len(found["running"]) == 2 else None

    found = poll(answers, "both workers to answer")
    small, large, idle = (found["models"][alias] for alias in ("small", "large", "idle"))
    assert (small["queue"], small["workers"]) == ("legit.small", ["gpu0"])
    assert (large["queue"], large["workers"]) == ("legit.large", ["gpu1"])
    assert [worker.partition("@")[0] for worker in large["running"]] == ["gpu1"]
    assert (idle["workers"], idle["running"]) == ([], [])
    assert found["workers"]["gpu1"] == {"device": "cpu", "models": ["large"]}
    table = shell.run("celery -A legit_worker legit queues --timeout 3")
    assert "legit.idle" in table
    assert "nobody" in table


def test_a_task_that_no_models_queue_is_for_is_answered(terminal: tuple[Terminal, Path, Broker]) -> None:
    shell, folder, _ = terminal
    (folder / "misspelt.py").write_text(
        "from legit_worker.celery import app\n"
        "result = app.send_task('legit_worker.embed_text', ['a text'], {'model': 'smal'})\n"
        f"print(result.get(timeout={ANSWER_SECONDS}, propagate=False))\n"
    )
    assert "'smal'" in shell.run("python misspelt.py")
