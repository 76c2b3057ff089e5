"""What a wire to a server remembers."""

from __future__ import annotations

import pytest
from kombu import Connection

from legit_worker.routing import wires
from legit_worker.routing.delivery import Delivery
from legit_worker.routing.wires import BrokerWire
from legit_worker.settings import AppSettings


def delivery(queue: str) -> Delivery:
    return Delivery(app="alpha", chosen=AppSettings(), queue=queue, task_id="1", envelope=b"{}")


def test_of_the_queues_that_tasks_name_the_latest_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wires, "KNOWN_QUEUES", 3)
    wire = BrokerWire(Connection("memory://localhost"))
    for queue in ("the app's own", *(f"answers.{number}" for number in range(5))):
        wire.channel.queue_declare(queue)
    for number in range(5):
        outcomes = wire.send([delivery("the app's own"), delivery(f"answers.{number}")])
        assert [error for _, error in outcomes] == [None, None]
    assert set(wire._known) == {"the app's own", "answers.3", "answers.4"}
    assert wire.channel._size("answers.0") == 1
