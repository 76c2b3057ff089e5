"""What the helpers hold at a time, and what happens once none of them can be started."""

from __future__ import annotations

import atexit
import functools
import math
import os
import signal
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from legit_worker import parking
from legit_worker.errors import InvalidInputError
from legit_worker.prep import processes
from legit_worker.prep.processes import MAX_BYTES, Helpers


class Pool:
    """Does each item at once, or none."""

    def __init__(self, *, is_broken: bool = False) -> None:
        self.is_broken = is_broken

    def schedule(self, function: Any, args: tuple[Any, ...], timeout: float) -> Future[Any]:
        """Return what the function gives."""
        if self.is_broken:
            raise RuntimeError("Unexpected error within the Pool")
        future: Future[Any] = Future()
        future.set_result(function(*args))
        return future


@pytest.fixture
def helpers(monkeypatch: pytest.MonkeyPatch) -> Helpers:
    monkeypatch.setattr(Helpers, "_new_pool", lambda self: Pool())
    return Helpers(1, 30)


def test_what_is_done_takes_no_room_though_its_task_has_not_gone_on(
    helpers: Helpers, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: Future[Any] = Future()
    done.set_result(None)
    helpers._at_work[done] = MAX_BYTES

    def wait(future: Future[Any], what: str, **_: Any) -> None:
        assert future is not done, "this would be waited for for ever"

    monkeypatch.setattr(parking, "wait", wait)
    assert helpers.run(math.sqrt, 4.0, size=1) == 2


def test_threads_share_the_helpers(helpers: Helpers) -> None:
    """One adds and takes away items while another asks what is at work: so often that it met it in each run."""
    wrong: list[Exception] = []

    def work() -> None:
        try:
            for _ in range(500):
                helpers.run(math.sqrt, 4.0, size=1)
        except Exception as error:
            wrong.append(error)

    for number in range(200):
        helpers._at_work[Future()] = number  # others' items
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_threads_that_ask_first_at_once_make_one_set_of_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)
    monkeypatch.setattr(Helpers, "_new_pool", lambda self: Pool())
    monkeypatch.setattr(atexit, "register", lambda function: None)
    monkeypatch.setenv("LEGIT_WORKER_PREP_PROCESSES", "1")
    monkeypatch.setattr(processes, "_helpers", functools.cache(processes._helpers.__wrapped__))

    def ask() -> Helpers | None:
        both.wait()
        return processes.helpers()

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.submit(ask), threads.submit(ask)
    assert first.result() is second.result() is not None


def test_helpers_that_could_not_be_started_are_started_anew(helpers: Helpers, caplog: pytest.LogCaptureFixture) -> None:
    lost: Future[Any] = Future()
    helpers._at_work[lost] = 1
    helpers._pool = Pool(is_broken=True)  # type: ignore[assignment]
    assert helpers.run(math.sqrt, 4.0, size=1) == 2
    assert "are started anew" in caplog.text
    with pytest.raises(BrokenProcessPool, match="LEGIT_WORKER_PREP_PROCESSES=1"):
        lost.result(0)


def end_first(folder: str, number: int) -> str:
    """Work, in a helper that gets a signal the first time."""
    been = Path(folder, "been")
    if not been.exists():
        been.touch()
        os.kill(os.getpid(), number)
        time.sleep(60)
    return "done"


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP])
def test_a_helper_that_is_told_to_end_leaves_its_item_to_the_next(tmp_path: Path, told: signal.Signals) -> None:
    """As a service manager ends a worker: it sends `TERM` to all of its processes."""
    helpers = Helpers(1, 60)
    try:
        assert helpers.run(end_first, str(tmp_path), told.value, size=1) == "done"
    finally:
        helpers.close()


def test_a_helper_that_is_killed_fails_its_item(tmp_path: Path) -> None:
    """The system does so if memory runs out."""
    helpers = Helpers(1, 60)
    try:
        with pytest.raises(InvalidInputError, match="ended its helper process"):
            helpers.run(end_first, str(tmp_path), signal.SIGKILL.value, size=1)
    finally:
        helpers.close()
