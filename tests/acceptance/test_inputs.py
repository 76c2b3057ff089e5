"""What strangers send: a text stays a text, an image has its pixels and no more, and limits are the settings'."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Broker, Sides, StartWorker, Worker
from tiny_models import build_image, build_text_and_image, picture

from legit_worker.errors import InvalidInputError

#: The least cosine with what the library gives.
COSINE = 0.9999


def encoded(image: Any, form: str = "PNG", **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, form, **options)
    return base64.b64encode(file.getvalue()).decode()


def assert_same_direction(answer: Any, vector: Any) -> None:
    got = np.array(answer)
    assert got @ vector / (np.linalg.norm(got) * np.linalg.norm(vector)) >= COSINE


# Texts


@pytest.fixture(scope="module")
def asked() -> Iterator[tuple[str, list[str]]]:
    """The address of a server of pictures, and what it was asked for."""
    paths: list[str] = []

    class Pictures(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(200)
            self.end_headers()
            picture(1).save(self.wfile, "PNG")

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of images and texts: one with a prompt before each text, one without."""
    return {
        "plain": build_image(tmp_path_factory.mktemp("plain")),
        "prompted": build_image(tmp_path_factory.mktemp("prompted"), prompt="find "),
    }


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which each input is a text and an image."""
    return build_text_and_image(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def multimodal(start_module_worker: StartWorker, clips: dict[str, Path], pairs: Path) -> Worker:
    """A worker that has both models, as kind `embed` and as kind `image`, and one of pairs."""
    variables = {"LEGIT_WORKER_MODELS__PAIRS__KIND": "image", "LEGIT_WORKER_MODELS__PAIRS__PATH": str(pairs)}
    for name, path in clips.items():
        for kind in ("embed", "image"):
            variables[f"LEGIT_WORKER_MODELS__{name}_{kind}__PATH".upper()] = str(path)
            variables[f"LEGIT_WORKER_MODELS__{name}_{kind}__KIND".upper()] = kind
    return start_module_worker("project", environment=variables | {"LEGIT_WORKER_ENABLED": "1"})


@pytest.mark.parametrize("kind", ["embed", "image"])
@pytest.mark.parametrize("name", ["plain", "prompted"])
def test_a_text_that_looks_like_a_picture_is_never_fetched_or_read(
    multimodal: Worker,
    clips: dict[str, Path],
    asked: tuple[str, list[str]],
    tmp_path: Path,
    name: str,
    kind: str,
) -> None:
    from sentence_transformers import SentenceTransformer

    address, paths = asked
    file = tmp_path / "picture.png"
    picture(2).save(file)
    library = SentenceTransformer(str(clips[name]), device="cpu")
    for text in (f"{address}/x.png", str(file), "data:image/png;base64,iVBO"):
        vector = library.encode({"text": text})
        assert_same_direction(multimodal.ask("legit_worker.embed_text", text, model=f"{name}_{kind}"), vector)
        found = multimodal.ask("encode", [text], f"{name}_{kind}")
        assert_same_direction(found["values"][0], vector)
    assert paths == []


@pytest.mark.parametrize("kind", ["embed", "image"])
def test_an_address_beside_a_text_is_refused(multimodal: Worker, asked: tuple[str, list[str]], kind: str) -> None:
    address, paths = asked
    message = [{"role": "user", "content": [{"type": "image", "image": f"{address}/x.png"}]}]
    for value in ({"text": "a", "image": f"{address}/x.png"}, {"image": f"{address}/x.png"}, message, {}):
        with pytest.raises(InvalidInputError, match="expected"):
            multimodal.ask("encode", [value], f"plain_{kind}")
        with pytest.raises(InvalidInputError, match="expected"):
            multimodal.ask("legit_worker.embed_text", [value], model=f"plain_{kind}")
    assert paths == []


BLANK = ["\u00a0", "\u200b\u200b", "\ufeff", "\x00\x01\x7f", "\u2028", "\u202e \u2069", "\t\u3000"]


@pytest.mark.parametrize("text", BLANK, ids=ascii)
def test_a_text_that_shows_nothing_is_empty(multimodal: Worker, text: str) -> None:
    with pytest.raises(InvalidInputError, match="item 1: the text is empty"):
        multimodal.ask("legit_worker.embed_text", ["fine", text], model="plain_embed")


def test_a_text_that_is_no_unicode_is_refused_by_its_place_whatever_the_options(multimodal: Worker) -> None:
    for options in ({}, {"truncate": False}):
        with pytest.raises(InvalidInputError, match="item 1: the text is not valid Unicode"):
            multimodal.ask("legit_worker.embed_text", ["fine", "a \ud800"], model="plain_embed", **options)


# Images


def ask_image(worker: Worker, image: Any) -> Any:
    return worker.ask("legit_worker.embed_image", image, model="plain_image")


@pytest.fixture(scope="module")
def clip(clips: dict[str, Path]) -> Any:
    """The library's own model."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(clips["plain"]), device="cpu")


def transparent(mode: str) -> Any:
    """A picture whose right half is transparent, with something else below."""
    from PIL import Image

    image = picture(1).convert("RGBA")
    mask = Image.new("L", image.size, 255)
    mask.paste(0, (image.width // 2, 0, *image.size))
    image.putalpha(mask)
    return image if mode == "RGBA" else image.convert(mode)


def with_palette() -> Any:
    """A picture in a palette, of which one colour is transparent."""
    image = picture(1).convert("P")
    image.info["transparency"] = image.getpixel((0, 0))
    return image


@pytest.mark.parametrize(
    ("image", "form"),
    [
        (transparent("RGBA"), "PNG"),
        (transparent("RGBA"), "WEBP"),
        (transparent("LA"), "PNG"),
        (with_palette(), "PNG"),
        (with_palette(), "GIF"),
        (picture(1).convert("CMYK"), "JPEG"),
        (picture(1).convert("CMYK"), "TIFF"),
        (picture(1).convert("1"), "PNG"),
        (picture(1, width=1, height=1), "PNG"),
        (picture(1), "BMP"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.mode,
)
def test_an_image_has_the_librarys_vector(multimodal: Worker, clip: Any, image: Any, form: str) -> None:
    from PIL import Image

    file = encoded(image, form)
    vector = clip.encode(Image.open(io.BytesIO(base64.b64decode(file))))
    assert_same_direction(ask_image(multimodal, file), vector)
    prepared = multimodal.ask("legit_worker.prep_image", file, model="plain_image")
    assert_same_direction(ask_image(multimodal, prepared), vector)


def test_a_text_and_an_image_are_one_input_of_a_model_that_takes_both(multimodal: Worker, pairs: Path) -> None:
    from sentence_transformers import SentenceTransformer

    library = SentenceTransformer(str(pairs), device="cpu")
    texts, images = ["red apple", "https://example.org/x.png"], [picture(1), picture(2, width=90, height=30)]
    inputs = [{"text": text, "image": encoded(image)} for text, image in zip(texts, images, strict=True)]
    vectors = library.encode([{"text": text, "image": image} for text, image in zip(texts, images, strict=True)])
    for answer, vector in zip(multimodal.ask("legit_worker.embed_image", inputs, model="pairs"), vectors, strict=True):
        assert_same_direction(answer, vector)
    assert_same_direction(multimodal.ask("legit_worker.embed_image", inputs[1], model="pairs"), vectors[1])
    assert abs(vectors[0] @ vectors[1]) < COSINE * np.linalg.norm(vectors[0]) * np.linalg.norm(vectors[1])


def test_an_address_is_no_image_of_a_pair(multimodal: Worker, asked: tuple[str, list[str]], tmp_path: Path) -> None:
    address, paths = asked
    file = tmp_path / "picture.png"
    picture(2).save(file)
    for image in (f"{address}/x.png", str(file), "file://" + str(file), {"url": address}, None, [encoded(picture(1))]):
        value = [{"text": "a", "image": encoded(picture(1))}, {"text": "a", "image": image}]
        with pytest.raises(InvalidInputError, match="item 1: "):
            multimodal.ask("legit_worker.embed_image", value, model="pairs")
    for value in ({"text": "a"}, {"image": encoded(picture(1))}, {"text": "a", "image": "", "audio": "a.wav"}, {}):
        with pytest.raises(InvalidInputError, match=r"expected an image as base64, or .*, got dict"):
            multimodal.ask("legit_worker.embed_image", value, model="pairs")
    with pytest.raises(InvalidInputError, match="the text is empty"):
        multimodal.ask("legit_worker.embed_image", {"text": " ", "image": encoded(picture(1))}, model="pairs")
    assert paths == []


def test_what_a_model_can_not_take_is_refused_with_what_it_takes(multimodal: Worker) -> None:
    both = {"text": "a", "image": encoded(picture(1))}
    with pytest.raises(InvalidInputError, match=r"takes no image with text as one input: it takes .*image"):
        multimodal.ask("legit_worker.embed_image", both, model="plain_image")
    with pytest.raises(InvalidInputError, match="takes no image as one input: it takes image with text"):
        multimodal.ask("legit_worker.embed_image", encoded(picture(1)), model="pairs")
    with pytest.raises(InvalidInputError, match="takes no text as one input: it takes image with text"):
        multimodal.ask("legit_worker.embed_text", "a", model="pairs")


def test_grey_of_sixteen_bits_is_the_grey_of_eight(multimodal: Worker, clip: Any) -> None:
    from PIL import Image

    grey = picture(3).convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    for form in ("PNG", "TIFF"):
        assert_same_direction(ask_image(multimodal, encoded(deep, form)), clip.encode(grey))
    with pytest.raises(InvalidInputError, match="32 bits"):
        ask_image(multimodal, encoded(grey.convert("F"), "TIFF"))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_picture_of_an_animation_counts(multimodal: Worker, clip: Any, form: str) -> None:
    from PIL import Image

    first = picture(1).quantize(16).convert("RGB")
    file = encoded(first, form, save_all=True, append_images=[picture(2), picture(3)], lossless=True)
    with Image.open(io.BytesIO(base64.b64decode(file))) as opened:
        assert opened.n_frames == 3
    assert_same_direction(ask_image(multimodal, file), clip.encode(first))


def test_an_image_is_turned_as_its_camera_noted(multimodal: Worker, clip: Any) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    file = encoded(picture(1), "PNG", exif=exif)
    assert_same_direction(ask_image(multimodal, file), clip.encode(picture(1).rotate(-90, expand=True)))


def in_lines(text: str) -> str:
    return "\r\n".join(text[start : start + 76] for start in range(0, len(text), 76))


@pytest.mark.parametrize("task", ["embed_image", "prep_image"])
def test_base64_is_read_as_clients_write_it(multimodal: Worker, task: str) -> None:
    plain = encoded(picture(1))
    urlsafe = plain.replace("+", "-").replace("/", "_")
    assert urlsafe != plain
    expected = multimodal.ask(f"legit_worker.{task}", plain, model="plain_image")
    for text in (in_lines(plain), urlsafe, f"data:image/png;base64,{plain}", f"DATA:;base64,\n{in_lines(plain)}\n"):
        assert multimodal.ask(f"legit_worker.{task}", text, model="plain_image") == expected


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("abcde", "not base64 with padding: its 5 characters"),
        ("ab=cdefg", "not base64"),
        ("data:image/svg+xml,%3Csvg%3E", "data: URI is not base64"),
        ("ab*d", "not base64"),
        ("abcé", r"not base64: it has the character '\\xe9'"),
        (base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n").decode(), "it is none of JPEG, PNG, WEBP, GIF, BMP, TIFF$"),
        (encoded(picture(1), "PPM"), "it is none of JPEG"),
        (encoded(picture(1, width=400, height=400), "JPEG")[:2000], "truncated"),
        (encoded(picture(1))[:200], "can't be read"),
    ],
)
def test_what_is_no_image_is_refused_by_name_and_without_an_objects_address(
    multimodal: Worker, image: str, message: str
) -> None:
    with pytest.raises(InvalidInputError, match=f"item 1: .*{message}") as refused:
        ask_image(multimodal, [encoded(picture(1)), image])
    assert "0x" not in str(refused.value)


# Numbers


def test_an_item_that_is_not_finite_is_computed_alone_before_it_fails(sides: Sides, broker: Broker) -> None:
    """All are there before the worker starts, so they share batches, and the shorter ones are padded."""
    client = broker.client()
    texts = [*("x" * length for length in range(1, 25)), "bad"]
    results = [client.send_task("legit_worker.embed_text", [text], {"model": "padded"}) for text in texts]
    worker = sides.worker("modelpool", broker=broker)
    *lengths, bad = worker.answers(results)
    assert [vector[0] for vector in lengths] == list(range(1, 25))
    assert any(vector[1] > 1 for vector in lengths)
    assert isinstance(bad, InvalidInputError)
    with pytest.raises(InvalidInputError, match="item 2: the model's result is not finite"):
        worker.ask("legit_worker.embed_text", ["long", "a", "bad", "bad too"], model="padded")


# Limits

LIMITS = {
    "MAX_ITEMS": "3",
    "MAX_CHARACTERS": "50",
    "MAX_IMAGE_BYTES": "20KiB",
    "MAX_PIXELS": "5000",
    "MAX_TASK_PIXELS": "9000",
    "IMAGE_FORMATS": "PNG",
}


@pytest.mark.parametrize("side", ["all", "an app"])
def test_limits_are_settings_of_all_and_of_each_app(
    start_worker: StartWorker, tiny_paths: dict[str, Path], side: str
) -> None:
    prefix = "LEGIT_WORKER_" if side == "all" else "LEGIT_WORKER_APPS__SHOP__"
    models = {"LEGIT_WORKER_MODELS__SIM__KIND": "simulated", "LEGIT_WORKER_MODELS__CLIP__KIND": "image"}
    models["LEGIT_WORKER_MODELS__CLIP__PATH"] = str(tiny_paths["image"])
    limits = {f"{prefix}{name}": value for name, value in LIMITS.items()}
    worker = start_worker("legit_worker", environment=models | limits)

    def ask(task: str, *args: Any, **options: Any) -> Any:
        sent = worker.client.send_task(f"legit_worker.{task}", args, options, headers={"app": "shop"})
        return worker.answer(sent)

    noise = picture(1, width=70, height=70)
    beyond = [
        ("embed_text", (["text"] * 4, "sim"), "4 items and one task takes 3"),
        ("embed_text", (["text", "x" * 51], "sim"), "item 1: the text has 51 characters and one may have 50"),
        ("embed_image", (encoded(picture(1, width=51, height=100)),), "51 x 100 pixels and one may have 5000"),
        ("embed_image", ([encoded(noise)] * 2,), "item 1: the first 2 images have 9800 pixels and one task takes 9000"),
        ("prep_image", ([encoded(noise)] * 2,), "item 1: the first 2 images have 9800 pixels and one task takes 9000"),
        ("embed_image", (encoded(noise, "BMP") + "AAAA" * 7000,), "over 20480 bytes.*it has 3"),
        ("embed_image", (encoded(noise, "JPEG"),), "it is none of PNG"),
    ]
    for task, args, message in beyond:
        with pytest.raises(InvalidInputError, match=message):
            ask(task, *args)
    assert len(ask("embed_image", [encoded(noise)])) == 1
    assert len(ask("embed_text", ["x" * 50] * 3, "sim")) == 3
    if side == "an app":
        assert len(worker.ask("legit_worker.embed_text", ["x" * 51] * 4, model="sim")) == 4
