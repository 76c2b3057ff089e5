"""What the helpers hold at a time, and what happens once none of them can be started."""

from __future__ import annotations

import math
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest

from legit_worker import parking
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


def test_helpers_that_could_not_be_started_are_started_anew(helpers: Helpers, caplog: pytest.LogCaptureFixture) -> None:
    lost: Future[Any] = Future()
    helpers._at_work[lost] = 1
    helpers._pool = Pool(is_broken=True)  # type: ignore[assignment]
    assert helpers.run(math.sqrt, 4.0, size=1) == 2
    assert "are started anew" in caplog.text
    with pytest.raises(BrokenProcessPool, match="LEGIT_WORKER_PREP_PROCESSES=1"):
        lost.result(0)
