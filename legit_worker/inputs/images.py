"""Image files from strangers.

In: base64, or a file's bytes. Out: bytes, `ImageBytes`, or pixels; or `InvalidInputError`. Padded base64 is read, in
both alphabets, with line breaks, and behind a `data:` head. A file's head tells the number of pixels before any is
decoded, and one image's pixels are decoded at a time.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import string
import struct
import warnings
import zlib
from typing import Any

from legit_worker.errors import InvalidInputError
from legit_worker.inputs.limits import Limits
from legit_worker.inputs.types import ImageBytes

#: What Pillow's readers raise for broken files. What ends a task, such as Celery's time limit, is not among these.
BROKEN = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError),
    *(SyntaxError, TypeError, ValueError, struct.error, zlib.error),
)

#: An object's address in a Pillow message: with it, equal errors would not be counted as one.
_ADDRESS = re.compile(r" ?<[^<>]* object at 0x[0-9a-fA-F]+>")

#: The longest head of a `data:` URI that is looked for.
HEAD = 256

#: What stands before the bytes in a `data:` URI.
_DATA = re.compile(r"\s*data:[^,]*,", re.IGNORECASE)

#: The usual alphabet, and its padding.
ALPHABET = (string.ascii_letters + string.digits + "+/=").encode()

#: White space, which stands between lines of base64.
SPACES = b" \t\r\n\v\f"

#: From the alphabet for URLs to the usual one.
USUAL = bytes.maketrans(b"-_", b"+/")


def bytes_of(text: str, most: int) -> bytes:
    """Read at most `most` bytes. Raises `InvalidInputError`."""
    head = _DATA.match(text[:HEAD])
    if head and not head[0].lower().rstrip().endswith(";base64,"):
        raise InvalidInputError("the data: URI is not base64: its head must end in ;base64")
    try:
        raw = text[head.end() if head else 0 :].encode("ascii").translate(USUAL, delete=SPACES)
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"this is not base64: it has the character {text[error.start]!a}") from None
    size = len(raw) // 4 * 3 - raw[-2:].count(b"=")
    if size > most:
        raise InvalidInputError(
            f"the file has over {most} bytes, the most that one may have: it has {size}; resize the image"
        )
    if len(raw) % 4:
        raise _no_base64(raw, f" with padding: its {len(raw)} characters are no multiple of 4")
    try:
        return base64.b64decode(raw, validate=True)
    except binascii.Error as error:
        raise _no_base64(raw, f": {error}") from None


def _no_base64(raw: bytes, otherwise: str) -> InvalidInputError:
    """Name the first character that base64 has not: a path or an address has one."""
    strangers = raw.translate(None, delete=ALPHABET).decode()
    return InvalidInputError(
        f"this is not base64{f': it has the character {strangers[0]!a}' if strangers else otherwise}"
    )


def image_of(file: bytes, limits: Limits) -> tuple[ImageBytes, int]:
    """Read the head of a file. Returns the image and its number of pixels. Raises `InvalidInputError`."""
    if len(file) > limits.max_image_bytes:
        raise InvalidInputError(f"the image has {len(file)} bytes and one may have {limits.max_image_bytes}: resize it")
    image = ImageBytes(file, limits.image_formats)
    with _opened(image) as opened:
        width, height = opened.size
    if width * height > limits.max_pixels:
        raise InvalidInputError(
            f"the image has {width} x {height} pixels and one may have {limits.max_pixels}: resize it"
        )
    return image, width * height


def decode(image: ImageBytes) -> Any:
    """Decode into a `PIL.Image.Image` in RGB, turned as its camera noted. Of an animation, the first picture counts.

    Raises `InvalidInputError`.
    """
    from PIL import ImageOps

    try:
        with _opened(image) as opened:
            return on_white(ImageOps.exif_transpose(opened))
    except InvalidInputError as error:
        raise InvalidInputError(f"{image.place}{error}") from None
    except BROKEN as error:
        raise InvalidInputError(f"{image.place}{_reason(error)}") from None


def on_white(image: Any) -> Any:
    """Convert into RGB, with what is transparent on white, as transformers does (`convert_to_rgb`, 5.24).

    Grey of 16 bits becomes grey of 8, of which Pillow and the library would make white. Raises `InvalidInputError`.
    """
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        image = Image.fromarray(_in_eight_bits(image))
    elif image.mode in ("I", "F"):
        raise InvalidInputError(
            f"the image has pixels of 32 bits (mode {image.mode}), and nothing says which number is white: send 8 or 16"
        )
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _in_eight_bits(image: Any) -> Any:
    import numpy as np

    return (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)


def _opened(image: ImageBytes) -> Any:
    """Open the file, and decode nothing. Raises `InvalidInputError`."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken metadata, and of a size within this package's own bound
            return Image.open(io.BytesIO(image.file), formats=image.formats)
    except UnidentifiedImageError:
        raise InvalidInputError(f"the image can't be read: it is none of {', '.join(image.formats)}") from None
    except (Image.DecompressionBombError, *BROKEN) as error:
        raise InvalidInputError(_reason(error)) from None


def _reason(error: Exception) -> str:
    return f"the image can't be read: {_ADDRESS.sub('', str(error)) or type(error).__name__}"
