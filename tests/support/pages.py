"""The code on a page of the documents.

In: Markdown. Out: its blocks, and the commands of a console, each with what is shown below it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from harness import ROOT

EXAMPLES = ROOT / "examples"


@dataclass(frozen=True)
class Step:
    """One command, and what is shown below it."""

    command: str
    shown: str


def read_blocks(text: str) -> list[tuple[str, str]]:
    """The blocks of a page in their order, each with its language."""
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def read_steps(block: str) -> list[Step]:
    """The commands of a console."""
    return [Step(*part.partition("\n")[::2]) for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]


class Page:
    """What a reader of an example types: to install, to start the worker, and then in other terminals."""

    def __init__(self, name: str) -> None:
        self.name = name
        text = (EXAMPLES / name / "README.md").read_text()
        consoles = [read_steps(block) for language, block in read_blocks(text) if language == "console"]
        (place,) = (place for place, steps in enumerate(consoles) if re.search("celery .* worker ", steps[-1].command))
        self.install = consoles[0]
        self.before = [step for steps in consoles[1:place] for step in steps]
        self.worker = [step.command for step in consoles[place]]
        self.after = [step for steps in consoles[place + 1 :] for step in steps]


def typed(commands: Iterable[str], models: Mapping[str, Path]) -> list[str]:
    """The commands, with the folders of models in place of their names."""
    return [re.sub("|".join(models), lambda name: str(models[name[0]]), command) for command in commands]
