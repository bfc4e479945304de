"""Image bytes become pixels: JPEG, PNG and WEBP only, always RGB, never larger than a cap.

Format and size are read from the header before anything is decoded: no other format reaches a
decoder (Pillow alone would hand PostScript to Ghostscript), and a bomb is refused while it is
still small. The decoder is torchvision's (libjpeg-turbo), whose pixels equal Pillow's; like
Pillow, timm and torchvision's references it leaves the EXIF rotation unapplied, as the published
accuracies were made. torchvision has announced that its decoder will move to another package; where
it is gone, Pillow itself decodes, to the same pixels at four fifths of the speed.
"""

import io
import re
import warnings

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

try:
    from torchvision.io import ImageReadMode, decode_image
except ImportError:
    decode_image = None

MAX_PIXELS = 64_000_000
"""Largest image that is decoded: 192 MB of pixels."""

FORMATS = ("JPEG", "PNG", "WEBP")


class BadImage(ValueError):  # noqa: N818  # it is the image that is bad
    """An image that cannot be used.

    Args:
        key: Name of the sample or file.
        reason: Why, in a few words.
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key = key
        self.reason = reason

    def __reduce__(self) -> tuple[type["BadImage"], tuple[str, str]]:
        # An exception is rebuilt from its message alone when it crosses processes; this has two.
        return type(self), (self.key, self.reason)


def read_image_size(data: bytes | bytearray, *, key: str) -> tuple[int, int]:
    """Width and height from the header, in pixels; decodes nothing.

    Raises:
        BadImage: Not a JPEG, PNG or WEBP, or more than `MAX_PIXELS`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(key, f"more than {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise BadImage(key, _not_an_image(data)) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise BadImage(key, f"damaged header ({error})") from error
    if width * height > MAX_PIXELS:
        raise BadImage(key, f"{width} x {height} are more than {MAX_PIXELS:,} pixels")
    return width, height


def decode_rgb(data: bytes | bytearray, *, key: str) -> Tensor:
    """Decode to uint8 of shape (3, H, W); memory lies pixel by pixel (channels last).

    Gray becomes three equal channels, CMYK is converted, alpha is dropped, 16 bits are scaled to 8.

    Raises:
        BadImage: The header is refused (`read_image_size`), or the data are cut or damaged.
    """
    read_image_size(data, key=key)
    image = _decode_pillow(data, key=key) if decode_image is None else _decode(data, key=key)
    if image.dtype != torch.uint8:
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    return image


def _decode(data: bytes | bytearray, *, key: str) -> Tensor:
    # frombuffer wants writable memory: bytes are copied, which costs 1% of decoding.
    buffer = data if isinstance(data, bytearray) else bytearray(data)
    try:
        with warnings.catch_warnings():
            # Each call says that the decoder will move; `_decode_pillow` is ready for that day.
            warnings.simplefilter("ignore", DeprecationWarning)
            image: Tensor = decode_image(
                torch.frombuffer(buffer, dtype=torch.uint8), mode=ImageReadMode.RGB
            )
    except RuntimeError as error:
        # torchvision's message begins with its function, file and line.
        reason = re.sub(r"^\w+, \S+:\d+, ", "", str(error).splitlines()[0])
        raise BadImage(key, f"damaged data ({reason})") from error
    return image


def _decode_pillow(data: bytes | bytearray, *, key: str) -> Tensor:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.mode.startswith("I;16"):
                gray = np.asarray(image).astype(np.int32)
                return torch.from_numpy(gray)[None].expand(3, -1, -1)
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise BadImage(key, f"damaged data ({error})") from error


def _not_an_image(data: bytes | bytearray) -> str:
    if not data:
        return "empty"
    head = bytes(data[:512]).lstrip()
    if head.startswith(b"%!PS"):
        return "PostScript, not JPEG, PNG or WEBP"
    if head.startswith((b"<", b"{")):
        return "text, not JPEG, PNG or WEBP"
    return "not a JPEG, PNG or WEBP"
