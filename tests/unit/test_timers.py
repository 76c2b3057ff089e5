"""The pool's timers on Celery's event loop."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest
from kombu.asynchronous import Hub

from legit_worker.pool import pool
from legit_worker.pool.looks import Looks
from legit_worker.pool.pool import ModelPool


def test_a_new_connection_adds_no_timers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery 5.6 takes none away as a connection is lost."""
    monkeypatch.setattr(pool, "default_registry", MagicMock())
    subject: Any = MagicMock(_looks=Looks())
    hub = Hub()
    hub.add_reader = lambda *_: None
    try:
        counts = []
        for _ in range(3):
            ModelPool.register_with_event_loop(subject, hub)
            counts.append(sum(not timer.entry.canceled for timer in hub.timer.queue))
        assert counts[0] == len(subject._looks) > 5
        assert len(set(counts)) == 1
    finally:
        hub.close()
