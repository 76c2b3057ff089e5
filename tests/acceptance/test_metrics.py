"""`LEGIT_WORKER_METRICS_PORT`: what the real command serves, scraped and parsed as Prometheus does."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from dataclasses import replace

import pytest
import redis
from appqueues import routed
from harness import LATE, SIMULATED, Broker, StartWorker, Worker, poll, run_python
from ownserver import Server
from scraping import SERVING, Endpoint, endpoint_of

ON = {"LEGIT_WORKER_ENABLED": "1", **SERVING}

MIB = 2**20


@pytest.fixture
def serve(start_worker: StartWorker) -> Callable[..., tuple[Worker, Endpoint]]:
    """Starts a worker that serves metrics."""

    def start(project: str = "project", *arguments: str, **options: object) -> tuple[Worker, Endpoint]:
        environment = {**SIMULATED, **ON, **options.pop("environment", {})}  # type: ignore[dict-item]
        worker = start_worker(project, *arguments, environment=environment, **options)
        return worker, endpoint_of(worker)

    return start


def test_tasks_and_batches_are_counted(serve: Callable[..., tuple[Worker, Endpoint]]) -> None:
    worker, endpoint = serve()
    worker.answers([worker.send("one", f"a task of {number}") for number in range(20)])
    worker.answers([worker.send("no_model", number) for number in range(5)])
    worker.answers([worker.send("raises_before", "x") for _ in range(3)])
    endpoint.wait_for("tasks_total", "one", "other", "succeeded", value=20)
    endpoint.wait_for("tasks_total", "no_model", "other", "succeeded", value=5)
    scrape = endpoint.wait_for("tasks_total", "raises_before", "other", "failed", value=3)
    ended = {("one", "succeeded"): 20, ("no_model", "succeeded"): 5, ("raises_before", "failed"): 3}
    assert scrape.all("tasks_total") == {(task, "other", state): count for (task, state), count in ended.items()}
    received = {task: count for (task,), count in scrape.all("messages_received_total").items() if count}
    assert received == {"one": 20, "no_model": 5, "raises_before": 3}
    assert not any(scrape.all("messages_redelivered_total").values())
    for name in ("task_queue_seconds", "task_seconds", "task_wait_seconds"):
        assert scrape.all(f"{name}_count")["one", "other"] == 20, name
        assert scrape.one(f"{name}_bucket", "one", "other", "+Inf") == 20, name
    assert scrape.one("task_seconds_sum", "one", "other") >= scrape.one("task_wait_seconds_sum", "one", "other")
    # The pool's own statistics tell the same.
    model = worker.pool()["models"]["sim"]
    assert scrape.one("batch_items_sum", "sim") == model["items"] == 20
    assert scrape.one("batch_items_count", "sim") == scrape.one("batch_seconds_count", "sim") == model["batches"]
    assert scrape.one("batch_seconds_sum", "sim") == pytest.approx(model["forward_seconds"], abs=0.001)
    waste = 1 - scrape.one("computed_cost_total", "sim") / scrape.one("batch_padded_cost_sum", "sim")
    assert waste == pytest.approx(model["waste"], abs=0.0001)
    assert scrape.one("computed_cost_total", "sim") == 20 * 4
    assert scrape.one("tasks_parked") == scrape.one("tasks_not_started") == 0
    assert scrape.one("window") == worker.pool()["window"]
    ((_, node, role, pool, device),) = scrape.all("info")
    assert (node, role, pool, device) == (worker.name, "device", "ModelPool", "auto")
    assert scrape.one("model_state", "sim", "resident") == scrape.one("ready") == 1
    assert scrape.one("model_info", "sim", "simulated", "torch", "simulated") == 1
    assert "process_resident_memory_bytes" in scrape.text


def test_each_end_of_a_task_has_its_state(serve: Callable[..., tuple[Worker, Endpoint]], broker: Broker) -> None:
    worker, endpoint = serve("routed", "--time-limit=2", broker=broker)
    retried = worker.send("again")
    worker.answer(retried)
    revoked = worker.client.send_task("double", [1], countdown=3600)
    worker.wait_for_log(f"[{revoked.id}] received")
    worker.client.control.revoke(revoked.id, terminate=True)
    worker.client.send_task("double", [1], expires=-1)
    worker.send("nobody_knows_this")
    worker.answers([worker.send("sleeps", 30)])
    endpoint.wait_for("tasks_total", "double", "other", "revoked", value=1)
    endpoint.wait_for("tasks_total", "other", "other", "unknown", value=1)
    endpoint.wait_for("tasks_total", "sleeps", "other", "failed", value=1)
    endpoint.wait_for("tasks_total", "again", "other", "retried", value=2)
    endpoint.wait_for("tasks_total", "again", "other", "succeeded", value=1)


def test_tasks_and_results_have_their_app(serve: Callable[..., tuple[Worker, Endpoint]], broker: Broker) -> None:
    worker, endpoint = serve("routed", broker=broker, environment=routed(broker, "alpha", "beta"))
    worker.answers(
        [
            *(worker.client.send_task("work", [number], headers={"app": "alpha"}) for number in range(10)),
            worker.client.send_task("double", [1], headers={"app": "beta"}),
            worker.client.send_task("double", [1], headers={"app": "a stranger's"}),
        ]
    )
    endpoint.wait_for("tasks_total", "work", "alpha", "succeeded", value=9)
    endpoint.wait_for("tasks_total", "work", "alpha", "failed", value=1)
    endpoint.wait_for("tasks_total", "double", "other", "succeeded", value=1)
    scrape = endpoint.wait_for("tasks_total", "double", "beta", "succeeded", value=1)
    assert scrape.all("routed_results_total") == {
        ("alpha", "success"): 9, ("alpha", "failure"): 1, ("beta", "success"): 1, ("beta", "failure"): 0,
    }  # fmt: skip
    assert "stranger" not in scrape.text


def test_loads_evictions_and_memory_are_told(serve: Callable[..., tuple[Worker, Endpoint]]) -> None:
    """Two models of 100 MiB, and room for one: each use of the other evicts."""
    models = {f"LEGIT_WORKER_MODELS__M{number}__KIND": "simulated" for number in range(2)}
    models |= {f"LEGIT_WORKER_MODELS__M{number}__PATH": f"0.001,0,{100 * MIB},0.01,1" for number in range(2)}
    limit = 150 * MIB
    worker, endpoint = serve(
        environment=models | {"LEGIT_WORKER_DEVICE": "simulated", "LEGIT_WORKER_VRAM_LIMIT": str(limit)}
    )
    for number in (0, 1, 0):
        worker.ask("one", "a task", f"m{number}")
    scrape = endpoint.scrape()
    assert scrape.one("model_loads_total", "m0") == 2
    assert scrape.one("model_loads_total", "m1") == scrape.one("model_evictions_total", "m1") == 1
    assert scrape.one("model_evictions_total", "m0") == 1
    assert scrape.one("model_state", "m0", "resident") == scrape.one("model_state", "m1", "unloaded") == 1
    assert scrape.one("model_info", "m0", "simulated", "torch", "simulated") == 1
    assert scrape.one("model_load_seconds", "m0") >= 0.01
    assert scrape.one("memory_weights_bytes") == scrape.one("model_weights_bytes", "m0") == 100 * MIB
    assert scrape.one("memory_budget_bytes") == scrape.one("memory_total_bytes") == limit
    assert scrape.one("memory_free_bytes") == limit - 100 * MIB


def test_batches_that_run_out_of_memory_are_counted(serve: Callable[..., tuple[Worker, Endpoint]]) -> None:
    """The simulated device has 12 bytes, and an item of the model `m` takes one for each word."""
    worker, endpoint = serve(
        environment={
            "LEGIT_WORKER_MODELS__M__KIND": "simulated",
            "LEGIT_WORKER_MODELS__M__PATH": "0.001,0,0,0,1",
            "LEGIT_WORKER_DEVICE": "simulated",
            "LEGIT_WORKER_VRAM_LIMIT": "12",
        }
    )
    worker.answers([worker.send("one", "word " * 100, "m")])
    scrape = endpoint.wait_for("tasks_total", "one", "other", "failed", value=1)
    assert scrape.one("out_of_memory_total", "m") == worker.pool()["models"]["m"]["out_of_memory"] > 0


def test_dead_letters_are_counted(serve: Callable[..., tuple[Worker, Endpoint]], broker: Broker) -> None:
    """Garbage in the queue, and a message that outlived too many workers."""
    if not broker.url.startswith("redis"):
        pytest.skip("other brokers have no unreadable messages and no counts of deaths")
    worker, endpoint = serve(broker=broker, environment={"LEGIT_WORKER_MAX_DELIVERIES": "1"})
    with redis.Redis.from_url(broker.url) as server:
        server.lpush(broker.queue, b"\xff garbage")
        endpoint.wait_for("dead_letters_total", "unreadable", "", value=1)
    task = worker.send("sleeps", 60)
    worker.wait_for_log(f"[{task.id}] received")
    worker.kill()
    other, second = serve(broker=broker, environment={"LEGIT_WORKER_MAX_DELIVERIES": "1"})
    other.answers([task])
    second.wait_for("tasks_total", "sleeps", "other", "failed", value=1)
    second.wait_for("recovered_messages_total", value=1)
    scrape = second.wait_for("dead_letters_total", "poisoned", "", value=1)
    assert scrape.one("messages_redelivered_total", "sleeps") == 1


def test_what_is_held_is_told_and_renewed(serve: Callable[..., tuple[Worker, Endpoint]], broker: Broker) -> None:
    if not broker.url.startswith("redis"):
        pytest.skip("other brokers hold messages for a connection")
    worker, endpoint = serve(broker=broker, environment={**LATE, "LEGIT_WORKER_LEASE_SECONDS": "1"})
    results = [worker.send("one", number, "late") for number in range(4)]
    scrape = endpoint.wait_for("tasks_parked", value=4)
    assert scrape.one("held_messages") == scrape.one("tasks_running") == 4
    poll(lambda: endpoint.scrape().one("lease_renewals_total") > 0, "a renewal")
    worker.answers(results)
    endpoint.wait_for("held_messages", value=0)


def test_prefork_tasks_are_counted_by_their_parent(serve: Callable[..., tuple[Worker, Endpoint]]) -> None:
    worker, endpoint = serve("project", "--concurrency=2", pool="--pool=prefork")
    worker.answers([worker.send("no_model", number) for number in range(10)])
    worker.answers([worker.send("raises_before", "x") for _ in range(2)])
    endpoint.wait_for("tasks_total", "raises_before", "other", "failed", value=2)
    scrape = endpoint.wait_for("tasks_total", "no_model", "other", "succeeded", value=10)
    assert scrape.one("task_seconds_count", "no_model", "other") == 10
    ((_, _, _, pool, _),) = scrape.all("info")
    assert pool == "prefork"
    assert endpoint.ask("/readyz") == (200, {"ok": True, "reasons": []})
    assert endpoint.get("/healthz")[0] == 200


def test_a_taken_port_is_said_and_had_once_it_is_free(
    start_worker: StartWorker, serve: Callable[..., tuple[Worker, Endpoint]]
) -> None:
    """Two workers of one host, or a rolling restart."""
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        worker = start_worker(environment={**SIMULATED, **ON, "LEGIT_WORKER_METRICS_PORT": str(port)})
        worker.wait_for_log(f"port {port} can't be had")
        assert worker.ask("no_model", 1) == 2
        assert worker.stats()["metrics"] == {"port": None}
    assert endpoint_of(worker) == Endpoint(port)
    assert Endpoint(port).scrape().one("tasks_total", "no_model", "other", "succeeded") == 1
    _, another = serve()
    assert another.port != port


def test_a_worker_is_alive_while_it_loads_and_ready_afterwards(start_worker: StartWorker) -> None:
    pinned = {**LATE, "LEGIT_WORKER_MODELS__LATE__PIN": "1"}
    worker = start_worker(environment={**SIMULATED, **ON, **pinned}, wait=False)
    endpoint = endpoint_of(worker)
    status, why = endpoint.ask("/readyz")
    assert (status, why["reasons"][0]) == (503, "the worker starts")
    status, why = endpoint.ask("/healthz?seconds=0.001")
    assert (status, why["excuse"]) == (200, "the worker starts")
    worker.wait_until_ready()
    poll(lambda: endpoint.get("/readyz")[0] == 200, "ready")
    assert endpoint.ask("/healthz")[1]["ok"]


def test_a_task_that_keeps_the_thread_is_no_sign_of_life_and_a_batch_is(
    serve: Callable[..., tuple[Worker, Endpoint]],
) -> None:
    worker, endpoint = serve(environment={"LEGIT_WORKER_MODELS__LONG__KIND": "simulated",
                                          "LEGIT_WORKER_MODELS__LONG__PATH": "4,0"})  # fmt: skip
    result = worker.send("sleeps", 4)
    status, why = poll(lambda: (answer := endpoint.ask("/healthz?seconds=2"))[0] == 503 and answer, "a dead worker")
    assert why["busy_with"] == f"sleeps[{result.id}]"
    assert endpoint.get("/healthz")[0] == 200, "the default is a minute"
    worker.answers([result])
    poll(lambda: endpoint.get("/healthz?seconds=2")[0] == 200, "a living worker")
    result = worker.send("one", "an item", "long")

    def late() -> tuple[int, dict[str, object]] | None:  # the load before the batch keeps the thread a moment, too
        status, why = endpoint.ask("/healthz?seconds=2")
        return (status, why) if why["turned_seconds_ago"] > 2 else None

    status, why = poll(late, "a long batch")
    assert (status, why["excuse"], why["busy_with"]) == (200, "a batch runs", "a batch")
    worker.answers([result])


def test_a_worker_that_ends_is_alive_and_not_ready(serve: Callable[..., tuple[Worker, Endpoint]]) -> None:
    worker, endpoint = serve(environment=LATE)
    result = worker.send("one", "an item", "late")
    endpoint.wait_for("tasks_parked", value=1)
    worker.signal(signal.SIGTERM)
    _, why = poll(lambda: (answer := endpoint.ask("/readyz"))[0] == 503 and answer, "not ready")
    assert why["reasons"] == ["the worker ends"]
    assert endpoint.ask("/healthz?seconds=0.001")[1]["excuse"] == "the worker ends"
    assert worker.wait() == 0
    assert result.successful()


def test_a_worker_whose_broker_is_away_is_alive_and_not_ready(start_worker: StartWorker, server: Server) -> None:
    broker = Broker(url=server.url, backend=server.url, queue="away")
    worker = start_worker(broker=broker, environment={**SIMULATED, **ON})
    endpoint = endpoint_of(worker)
    poll(lambda: endpoint.get("/readyz")[0] == 200, "ready")
    server.kill()
    poll(lambda: "the broker is away" in endpoint.ask("/readyz")[1]["reasons"], "not ready")
    assert endpoint.ask("/healthz?seconds=0.001")[1]["excuse"] == "the broker is away"
    server.start()
    poll(lambda: endpoint.get("/readyz")[0] == 200, "ready again")
    assert worker.ask("no_model", 1) == 2


def test_a_result_backend_that_takes_nothing_is_told_before_the_first_task(
    start_worker: StartWorker, broker: Broker, server: Server
) -> None:
    def let_bob_in_by(password: str) -> None:
        with redis.Redis.from_url(server.url) as client:
            client.execute_command("ACL", "SETUSER", "bob", "on", f">{password}", "~*", "&*", "+@all", "-ping")

    let_bob_in_by("right")
    theirs = replace(broker, backend=f"redis://bob:wrong@127.0.0.1:{server.port}/0")
    worker = start_worker(broker=theirs, environment={**SIMULATED, **ON})
    worker.wait_for_log("takes no results")
    assert "AuthenticationError" in worker.log
    assert "wrong@" not in worker.log
    endpoint = endpoint_of(worker)
    assert endpoint.scrape().one("result_backend_away_seconds") > 0
    let_bob_in_by("wrong")
    poll(lambda: endpoint.scrape().one("result_backend_away_seconds") == 0, "the results to be taken")
    assert worker.ask("no_model", 1) == 2


def test_without_the_setting_nothing_is_imported_and_no_port_is_open(broker: Broker) -> None:
    code = """
import sys, project
from legit_worker.pool.pool import ModelPool
pool = ModelPool(1, app=project.app)
print(pool.figures, sorted({"prometheus_client", "http.server"} & set(sys.modules)))
"""
    assert run_python(code, broker, {"LEGIT_WORKER_ENABLED": "1"}).split() == ["None", "[]"]


def test_a_worker_without_the_package_says_what_to_install(start_worker: StartWorker, tmp_path: object) -> None:
    worker = start_worker("without_prometheus", environment={**SIMULATED, **ON}, wait=False)
    assert worker.wait() != 0
    assert "pip install 'legit-worker[metrics]'" in worker.log
