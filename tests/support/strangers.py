"""Messages that a stranger may put into a worker's queue: nearly tasks, and not.

In: nothing. Out: by what is wrong with each, bytes for a Redis list, or the parts of a message for another broker.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import kombu
import redis

#: A task that the tests' projects have, and that needs no model.
TASK = "no_model"


def headers(**changes: Any) -> dict[str, Any]:
    """Of a task, by protocol 2."""
    return {"task": TASK, "id": "an-id", "lang": "py", "root_id": "an-id"} | changes


def body(*parts: Any) -> str:
    """Arguments, keyword arguments and what is to follow; as base64 of JSON."""
    return base64.b64encode(json.dumps(parts or ([1], {}, {})).encode()).decode()


def message(**changes: Any) -> dict[str, Any]:
    """A whole one, as kombu writes it to Redis."""
    properties = {"body_encoding": "base64", "delivery_info": {"exchange": "", "routing_key": "celery"}}
    whole = {
        "body": body(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers(),
        "properties": properties | {"delivery_tag": "a tag", "delivery_mode": 2, "correlation_id": "an-id"},
    }
    return whole | changes


def without(part: str) -> dict[str, Any]:
    return {key: value for key, value in message().items() if key != part}


#: Values that a field of a message has in no message of Celery's.
ODD = {"null": None, "a number": 7, "a text": "x", "a list": [1], "an object": {"a": 1}, "true": True, "minus": -1.5}

#: Of a task's headers, those that Celery reads.
FIELDS = (
    "id", "task", "timelimit", "eta", "expires", "retries", "stamps", "stamped_headers", "shadow", "group",
    "ignore_result", "root_id", "argsrepr", "compression", "meth", "origin", "parent_id", "lang",
    "replaced_task_nesting",
)  # fmt: skip


def strangers() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each with what is wrong with it."""
    yield "an empty object", {}
    for part in message():
        yield f"no {part}", without(part)
        for kind, value in ODD.items():
            yield f"{part}: {kind}", message(**{part: value})
    for field in FIELDS:
        for kind, value in ODD.items():
            yield f"header {field}: {kind}", message(headers=headers(**{field: value}))
    yield "header timelimit: texts", message(headers=headers(timelimit=["x", "y"]))
    yield "header timelimit: three", message(headers=headers(timelimit=[1, 2, 3]))
    yield "header stamps and stamped_headers", message(headers=headers(stamps=5, stamped_headers=["a"]))
    for kind, value in ODD.items():
        yield f"an unknown task, id: {kind}", message(headers=headers(task="nobody's", id=value))
    for kind, parts in {"two parts": ([1], {}), "five": ([1], {}, {}, 4, 5), "numbers": (1, 2, 3)}.items():
        yield f"body: {kind}", message(body=body(*parts))
    for kind, embed in {"a list": [], "callbacks: 5": {"callbacks": 5}, "chain: x": {"chain": "x"}}.items():
        yield f"embed: {kind}", message(body=body([1], {}, embed))
    yield "body: bad base64", message(body="%%%")
    yield "body: not JSON", message(body=base64.b64encode(b"{").decode())
    yield "body: not UTF-8", message(body=base64.b64encode(b"\xff\xfe").decode())
    for kind, value in ODD.items():
        properties = message()["properties"]
        yield f"body_encoding: {kind}", message(properties=properties | {"body_encoding": value})
        yield f"reply_to: {kind}", message(properties=properties | {"reply_to": value, "correlation_id": value})
        yield f"priority: {kind}", message(properties=properties | {"priority": value})
        yield f"protocol 1, args: {kind}", protocol_1(args=value)
        yield f"protocol 1, kwargs: {kind}", protocol_1(kwargs=value)
        yield f"protocol 1, id: {kind}", protocol_1(id=value)
        yield f"protocol 1, task: {kind}", protocol_1(task=value)


def protocol_1(**changes: Any) -> dict[str, Any]:
    """Of an old client: the whole task is in the body."""
    task = {"task": TASK, "id": "an-id", "args": [1], "kwargs": {}} | changes
    return message(headers={}, body=base64.b64encode(json.dumps(task).encode()).decode())


def push(url: str, queue: str, messages: Iterator[tuple[str, dict[str, Any]]]) -> int:
    """Put them into a Redis list, as they are. Returns how many."""
    with redis.Redis.from_url(url) as server:
        return int(server.lpush(queue, *[json.dumps(raw) for _, raw in messages]))


def publish(url: str, queue: str, messages: Iterator[tuple[str, dict[str, Any]]]) -> int:
    """Send those that AMQP can carry, whose headers and properties have types of their own. Returns how many."""
    sent = 0
    with kombu.Connection(url) as connection:
        channel = connection.default_channel
        kombu.Queue(queue, kombu.Exchange(queue), queue)(channel).declare()
        for _, raw in messages:
            named = {name: raw.get(name) for name in ("body", "content-type", "content-encoding")}
            if isinstance(raw.get("headers"), dict) and all(isinstance(text, str) for text in named.values()):
                with contextlib.suppress(ValueError):
                    named["body"] = base64.b64decode(named["body"], validate=True)
                channel.basic_publish(
                    channel.prepare_message(
                        named["body"],
                        headers=raw["headers"],
                        content_type=named["content-type"],
                        content_encoding=named["content-encoding"],
                    ),
                    exchange=queue,
                    routing_key=queue,
                )
                sent += 1
    return sent
