"""Image files: from a stranger's bytes to pixels in memory.

In: a file's bytes. Out: a Pillow image, or a smaller file of the same picture. Nothing is decoded before the file's
head has told the number of pixels.
"""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

from legit_worker.errors import InvalidInputError
from legit_worker.prep.texts import model_folder

#: The most bytes in one image file.
MAX_BYTES = 32 * 2**20

#: The most pixels in one image, as a large camera has. A file of half a megabyte can hold a hundred times as many.
MAX_PIXELS = 64_000_000


def open_image(file: bytes) -> Any:
    """Open a `PIL.Image.Image`: read its head, and decode no pixels. Raises `InvalidInputError`."""
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
    """Decode into a `PIL.Image.Image` in RGB, turned as its camera noted. Raises `InvalidInputError`."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidInputError(f"the image can't be read: {error}") from None


def shrink(file: bytes, edge: tuple[int, int] | None) -> bytes:
    """Write the picture as a PNG, resized as the model's processor would: `edge` is the model's `resize_of`.

    The processor then need not resize, and gives the result that it would give for the original. Raises
    `InvalidInputError`.
    """
    image = decode(open_image(file))
    if edge is not None:
        image = _resized(image, *edge)
    target = io.BytesIO()
    image.save(target, "PNG", compress_level=1)
    return target.getvalue()


def pixels(file: bytes) -> tuple[tuple[int, int], bytes]:
    """Return width and height, and three bytes per pixel. Raises `InvalidInputError`."""
    image = decode(open_image(file))
    return image.size, image.tobytes()


@functools.lru_cache(maxsize=32)
def resize_of(path: str, revision: str | None = None) -> tuple[int, int] | None:
    """Return the shortest edge, in pixels, to which a model's processor resizes, and Pillow's number of the filter.

    None if the model's files say anything else: then the processor gets the picture in full size.
    """
    folder = model_folder(path, revision)
    for file in sorted(folder.rglob("*processor_config.json")) if folder else ():
        match _processor(file):
            case {"do_resize": True, "size": {"shortest_edge": int(edge)}, "resample": int(resample)}:
                return edge, resample
    return None


def _processor(file: Path) -> Any:
    """Read a processor's settings. Newer files keep them one level down."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return content.get("image_processor", content) if isinstance(content, dict) else None


def _resized(image: Any, edge: int, resample: int) -> Any:
    """Resize as transformers does (`get_resize_output_image_size`, 5.23): the longer edge is rounded down."""
    short, long = sorted(image.size)
    if short <= edge:
        return image
    longer = int(edge * long / short)
    size = (edge, longer) if image.width <= image.height else (longer, edge)
    return image.resize(size, resample=resample)
