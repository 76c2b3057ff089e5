"""A process that is forked while another thread imports a module, or computes a batch."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from legit_worker.device import in_flight
from legit_worker.device.devices import Launch
from legit_worker.models import forks

#: A fork that can't wait for the import, and what a model call in the child says.
PROGRAM = """
import os, sys, threading, time
import legit_worker
from legit_worker.device import in_flight
from legit_worker.models import forks
forks.MOST_SECONDS = 0.1
thread = threading.Thread(target=lambda: legit_worker.model("m").map(["x"]), daemon=True)
thread.start()
while "endless" not in sys.modules:
    time.sleep(0.01)
child = os.fork()
if child == 0:
    try:
        legit_worker.model("m").map(["x"])
    except Exception as error:
        print(type(error).__name__, error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
os._exit(0)
"""


def test_a_child_that_can_not_import_says_so(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text("import time\ntime.sleep(1000)\n")
    root = str(Path(__file__).parents[2])
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={"PYTHONPATH": f"{tmp_path}:{root}", "LEGIT_WORKER_MODELS__M__KIND": "endless:Model"}
        | {"LEGIT_WORKER_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert finished.stdout.startswith("ModelLoadError this process was forked while another thread"), finished.stderr
    assert "'endless'" in finished.stdout


def test_who_waited_for_a_fork_in_vain_gives_nothing_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "MOST_SECONDS", 0.1)
    forks.hold_imports()
    second = threading.Thread(target=lambda: (forks.hold_imports(), forks.go_on()))
    second.start()
    second.join()
    forks.go_on()
    loads = threading.Thread(target=forks.importing().__enter__, daemon=True)
    loads.start()
    loads.join(10)
    assert not loads.is_alive()
    forks.restart()


#: A signal's handler forks on the thread that waits for OpenVINO's batch.
FORKS_IN_HANDLER = """
import os, signal
from types import SimpleNamespace
from legit_worker.backends.graphs import Inference
from legit_worker.device.in_flight import handing_over
def fork(*_):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
signal.signal(signal.SIGUSR1, fork)
class Request:
    latency = 1.0
    def wait(self):
        waits.append(self)
        if len(waits) == 1:
            signal.raise_signal(signal.SIGUSR1)
    def get_output_tensor(self, number):
        return SimpleNamespace(data=[[1.0]])
waits, given_back = [], []
graph = SimpleNamespace(seconds_until=lambda began, ended: 0.1, give_back=given_back.append)
batch = Inference(outputs=None, seconds=0, is_done=False, count=1, graph=graph, request=Request(), began=0, arrays={})
with handing_over(batch):
    pass
batch.wait()
print(batch.is_done, batch.error, len(given_back))
"""


def test_a_handler_may_fork_while_a_batch_is_waited_for() -> None:
    assert printed(FORKS_IN_HANDLER) == "True None 1"


def printed(program: str) -> str:
    """What a program prints in a process of its own."""
    finished = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return finished.stdout.strip()


class Refused(Launch):
    """A batch for which nobody must wait."""

    def wait(self) -> None:
        pytest.fail("somebody waits for it")


#: A signal's handler forks on the thread that hands a batch over, before the batch has begun.
FORKS_AT_HAND_OVER = """
import os, signal
from legit_worker.device import in_flight
from legit_worker.device.devices import Launch
def fork(*_):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
signal.signal(signal.SIGUSR1, fork)
class Batch(Launch):
    def wait(self):
        waits.append(began)
waits, began = [], False
with in_flight.handing_over(Batch(outputs=None, seconds=0.0, is_done=False)):
    signal.raise_signal(signal.SIGUSR1)
    began = True
in_flight.wait()
print(waits)
"""


def test_a_handler_that_forks_while_a_batch_is_handed_over_does_not_wait_for_it() -> None:
    assert printed(FORKS_AT_HAND_OVER) == "[True]"


def test_a_batch_that_was_done_while_it_was_handed_over_is_not_in_flight() -> None:
    launch = Refused(outputs=None, seconds=0.0, is_done=False)
    with in_flight.handing_over(launch):
        launch.is_done = True
        in_flight.landed(launch)
    in_flight.wait()


def test_a_fork_waits_for_no_batch_whose_device_refused_it() -> None:
    with pytest.raises(LookupError), in_flight.handing_over(Refused(outputs=None, seconds=0.0)):
        raise LookupError
    in_flight.wait()
