"""The border: base64, blank texts, image files; and numbers that are not finite."""

from __future__ import annotations

import base64
import io
import struct
import textwrap
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from legit_worker import settings
from legit_worker.errors import InvalidInputError
from legit_worker.inputs.images import bytes_of, image_of
from legit_worker.inputs.limits import limits_of
from legit_worker.inputs.reading import texts_or_prepared
from legit_worker.inputs.texts import is_blank, text_of
from legit_worker.inputs.types import ImageBytes, PreparedText, Text
from legit_worker.models.features import dense_rows
from legit_worker.models.finite import ENOUGH, with_second_try

DEFAULTS = limits_of(settings.Settings(), "")


@given(st.binary(min_size=1), st.booleans(), st.integers(min_value=1, max_value=80), st.booleans())
def test_bytes_come_back_however_their_base64_is_written(
    content: bytes, is_for_urls: bool, width: int, has_head: bool
) -> None:
    text = (base64.urlsafe_b64encode if is_for_urls else base64.b64encode)(content).decode()
    text = "\r\n".join(textwrap.wrap(text, width))
    assert bytes_of(f"data:image/png;base64,{text}" if has_head else text, len(content)) == content
    with pytest.raises(InvalidInputError, match=f"over {len(content) - 1} bytes.*it has {len(content)};"):
        bytes_of(text, len(content) - 1)


@given(st.text())
def test_any_string_is_bytes_or_an_error(text: str) -> None:
    try:
        bytes_of(text, 1000)
    except InvalidInputError as error:
        error.args[0].encode()  # and can be sent


@given(st.text(min_size=1))
def test_a_text_that_strip_leaves_empty_is_blank(text: str) -> None:
    assert is_blank(text) or text.strip()
    try:
        assert type(text_of(text, 1000)) is Text
    except InvalidInputError:
        assert is_blank(text)


@pytest.mark.parametrize("text", ["a", "\u200ba", "é", "e\u0301", "中", "🎉", "\ue000", "﷽"])
def test_what_shows_something_is_no_blank(text: str) -> None:
    assert not is_blank(text)


HEADS = [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\0\0\0\0WEBP", b"BM", b"II*\0"]


@given(st.binary(max_size=300), st.sampled_from(HEADS))
def test_any_file_is_an_image_or_an_error_without_an_address(rest: bytes, head: bytes) -> None:
    said = ""
    try:
        image, _ = image_of(head + rest, DEFAULTS)
        image.decode()
    except InvalidInputError as error:
        said = str(error)
    assert "0x" not in said


def test_a_file_that_claims_more_pixels_than_pillow_takes_is_refused_by_its_head() -> None:
    chunks = {b"IHDR": struct.pack(">IIBBBBB", 100_000, 100_000, 1, 0, 0, 0, 0), b"IDAT": b"x" * 9}
    file = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks.items()
    )
    with pytest.raises(InvalidInputError, match="10000000000 pixels"):
        image_of(file, DEFAULTS)


def test_an_image_keeps_its_file_and_no_pixels() -> None:
    file = io.BytesIO()
    Image.new("1", (7000, 9000)).save(file, "PNG")
    image, pixels = image_of(file.getvalue(), DEFAULTS)
    assert pixels == 63_000_000
    assert image == ImageBytes(file.getvalue(), DEFAULTS.image_formats)


def test_a_vector_of_float16_is_normalised_whatever_its_norm() -> None:
    rows = [np.full(384, 200, dtype=np.float16), np.full(384, 0.001, dtype=np.float16)]
    vectors = dense_rows(rows, None, normalize=True, precision="float32")
    assert vectors.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(vectors.astype(np.float64), axis=1), 1, atol=1e-2)


def test_only_what_is_not_finite_is_tried_alone_and_not_for_ever() -> None:
    tried: list[int] = []

    def alone(item: int) -> np.ndarray:
        tried.append(item)
        return np.array([np.nan if item > 2 else item])

    bad = np.array([np.inf])
    outputs = with_second_try(list(range(12)), [np.array([0.0]), "text", bad, *[bad] * 9], alone)
    assert tried == [2, *range(3, 3 + ENOUGH)]
    assert outputs[2] == np.array([2])


@pytest.mark.parametrize("precision", ["binary", "ubinary", "int8", "uint8"])
def test_a_precision_hides_no_result_that_is_not_finite(precision: str) -> None:
    rows = [np.ones(8, np.float32), np.full(8, np.nan, np.float32)]
    with pytest.raises(InvalidInputError, match="item 1: the model's result is not finite"):
        dense_rows(rows, None, normalize=True, precision=precision)
    with pytest.raises(InvalidInputError, match=r"^the model's result is not finite"):
        dense_rows(rows[1:], None, normalize=False, precision="binary")
    assert np.isnan(dense_rows(rows, None, normalize=False, precision="float32")[1]).all()


@pytest.mark.parametrize(("prompt", "match"), [("\ud800", "not valid Unicode"), ("p" * 101, "the prompt has 101")])
def test_the_prompt_of_a_prepared_text_is_bound_as_a_tasks_own(prompt: str, match: str) -> None:
    value = PreparedText((1, 2), "t", prompt=prompt).to_json()
    limits = replace(DEFAULTS, max_characters=100)
    with pytest.raises(InvalidInputError, match=match):
        texts_or_prepared(value, "text", limits)
    with pytest.raises(InvalidInputError, match=match):
        texts_or_prepared([value] * (limits.max_items + 1), "text", limits)
