"""`celery legit models`, and Celery's own `inspect` and `control`: an operator changes what is in memory."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import commands
import pytest
from harness import ANSWER_SECONDS, SIDES, StartWorker, Worker, poll

MIB = 2**20

#: Columns of the narrowest terminal.
COLUMNS = 80


def model(alias: str, numbers: str, **more: str) -> dict[str, str]:
    found = {"KIND": "simulated", "PATH": numbers} | more
    return {f"LEGIT_WORKER_MODELS__{alias.upper()}__{key}": value for key, value in found.items()}


#: Room for two of three models. A call of `slow` with thirty words is a batch of its own: 0.3 s.
SETTINGS = SIDES["modelpool"] | {
    "LEGIT_WORKER_DEVICE": "simulated",
    "LEGIT_WORKER_VRAM_LIMIT": str(200 * MIB),
    **model("first", f"0,0,{100 * MIB}"),
    **model("slow", f"0.3,0.01,{100 * MIB},0.5"),
    **model("large", f"0,0,{300 * MIB}"),
}


@pytest.fixture(scope="module")
def one(start_module_worker: StartWorker) -> Worker:
    worker = start_module_worker("project", environment=SETTINGS)
    worker.wait_until_it_hears()
    return worker


def celery(worker: Worker, *words: str, code: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command of the project's, that is over."""
    finished = commands.celery("project", *words, broker=worker.broker, settings=SETTINGS | variables, columns=COLUMNS)
    assert finished.returncode == code, finished.stdout + finished.stderr
    return finished


def legit(worker: Worker, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    there = ("--destination", worker.name, "--timeout", "30")  # which end with the worker's answer
    return celery(worker, "legit", "models", *words, *there, code=code)


def tell(worker: Worker, command: str, **arguments: Any) -> dict[str, Any]:
    """What this worker answers to a remote control command."""
    worker.wait_until_it_hears()
    replies = worker.client.control.broadcast(
        command, arguments=arguments, reply=True, destination=[worker.name], limit=1, timeout=ANSWER_SECONDS
    )
    found: dict[str, Any] = replies[0][worker.name]
    return found


def seen(worker: Worker, alias: str) -> dict[str, Any]:
    found: dict[str, Any] = tell(worker, "legit_models")["models"][alias]
    return found


def test_a_model_is_loaded_pinned_unpinned_and_unloaded(one: Worker) -> None:
    assert "is being loaded" in legit(one, "load", "Slow").stdout
    assert seen(one, "slow")["state"] == "resident"
    assert tell(one, "legit_pin", alias="slow") == {"ok": "model 'slow' is in memory, and is pinned"}
    refused = legit(one, "unload", "slow", code=1)
    assert "is pinned: unpin it first" in refused.stderr
    table = legit(one)
    assert one.name in table.stdout
    row = next(line.split() for line in table.stdout.splitlines() if line.startswith("slow"))
    assert row == ["slow", "resident,", "pinned", "100", "0", "0", row[6], "s", "ago", "1"]
    assert all(len(line) <= COLUMNS for line in table.stdout.splitlines())
    tell(one, "legit_unpin", alias="slow")
    assert "has left memory" in tell(one, "legit_unload", alias="slow")["ok"]
    found = tell(one, "legit_models")
    assert found["models"]["slow"]["state"] == "unloaded"
    assert found["memory"]["weights"] == 0
    assert one.ask("one", "a task", "slow")


def test_a_model_in_use_leaves_once_its_calls_are_done_and_the_calls_that_come_load_it_again(one: Worker) -> None:
    before = one.pool()["models"]["slow"]["loads"]
    tasks = [one.send("one", f"{number} {'word ' * 29}", "slow") for number in range(8)]
    poll(lambda: seen(one, "slow")["users"], "a call to use the model")
    assert "leaves memory once" in tell(one, "legit_unload", alias="slow")["ok"]
    assert one.ask("one", "a later task", "slow")
    one.answers(tasks)
    assert all(task.successful() for task in tasks)
    assert seen(one, "slow")["loads"] == before + 1


def test_what_can_not_be_done_is_one_sentence(one: Worker) -> None:
    unknown = legit(one, "load", "nosuch", code=1)
    assert "no model 'nosuch' is configured; there are: first" in unknown.stderr
    assert "raise LEGIT_WORKER_VRAM_LIMIT" in tell(one, "legit_load", alias="large")["error"]
    nobody = celery(one, "legit", "models", "--destination", "nobody@nowhere", code=1)
    assert "no worker told of its models" in nobody.stderr


def test_celerys_own_commands_do_the_same(one: Worker) -> None:
    there = ("--destination", one.name, "--timeout", "5")
    assert "legit_pin <alias>" in celery(one, "control", "--list").stdout
    assert "'first'" in celery(one, "control", "legit_load", "first", *there).stdout
    poll(lambda: seen(one, "first")["state"] == "resident", "the load")
    shown = json.loads(celery(one, "inspect", "legit_models", "--json", *there).stdout)
    assert shown[one.name]["models"]["first"]["loads"] >= 1
    tell(one, "legit_unload", alias="first")
    assert seen(one, "first")["state"] == "unloaded"


def test_a_stock_worker_answers_as_to_any_unknown_command(start_worker: StartWorker) -> None:
    worker = start_worker("idle", environment=SETTINGS | {"LEGIT_WORKER_ENABLED": "0"})
    assert tell(worker, "legit_nosuch") == {"error": "KeyError('legit_nosuch')"}
    for command in ("legit_models", "legit_load", "legit_unload", "legit_pin", "legit_unpin"):
        assert tell(worker, command, alias="first") == {"error": f"KeyError('{command}')"}
    told = legit(worker, "load", "first", code=1)
    assert "legit_worker is not enabled in this worker" in told.stderr
    assert worker.ask("in_memory") == [worker.pid, []]


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_under_other_pools_keep_alive_holds_and_commands_work_or_say_why_not(
    start_worker: StartWorker, pool: str
) -> None:
    settings = SETTINGS | model("first", f"0,0,{100 * MIB}", KEEP_ALIVE="0.5")
    worker = start_worker("idle", "--concurrency=1", pool=f"--pool={pool}", environment=settings)
    assert worker.ask("one", "a task", "first")
    pid, resident = worker.ask("in_memory")
    assert (pid == worker.pid) is (pool == "threads")
    assert resident in (["first"], []), "it may have left by now"
    poll(lambda: worker.ask("in_memory")[1] == [], "the model to leave")
    told = tell(worker, "legit_load", alias="slow")
    if pool == "threads":
        assert told == {"ok": "model 'slow' is being loaded"}
        poll(lambda: seen(worker, "slow")["state"] == "resident", "the load")
        tell(worker, "legit_unload", alias="slow")
    else:
        assert "each process loads models of its own" in told["error"]
