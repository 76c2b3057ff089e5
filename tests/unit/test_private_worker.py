"""A signal in the moment of the private worker's start ends that worker too."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

import pytest

from legit_worker.validation import worker as module
from legit_worker.validation.worker import PrivateWorker, ending_by_exception


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_between_the_fork_and_its_answer_leaves_no_worker(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen[bytes]):
        def __init__(self, _: Any, **options: Any) -> None:
            super().__init__(["sleep", "60"], **options)
            started.append(self)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(module.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        run_a_worker()
    assert started[0].returncode == -signal.SIGTERM


def run_a_worker() -> None:
    with ending_by_exception(), PrivateWorker("project", "queue", "name", {}) as worker:
        worker.start()
        pytest.fail("the comparison began")
