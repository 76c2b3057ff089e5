"""Parts of a chord that come again after their worker was killed between its claim and the body."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from legit_worker import parking
from legit_worker.results import patience
from legit_worker.results.chords import SENT, Claims


class Backend:
    """A chord whose parts are all counted. A dead worker's claim may end just after it kept a part from claiming."""

    def __init__(self, claim: bytes | None, looks: int) -> None:
        self.claim, self.looks, self.counted, self.sent = claim, looks, 0, 0
        self.client = self

    def on_chord_part_return(self, request: Any) -> None:
        """Claim the sending, unless somebody has."""
        self.counted += 1
        if self.claim is None and not self.sent:
            self.sent, self.claim = 1, SENT
        elif self.looks <= 0 and self.claim != SENT:
            self.claim = None

    def get_key_for_group(self, group: str, suffix: str) -> str:
        """Its key."""
        return suffix

    def get(self, key: str) -> bytes | None:
        """The claim."""
        claim, self.looks = self.claim, self.looks - 1
        if self.looks < 0 and claim != SENT:  # from the next look on
            self.claim = None
        return claim

    def exists(self, key: str) -> bool:
        """Whether the chord is not over."""
        return not self.sent


class Chords(Claims, Backend):
    """As the backend of a worker."""


def part(**delivery: Any) -> Any:
    return SimpleNamespace(group="g", delivery_info=delivery)


#: How the worker itself waits.
later = patience.later


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def at_once(done: Future[Any], what: str, **_: Any) -> bool:
        return True

    monkeypatch.setattr(parking, "park", at_once)
    monkeypatch.setattr(patience, "later", Future)


@pytest.mark.parametrize("looks", range(6))
def test_the_body_is_sent_whenever_the_claim_ends(looks: int) -> None:
    backend = Chords(b"dead", looks)
    backend.on_chord_part_return(part(redelivered=True))
    assert backend.sent == 1


def test_a_part_that_comes_for_the_first_time_waits_for_nobody() -> None:
    backend = Chords(b"alive", 100)
    backend.on_chord_part_return(part())
    assert (backend.sent, backend.counted, backend.looks) == (0, 1, 100)


def test_a_worker_that_can_not_wait_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "park", lambda *_, **__: False)
    backend = Chords(b"alive", 100)
    backend.on_chord_part_return(part(redelivered=True))
    assert (backend.sent, backend.counted) == (0, 1)


def test_all_parts_that_wait_share_one_thread() -> None:
    before = threading.active_count()
    first = [later() for _ in range(1000)]
    assert threading.active_count() <= before + 1
    for done in first:
        done.result(timeout=60)
    later().result(timeout=60)  # and there is another look after that
