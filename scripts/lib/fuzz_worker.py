"""What is tried in a real worker: messages that its queue in Redis gets as they are.

In: a number of messages. Out: what went wrong: a worker that ended, a message that stays, a task without an answer or
with an error that says nothing, a good task beside them that failed, memory that grew.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzz
import redis
from fuzz_inputs import MODELS, arguments_of, in_base64, messages, mutated, pictures, texts
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from processes import ProcessDiedError, Processes
from services import Side, start_broker, start_side

from legit_worker.settings.values import BUILT_IN_TASKS

#: Messages that are sent before the worker is looked at.
ROUND = 200

#: Seconds for a round: some odd texts are long, and a machine may be busy.
PATIENCE = 120

#: The most that resident memory may grow from the first rounds, in which models load, to the last ones.
GROWTH, GROWTH_BYTES = 1.15, 64 << 20

#: The part of the rounds that belongs to the first ones.
WARM = 0.4

#: What a task's failure may be: this project's errors, and Python's for a call that does not fit the task.
CLEAR = {"InvalidInputError", "UnknownModelError", "TypeError"}

#: A good task, sent in each round, and what `legit_worker.rerank` answers.
GOOD = {"query": "red apple", "documents": ["a cat", "the red apple"]}

ENVELOPE = Path(__file__).parents[2] / "docs" / "envelope.schema.json"

Row = tuple[str, int, list[str]]


def try_worker(processes: Processes, number: int, count: int) -> Iterator[Row]:
    """Send this many messages to one worker."""
    side = start_side(processes, "fuzzed", "legit_worker", f"{start_broker(processes)}/0", _environment(processes))
    scene = Scene(side)
    encoded = in_base64(pictures())
    each = count // (2 * len(BUILT_IN_TASKS))
    for task in BUILT_IN_TASKS:
        yield scene.row(f"worker: {task}", arguments_of(task, encoded), number, each, scene.calls(task))
    yield scene.row("worker: messages", messages(), number, count // 4, scene.messages)
    raw = mutated([_whole("ID", "legit_worker.embed_text", {"text": "a cat"}), b"{}", b"[[],{},{}]"])
    rest = count - each * len(BUILT_IN_TASKS) - count // 4
    yield scene.row("worker: bytes", raw | texts.map(_in_utf8), number, rest, scene.bytes)
    yield "worker: memory", 0, scene.growth()
    yield "worker: its end", 0, scene.end()


def _in_utf8(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _environment(processes: Processes) -> dict[str, str]:
    """A worker with small models, one compute thread, and an app that gets results."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))
    from tiny_models import BUILDERS, build_multi

    variables = {"OMP_NUM_THREADS": "1", "LEGIT_WORKER_APPS__A__RESULT_ROUTING": "1"}
    variables |= {"LEGIT_WORKER_MAX_PIXELS": "1000000", "LEGIT_WORKER_APP_FROM": "header:app,reply_to"}
    for kind in MODELS:
        path = {**BUILDERS, "multi": build_multi}[kind](processes.folder / kind)
        variables |= {
            f"LEGIT_WORKER_MODELS__{kind.upper()}__{name}": value
            for name, value in (("PATH", str(path)), ("KIND", kind))
        }
    return variables


def _whole(task_id: str, task: str, arguments: dict[str, Any]) -> bytes:
    """A message, as kombu writes it."""
    body = base64.b64encode(json.dumps([[], arguments, {}]).encode()).decode()
    headers = {"task": task, "id": task_id, "lang": "py", "root_id": task_id, "app": "a"}
    to = {"exchange": "", "routing_key": "celery"}
    properties = {"body_encoding": "base64", "delivery_tag": f"tag-{task_id}", "delivery_info": to, "priority": 0}
    whole = {"body": body, "content-type": "application/json", "content-encoding": "utf-8"}
    return json.dumps(whole | {"headers": headers, "properties": properties}).encode()


class Scene:
    """One worker, and what was seen of it."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._redis = redis.Redis.from_url(side.url)
        self._number = 0
        self._memory: list[int] = []
        self._schema = Draft202012Validator(json.loads(ENVELOPE.read_text()))
        self._is_over = False

    def row(self, name: str, inputs: st.SearchStrategy[Any], number: int, count: int, write: Any) -> Row:
        """Send examples in rounds. Returns a row of the table."""
        waiting: list[tuple[bytes, str | None]] = []
        problems: list[str] = []
        sent = 0

        def flush() -> None:
            nonlocal sent
            sent += len(waiting)
            if not self._is_over:
                problems.extend(self._round(waiting))
            waiting.clear()

        def add(value: Any) -> None:
            self._number += 1
            waiting.append(write(value, f"fuzz-{self._number}"))
            if len(waiting) == ROUND:
                flush()

        fuzz.examples(inputs, number, count, add)
        flush()
        return name, sent, problems

    def calls(self, task: str) -> Any:
        """How arguments become a whole message, whose task must be answered."""
        return lambda arguments, task_id: (_whole(task_id, f"legit_worker.{task}", arguments), task_id)

    def messages(self, message: dict[str, Any], task_id: str) -> tuple[bytes, None]:
        """Each has its own id, if it has a good one. Whether it is answered depends on what is odd."""
        text = json.dumps(message).replace('"ID"', f'"{task_id}"').replace('"TAG"', f'"tag-{task_id}"')
        return text.encode(), None

    def bytes(self, raw: bytes, task_id: str) -> tuple[bytes, None]:
        """The same for bytes."""
        return raw.replace(b"ID", task_id.encode()), None

    def _round(self, waiting: list[tuple[bytes, str | None]]) -> list[str]:
        """Send these and a good task, and wait until the worker has nothing left."""
        good = f"good-{self._number}"
        self._redis.lpush("celery", *(raw for raw, _ in waiting), _whole(good, "legit_worker.rerank", GOOD))
        try:
            problems = self._wait(good)
        except ProcessDiedError as error:
            self._is_over = True
            return [f"{error}\nOf this round: {[raw for raw, _ in waiting]}"]
        if problems:
            self._is_over = True
            return [f"{problem}\nOf this round: {[raw for raw, _ in waiting]}" for problem in problems]
        self._memory.append(_resident(self._side.worker.pid))
        return [*self._answers(waiting), *self._envelopes()]

    def _wait(self, good: str) -> list[str]:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            self._side.worker.check()
            left, held = self._redis.llen("celery"), self._redis.hlen("unacked")
            if not left and not held and self._redis.exists(f"celery-task-meta-{good}"):
                answer = self._answer(good)
                is_good = answer["status"] == "SUCCESS" and answer["result"][0]["index"] in (0, 1)
                return [] if is_good else [f"a good task failed: {answer}"]
            time.sleep(0.01)
        stays = [text[:2000] for text in self._redis.hvals("unacked")]
        return [
            f"after {PATIENCE} s, {left} messages wait and {held} are not acked: {stays}\n{self._side.worker.tail()}"
        ]

    def _answer(self, task_id: str) -> Any:
        raw = self._redis.get(f"celery-task-meta-{task_id}")
        return None if raw is None else json.loads(raw)

    def _answers(self, waiting: list[tuple[bytes, str | None]]) -> Iterator[str]:
        """Tell of each task that has no answer, or one that says nothing."""
        for raw, task_id in waiting:
            if task_id is None:
                continue
            answer = self._answer(task_id)
            if answer is None:
                yield f"no answer: {raw!r}"
            elif answer["status"] == "FAILURE":
                kind, text = answer["result"]["exc_type"], str(answer["result"]["exc_message"])
                if kind not in CLEAR or len(text) > 5000 or " object at 0x" in text:
                    yield f"{kind}: {text[:600]} of {_told(raw)}\n{answer['traceback']}"
            elif answer["status"] != "SUCCESS":
                yield f"{answer['status']}: {raw!r}"

    def _envelopes(self) -> Iterator[str]:
        """Tell of each that its app could not read."""
        while raw := self._redis.lpop("a.results"):
            envelope = json.loads(raw)
            for error in self._schema.iter_errors(envelope):
                yield f"an envelope: {error.message}: {raw[:1000]!r}"

    def growth(self) -> list[str]:
        """Tell if the last rounds' memory is more than that of the first ones."""
        start = int(len(self._memory) * WARM)
        before, after = self._memory[: start + 1][-1:], self._memory[-3:]
        if self._is_over or len(self._memory) < 4:
            return []
        first, last = max(before), sorted(after)[len(after) // 2]
        print(
            f"resident memory: {first >> 20} MiB after {start + 1} rounds, {last >> 20} MiB after {len(self._memory)}"
        )
        return (
            [] if last <= max(first * GROWTH, first + GROWTH_BYTES) else [f"memory grew from {first} to {last} bytes"]
        )

    def end(self) -> list[str]:
        """Stop the worker as an operator does."""
        if self._is_over:
            return []
        self._side.worker.send(15)
        code = self._side.worker.wait(PATIENCE)
        return [] if code == 0 else [f"the worker ended with exit code {code}:\n{self._side.worker.tail()}"]


def _told(raw: bytes) -> str:
    """A message's arguments."""
    return ascii(base64.b64decode(json.loads(raw)["body"]))[:1500]


def _resident(pid: int) -> int:
    """Bytes of memory that the process has."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096
