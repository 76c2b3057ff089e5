"""A cold shutdown's handler reads nothing from RabbitMQ: the code that it interrupted may wait for an answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from legit_worker.pool.softly import SoftShutdown


class TaskConsumer:
    """Counts how often it is cancelled."""

    def __init__(self) -> None:
        self.cancelled = 0

    def cancel(self) -> None:
        self.cancelled += 1


@pytest.mark.parametrize(("driver", "in_handler"), [("amqp", 0), ("redis", 1)])
def test_consumers_are_cancelled_after_the_handler(driver: str, in_handler: int) -> None:
    """The calls are those of `on_cold_shutdown` (celery.apps.worker, 5.7), in its order."""
    active: list[Any] = []
    consumer = SimpleNamespace(
        controller=SimpleNamespace(),
        connection=SimpleNamespace(transport=SimpleNamespace(driver_type=driver)),
        task_consumer=TaskConsumer(),
        cancel_active_requests=lambda: active.append(1),
    )
    soft = SoftShutdown(Celery(set_as_current=False))
    soft.meet(consumer)
    consumer.controller.wait_for_soft_shutdown()
    consumer.task_consumer.cancel()
    consumer.cancel_active_requests()
    assert (consumer.task_consumer.cancelled, active) == (in_handler, [1])
    consumer.task_consumer.cancel()  # as the consumer stops
    assert consumer.task_consumer.cancelled == in_handler + 1


def test_a_worker_without_a_connection_ends_too() -> None:
    consumer = SimpleNamespace(
        controller=SimpleNamespace(), connection=None, task_consumer=None, cancel_active_requests=lambda: None
    )
    soft = SoftShutdown(Celery(set_as_current=False))
    soft.meet(consumer)
    consumer.controller.wait_for_soft_shutdown()
    consumer.cancel_active_requests()
