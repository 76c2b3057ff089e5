"""What is stored beside a result is what Celery's own code stores, whatever a project has set."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context
from celery.backends.redis import RedisBackend

from legit_worker.results.described import StandIn, stand_in_for

REQUESTS = [
    None,
    Context(id="1", task="t", args=[1], kwargs={"a": 2}, hostname="w", retries=3),
    Context(id="1", task="t", group="g", parent_id="p", delivery_info={"routing_key": "q"}, children=[]),
    Context(id="1", task="t", args=[], stamps={"user": ["me"]}, stamped_headers=["user"], delivery_info=None),
]

#: What projects set, by each of Celery's ways.
SETTINGS: dict[str, Callable[[Celery], Any]] = {
    "nothing": lambda app: None,
    "extended": lambda app: app.conf.update(result_extended=True),
    "extended by an object": lambda app: app.config_from_object({"result_extended": True}),
    "extended by a prefix": lambda app: app.config_from_object({"CELERY_RESULT_EXTENDED": True}, namespace="CELERY"),
    "time zone": lambda app: app.conf.update(timezone="Asia/Kolkata"),
    "local time": lambda app: app.conf.update(enable_utc=False, timezone="America/New_York"),
}


def described(backend: Any) -> StandIn:
    stand_in = stand_in_for(backend, type(backend))
    assert stand_in is not None
    return stand_in


def assert_alike(backend: Any, stand_in: StandIn) -> None:
    for request in REQUESTS:
        for state in ("SUCCESS", "FAILURE", "STARTED"):
            for encode in (False, True):
                ours, celerys = (
                    describe([1.5], state, None, request, encode=encode)
                    for describe in (stand_in.describe, backend._get_result_meta)
                )
                now, then = ours.pop("date_done"), celerys.pop("date_done")
                assert ours == celerys
                assert type(now) is type(then)
                if then is not None:
                    assert now[-6:] == then[-6:], "the time zone"
                    assert datetime.fromisoformat(then) - datetime.fromisoformat(now) < timedelta(seconds=10)


@pytest.mark.parametrize("setting", SETTINGS)
def test_it_is_what_celery_stores(setting: str) -> None:
    app = Celery("described", set_as_current=False, broker="memory://", backend="redis://")
    SETTINGS[setting](app)
    assert_alike(app.backend, described(app.backend))


def test_a_setting_that_changes_is_seen() -> None:
    app = Celery("described", set_as_current=False, broker="memory://", backend="redis://")
    stand_in = described(app.backend)
    for extended in (True, False, True):
        app.conf.result_extended = extended
        assert ("name" in stand_in.describe(1, "SUCCESS", None, REQUESTS[1])) is extended
        assert_alike(app.backend, stand_in)


class _OwnClock(Celery):
    def now(self) -> datetime:
        return datetime(2030, 1, 1)


class _OwnBackend(RedisBackend):
    def _get_result_meta(self, *args: Any, **kwargs: Any) -> Any:
        return super()._get_result_meta(*args, **kwargs) | {"mine": True}


def test_a_projects_own_clock_and_description_are_kept() -> None:
    app = _OwnClock("described", set_as_current=False, broker="memory://", backend="redis://")
    assert stand_in_for(app.backend, RedisBackend) is None
    app = Celery("described", set_as_current=False, broker="memory://", backend="redis://")
    assert stand_in_for(app.backend, _OwnBackend) is None
    app.now = lambda: datetime(2030, 1, 1)  # type: ignore[method-assign]
    assert stand_in_for(app.backend, RedisBackend) is None
