"""An envelope in the form that an app's own consumer reads. Pure.

In: an envelope's bytes, and the app's settings. Out: values for lists in Redis, or one message for another broker.

Sources: Celery's protocol 2, https://docs.celeryq.dev/en/stable/internals/protocol.html; kombu's Redis transport
(kombu.transport.redis, 5.6); Laravel's Illuminate\\Queue\\Queue::createStringPayload and LuaScripts::push (8 to 12).
"""

from __future__ import annotations

import base64
import json
import secrets
import socket
import uuid
from dataclasses import dataclass, field
from time import time
from typing import Any

from legit_worker.settings import AppSettings

#: The namespace of every UUIDv5 made here.
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "legit_worker:result")


@dataclass(frozen=True)
class Push:
    """One value for the right or the left end of a Redis list."""

    key: str
    value: bytes
    left: bool = False


@dataclass(frozen=True)
class Message:
    """One message for another broker."""

    body: bytes
    headers: dict[str, Any] = field(default_factory=dict)
    properties: dict[str, Any] = field(default_factory=dict)
    content_type: str = "application/json"
    content_encoding: str = "utf-8"


def queue_of(app: str, chosen: AppSettings) -> str:
    """Return the app's configured queue."""
    return chosen.queue or f"{app}.results"


def key_of(chosen: AppSettings, queue: str) -> str:
    """Return the list in Redis."""
    return f"{chosen.prefix}queues:{queue}" if chosen.format == "laravel" else chosen.prefix + queue


def pushes(chosen: AppSettings, queue: str, task_id: str, envelope: bytes) -> list[Push]:
    """Return the values for Redis, which belong into one transaction."""
    if chosen.format == "json":
        return [Push(key_of(chosen, queue), envelope)]
    if chosen.format == "celery":
        return [Push(key_of(chosen, queue), _in_kombus_form(_celery(chosen, task_id, envelope), queue), left=True)]
    key = key_of(chosen, queue)
    return [Push(key, _laravel(chosen, task_id, envelope)), Push(f"{key}:notify", b"1")]


def message(chosen: AppSettings, task_id: str, envelope: bytes) -> Message:
    """Return the message for RabbitMQ, or for any other transport of kombu."""
    if chosen.format == "json":
        return Message(envelope)
    if chosen.format == "celery":
        return _celery(chosen, task_id, envelope)
    job = _laravel(chosen, task_id, envelope)
    return Message(job, {"laravel": {"attempts": 0}}, {"correlation_id": stable_id(task_id)})


def stable_id(task_id: str) -> str:
    """Return the same id for every envelope of a task, so that consumers see duplicates."""
    return str(uuid.uuid5(NAMESPACE, task_id.encode(errors="backslashreplace").decode()))


def _celery(chosen: AppSettings, task_id: str, envelope: bytes) -> Message:
    own_id = stable_id(task_id)
    headers = {
        "lang": "py",
        "task": chosen.job,
        "id": own_id,
        "shadow": None,
        "eta": None,
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": [None, None],
        "root_id": own_id,
        "parent_id": None,
        "argsrepr": "(<envelope>,)",
        "kwargsrepr": "{}",
        "origin": f"legit_worker@{socket.gethostname()}",
        "ignore_result": False,
    }
    embed = b'{"callbacks":null,"errbacks":null,"chain":null,"chord":null}'
    return Message(b"[[%b],{},%b]" % (envelope, embed), headers, {"correlation_id": own_id, "reply_to": ""})


def _laravel(chosen: AppSettings, task_id: str, envelope: bytes) -> bytes:
    now = time()
    job: dict[str, Any] = {
        "uuid": stable_id(task_id),
        "displayName": str(chosen.job).partition("@")[0],
        "job": chosen.job,
        "maxTries": None,
        "maxExceptions": None,
        "failOnTimeout": False,
        "backoff": None,
        "timeout": None,
        # Newer releases of Laravel tell the age of a queue by `createdAt`. Horizon adds the others to its own jobs.
        "createdAt": int(now),
        "type": "job",
        "tags": [],
        "pushedAt": f"{now:.4f}",
        # Laravel tells reserved jobs apart by their whole text. So one part must always differ.
        "id": secrets.token_hex(16),
        "attempts": 0,
    }
    # The envelope is JSON already, and may be large: it is not parsed and written again.
    return b'%b,"data":%b}' % (json.dumps(job).encode()[:-1], envelope)


def _in_kombus_form(celery: Message, queue: str) -> bytes:
    return json.dumps(
        {
            "body": base64.b64encode(celery.body).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": celery.headers,
            "properties": {
                **celery.properties,
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": queue},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid.uuid4()),
            },
        }
    ).encode()
