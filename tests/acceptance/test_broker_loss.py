"""The broker goes away while tasks are parked, and comes back: each is answered, and the worker is the same."""

from __future__ import annotations

import json
import time

import pytest
from harness import SIMULATED, Broker, StartWorker, poll
from ownserver import Server

#: Tasks sent before the outage, and after it.
TASKS = 300


@pytest.mark.parametrize(("away", "back"), [("stop", "start"), ("freeze", "thaw")])
def test_tasks_outlive_the_broker(start_worker: StartWorker, server: Server, away: str, back: str) -> None:
    options = {"visibility_timeout": 2, "unacked_restore_throttle": 1, "unacked_restore_interval": 1}
    broker = Broker(
        url=server.url,
        backend=server.url,
        queue="work",
        transport_options=options,
        environment={"PROJECT_TRANSPORT_OPTIONS": json.dumps(options)},
    )
    slow = {"LEGIT_WORKER_MODELS__SIM__PATH": "0.02,0.005", "LEGIT_WORKER_WINDOW": "64"}
    worker = start_worker("project", broker=broker, environment=SIMULATED | {"LEGIT_WORKER_ENABLED": "1"} | slow)
    results = [worker.send("one", f"text {number}") for number in range(TASKS)]
    poll(lambda: results[TASKS // 10].ready(), "the first answers")
    getattr(server, away)()
    time.sleep(3)
    getattr(server, back)()
    worker.answers(results)
    assert all(result.successful() for result in results)
    assert worker.ask("one", "last")
    assert worker.log.count(f"{worker.name} ready.") == 1
