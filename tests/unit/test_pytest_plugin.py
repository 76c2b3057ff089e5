"""The pytest plugin, by a user's tests in an empty folder: those of docs/testing.md, and some that fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import legit_worker
from legit_worker.errors import InvalidInputError
from legit_worker.testing import Ledger, ModelOnDevice, memory_app, run_together, use_models, vector

ROOT = Path(__file__).parents[2]

#: Seconds for pytest in a process of its own.
RUN_SECONDS = 120

TASKS = """
import legit_worker
from celery import Celery

app = legit_worker.install(Celery("tasks", broker="redis://nowhere.invalid", backend="redis://nowhere.invalid"))

@app.task
def embed(text):
    return legit_worker.model("minilm").encode(text).tolist()

@app.task
def embed_alone(text):
    with legit_worker.exclusive():
        return embed(text)
"""


def run(folder: Path, test: str) -> str:
    """What pytest says of a user's test file."""
    (folder / "tasks.py").write_text(TASKS)
    (folder / "test_users.py").write_text(test)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CELERY_", "LEGIT_WORKER_"))}
    command = [sys.executable, "-m", "pytest", "-p", "legit_worker_pytest", "-p", "no:cacheprovider", "-rA", "-q"]
    finished = subprocess.run(
        command,
        cwd=folder,
        env=kept | {"PYTHONPATH": f"{ROOT}:{folder}"},
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    return finished.stdout + finished.stderr


def test_the_tests_of_the_page_pass_in_an_empty_folder(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "testing.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    said = run(tmp_path, "\n".join(blocks))
    assert f"{len(blocks)} passed" in said, said


def test_a_task_that_runs_alone_is_found_and_a_failure_is_the_tasks(tmp_path: Path) -> None:
    said = run(
        tmp_path,
        """
import pytest
from tasks import embed, embed_alone

def test_alone(legit_models, assert_batched):
    legit_models("minilm")
    with pytest.raises(AssertionError, match="10 calls of .*embed_alone took 10 batches of model 'minilm'.* take 5"):
        assert_batched(embed_alone, [f"text {number}" for number in range(10)])

def test_bad(legit_models, assert_batched):
    legit_models("minilm")
    with pytest.raises(Exception, match="takes strings and numbers"):
        assert_batched(embed, ["good", [True], "good too"])

def test_no_model(assert_batched):
    with pytest.raises(AssertionError, match="2 calls of .*upper.* called no model"):
        assert_batched(str.upper, ["a", "b"])

def test_afterwards_a_handle_computes_directly(legit_models):
    legit_models("minilm")
    assert len(embed("text")) == 8
""",
    )
    assert "4 passed" in said, said


def test_a_run_that_uses_no_fixture_imports_neither_celery_nor_this_package(tmp_path: Path) -> None:
    said = run(
        tmp_path,
        """
import sys

def test_nothing_is_imported():
    assert not [name for name in sys.modules if name.split(".")[0] in ("celery", "kombu", "legit_worker", "torch")]
""",
    )
    assert "1 passed" in said, said


def test_calls_that_run_together_wait_for_a_models_load() -> None:
    texts = ["one", "two", "three"]
    with use_models({"late": {"kind": "simulated", "path": "0,0,0,0.2"}}):
        done = run_together(lambda text: legit_worker.model("late").map([text])[0], texts)
    assert done.results == [vector(text).tolist() for text in texts]
    assert done.items == {"late": 3}
    assert done.batches["late"] < 3


def test_the_current_app_is_the_same_after_a_memory_app() -> None:
    from celery import Celery, current_app

    mine = Celery("mine")
    mine.set_current()
    with memory_app() as app:
        assert "legit_worker.embed_text" in app.tasks
    assert current_app._get_current_object() is mine


def test_the_settings_of_one_test_are_not_those_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def embed(count: int) -> int:
        with use_models({"m": {"kind": "simulated"}}), memory_app() as app:
            return len(app.tasks["legit_worker.embed_text"].delay(["a text"] * count, "m").get())

    monkeypatch.setenv("LEGIT_WORKER_MAX_ITEMS", "2")
    with pytest.raises(InvalidInputError, match="one task takes 2"):
        embed(3)
    monkeypatch.delenv("LEGIT_WORKER_MAX_ITEMS")
    assert embed(3) == 3


def test_what_the_module_had_before_is_still_there() -> None:
    ledger = Ledger(total=100)
    model = ModelOnDevice(ledger, "one", weights=60, bytes_per_cost=1)
    model.to("simulated")
    assert ledger.used == 60
