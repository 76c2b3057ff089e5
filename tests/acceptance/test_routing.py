"""Which results an app is told of, which app that is, and what lies on its queue."""

from __future__ import annotations

import re
import uuid
from typing import Any

import pytest
import redis
from appqueues import AppQueue, Apps, app_queue, routed
from celery import chain, chord, group, signature
from harness import CUSTOM, SIMULATED, Broker, StartWorker, poll

#: How a project asks for the backend without `install`.
SHIM = "legit_worker.routing:RoutingBackend+"

ENABLED = {"LEGIT_WORKER_ENABLED": "1"}

#: One name of Celery's own for each built-in task that is used here.
ALIASES = {"LEGIT_WORKER_TASKS__EMBED_TEXT": '{"shop.embed": {"content": "text"}}'}


def start_apps(start: StartWorker, broker: Broker, *arguments: str, on: Any = ("alpha", "beta"), **more: Any) -> Apps:
    """A worker under ModelPool, two apps that are told, and one, gamma, that is known and is not."""
    options = {name: more.pop(name) for name in ("pool",) if name in more}
    environment = SIMULATED | CUSTOM | ENABLED | routed(broker, *on) | more
    environment |= {"LEGIT_WORKER_APPS__GAMMA__WEIGHT": "1"}
    worker = start("routed", *arguments, broker=broker, environment=environment, **options)
    return Apps(worker, {app: app_queue(broker, app) for app in (*on, "gamma", "stranger")})


@pytest.fixture
def apps(shared: Apps) -> Apps:
    """The worker that the tests share which change nothing about it. What others were told is not looked at."""
    shared.forget()
    return shared


@pytest.fixture(scope="module")
def shared(start_module_worker: StartWorker, servers: Any) -> Apps:
    """A worker with every source of an app's name."""
    broker = servers.fresh()
    queues = ",".join([broker.queue, f"{broker.queue}.for.beta"])
    sources = rf"header:app,kwarg:app,queue:{broker.queue}\.for\.(?P<app>[a-z]+),reply_to"
    return start_apps(
        start_module_worker,
        broker,
        f"--queues={queues}",
        **ALIASES,
        LEGIT_WORKER_APP_FROM=sources,
        LEGIT_WORKER_RESULT_MAX_BYTES="4KiB",
        LEGIT_WORKER_APPS__ALPHA__REPLY_TO_PREFIX=f"{broker.queue}.answers.",
    )


# Which results.


def test_a_success_is_told_with_everything_that_the_app_needs(apps: Apps) -> None:
    meta = {"row": 7, "of": ["any", {"kind": None}]}
    sent = apps.send("one", "text", headers={"meta": meta, "queued_at": "2026-01-01T00:00:00.000Z"})
    envelope = apps.only(sent)
    assert envelope["status"] == "SUCCESS"
    assert envelope["result"] == sent.get(timeout=1)
    assert envelope["error"] is None
    assert (envelope["v"], envelope["task"], envelope["attempt"], envelope["model"]) == (1, "one", 1, "sim")
    assert envelope["meta"] == meta
    assert envelope["queued_at"] == "2026-01-01T00:00:00.000Z"
    assert envelope["queued_at"] < envelope["started_at"] <= envelope["finished_at"]
    assert envelope["worker"] in apps.worker.name


def test_a_failure_is_told_without_its_traceback(apps: Apps) -> None:
    envelope = apps.only(apps.send("fails"))
    assert (envelope["status"], envelope["result"]) == ("FAILURE", None)
    assert (envelope["error"]["type"], envelope["error"]["message"]) == ("ValueError", "it failed")
    assert "Traceback" not in str(envelope)
    assert "routed.py" not in str(envelope)


def test_an_errors_message_tells_no_password(apps: Apps) -> None:
    sent = apps.client.send_task(
        "fails", [], {"message": "no answer from redis://me:hunter2@cache:6379/0"}, headers={"app": "alpha"}
    )
    assert "hunter2" not in str(apps.only(sent))


def test_retries_are_told_once_with_the_attempt_that_ended_the_task(apps: Apps) -> None:
    envelope = apps.only(apps.send("again"))
    assert (envelope["status"], envelope["result"], envelope["attempt"]) == ("SUCCESS", "after 2", 3)
    envelope = apps.only(apps.send("gives_up"))
    assert (envelope["status"], envelope["error"]["message"], envelope["attempt"]) == ("FAILURE", "never", 2)


def test_an_expired_task_is_told_as_revoked(apps: Apps) -> None:
    assert apps.only(apps.send("double", 1, expires=-10))["status"] == "REVOKED"


def test_a_task_that_is_revoked_before_its_start_is_told_as_revoked(apps: Apps) -> None:
    task_id = str(uuid.uuid4())
    apps.client.control.revoke(task_id)
    apps.worker.wait_for_log(task_id)
    assert apps.only(apps.send("double", 1, task_id=task_id))["status"] == "REVOKED"


def test_a_task_that_is_revoked_while_it_waits_for_a_model_is_told_as_revoked(apps: Apps) -> None:
    parked = apps.client.send_task("one", ["text"], {"alias": "slow_to_load"}, headers={"app": "alpha"})
    poll(lambda: parked.id in apps.worker.received, "the task to start")
    apps.client.control.revoke(parked.id, terminate=True, destination=[apps.worker.name])
    envelope = apps.only(parked, settle=False)
    assert envelope["status"] == "REVOKED"


def test_an_unknown_task_is_told_as_not_registered(apps: Apps) -> None:
    envelope = apps.only(apps.send("no_such_task"))
    assert (envelope["status"], envelope["error"]["type"]) == ("FAILURE", "NotRegistered")
    assert envelope["task"] == "no_such_task"


def test_invalid_input_is_told_as_an_error_that_no_retry_mends(apps: Apps) -> None:
    sent = apps.client.send_task("one", ["bad item"], {"alias": "picky"}, headers={"app": "alpha"})
    error = apps.only(sent)["error"]
    assert (error["type"], error["retryable"]) == ("InvalidInputError", False)


@pytest.mark.parametrize(("task", "options"), [("overtime", {"time_limit": 1}), ("exits", {})])
def test_an_end_that_celery_tells_for_a_task_says_when_the_task_began(apps: Apps, task: str, options: Any) -> None:
    envelope = apps.only(apps.send(task, **options))
    assert envelope["status"] == "FAILURE"
    assert envelope["started_at"] <= envelope["finished_at"]


def test_a_task_without_a_run_names_nothing_of_the_run_before_it(start_worker: StartWorker, broker: Broker) -> None:
    worker = start_worker("routed", broker=broker, environment=alone(broker), pool="--pool=solo")
    apps = Apps(worker, {"alpha": app_queue(broker, "alpha")})
    ran, expired = sent = [apps.send("work", 1), apps.send("work", 1, expires=-10)]
    worker.settle(sent)
    told = {envelope["id"]: envelope for envelope in apps.told("alpha", ran.id, expired.id)}
    assert (told[ran.id]["status"], told[ran.id]["model"]) == ("SUCCESS", "sim")
    assert (told[expired.id]["status"], told[expired.id]["model"]) == ("REVOKED", None)
    assert (told[expired.id]["started_at"], told[expired.id]["computed_by"]) == (None, None)


def test_a_task_that_another_task_runs_in_itself_hides_nothing_of_it(start_worker: StartWorker, broker: Broker) -> None:
    apps = start_apps(start_worker, broker, LEGIT_WORKER_LOG="json")
    assert apps.only(apps.send("runs_another"))["model"] == "sim"


def test_a_task_whose_result_celery_ignores_is_told(apps: Apps) -> None:
    sent = apps.send("quiet", 1)
    assert apps.only(sent, settle=False)["result"] == 2
    sent = apps.send("double", 4, ignore_result=True)
    assert apps.only(sent, settle=False)["result"] == 8


def test_a_result_that_is_too_large_is_told_as_a_failure_and_kept_by_celery(apps: Apps) -> None:
    sent = apps.send("large", 5000)
    envelope = apps.only(sent)
    assert (envelope["status"], envelope["error"]["type"]) == ("FAILURE", "RoutingError")
    assert "RESULT_MAX_BYTES" in envelope["error"]["message"]
    assert sent.get(timeout=1) == "x" * 5000
    assert apps.only(apps.send("large", 3000))["status"] == "SUCCESS"


def test_a_meta_that_is_too_large_does_not_break_the_cap(apps: Apps) -> None:
    envelope = apps.only(apps.send("double", 1, headers={"meta": "m" * 10_000}))
    assert envelope["status"] == "FAILURE"
    assert len(str(envelope)) < 5000


def test_a_result_that_json_has_no_word_for_is_told_as_a_failure(apps: Apps) -> None:
    envelope = apps.only(apps.send("odd", "nan"))
    assert (envelope["status"], envelope["error"]["type"]) == ("FAILURE", "RoutingError")


def test_a_task_that_celery_lets_go_has_no_end_to_tell(apps: Apps) -> None:
    apps.send("ignored")
    assert apps.told() == []


def test_only_the_last_task_of_a_chain_is_told(apps: Apps) -> None:
    sent = chain(apps.task("double", 1), apps.task("double"), apps.task("double"), app=apps.client).apply_async()
    assert apps.only(sent)["result"] == 8


def test_a_task_in_a_chain_is_told_where_its_header_says_so(apps: Apps) -> None:
    first = apps.task("double", 1, headers={"route": "always"})
    sent = chain(first, apps.task("double"), app=apps.client).apply_async()
    apps.worker.settle([sent])
    assert [envelope["result"] for envelope in apps.told()] == [2, 4]


def test_a_task_whose_header_says_never_is_not_told(apps: Apps) -> None:
    apps.worker.settle([apps.send("double", 1, headers={"route": "never"})])
    assert apps.told() == []


def test_a_chain_that_breaks_is_told_once_as_its_last_tasks_failure(apps: Apps) -> None:
    last = apps.task("double")
    sent = chain(apps.task("double", 1), apps.task("fails"), apps.task("double"), last, app=apps.client).apply_async()
    envelope = apps.only(sent, settle=False)
    assert (envelope["status"], envelope["task"]) == ("FAILURE", "double")
    assert envelope["error"]["message"] == "it failed"


def test_of_a_chord_the_body_is_told(apps: Apps) -> None:
    apps.worker.broker.needs_stored_results()
    parts = [apps.task("double", number) for number in (1, 2, 3)]
    sent = chord(parts, apps.task("total"), app=apps.client).apply_async()
    assert apps.only(sent)["result"] == 12


def test_a_task_in_a_chords_header_is_told_where_its_header_says_so(apps: Apps) -> None:
    apps.worker.broker.needs_stored_results()
    parts = [apps.task("double", 1, headers={"route": "always"}), apps.task("double", 2)]
    sent = chord(parts, apps.task("total"), app=apps.client).apply_async()
    apps.worker.settle([sent])
    assert [envelope["result"] for envelope in apps.told()] == [2, 6]


def test_a_chord_that_breaks_is_told_once_as_its_bodys_failure(apps: Apps) -> None:
    apps.worker.broker.needs_stored_results()
    sent = chord(
        [apps.task("double", 1), apps.task("fails"), apps.task("double", 2)], apps.task("total"), app=apps.client
    ).apply_async()
    envelope = apps.only(sent)
    assert (envelope["status"], envelope["task"]) == ("FAILURE", "total")


def test_a_chord_with_several_failures_is_told_once(apps: Apps) -> None:
    apps.worker.broker.needs_stored_results()
    sent = chord(
        [apps.task("fails"), apps.task("fails"), apps.task("fails")], apps.task("total"), app=apps.client
    ).apply_async()
    assert apps.only(sent)["status"] == "FAILURE"


def test_every_task_of_a_group_is_told(apps: Apps) -> None:
    sent = group([apps.task("double", number) for number in (1, 2, 3)], app=apps.client).apply_async()
    apps.worker.settle(sent.results)
    assert sorted(envelope["result"] for envelope in apps.told()) == [2, 4, 6]


def test_a_task_that_becomes_another_is_told_once(apps: Apps) -> None:
    apps.worker.broker.needs_stored_results()
    assert apps.only(apps.send("replaced", 4))["result"] == 8


# Which app.


def test_each_app_is_told_of_its_own_tasks_only(apps: Apps) -> None:
    results = {app: apps.send("double", number, app=app) for number, app in enumerate(["alpha", "beta"])}
    apps.worker.settle(list(results.values()))
    assert [envelope["id"] for envelope in apps.told("alpha")] == [results["alpha"].id]
    assert [envelope["id"] for envelope in apps.told("beta")] == [results["beta"].id]


def test_an_app_that_is_off_or_unknown_gets_what_celery_gives(apps: Apps) -> None:
    before = apps.counts()["unknown"]
    sent = [apps.send("double", 1, app=app) for app in ("gamma", "stranger", None)]
    assert apps.worker.answers(sent) == [2, 2, 2]
    assert apps.told() == apps.told("beta") == []
    assert not apps.queues["gamma"].exists()
    assert not apps.queues["stranger"].exists()
    assert apps.counts()["unknown"] == before + 1


def test_a_kwarg_names_the_app(apps: Apps) -> None:
    sent = apps.client.send_task("double", [1], {"app": "beta"})
    assert apps.only(sent, "beta")["result"] == 2


def test_the_queue_names_the_app(apps: Apps) -> None:
    sent = apps.send("double", 1, app=None, queue=f"{apps.worker.broker.queue}.for.beta")
    assert apps.only(sent, "beta")["result"] == 2


def test_reply_to_names_the_app(apps: Apps) -> None:
    apps.worker.broker.needs_stored_results()
    assert apps.only(apps.send("double", 1, app=None, reply_to="beta"), "beta")["result"] == 2


def test_reply_to_names_a_queue_under_the_apps_prefix(apps: Apps) -> None:
    apps.worker.broker.needs_stored_results()
    queue = AppQueue(apps.worker.broker.url, f"{apps.worker.broker.queue}.answers.mine")
    sent = apps.send("double", 1, app=None, reply_to=queue.name)
    queue.wait_for([sent.id])
    assert apps.told() == []
    named = apps.send("double", 1, reply_to=queue.name)
    queue.wait_for([named.id])


@pytest.mark.parametrize("name", ["elsewhere", "answers.mine", "{queue}.answers.../../x", "{queue}.answers.a b"])
def test_reply_to_outside_of_the_prefix_names_nothing(apps: Apps, name: str) -> None:
    apps.worker.broker.needs_stored_results()
    reply_to = name.format(queue=apps.worker.broker.queue)
    assert apps.only(apps.send("double", 1, reply_to=reply_to))["result"] == 2
    assert not AppQueue(apps.worker.broker.url, reply_to).exists()


def test_the_first_source_that_names_an_app_counts(apps: Apps) -> None:
    queue = f"{apps.worker.broker.queue}.for.beta"
    sent = apps.client.send_task("double", [1], {"app": "beta"}, headers={"app": "alpha"}, queue=queue)
    assert apps.only(sent)["app"] == "alpha"
    assert apps.told("beta") == []


ODD = ["../x", "queues:other", "alpha\n", "alpha ", "a" * 10_000, "*", "{alpha}", "", 7, ["alpha"], {"alpha": 1}, True]


@pytest.mark.parametrize("name", ODD, ids=[repr(name)[:20] for name in ODD])
def test_a_message_can_not_choose_another_key(apps: Apps, name: Any) -> None:
    url = apps.worker.broker.url
    if not url.startswith("redis"):
        pytest.skip("looks at Redis's keys")
    with redis.Redis.from_url(url) as server:
        before = lists(server)
        sent = [apps.send("double", 1, app=None, headers={"app": name})]
        if isinstance(name, str):
            sent.append(apps.send("double", 1, app=None, reply_to=name))
        assert apps.worker.answers(sent) == [2] * len(sent)
        assert apps.told() == apps.told("beta") == []
        assert lists(server) <= before


def lists(server: Any) -> set[str]:
    """The queues that there are, without Celery's own, which come and go."""
    names = {name.decode() for name in server.scan_iter(_type="list")}
    return {name for name in names if not re.search(r"pidbox|celeryev", name)}


@pytest.mark.parametrize("name", ["sends", "delays"])
def test_a_task_that_is_sent_by_another_has_its_app_and_its_meta(apps: Apps, name: str) -> None:
    sent = apps.send(name, 4, headers={"meta": {"row": 9}})
    child = apps.worker.answer(sent)
    apps.queues["alpha"].wait_for([sent.id, child])
    parent, inherited = (
        next(found for found in apps.queues["alpha"].seen if found["id"] == one) for one in (sent.id, child)
    )
    assert inherited["result"] == 8
    assert inherited["meta"] == parent["meta"] == {"row": 9}
    apps.told()


def test_a_child_may_be_for_another_app(apps: Apps) -> None:
    child = apps.worker.answer(apps.send("sends_to", 4, {"app": "beta", "meta": "its own"}))
    (envelope,) = apps.told("beta", child)
    assert (envelope["id"], envelope["meta"]) == (child, "its own")
    assert child not in [envelope["id"] for envelope in apps.told()]


def test_a_callback_has_the_app_and_the_meta_of_the_task_before_it(apps: Apps) -> None:
    callback = signature("double", app=apps.client).set(task_id=str(uuid.uuid4()))
    sent = apps.send("double", 1, headers={"meta": 5}, link=callback)
    queue = apps.queues["alpha"]
    queue.wait_for([sent.id, callback.options["task_id"]])
    found = {envelope["id"]: envelope for envelope in queue.seen}
    assert found[callback.options["task_id"]]["result"] == 4
    assert found[callback.options["task_id"]]["meta"] == 5


def test_a_chain_without_an_app_of_its_own_steps_has_its_first_tasks(apps: Apps) -> None:
    """As sent by a producer that knows of headers only: `chain.apply_async(headers=...)`."""
    steps = [apps.task("double", 1), apps.task("double", app=None), apps.task("double", app=None)]
    sent = chain(*steps, app=apps.client).apply_async()
    assert apps.only(sent)["result"] == 8


def test_children_have_an_app_that_only_the_queue_named(start_worker: StartWorker, broker: Broker) -> None:
    queue = f"{broker.queue}.for.alpha"
    settings = {"LEGIT_WORKER_APP_FROM": rf"queue:{broker.queue}\.for\.(?P<app>[a-z]+)"}
    apps = start_apps(start_worker, broker, f"--queues={broker.queue},{queue}", **settings)
    sent = apps.send("sends", 4, app=None, queue=queue, headers={"meta": "m"})
    child = apps.worker.answer(sent)
    apps.queues["alpha"].wait_for([sent.id, child])
    assert {envelope["meta"] for envelope in apps.queues["alpha"].seen} == {"m"}
    ignored = apps.send("double", 1)
    apps.worker.settle([ignored])
    assert ignored.id not in [envelope["id"] for envelope in apps.queues["alpha"].take()]


# Other pools, and other backends.


def alone(broker: Broker, **more: str) -> dict[str, str]:
    """The backend by its URL, without `install`."""
    backend = more.pop("backend", broker.backend)
    return SIMULATED | CUSTOM | routed(broker, "alpha") | {"CELERY_RESULT_BACKEND": SHIM + backend} | more


@pytest.mark.parametrize("pool", ["solo", "threads", "prefork"])
def test_the_backend_alone_tells_apps_under_any_pool(start_worker: StartWorker, broker: Broker, pool: str) -> None:
    worker = start_worker("routed", "-c", "2", broker=broker, environment=alone(broker), pool=f"--pool={pool}")
    apps = Apps(worker, {"alpha": app_queue(broker, "alpha")})
    assert apps.only(apps.send("double", 2))["result"] == 4
    assert apps.only(apps.send("fails"))["error"]["type"] == "ValueError"
    assert apps.only(apps.send("no_such_task"))["error"]["type"] == "NotRegistered"
    assert apps.only(apps.send("double", 1, expires=-10))["status"] == "REVOKED"
    if broker.stores_results:
        parts = [apps.task("double", number) for number in (1, 2)]
        sent = chord(parts, apps.task("total"), app=apps.client).apply_async()
        assert apps.only(sent)["result"] == 6
    child = worker.answer(apps.send("sends", 4))
    apps.queues["alpha"].wait_for([child])


def test_time_limits_are_told_as_failures(start_worker: StartWorker, broker: Broker) -> None:
    worker = start_worker("routed", "-c", "1", broker=broker, environment=alone(broker), pool="--pool=prefork")
    apps = Apps(worker, {"alpha": app_queue(broker, "alpha")})
    soft = apps.only(apps.send("overtime", soft_time_limit=1))
    assert (soft["status"], soft["error"]["type"]) == ("FAILURE", "SoftTimeLimitExceeded")
    hard = apps.only(apps.send("overtime", time_limit=1))
    assert (hard["status"], hard["error"]["type"]) == ("FAILURE", "TimeLimitExceeded")


def test_a_project_without_results_tells_apps_all_the_same(start_worker: StartWorker, broker: Broker) -> None:
    apps = start_apps(start_worker, broker, CELERY_RESULT_BACKEND="disabled://")
    assert apps.only(apps.send("double", 2), settle=False)["result"] == 4
    assert apps.only(apps.send("fails"), settle=False)["status"] == "FAILURE"
    assert apps.only(apps.send("double", 1, expires=-10), settle=False)["status"] == "REVOKED"
    assert apps.only(apps.send("no_such_task"), settle=False)["error"]["type"] == "NotRegistered"
    sent = chain(apps.task("double", 1), apps.task("double"), app=apps.client).apply_async()
    assert apps.only(sent, settle=False)["result"] == 4


def test_what_only_another_serializer_has_a_word_for_is_a_list_or_a_failure(
    start_worker: StartWorker, broker: Broker
) -> None:
    pytest.importorskip("yaml")
    apps = start_apps(
        start_worker, broker, PROJECT_CONF='{"result_serializer": "yaml", "accept_content": ["json", "yaml"]}'
    )
    apps.client.conf.update(accept_content=["json", "yaml"], result_serializer="yaml")
    sent = apps.send("odd", "set")
    assert apps.only(sent)["result"] == [1]
    assert sent.get(timeout=1) == {1}
    sent = apps.send("odd", "bytes")
    envelope = apps.only(sent)
    assert sent.get(timeout=1) == b"\xff"
    assert (envelope["status"], envelope["error"]["type"]) == ("FAILURE", "RoutingError")


def test_early_acks_tell_apps_and_the_log_says_what_they_cost(start_worker: StartWorker, broker: Broker) -> None:
    apps = start_apps(start_worker, broker, PROJECT_ACKS_LATE="0")
    assert apps.only(apps.send("one", "text"))["status"] == "SUCCESS"
    assert apps.only(apps.send("fails"))["status"] == "FAILURE"
    assert len(re.findall("WARNING.*task_acks_late", apps.worker.log)) == 1


def test_rabbitmq_carries_tasks_results_and_envelopes(start_worker: StartWorker, rabbitmq: Broker) -> None:
    apps = start_apps(start_worker, rabbitmq, CELERY_RESULT_BACKEND="rpc://")
    apps.client.conf.result_backend = "rpc://"
    sent = apps.send("double", 2)
    assert apps.only(sent, settle=False)["result"] == 4
    assert apps.only(apps.send("fails"), settle=False)["status"] == "FAILURE"
    sent = chain(apps.task("double", 1), apps.task("double"), app=apps.client).apply_async()
    assert apps.only(sent, settle=False)["result"] == 4
