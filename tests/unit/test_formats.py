"""An envelope as each kind of consumer finds it."""

from __future__ import annotations

import base64
import json
from typing import Any
from uuid import UUID

import pytest

from legit_worker.routing.formats import message, pushes, queue_of, stable_id
from legit_worker.settings import AppSettings

ENVELOPE = json.dumps({"v": 1, "id": "a1", "meta": {"text": 'Zoë "quoted" 🙂'}}, ensure_ascii=False).encode()


def app(**changes: Any) -> AppSettings:
    return AppSettings(**({"result_routing": True, "job": r"App\Jobs\Ready@handle"} | changes))


def test_the_queue_is_the_apps_own_unless_it_is_named() -> None:
    assert queue_of("vod", app()) == "vod.results"
    assert queue_of("vod", app(queue="q")) == "q"


def test_json_is_the_envelope_itself() -> None:
    (push,) = pushes(app(prefix="p:"), "q", "a1", ENVELOPE)
    assert (push.key, push.value, push.left) == ("p:q", ENVELOPE, False)
    assert message(app(), "a1", ENVELOPE).body == ENVELOPE


def test_laravel_finds_its_own_string_job() -> None:
    job, notify = pushes(app(format="laravel", prefix="laravel-database-"), "vod", "a1", ENVELOPE)
    assert (job.key, notify.key) == ("laravel-database-queues:vod", "laravel-database-queues:vod:notify")
    assert notify.value == b"1"
    payload = json.loads(job.value)
    assert payload["data"] == json.loads(ENVELOPE)
    assert payload["job"] == r"App\Jobs\Ready@handle"
    assert payload["displayName"] == r"App\Jobs\Ready"
    assert payload["attempts"] == 0
    assert set(payload) == {
        *("uuid", "displayName", "job", "maxTries", "maxExceptions", "failOnTimeout", "backoff", "timeout"),
        *("data", "id", "attempts", "createdAt", "type", "tags", "pushedAt"),
    }


def test_laravel_sees_a_duplicate_by_its_uuid_and_keeps_both_apart() -> None:
    first, second = (json.loads(pushes(app(format="laravel"), "q", "a1", ENVELOPE)[0].value) for _ in range(2))
    assert first["uuid"] == second["uuid"] == stable_id("a1")
    assert UUID(first["uuid"]).version == 5
    assert first["id"] != second["id"], "Laravel keeps reserved jobs in a set of payloads"


def test_celery_finds_a_message_of_protocol_2() -> None:
    (push,) = pushes(app(format="celery", job="handle", prefix="p:"), "q", "a1", ENVELOPE)
    assert (push.key, push.left) == ("p:q", True)
    stored = json.loads(push.value)
    assert (stored["headers"]["task"], stored["headers"]["id"]) == ("handle", stable_id("a1"))
    assert stored["properties"]["delivery_info"] == {"exchange": "", "routing_key": "q"}
    args, kwargs, embed = json.loads(base64.b64decode(stored["body"]))
    assert (args, kwargs) == ([json.loads(ENVELOPE)], {})
    assert set(embed) == {"callbacks", "errbacks", "chain", "chord"}


@pytest.mark.parametrize("kind", ["celery", "laravel"])
def test_another_broker_gets_the_same_in_a_message(kind: str) -> None:
    parcel = message(app(format=kind), "a1", ENVELOPE)
    body = json.loads(parcel.body)
    assert (body["data"] if kind == "laravel" else body[0][0]) == json.loads(ENVELOPE)
    assert parcel.properties["correlation_id"] == stable_id("a1")


def test_an_id_that_is_no_unicode_has_its_own_uuid_too() -> None:
    assert stable_id("a\ud800") != stable_id("a\udfff")


def test_a_queue_of_a_cluster_has_its_braces_in_all_keys() -> None:
    chosen = AppSettings(format="laravel", job="App\\Jobs\\X@handle", queue="{embeddings}", prefix="app-")
    keys = [push.key for push in pushes(chosen, queue_of("vod", chosen), "an-id", b"{}")]
    assert keys == ["app-queues:{embeddings}", "app-queues:{embeddings}:notify"]


@pytest.mark.parametrize("queue", ["{a", "a}", "{}", "{a}{b}", "{{a}}", "x{a}"])
def test_braces_that_are_no_pair_around_a_name_are_refused(queue: str) -> None:
    with pytest.raises(ValueError, match="braces"):
        AppSettings(queue=queue)
