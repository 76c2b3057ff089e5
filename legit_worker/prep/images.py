"""Image files, from bytes that anyone may have sent to pixels in memory.

In: a file's bytes. Out: a Pillow image, or a smaller file of the same picture. Pixels are decoded only once the file's
head has said how many there are.
"""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

from legit_worker.errors import InvalidInputError
from legit_worker.prep.texts import model_folder

#: Bytes in one image file.
MAX_BYTES = 32 * 2**20

#: Pixels in one image: a large camera's. A file of half a megabyte can claim a hundred times as many.
MAX_PIXELS = 64_000_000


def open_image(file: bytes) -> Any:
    """A `PIL.Image.Image` whose head was read and whose pixels were not. Raises `InvalidInputError`."""
    from PIL import Image

    if len(file) > MAX_BYTES:
        raise InvalidInputError(f"the image has over {MAX_BYTES} bytes, the most that one may have: resize it")
    try:
        opened = Image.open(io.BytesIO(file))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InvalidInputError(f"the image can't be read: {error}") from None
    if opened.width * opened.height > MAX_PIXELS:
        raise InvalidInputError(
            f"the image has {opened.width} x {opened.height} pixels and one may have {MAX_PIXELS}: resize it"
        )
    return opened


def decode(opened: Any) -> Any:
    """Its pixels: a `PIL.Image.Image` in RGB, the way up that its camera noted. Raises `InvalidInputError`."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidInputError(f"the image can't be read: {error}") from None


def shrink(file: bytes, edge: tuple[int, int] | None) -> bytes:
    """The picture as a PNG, resized as the model's processor would: `edge` is `resize_of` that model.

    The processor then finds the size that it wants, and what it computes is what it would have computed. Raises
    `InvalidInputError`.
    """
    image = decode(open_image(file))
    if edge is not None:
        image = _resized(image, *edge)
    target = io.BytesIO()
    image.save(target, "PNG", compress_level=1)
    return target.getvalue()


def pixels(file: bytes) -> tuple[tuple[int, int], bytes]:
    """Width and height, and three bytes per pixel. Raises `InvalidInputError`."""
    image = decode(open_image(file))
    return image.size, image.tobytes()


@functools.lru_cache(maxsize=32)
def resize_of(path: str, revision: str | None = None) -> tuple[int, int] | None:
    """The shortest edge, in pixels, to which a model's processor resizes, and Pillow's number of the filter.

    None where its files say anything else: then it gets the picture in full size.
    """
    folder = model_folder(path, revision)
    for file in sorted(folder.rglob("*processor_config.json")) if folder else ():
        match _processor(file):
            case {"do_resize": True, "size": {"shortest_edge": int(edge)}, "resample": int(resample)}:
                return edge, resample
    return None


def _processor(file: Path) -> Any:
    """A processor's own settings, which newer files keep one level down."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return content.get("image_processor", content) if isinstance(content, dict) else None


def _resized(image: Any, edge: int, resample: int) -> Any:
    """As transformers computes it (`get_resize_output_image_size`, 5.23): the longer edge is rounded down."""
    short, long = sorted(image.size)
    if short <= edge:
        return image
    longer = int(edge * long / short)
    size = (edge, longer) if image.width <= image.height else (longer, edge)
    return image.resize(size, resample=resample)
