"""The ordinary project, with tasks that do what Celery lets a task do, before and after they call a model.

In: as `project`; `PROJECT_CONF`: JSON for more settings; `PROJECT_JOURNAL`: a file. Out: results, and in that file one
line of JSON for each thing that happened: the task's id, its name, details.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

from billiard.exceptions import WorkerLostError
from celery import Task, chain, chord, group
from celery.canvas import Signature
from celery.exceptions import Ignore, Reject, Retry
from celery.result import AsyncResult, allow_join_result
from celery.worker.request import Request
from project import app

import legit_worker

app.conf.update(json.loads(os.environ["PROJECT_CONF"]))

_journal = Path(os.environ["PROJECT_JOURNAL"]).open("a", buffering=1)  # noqa: SIM115 for as long as the worker lives


def note(task_id: str | None, what: str, *details: Any) -> None:
    """One line, whole or not at all."""
    _journal.write(json.dumps([task_id, what, *details], default=repr) + "\n")


def call_model(times: int = 1, item: Any = "an item") -> Any:
    """Under ModelPool the task parks here, so many times."""
    return [legit_worker.model("sim").map([item])[0] for _ in range(times)]


class NotedRequest(Request):  # type: ignore[misc]
    """What the worker's own side of a task is told, and what becomes of the message."""

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """The pool has it."""
        note(self.id, "accepted", pid == os.getpid())
        super().on_accepted(pid, time_accepted)

    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> None:
        """It ended without a result."""
        note(self.id, "request fails", type(exc_info.exception).__name__)
        super().on_failure(exc_info, *args, **kwargs)

    def on_retry(self, exc_info: Any) -> None:
        """It comes again."""
        note(self.id, "request retries")
        super().on_retry(exc_info)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """It took too long."""
        note(self.id, "request times out", soft, timeout)
        super().on_timeout(soft, timeout)

    def acknowledge(self) -> None:
        """The message is done with. Celery may say so twice."""
        if not self.acknowledged:
            note(self.id, "acks")
        super().acknowledge()

    def reject(self, requeue: bool = False) -> None:
        """The message is given back, or away."""
        if not self.acknowledged:
            note(self.id, "rejects", requeue)
        super().reject(requeue)


class Noted(Task):  # type: ignore[misc]
    """A task class of the project's own, with all the hooks."""

    Request = NotedRequest

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        """Before its own code."""
        note(task_id, "before_start", args, kwargs)

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        """It returned."""
        note(task_id, "on_success", retval)

    def on_failure(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """It raised."""
        note(task_id, "on_failure", repr(exc), str(einfo.exception))

    def on_retry(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """It asked to be run again."""
        note(task_id, "on_retry", repr(exc))

    def after_return(self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """It is over."""
        note(task_id, "after_return", status, repr(retval))


# --- ends of a task ---


def returns(task: Noted) -> str:
    """As most do."""
    return f"after {task.request.retries} retries"


def raises(task: Noted) -> None:
    """An error of its own."""
    raise ValueError("an error of its own")


def raises_expected(task: Noted) -> None:
    """One that the task declares."""
    raise KeyError("expected")


def retries_twice(task: Noted) -> str:
    """Celery sends it again."""
    if task.request.retries < 2:
        raise task.retry(exc=ValueError("not yet"), countdown=0.05)
    return returns(task)


def retries_in_vain(task: Noted) -> None:
    """More often than it may, and says why."""
    raise task.retry(exc=ValueError("never"), countdown=0, max_retries=1)


def retries_without_reason(task: Noted) -> None:
    """The same, and says nothing."""
    raise task.retry(countdown=0, max_retries=1)


def retries_with_other_arguments(task: Noted) -> str:
    """The second time it has another end."""
    raise task.retry(args=["returns", 1], countdown=0)


def raises_retry(task: Noted) -> None:
    """By hand: nobody sends it again."""
    raise Retry("by hand", exc=ValueError("not now"))


def ignores(task: Noted) -> None:
    """No result is to be kept."""
    raise Ignore


def rejects(task: Noted) -> None:
    """The message is to go."""
    raise Reject("not for me", requeue=False)


def requeues_once(task: Noted) -> str:
    """The message is to come again."""
    if not task.request.delivery_info["redelivered"]:
        raise Reject("not now", requeue=True)
    return "redelivered"


def loses_its_worker(task: Noted) -> str:
    """As if the process that ran it had died, the first time."""
    if not task.request.delivery_info["redelivered"]:
        raise WorkerLostError("it was here a moment ago")
    return "redelivered"


def returns_unserializable(task: Noted) -> Any:
    """What JSON has no word for."""
    return object()


#: All of them, by their names.
ENDS = {
    end.__name__: end
    for end in (
        returns,
        raises,
        raises_expected,
        retries_twice,
        retries_in_vain,
        retries_without_reason,
        retries_with_other_arguments,
        raises_retry,
        ignores,
        rejects,
        requeues_once,
        loses_its_worker,
        returns_unserializable,
    )
}


def come_to(self: Noted, end: str, parks: int) -> Any:
    """So many model calls, and then this end."""
    call_model(parks)
    note(self.request.id, "goes on")
    return ENDS[end](self)


app.task(come_to, name="ends", bind=True, base=Noted, max_retries=3, throws=(KeyError,))


@app.task(
    name="autoretries",
    bind=True,
    base=Noted,
    autoretry_for=(ValueError,),
    default_retry_delay=0,
    retry_kwargs={"max_retries": 2},
)
def autoretries(self: Noted, good_attempt: int) -> Any:
    """Fails until this attempt; Celery tries again by itself."""
    call_model()
    note(self.request.id, "goes on")
    if self.request.retries < good_attempt:
        raise ValueError("not yet")
    return returns(self)


def ack_name(late: bool, on_failure: bool, on_lost: bool) -> str:
    """The task with these options."""
    return f"acks.{late:d}{on_failure:d}{on_lost:d}"


for late, on_failure, on_lost in itertools.product((False, True), repeat=3):
    app.task(
        come_to,
        name=ack_name(late, on_failure, on_lost),
        bind=True,
        base=Noted,
        acks_late=late,
        acks_on_failure_or_timeout=on_failure,
        reject_on_worker_lost=on_lost,
    )


# --- what a task sees, sends and keeps ---


@app.task(name="sees", bind=True, base=Noted)
def sees(self: Noted, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Its whole request, as it is after a model call."""
    before = json.loads(json.dumps(vars(self.request), default=repr))
    call_model(2)
    after = json.loads(json.dumps(vars(self.request), default=repr))
    assert before == after, f"{before} became {after}"
    return after


@app.task(name="says", bind=True, base=Noted)
def says(self: Noted, *args: Any) -> list[Any]:
    """What it was given, in words, after a model call."""
    call_model()
    return [repr(arg) for arg in args]


def wait_for_file(self: Noted, path: str) -> str:
    """Calls a model again and again, until there is such a file. Parked nearly all the time."""
    note(self.request.id, "waits")
    while not Path(path).exists():
        call_model()
    note(self.request.id, "goes on")
    return "it came"


app.task(wait_for_file, name="waits_for", bind=True, base=Noted)
app.task(wait_for_file, name="untracked", bind=True, base=Noted, track_started=False)


@app.task(name="quiet", base=Noted, ignore_result=True)
def quiet(number: int) -> int:
    """Nobody keeps its result."""
    call_model()
    return number


@app.task(name="overruns")
def overruns(seconds: float) -> str:
    """Takes this many seconds itself, a little after each of its model calls."""
    for _ in range(round(seconds / 0.02)):
        call_model()
        time.sleep(0.02)
    return "nobody minded"


@app.task(name="runs_at")
def runs_at() -> float:
    """When it began."""
    began = time.time()
    call_model()
    return began


@app.task(name="slowly", rate_limit="10/s")
def slowly() -> float:
    """No more than ten a second. When it began."""
    return runs_at.run()  # type: ignore[no-any-return]


@app.task(name="kept", store_eager_result=True)
def kept(number: int) -> int:
    """Keeps its result even when it is run by hand."""
    call_model()
    return 2 * number


@app.task(name="unkept")
def unkept(number: int) -> int:
    """The same, without."""
    call_model()
    return 2 * number


@app.task(name="runs_here")
def runs_here(number: int) -> list[Any]:
    """Runs both here and now: their ids, and what they gave."""
    call_model()
    results = [task.apply([number]) for task in (kept, unkept)]
    call_model()
    return [[result.id, result.get(disable_sync_subtasks=False)] for result in results]


@app.task(name="eager_child", bind=True)
def eager_child(self: Any, number: int) -> list[Any]:
    """Whether it was run by its parent, and whether it knows itself."""
    call_model()
    return [self.request.is_eager, self.request.id, number]


@app.task(name="eager_parent", bind=True)
def eager_parent(self: Any, number: int) -> list[Any]:
    """Sends another one, which `task_always_eager` runs here and now."""
    call_model()
    child = eager_child.delay(number)
    call_model()
    answer = child.get(disable_sync_subtasks=False)
    return [self.request.is_eager, child.id == answer[1], child.id != self.request.id, answer[0], answer[2]]


@app.task(name="sends_children", bind=True)
def sends_children(self: Any, count: int) -> list[str]:
    """Sends one after each model call, and says their ids as its request has them."""
    for number in range(count):
        call_model()
        sees.delay(number)
    return [child.id for child in self.request.children]


@app.task(name="replaces", bind=True)
def replaces(self: Any, signature: dict[str, Any]) -> Any:
    """Becomes another task, or a whole canvas."""
    call_model()
    return self.replace(Signature.from_dict(signature, app=app))


@app.task(name="adds_to_chord", bind=True)
def adds_to_chord(self: Any, number: int) -> int:
    """One more for the chord that it is in."""
    call_model()
    self.add_to_chord(add.s(number, 100))
    return number


@app.task(name="joins")
def joins(task_id: str) -> Any:
    """Asks for another task's result, which Celery forbids, also after a model call."""
    refused = []
    for _ in range(2):
        try:
            AsyncResult(task_id, app=app).get(timeout=5)
        except RuntimeError as error:
            refused.append(str(error))
        call_model()
    return refused


@app.task(name="joins_allowed", bind=True, base=Noted)
def joins_allowed(self: Noted, task_id: str, path: str) -> Any:
    """The same where it is allowed, before and after it waited for a file."""
    with allow_join_result():
        first = AsyncResult(task_id, app=app).get(timeout=5)
        wait_for_file(self, path)
        return [first, AsyncResult(task_id, app=app).get(timeout=5)]


# --- steps of a canvas: each calls a model ---


@app.task(name="add")
def add(one: int, other: int) -> int:
    """A sum."""
    call_model(item=one)
    return one + other


@app.task(name="total")
def total(numbers: list[int]) -> int:
    """The sum of many."""
    call_model()
    return sum(numbers)


@app.task(name="flat_total")
def flat_total(numbers: Any) -> int:
    """The sum of lists in lists."""
    call_model()
    return sum(map(flat_total.run, numbers)) if isinstance(numbers, list) else numbers


@app.task(name="gather", bind=True, base=Noted)
def gather(self: Noted, *args: Any) -> Any:
    """Notes what it was given, and gives it back."""
    call_model()
    note(self.request.id, "gathers", *args)
    return list(args)


@app.task(name="fails")
def fails(*_: Any) -> None:
    """After a model call."""
    call_model()
    raise ValueError("a step failed")


@app.task(name="errback")
def errback(request: Any, exc: Exception, traceback: str | None) -> None:
    """Run by the failing task's own worker, within that task, as it is registered there."""
    call_model()
    note(request.id, "errback", type(exc).__name__, str(exc), "ValueError" in (traceback or ""))
    call_model()


@app.task(name="old_errback", bind=True)
def old_errback(self: Any, task_id: str) -> None:
    """The other form: a message of its own, with the failed task's id."""
    call_model()
    note(task_id, "old errback", self.request.parent_id == task_id)


@app.task(name="canvas_inside", bind=True)
def canvas_inside(self: Any, count: int) -> Any:
    """Sends a whole canvas after a model call, and becomes it."""
    call_model()
    parts = group(chain(add.s(number, 1), add.s(10)) for number in range(count))
    return self.replace(chord(parts, total.s()))


@app.task(name="chunks_inside", bind=True)
def chunks_inside(self: Any, count: int, size: int) -> Any:
    """The same with chunks."""
    call_model()
    return self.replace(chain(add.chunks(((i, i) for i in range(count)), size).group(), flat_total.s()))


@app.task(name="sends_chord")
def sends_chord() -> str:
    """Some backends can't."""
    call_model()
    return str(chord([add.s(1, 1), add.s(2, 2)], total.s()).apply_async().id)
