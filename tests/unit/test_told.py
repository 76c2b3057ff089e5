"""What the log says of a load while it goes on."""

from __future__ import annotations

import threading

import pytest
from harness import poll

from legit_worker.models import told
from legit_worker.models.slot import Slot
from legit_worker.settings import ModelSettings

BEGINS = "model 'minilm' (kind embed, path /models/minilm) loads on cpu"


def minilm(size: int = 0) -> Slot:
    """A model that was never loaded."""
    return Slot(alias="minilm", spec=ModelSettings(path="/models/minilm"), size=size)


def test_its_beginning_has_a_line_with_the_size_if_that_is_known(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", told.__name__)
    for size in (87 * 2**20, 0):
        with told.load_is_told(minilm(size), "cpu"):
            pass
    assert caplog.messages == [f"{BEGINS}, about 87 MiB", f"{BEGINS}, of unknown size"]


def test_a_long_load_is_told_again_until_it_ends(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", told.__name__)
    monkeypatch.setattr(told, "STILL_SECONDS", 0.001)
    before = set(threading.enumerate())
    with told.load_is_told(minilm(), "cpu"):
        poll(lambda: len(caplog.messages) > 1, "a second line", 60)
        (teller,) = set(threading.enumerate()) - before
    teller.join(60)
    assert not teller.is_alive()
    assert caplog.messages[1].startswith("model 'minilm' still loads, since ")
