"""An ordinary Celery project with one line of legit_worker, as a user would write it.

In: Celery's own environment variables, and a few `PROJECT_` ones that stand for what a project has in its settings
file. Out: tasks that call models in every way a task can.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import kombu
from celery import Celery, signals
from celery.exceptions import Ignore
from celery.utils.log import get_task_logger

import legit_worker

logger = get_task_logger(__name__)

app = Celery("project")
app.conf.update(
    broker_url=os.environ["CELERY_BROKER_URL"],
    result_backend=os.environ["CELERY_RESULT_BACKEND"],
    task_default_queue=os.environ["PROJECT_QUEUE"],
    control_exchange=os.environ["PROJECT_QUEUE"],  # or a monitor of another test would speak to this worker
    broker_transport_options=json.loads(os.environ.get("PROJECT_TRANSPORT_OPTIONS", "{}")),
    broker_connection_retry_on_startup=True,
    task_serializer="json",
    result_serializer="json",
    accept_content=["json"],
    task_track_started=True,
)
if "PROJECT_QUEUE_TYPE" in os.environ:
    arguments = {"x-queue-type": os.environ["PROJECT_QUEUE_TYPE"]}
    arguments |= json.loads(os.environ.get("PROJECT_QUEUE_ARGUMENTS", "{}"))
    name = os.environ["PROJECT_QUEUE"]
    app.conf.task_queues = [kombu.Queue(name, kombu.Exchange(name), name, queue_arguments=arguments)]
if "PROJECT_POOL" in os.environ:
    app.conf.worker_pool = os.environ["PROJECT_POOL"]
if "PROJECT_ACKS_LATE" in os.environ:
    app.conf.task_acks_late = os.environ["PROJECT_ACKS_LATE"] == "1"
if "PROJECT_ACKS_ON_TIMEOUT" in os.environ:
    app.conf.task_acks_on_failure_or_timeout = os.environ["PROJECT_ACKS_ON_TIMEOUT"] == "1"
if "PROJECT_SOFT_TIME_LIMIT" in os.environ:
    app.conf.task_soft_time_limit = os.environ["PROJECT_SOFT_TIME_LIMIT"]
if os.environ.get("PROJECT_INSTALL", "1") == "1":
    legit_worker.install(app)


@app.task(name="one")
def one(item: Any, alias: str = "sim") -> Any:
    """One item, one model."""
    return legit_worker.model(alias).map([item])[0]


@app.task(name="encode")
def encode(texts: Any, alias: str = "sim", **options: Any) -> Any:
    """What `encode` gives, and its shape and type."""
    vectors = legit_worker.model(alias).encode(texts, **options)
    return {"values": vectors.tolist(), "shape": list(vectors.shape), "dtype": str(vectors.dtype)}


@app.task(name="asks")
def asks(method: str, *args: Any, alias: str, **options: Any) -> Any:
    """What any method of a handle gives, as JSON has it."""
    answer = getattr(legit_worker.model(alias), method)(*args, **options)
    return answer.tolist() if hasattr(answer, "tolist") else answer


@app.task(name="no_model")
def no_model(number: int) -> int:
    """Never calls a model."""
    return number + 1


@app.task(name="sleeps")
def sleeps(seconds: float) -> None:
    """Its own code takes that long."""
    time.sleep(seconds)


@app.task(name="ignores")
def ignores(seconds: float) -> None:
    """Its own code takes that long, and it has no end that Celery would keep."""
    time.sleep(seconds)
    raise Ignore


class Mute:
    """Mixed into an error whose message can't be read."""

    def __str__(self) -> str:
        raise RuntimeError("who knows")

    __repr__ = __str__


class MuteError(Mute, Exception):
    """One of a task."""


class MuteMemoryError(Mute, MemoryError):
    """One that Celery treats apart."""


class MuteEnd(Mute, BaseException):
    """One that would end a process."""


@app.task(name="ends_mutely")
def ends_mutely(how: str) -> None:
    """By an error that can't be shown, after a model call."""
    legit_worker.model("sim").map([how])
    raise {"error": MuteError, "memory": MuteMemoryError, "end": MuteEnd}[how]


@app.task(name="ends_badly")
def ends_badly(how: str) -> None:
    """In a way that is no `Exception`, or that Celery takes for its own end; after a model call."""
    legit_worker.model("sim").map([how])
    raise {"exit": SystemExit(3), "interrupt": KeyboardInterrupt(), "memory": MemoryError("too large")}[how]


@app.task(name="two_models")
def two_models(item: str) -> list[Any]:
    """The second model's input depends on what came before."""
    first = legit_worker.model("sim").map([item])[0]
    second = legit_worker.model("other").map([f"{item} {first[0]}"])[0]
    return [first, second]


@app.task(name="fails_between")
def fails_between(item: str) -> None:
    """The first call works, the second is never reached."""
    first = legit_worker.model("sim").map([item])[0]
    raise RuntimeError(f"no second call after {first[0]}")


@app.task(name="raises_before")
def raises_before(item: str) -> Any:
    """Fails before any model is called."""
    raise KeyError(item)


@app.task(name="loop")
def loop(item: str, times: int) -> list[Any]:
    """Each call's input is made from the last one's output."""
    outputs = []
    for _ in range(times):
        outputs.append(legit_worker.model("sim").map([item])[0])
        item = f"{item} {outputs[-1][0]}"
    return outputs


@app.task(name="many")
def many(count: int, alias: str = "sim") -> str:
    """So many items in one call. The result is a digest of all outputs, in order."""
    return digest(legit_worker.model(alias).map(f"item {number}" for number in range(count)))


@app.task(name="catches")
def catches(item: str, alias: str) -> str:
    """A task may handle its item's error, and go on to call a model."""
    try:
        legit_worker.model(alias).map([item])
    except Exception as error:
        return f"{type(error).__name__} {legit_worker.model('sim').map([item])[0][0]}"
    return "no error"


@app.task(name="exclusive_pair")
def exclusive_pair(item: str) -> int:
    """How many other tasks ran their own code between two model calls of an exclusive section."""
    with legit_worker.exclusive():
        before = steps.value
        legit_worker.model("sim").map([item])
        legit_worker.model("sim").map([f"{item} again"])
        return steps.value - before


@app.task(name="shared_pair")
def shared_pair(item: str) -> int:
    """The same without the section."""
    steps.value += 1
    before = steps.value
    legit_worker.model("sim").map([item])
    legit_worker.model("sim").map([f"{item} again"])
    return steps.value - before


@app.task(name="step")
def step(item: str) -> int:
    """Counts itself before and after a model call."""
    steps.value += 1
    legit_worker.model("sim").map([item])
    steps.value += 1
    return steps.value


@app.task(name="retries", bind=True, max_retries=3, default_retry_delay=0)
def retries(self: Any, item: str) -> list[Any]:
    """Fails twice after a model call, and is tried again by Celery."""
    vector = legit_worker.model("sim").map([item])[0]
    if self.request.retries < 2:
        raise self.retry(exc=RuntimeError("not yet"))
    return [self.request.retries, vector]


@app.task(name="calls_another")
def calls_another(item: str) -> Any:
    """Runs another task here and now, which parks below this one."""
    result = one.apply([item])
    return [result.get(disable_sync_subtasks=False), calls_another.request.id]


@app.task(name="dawdles")
def dawdles(item: str, alias: str) -> Any:
    """Does something of its own, for long enough to do something to the worker."""
    output = legit_worker.model(alias).map([item])[0]
    print("computes something itself", flush=True)
    time.sleep(0.3)
    return output


@app.task(name="in_asyncio")
def in_asyncio(item: str) -> Any:
    """A model call below an event loop of the task's own."""

    async def call() -> Any:
        await asyncio.sleep(0)
        return legit_worker.model("sim").map([item])[0]

    return asyncio.run(call())


@app.task(name="in_threads")
def in_threads(items: list[str]) -> Any:
    """Model calls from threads of the task's own."""
    with ThreadPoolExecutor(2) as executor:
        return list(executor.map(lambda item: legit_worker.model("sim").map([item])[0], items))


@app.task(name="in_generator")
def in_generator(items: list[str]) -> Any:
    """Model calls from inside a generator, and a handle that is kept."""
    handle = legit_worker.model("sim")
    return list(handle.map([item])[0] for item in items)  # noqa: C400 a generator is the point


@app.task(name="collect")
def collect(results: list[Any], item: str) -> list[Any]:
    """What comes after several others: their results, and one more."""
    return [*results, legit_worker.model("sim").map([item])[0]]


@app.task(name="grad_modes")
def grad_modes(item: str, enabled: bool) -> list[bool]:
    """torch's grad mode before a model call, after it, and outside of the section."""
    import torch

    outside = torch.is_grad_enabled()
    with torch.set_grad_enabled(enabled):
        legit_worker.model("sim").map([item])
        inside = torch.is_grad_enabled()
        legit_worker.model("sim").map([f"{item} again"])
        later = torch.is_grad_enabled()
    return [outside, inside, later]


@app.task(name="context")
def context(item: str) -> dict[str, Any]:
    """What the task finds of its own, and of others, before and after a model call."""
    found = current_item.get()
    current_item.set(item)
    legit_worker.model("sim").map([item])
    thread = threading.current_thread() is threading.main_thread()
    inherited = project_name.get(None)
    return {
        "inherited": inherited,
        "before": found,
        "after": current_item.get(),
        "main_thread": thread,
        "request": context.request.id,
    }


class Steps:
    """Process-wide, as a module's global is."""

    value = 0


steps = Steps()

#: None in every task that did not set it: each runs in a context of its own.
current_item: contextvars.ContextVar[str | None] = contextvars.ContextVar("current_item", default=None)


#: Set while the project is imported: every task sees it.
project_name: contextvars.ContextVar[str] = contextvars.ContextVar("project_name")
project_name.set("project")


def digest(outputs: list[Any]) -> str:
    """One short string for any outputs."""
    return hashlib.sha256(json.dumps(outputs).encode()).hexdigest()


if os.environ.get("PROJECT_LOG_SIGNALS") == "1":

    @signals.task_prerun.connect
    def log_prerun(task_id: str, **_: Any) -> None:
        """One line a task."""
        logger.info("signal prerun %s", task_id)

    @signals.task_postrun.connect
    def log_postrun(task_id: str, **_: Any) -> None:
        """One line a task."""
        logger.info("signal postrun %s", task_id)

    @signals.task_success.connect
    def log_success(sender: Any, **_: Any) -> None:
        """One line a task."""
        logger.info("signal success %s", sender.request.id)

    @signals.task_failure.connect
    def log_failure(task_id: str, **_: Any) -> None:
        """One line a task."""
        logger.info("signal failure %s", task_id)
