"""Which app a task is for, and where its results may go."""

from __future__ import annotations

from typing import Any

import pytest

from legit_worker.apps import answer_queue, carrier, identify
from legit_worker.settings import AppSettings, AppSource, Settings


def settings(app_from: str = "header:app,kwarg:app", **apps: dict[str, Any]) -> Settings:
    return Settings(app_from=app_from, apps={name: AppSettings(**fields) for name, fields in apps.items()})


@pytest.mark.parametrize(
    ("app_from", "request_", "app"),
    [
        ("header:app", {"app": "Vod"}, "vod"),
        ("header:app", {"headers": {"app": "vod"}}, "vod"),
        ("header:app", {"headers": None}, None),
        ("header:app", {"app": ""}, None),
        ("header:app", {"app": ["vod"]}, None),
        ("kwarg:for", {"kwargs": {"for": "vod"}}, "vod"),
        ("kwarg:for", {"kwargs": None}, None),
        ("header:app,kwarg:app", {"app": "first", "kwargs": {"app": "second"}}, "first"),
        ("kwarg:app,header:app", {"app": "first", "kwargs": {"app": "second"}}, "second"),
        (r"queue:(?P<app>\w+)\.embed", {"delivery_info": {"routing_key": "vod.embed"}}, "vod"),
        (r"queue:(?P<app>\w+)\.embed", {"delivery_info": {"routing_key": "vod.embed.x"}}, None),
        (r"queue:(?P<app>\w+)\.embed", {"delivery_info": None}, None),
        ("reply_to", {"reply_to": "vod"}, "vod"),
        ("reply_to", {"reply_to": "vod.answers.7"}, "vod"),
        ("reply_to", {"reply_to": "6f1e0a52-a-queue-of-celerys-own"}, None),
        ("reply_to,header:app", {"reply_to": "6f1e0a52", "app": "vod"}, "vod"),
        ("kwarg:app", {"legit_worker_app": "vod"}, "vod"),
        ("kwarg:app", {"legit_worker_app": "parent", "kwargs": {"app": "own"}}, "own"),
    ],
)
def test_the_first_source_that_names_an_app_counts(app_from: str, request_: dict[str, Any], app: str | None) -> None:
    assert identify(settings(app_from, vod={"reply_to_prefix": "vod.answers."}), request_) == app


@pytest.mark.parametrize(
    ("reply_to", "queue"),
    [
        ("vod.answers.7", "vod.answers.7"),
        ("vod.answers.../x", None),
        ("vod.answers.7 8", None),
        ("vod.answers." + "x" * 128, None),
        ("other", None),
        (None, None),
        (7, None),
    ],
)
def test_a_message_names_only_queues_under_the_configured_prefix(reply_to: Any, queue: str | None) -> None:
    chosen = settings("reply_to", vod={"reply_to_prefix": "vod.answers."})
    assert answer_queue("vod", chosen, {"reply_to": reply_to}) == queue


@pytest.mark.parametrize("chosen", [settings("reply_to", vod={}), settings("header:app", vod={"reply_to_prefix": "v"})])
def test_a_message_names_no_queue_where_nothing_lets_it(chosen: Settings) -> None:
    assert answer_queue("vod", chosen, {"reply_to": "vod.answers"}) is None


def test_a_child_carries_the_app_where_its_worker_will_look() -> None:
    assert carrier(settings("kwarg:app,header:for")) == "for"
    assert AppSource("header", carrier(settings("kwarg:app"))) == AppSource("header", "legit_worker_app")


@pytest.mark.parametrize("info", [True, 7, ["a"], {"routing_key": -1}, {"routing_key": ["a"]}, {"routing_key": ""}])
def test_an_odd_address_names_no_app(info: Any) -> None:
    assert identify(settings("queue:(?P<app>.*)", a={}), {"delivery_info": info}) is None
