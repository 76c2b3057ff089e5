"""Images in the size that a model takes.

In: an image that has passed the border. Out: its pixels, or a smaller file of the same picture.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from legit_worker.inputs.images import decode
from legit_worker.inputs.types import ImageBytes
from legit_worker.prep import processes
from legit_worker.prep.texts import kept_if_found, model_folder

#: The processors that resize as `_resized` does. Others, such as ViLT's, round or enlarge the edges in their own way.
RESIZE_ALIKE = frozenset(
    f"{name}{kind}"
    for name in ("CLIP", "ChineseCLIP")
    for kind in ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
)

#: The shortest edge, in pixels, to which a model's processor resizes, and Pillow's number of the filter.
Edge = tuple[int, int]


def shrink(image: ImageBytes, edge: Edge | None) -> bytes:
    """Write the picture as a PNG, resized as the model's processor would: `edge` is the model's `resize_of`.

    The processor then need not resize, and gives the result that it would give for the original. Raises
    `InvalidInputError`.
    """
    target = io.BytesIO()
    _shrunk(image, edge).save(target, "PNG", compress_level=1)
    return target.getvalue()


def decoded(image: ImageBytes, edge: Edge | None) -> Any:
    """A `PIL.Image.Image` in RGB, resized as above, by a helper if there are helpers. Raises `InvalidInputError`."""
    if processes.helpers() is None:
        return _shrunk(image, edge)
    from PIL import Image

    return Image.frombytes("RGB", *processes.run(_pixels, image, edge, size=len(image.file)))


def _pixels(image: ImageBytes, edge: Edge | None) -> tuple[tuple[int, int], bytes]:
    """Return width and height, and three bytes per pixel."""
    shrunk = _shrunk(image, edge)
    return shrunk.size, shrunk.tobytes()


def _shrunk(image: ImageBytes, edge: Edge | None) -> Any:
    whole = decode(image)
    return whole if edge is None else _resized(whole, *edge)


@kept_if_found
def resize_of(path: str, revision: str | None = None) -> Edge | None:
    """Return the edge to which a model's processor resizes.

    None if the model's files say anything else, or another processor: then the processor gets the picture in full size.
    """
    folder = model_folder(path, revision)
    for file in sorted(folder.rglob("*processor_config.json")) if folder else ():
        match _processor(file):
            case {"image_processor_type": name} | {"feature_extractor_type": name} if name not in RESIZE_ALIKE:
                return None
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
