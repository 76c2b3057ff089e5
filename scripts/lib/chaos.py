"""Chaos: workers and servers are killed, stopped, filled and cut off while tasks run; every task is accounted for.

In: a number of tasks, and a seed that decides all that happens (`chaos_plan`). Out: a table in Markdown of what became
of the tasks (`chaos_account`), and exit code 1 if one is lost, or 2 if something else that happened is not explained.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import kombu.pools
import redis
from celery import Celery, chord
from celery.result import AsyncResult
from chaos_account import FINAL, Evidence, Letter, Verdict, judge, read_notes, runs_of
from chaos_plan import BODY, PART, Errand, plan
from chaos_scene import Act, Scene, begin
from processes import Processes
from rich.console import Console

#: Tasks that are sent and not done when a fault comes: this share of the tasks between two faults.
AHEAD = 0.75
#: Seconds without any progress after which no task comes any more: more than any timeout and backoff here.
PATIENCE = 90
#: Seconds between two faults, so that one is seen to be over.
GAP = 1.0
#: Problems that are shown.
SHOWN = 30
#: The exit codes if a task is lost, and if anything else is not explained.
LOST, UNEXPLAINED = 1, 2
#: Where RabbitMQ is, unless `LEGIT_TEST_AMQP_URL` says otherwise.
AMQP_URL = "amqp://guest:guest@localhost:5672//"
#: Keys of the broker that may be left, beside those that expire: bindings, the last sign of life of any worker, and
#: what operators have to read.
KEPT = (b"_kombu.binding", b"legit.beat", b"legit.dead", b"legit.unreadable")
#: How the lists end that a worker leaves if it is killed while others answer its question, under any pool.
REPLIES = b".reply.celery.pidbox"
#: Where dead letters are.
DEAD = ("legit.dead", "legit.dead.here", "legit.dead.there")

console = Console(highlight=False, soft_wrap=True)


def main(processes: Processes, arguments: Sequence[str]) -> int:
    options = _options(arguments)
    # A shell has what it starts in the background ignore it, and so would a worker until Celery is ready.
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    amqp_url = os.environ.get("LEGIT_TEST_AMQP_URL", AMQP_URL) if options.broker == "rabbitmq" else None
    name = f"chaos-{uuid.uuid4().hex[:8]}"
    run = ChaosRun(Scene(processes, name, plan(options.tasks, options.seed, options.broker, name), amqp_url))
    started = time.monotonic()
    try:
        run.go()
    finally:
        if options.logs:
            _keep(run, options.logs)
    command = f"scripts/chaos --tasks {options.tasks} --seed {options.seed} --broker {options.broker}"
    print(f"\n`{command}`, {len(run.scene.workers)} workers, {time.monotonic() - started:.0f} s:\n")
    return _report(run)


def _keep(run: ChaosRun, folder: Path) -> None:
    """All logs, and what they led to."""
    shutil.copytree(run.scene.folder, folder, dirs_exist_ok=True)
    told = [*run.verdicts, *run.scene.deaths.items(), *run.scene.troubles]
    (folder / "account").write_text("".join(f"{one}\n" for one in told))


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/chaos", description="Hurt workers and servers, account for all tasks."
    )
    parser.add_argument("--tasks", type=int, default=1000, metavar="N", help="about how many (default: 1000)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="what happens, and when (default: 1)")
    parser.add_argument("--broker", choices=("redis", "rabbitmq"), default="redis", help="(default: redis)")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep all logs here")
    return parser.parse_args(arguments)


class Forgotten(AsyncResult):
    """A result that nobody waits for. Celery's own tells the server when it goes, which may be away by then."""

    def __del__(self) -> None:
        """Nothing."""


class Sender(threading.Thread):
    """Sends all tasks, each until it is certain that the broker has it. Counts how often it tried."""

    def __init__(self, scene: Scene) -> None:
        super().__init__(daemon=True)
        self.sent: Counter[str] = Counter()
        #: How many may be sent by now, and whether it is to end.
        self.limit, self.is_stopped = 0, False
        self._scene = scene
        self._plain, self._storing = self._clients()

    def run(self) -> None:
        waiting: list[Errand] = []
        for place, errand in enumerate(self._scene.plan.errands):
            while place >= self.limit and not self.is_stopped:
                time.sleep(0.01)
            waiting.append(errand)
            if errand.kind is not PART:  # a chord's parts go with their body
                self._send(waiting)
                waiting = []

    def _send(self, errands: Sequence[Errand]) -> None:
        while not self.is_stopped:
            self.sent.update(errand.id for errand in errands)
            try:
                self._chord(errands) if errands[-1].kind is BODY else self._one(errands[0])
                return
            except Exception:  # nobody knows whether the server took it
                kombu.pools.reset()
                self._plain, self._storing = self._clients()
                time.sleep(0.2)

    def _one(self, errand: Errand) -> None:
        kind = errand.kind
        headers = {"app": kind.app} if kind.app else {}
        options = {"countdown": kind.countdown} if kind.countdown else {}
        self._plain.send_task(kind.task, [errand.number], task_id=errand.id, headers=headers, **options)

    def _chord(self, errands: Sequence[Errand]) -> None:
        *parts, body = errands
        app = self._storing
        header = [app.signature(part.kind.task, args=(part.number,), task_id=part.id) for part in parts]
        chord(header, app=app)(app.signature(body.kind.task, task_id=body.id))

    def _clients(self) -> tuple[Celery, Celery]:
        """One that asks for no result, and one that begins chords, which are counted where results are."""
        scene = self._scene
        clients = [Celery(broker=scene.broker_url, set_as_current=False) for _ in range(2)]
        clients[1].conf.result_backend = scene.results.url
        for client in clients:
            client.conf.task_default_queue = scene.queue
            client.conf.task_default_queue_type = "quorum" if scene.plan.quorum and scene.amqp_url else "classic"
            client.conf.task_publish_retry = False
            client.AsyncResult = client.subclass_with_self(Forgotten)
        return clients[0], clients[1]


class ChaosRun:
    """Lives on the main thread. Goes on until every task has a result, or nothing has moved for long."""

    def __init__(self, scene: Scene) -> None:
        self.scene, self.plan = scene, scene.plan
        self.sender = Sender(scene)
        self.notes: list[Any] = []
        self.ended: set[str] = set()
        self.stored: dict[str, tuple[str, Any]] = {}
        self.verdicts: list[Verdict] = []
        self.faults = list(self.plan.faults)
        self.done_faults: Counter[str] = Counter()
        self._act: Act | None = None
        self._act_until = self._moved = time.monotonic()
        self._ahead = round(AHEAD * len(self.plan.errands) / max(1, len(self.faults)))
        self._file: Any = None
        # The beginning of a line whose end is not written yet.
        self._begun = ""

    def go(self) -> None:
        """Run it all. Gives a verdict for each task that was sent."""
        self.scene.start()
        self.sender.start()
        while not self._is_over():
            self.scene.look_after()
            self._read()
            self._hurt()
            self._look_up()
            time.sleep(0.05)
        self.sender.is_stopped = True
        self.scene.close()
        self._read()
        self._look_up(everything=True)
        self.verdicts = judge([one for one in self.plan.errands if self.sender.sent[one.id]], self._evidence())
        self.scene.problems += self._left_over()

    def _is_over(self) -> bool:
        if time.monotonic() > self._moved + PATIENCE:
            self.scene.problems.append(
                f"nothing moved for {PATIENCE} s, {len(self.faults)} faults and "
                f"{len(self.plan.errands) - len(self.sender.sent)} tasks were still to come"
            )
            return True
        return len(self.stored) == len(self.plan.errands) and not self.faults and self._act is None

    def _read(self) -> None:
        """What tasks have noted since the last look."""
        path = self.scene.folder / "notes"
        if self._file is None and path.exists():
            self._file = path.open()
        *lines, self._begun = (self._begun + (self._file.read() if self._file else "")).split("\n")
        for note in read_notes(lines):
            self.notes.append(note)
            name, *_, what, value = note
            if what != "begins" and value != "Retry":
                self.ended.add(name)
            self._moved = time.monotonic()

    def _hurt(self) -> None:
        """Undo the fault that is over, and begin the next one that is due."""
        now = time.monotonic()
        if now < self._act_until + GAP * (self._act is None):
            return
        due = self.faults[0].at if self.faults else len(self.plan.errands)
        if self._act is not None:
            next(self._act, None)
            self._act, self._act_until, self._moved = None, now, now
            return
        self.sender.limit = due + self._ahead  # sent by and by: there is work when the fault comes
        if self.faults and len(self.ended) >= due:
            fault = self.faults.pop(0)
            console.print(f"[dim]{len(self.ended)} of {len(self.plan.errands)} tasks: {fault.what}[/]")
            self.done_faults[fault.what] += 1
            self._act = begin(self.scene, fault)
            self._act_until = now + next(self._act, 0.0)

    def _look_up(self, *, everything: bool = False) -> None:
        """The stored results of tasks that have ended; of all others too, once nothing has moved for a while."""
        quiet = everything or time.monotonic() > self._moved + 3
        wanted = [one.id for one in self.plan.errands if one.id not in self.stored and (quiet or one.id in self.ended)]
        if not wanted or self._act is not None:
            return
        with suppress(redis.RedisError):
            keys = [f"celery-task-meta-{name}" for name in wanted]
            for name, value in zip(wanted, self.scene.results.client().mget(keys), strict=True):
                meta = json.loads(value or "{}")
                if meta.get("status") in FINAL:
                    self.stored[name] = _state(meta)
                    self._moved = self._moved if everything else time.monotonic()

    def _evidence(self) -> Evidence:
        letters: dict[str, list[Letter]] = defaultdict(list)
        for body in (body for app in ("here", "there") for body in self._messages(app, f"{self.scene.queue}.{app}")):
            told = json.loads(body)
            value = told["result"] if told["error"] is None else told["error"]["type"]
            letters[told["id"]].append(Letter(attempt=told["attempt"], status=told["status"], value=value))
        dead: dict[str, list[str]] = defaultdict(list)
        for queue in DEAD:
            for body in self._messages("here", queue):
                record = json.loads(body)
                dead[record["id"]].append(record.get("reason", "an envelope that was not delivered"))
        scene = self.scene
        return Evidence(
            runs=runs_of(self.notes),
            sent=self.sender.sent,
            stored=self.stored,
            letters=letters,
            dead=dead,
            deaths=scene.deaths,
            troubles=scene.troubles,
            moves=scene.amqp_url is not None,
        )

    def _messages(self, app: str, queue: str) -> list[bytes]:
        """What this run has on a queue of the broker, or of the other app's server."""
        scene = self.scene
        if app == "there" or scene.amqp_url is None:
            server = scene.servers["apps" if app == "there" else "broker"]
            return list(server.client().lrange(queue, 0, -1))
        with suppress(Exception), kombu.Connection(scene.amqp_url) as connection:  # the queue may not be there
            channel, names = connection.default_channel, {errand.id for errand in self.plan.errands}
            found = [one for one in iter(lambda: channel.basic_get(queue), None) if json.loads(one.body)["id"] in names]
            for one in found:  # the others, of other runs and programs, go back when this connection ends
                channel.basic_ack(one.delivery_tag)
            return [one.body for one in found]
        return []

    def _left_over(self) -> list[str]:
        """What should be gone now that all workers have ended."""
        if self.scene.amqp_url is not None:
            with kombu.Connection(self.scene.amqp_url) as connection:
                left = connection.default_channel.queue_declare(self.scene.queue, passive=True).message_count
                for queue in (self.scene.queue, f"{self.scene.queue}.here"):
                    connection.default_channel.queue_delete(queue)
            return [f"{left} messages are left"] if left else []
        client = self.scene.servers["broker"].client()
        kept = (*KEPT, self.scene.queue.encode() + b".")
        keys = [key for key in client.scan_iter(count=1000) if not key.startswith(kept) and client.ttl(key) == -1]
        keys = [key for key in keys if not key.endswith(REPLIES)]
        found = [f"left over: {_size(client, key)}" for key in keys]
        unreadable = client.llen("legit.unreadable")
        if unreadable < self.scene.garbage:
            found.append(f"{unreadable} of {self.scene.garbage} pieces of garbage are in legit.unreadable")
        return found


def _state(meta: dict[str, Any]) -> tuple[str, Any]:
    value = meta["result"]
    return meta["status"], value if meta["status"] == "SUCCESS" else value["exc_type"]


def _size(client: Any, key: bytes) -> str:
    sizes = {b"hash": "hlen", b"list": "llen", b"zset": "zcard", b"set": "scard"}
    kind = client.type(key)
    return f"{key.decode()}, {kind.decode()} of {getattr(client, sizes[kind])(key) if kind in sizes else 1}"


def _report(run: ChaosRun) -> int:
    """Print tables in Markdown. Returns the exit code."""
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    for one in run.verdicts:
        for name in (one.errand.kind.name, "**all**"):
            rows[name].update({"tasks": 1, one.end: 1, "ran again": int(bool(one.again))})
    columns = ("tasks", "done", "own error", "chord error", "dead letter", "lost", "wrong", "ran again")
    _table(("kind of task", *columns), [(name, *(rows[name][column] for column in columns)) for name in sorted(rows)])
    again = Counter(reason for one in run.verdicts for reason in one.again)
    _table(("why tasks ran again", "runs"), again.most_common())
    _table(("what was done", "times"), run.done_faults.most_common())
    problems = [*run.scene.problems]
    problems += [f"{one.errand.kind.name} {one.errand.id}: {what}" for one in run.verdicts for what in one.problems]
    for problem in problems[:SHOWN]:
        print(f"- {problem}")
    lost = rows["**all**"]["lost"]
    print(f"\nLost: {lost}. Not explained: {len(problems)}.")
    return LOST if lost else UNEXPLAINED if problems else 0


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
    print()
