"""Starts the real `celery worker` command on a project in `acceptance/projects`, and speaks to it as a client.

In: a broker, a project's name, an environment. Out: a running worker with its log, its statistics, and an ordinary
Celery client that knows task names and nothing else. Whatever goes wrong, the error shows the end of the worker's log.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import kombu
import pytest
from celery import Celery
from celery.app.control import Inspect
from celery.backends.rpc import RPCBackend
from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.result import AsyncResult, GroupResult

ROOT = Path(__file__).parents[2]
PROJECTS = Path(__file__).parents[1] / "acceptance" / "projects"

#: Seconds until a started command is ready. It needs two; a machine that does much else takes longer.
START_SECONDS = 60

#: Seconds until a task is answered, until a log line appears, until a worker has stopped.
ANSWER_SECONDS = 60

#: Seconds between two looks at a condition.
POLL_SECONDS = 0.02

#: Seconds that a client trusts in being told of a result before it looks the result up again.
LOOK_SECONDS = 5

#: Seconds that a worker may take to answer `inspect`. It answers between two batches.
INSPECT_SECONDS = 10

#: Seconds that `stats` waits each time it asks. A question is lost if the worker connects again meanwhile.
ASK_SECONDS = (2, 4, INSPECT_SECONDS, INSPECT_SECONDS)

#: Lines of a log that an error shows.
TAIL_LINES = 60

#: What a project gets besides the test's own settings: one compute thread, since the machine has few cores and other
#: workers run beside this one, and no network.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",
    "PYTHONUNBUFFERED": "1",
}

#: Variables of the developer's shell that would change what is tested, or have each worker compile the package anew.
FOREIGN = ("CELERY_", "LEGIT_WORKER_", "PROJECT_", "PYTHONDONTWRITEBYTECODE")

T = TypeVar("T")

_numbers = itertools.count(1)


class WorkerDiedError(AssertionError):
    """A worker ended while it was needed."""


def poll(condition: Callable[[], T], what: str, seconds: float = ANSWER_SECONDS) -> T:
    """Look until `condition()` is true, and return what it gave. Raises `AssertionError` that says what never came."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds} s for {what}; the last look gave {value!r}")
        time.sleep(POLL_SECONDS)


class LooksAgain:
    """A result that is looked up again every few seconds of a wait.

    Celery subscribes over one connection and looks the result up over another. Valkey may take the two in either order,
    and then a result of just that instant is neither found nor told: `MONITOR` shows it, once in a hundred times where
    results come close together.
    """

    def get(self, timeout: float | None = None, **options: Any) -> Any:
        """As Celery's `get`, with its errors."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            try:
                return super().get(timeout=min(left, LOOK_SECONDS), **options)  # type: ignore[misc]
            except CeleryTimeoutError:
                if left <= LOOK_SECONDS:
                    raise


class ClientResult(LooksAgain, AsyncResult):  # type: ignore[type-arg]  # not generic before Celery 5.7
    """What a client's task gives."""

    def ready(self) -> bool:
        """As Celery's, and with results by message also where a `get` or a group has made the client a consumer.

        From then on the messages come to that consumer, and Celery's own `ready` looks for them on the queue alone.
        """
        if isinstance(self.backend, RPCBackend):
            with contextlib.suppress(TimeoutError):
                self.backend.result_consumer.drain_events(timeout=0.001)
        return bool(super().ready())

    def __del__(self) -> None:
        """Nothing. Celery's unsubscribes, and waits for the server there, which a test may have stopped."""


class ClientGroupResult(LooksAgain, GroupResult):
    """What a client's group gives."""


class Client(Celery):
    """An ordinary Celery client, but for its results."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.AsyncResult = self.subclass_with_self(ClientResult)
        self.GroupResult = self.subclass_with_self(ClientGroupResult)
        clients.append(self)


#: All clients of this process. They are closed before the servers are.
clients: list[Client] = []


@dataclass(frozen=True, kw_only=True)
class Broker:
    """Where one worker and its client meet: URLs and a queue that no other test uses."""

    url: str
    backend: str
    queue: str
    #: More of a project's environment: the filesystem transport's folders, a visibility timeout.
    environment: Mapping[str, str] = field(default_factory=dict)
    transport_options: Mapping[str, Any] = field(default_factory=dict)
    #: RabbitMQ's `x-queue-type`; None is its default.
    queue_type: str | None = None
    #: More of RabbitMQ's arguments of a queue.
    queue_arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stores_results(self) -> bool:
        """Whether results are where anybody finds them."""
        return not self.backend.startswith("rpc")

    def needs_stored_results(self) -> None:
        """Skip a test of results that others than the task's sender look at, where results are messages to that one."""
        if not self.stores_results:
            pytest.skip("rpc:// gives a result to who a message names in reply_to only, and has no chords")

    def client(self) -> Client:
        """An app that knows no task, as any other program's would."""
        app = Client(f"client-of-{self.queue}", broker=self.url, backend=self.backend, set_as_current=False)
        app.conf.update(
            task_default_queue=self.queue,
            task_serializer="json",
            result_serializer="json",
            accept_content=["json"],
            broker_transport_options=dict(self.transport_options),
        )
        if self.queue_type is not None:
            app.conf.task_queues = [self.declared()]
        return app

    def declared(self) -> kombu.Queue:
        """The queue as the project declares it."""
        arguments = {"x-queue-type": self.queue_type, **self.queue_arguments} if self.queue_type else None
        return kombu.Queue(self.queue, kombu.Exchange(self.queue), self.queue, queue_arguments=arguments)


class Worker:
    """A `celery worker` in a process group of its own. Fixtures make these, and close them when the test is over."""

    def __init__(
        self,
        broker: Broker,
        project: str,
        folder: Path,
        *arguments: str,
        pool: str | None = "--pool=solo",
        environment: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        number = next(_numbers)
        self.broker = broker
        self.name = f"worker{number}-{os.getpid()}@tests"
        self.path = folder / f"worker{number}.log"
        # The ready-made app has Celery's own.
        self._control = {} if project == "legit_worker" else {"control_exchange": broker.queue}
        self.renew_client()
        self._command = [
            *celery_command(project, "worker", "--loglevel=INFO"),
            f"--hostname={self.name}",
            f"--queues={broker.queue}",
            *([pool] if pool else []),
            *options,
            *arguments,
        ]
        self._environment = project_environment(broker, environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._hears = False

    def renew_client(self) -> None:
        """Have a client with connections of its own: where a server was replaced, the old ones wait for it."""
        self.client = self.broker.client()
        self.client.conf.update(self._control)

    def start(self) -> None:
        """Start the command, and don't wait for it."""
        self._hears = False
        with self.path.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                cwd=self.path.parent,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Until the worker says so. Raises `WorkerDiedError` with its log."""
        self.wait_for_log(f"{self.name} ready.", seconds=START_SECONDS)

    def wait_for_log(self, text: str, seconds: float = ANSWER_SECONDS) -> None:
        """Until the log has this text."""
        poll(lambda: self._alive() and text in self.log, f"{text!r} in the log of {self.name}", seconds)

    def stop(self, seconds: float = ANSWER_SECONDS) -> int:
        """Ask for a warm shutdown, as a terminal or an orchestrator does. Returns the exit code once it is over."""
        self.signal(signal.SIGTERM)
        return self.wait(seconds)

    def wait(self, seconds: float = ANSWER_SECONDS) -> int:
        """Until the process has ended. Returns the exit code."""
        assert self._process is not None
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} has not ended after {seconds} s:\n{self.tail()}") from None

    def signal(self, number: int) -> None:
        """Send a signal to the worker itself."""
        assert self._process is not None
        os.kill(self._process.pid, number)

    @property
    def pid(self) -> int:
        """Of the `celery worker` process."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """End it and whatever it started, at once and without a chance to say goodbye."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(ANSWER_SECONDS)

    def close(self) -> None:
        """What a fixture does when the test is over."""
        self.kill()

    @property
    def log(self) -> str:
        """All that the worker wrote so far."""
        return self.path.read_text(errors="replace")

    @property
    def received(self) -> set[str]:
        """The ids of the tasks that the worker took from the broker."""
        return set(re.findall(r"Task \S+\[(\S+)\] received", self.log))

    def tail(self) -> str:
        """The end of the log."""
        return "\n".join(self.log.splitlines()[-TAIL_LINES:])

    def wait_until_it_hears(self) -> None:
        """Celery says that a worker is ready just before it listens: remote control may find nobody then."""
        if not self._hears:
            poll(lambda: self.client.control.ping([self.name], timeout=1), f"{self.name} to hear", START_SECONDS)
            self._hears = True

    def inspect(self, seconds: float = INSPECT_SECONDS) -> Inspect:
        """Ask this worker alone, with patience for its batches."""
        self.wait_until_it_hears()
        return self.client.control.inspect([self.name], timeout=seconds)

    def stats(self) -> dict[str, Any]:
        """What `celery inspect stats` shows for this worker."""
        for seconds in ASK_SECONDS:
            answer = self.inspect(seconds).stats()
            if answer:
                stats: dict[str, Any] = answer[self.name]
                return stats
        raise AssertionError(f"{self.name} does not answer inspect:\n{self.tail()}")

    def pool(self) -> dict[str, Any]:
        """The pool's part of `stats`."""
        pool: dict[str, Any] = self.stats()["pool"]
        return pool

    def send(self, task: str, /, *args: Any, **kwargs: Any) -> AsyncResult[Any]:
        """Send one task by its name."""
        return self.client.send_task(task, args, kwargs)

    def ask(self, task: str, /, *args: Any, **kwargs: Any) -> Any:
        """Send one task and return its result, or raise its error."""
        return self.answer(self.send(task, *args, **kwargs))

    def answer(self, result: AsyncResult[Any], seconds: float = ANSWER_SECONDS) -> Any:
        """One task's result, or its error raised."""
        self.settle([result], seconds)
        return result.get(timeout=1)

    def answers(self, results: Sequence[AsyncResult[Any]], seconds: float = ANSWER_SECONDS) -> list[Any]:
        """All results, in order; an error in place of a result where a task failed."""
        self.settle(results, seconds)
        return [result.result for result in results]

    def settle(self, results: Sequence[AsyncResult[Any]], seconds: float = ANSWER_SECONDS) -> None:
        """Until all tasks are answered, one way or the other."""
        waiting = list(results)

        def all_ready() -> bool:
            assert self._alive()
            while waiting and waiting[-1].ready():
                waiting.pop()
            return not waiting

        try:
            poll(all_ready, f"{len(results)} answers", seconds)
        except AssertionError as error:
            missing = sum(not result.ready() for result in results)
            raise AssertionError(f"{missing} of the answers are missing. {error}\n{self.tail()}") from None

    def _alive(self) -> bool:
        assert self._process is not None
        code = self._process.poll()
        if code is not None:
            raise WorkerDiedError(f"{self.name} ended with exit code {code}. The end of its log:\n{self.tail()}")
        return True


#: What the fixture `start_worker` gives: starts a worker on a project, with `Worker`'s arguments.
StartWorker = Callable[..., Worker]

#: Simulated models: two fast ones, and one that takes two seconds for ten thousand items.
SIMULATED = {
    "LEGIT_WORKER_MODELS__SIM__KIND": "simulated",
    "LEGIT_WORKER_MODELS__SIM__PATH": "0.001,0",
    "LEGIT_WORKER_MODELS__OTHER__KIND": "simulated",
    "LEGIT_WORKER_MODELS__SLUGGISH__KIND": "simulated",
    "LEGIT_WORKER_MODELS__SLUGGISH__PATH": "0.01,0.0002",
}

#: A user's own models. None of them needs torch, which takes seconds to import and which `auto` would import.
CUSTOM = {"LEGIT_WORKER_DEVICE": "cpu"} | {
    f"LEGIT_WORKER_MODELS__{name.upper()}__KIND": f"custom_models:{name.title().replace('_', '')}"
    for name in (
        "upper",
        "planned",
        "padded",
        "ending",
        "laborious",
        "nested",
        "nosy",
        "nosy_loader",
        "picky",
        "poisoned",
        "stormy",
        "violent",
        "unloadable",
        "slow_to_load",
        "reports",
        "slow",
        "even",
        "counting",
        "launching",
        "heavy",
        "forgetful",
        "gated",
        "in_torch",
        "drawing",
        "drawing_too",
    )
}

#: A model that takes four seconds to load, and none to compute: its tasks are parked for as long as a test needs them.
LATE = {"LEGIT_WORKER_MODELS__LATE__KIND": "simulated", "LEGIT_WORKER_MODELS__LATE__PATH": "0,0,0,4"}

#: For tests that want more tasks in flight than a worker takes that does not know yet how long they last.
GREEDY = {"LEGIT_WORKER_MAX_HELD_SECONDS": "1000"}

#: The same project under Celery's own solo pool, and under ModelPool.
SIDES = {"stock": {}, "modelpool": {"LEGIT_WORKER_ENABLED": "1"}}


@dataclass(frozen=True)
class Sides:
    """Starts workers that differ in one variable only."""

    start: StartWorker
    project: str = "project"
    #: Instead of `Worker`'s own, where given.
    options: Sequence[str] | None = None

    def worker(self, side: str, *arguments: str, broker: Broker | None = None, **settings: str) -> Worker:
        """A worker with all models, on this side."""
        environment = SIMULATED | CUSTOM | SIDES[side] | settings
        options = {} if self.options is None else {"options": self.options}
        return self.start(self.project, *arguments, broker=broker, environment=environment, **options)


#: The workers that are running for the current test: its report shows their logs where it fails.
shown: list[Worker] = []


def celery_command(project: str, *arguments: str) -> list[str]:
    """The installed `celery` command, as a user types it."""
    return [str(Path(sys.executable).with_name("celery")), "-A", project, *arguments]


def hear_ctrl_c() -> None:
    """Have Ctrl-C end the command of a new process: a shell's background job ignores it, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def own_environment() -> dict[str, str]:
    """The developer's environment without what would change the test, and with where the projects are."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    path = os.pathsep.join([str(PROJECTS), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept | ENVIRONMENT | {"PYTHONPATH": path}


def project_environment(broker: Broker, settings: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a project reads, too."""
    ours = {"CELERY_BROKER_URL": broker.url, "CELERY_RESULT_BACKEND": broker.backend, "PROJECT_QUEUE": broker.queue}
    if broker.queue_type is not None:
        ours["PROJECT_QUEUE_TYPE"] = broker.queue_type
        ours["PROJECT_QUEUE_ARGUMENTS"] = json.dumps(dict(broker.queue_arguments))
    return own_environment() | ours | dict(broker.environment) | dict(settings or {})


def run_python(code: str, broker: Broker, settings: Mapping[str, str] | None = None) -> str:
    """What a short program prints, run in a project's environment."""
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env=project_environment(broker, settings),
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout
