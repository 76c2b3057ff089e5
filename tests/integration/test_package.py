"""What `pip install` of a checkout puts into an environment.

In: this checkout. Out: the package in a folder of its own, where mypy finds it as it finds any installed package.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT
from needs import missing

#: Seconds for pip, and for mypy without a cache.
COMMAND_SECONDS = 300

PROGRAM = """
from celery import Celery  # type: ignore[import-untyped]

import legit_worker
from legit_worker.errors import InvalidInputError
from legit_worker.testing import use_models

app = legit_worker.install(Celery("tasks"))
minilm = legit_worker.model("minilm")
reveal_type(minilm)


def embed(text: str) -> list[float]:
    with legit_worker.exclusive():
        vector: list[float] = minilm.encode(text).tolist()
    return vector


def length() -> int | None:
    return minilm.get_embedding_dimension()


with use_models({"minilm": {"kind": "simulated"}}):
    try:
        print(embed("red"), length())
    except InvalidInputError as error:
        print(error)
"""


def run(folder: Path, *command: str, **environment: str) -> str:
    """What a command says that runs in `folder`. Fails if the command does."""
    finished = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )
    assert finished.returncode == 0, f"{finished.stdout}\n{finished.stderr}"
    return finished.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that has the package, made by the wheel that pip builds."""
    if importlib.util.find_spec("hatchling") is None:
        missing("hatchling is not installed")
    folder = tmp_path_factory.mktemp("installed")
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    run(folder, "pip", "install", *offline, "--target", str(folder), str(ROOT))
    return folder


def test_the_wheel_has_every_file_of_the_package(installed: Path) -> None:
    def files(root: Path) -> set[str]:
        found = (path for path in (root / "legit_worker").rglob("*") if path.is_file())
        return {str(path.relative_to(root)) for path in found if path.suffix != ".pyc"}

    assert files(installed) == files(ROOT)
    assert "legit_worker/py.typed" in files(installed)


def test_a_users_program_is_checked_against_the_packages_types(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "program.py").write_text(PROGRAM)
    said = run(tmp_path, "mypy", "--strict", "program.py", PYTHONPATH=str(installed), MYPYPATH="")
    assert 'Revealed type is "legit_worker.models.handle.Handle"' in said
