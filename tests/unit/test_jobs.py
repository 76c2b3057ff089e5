"""A retry that can't be sent since the broker is away: its task goes back to the queue."""

from __future__ import annotations

from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from celery import Celery
from celery.exceptions import Reject
from kombu.exceptions import EncodeError, OperationalError

from legit_worker.pool.jobs import CLOSED, _seen_to


@pytest.mark.parametrize(
    ("error", "goes_back"),
    [
        (OperationalError("gone"), True),
        (AttributeError(CLOSED), True),
        (AttributeError("'Thing' object has no attribute 'client'"), False),
        (EncodeError("no JSON"), False),
    ],
)
def test_a_retry_goes_back_if_the_broker_is_away_and_only_then(
    monkeypatch: pytest.MonkeyPatch, error: Exception, goes_back: bool
) -> None:
    app = Celery(set_as_current=False)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(app, "send_task", fail)

    @app.task(bind=True)
    def again(self: Any) -> None:
        raise self.retry(countdown=0)

    again.push_request(called_directly=False, is_eager=False, retries=0, args=(), kwargs={}, delivery_info={})
    with pytest.raises(Reject) as caught:
        again.run()
    try:
        raise caught.value
    except Reject:
        _seen_to((1, ExceptionInfo(), None))
    assert caught.value.requeue is goes_back
