"""What the first bytes of an image say: format and size; light, for processes that decode nothing.

No other format reaches a decoder (Pillow alone would hand PostScript to Ghostscript), and a bomb is
refused while it is still small.
"""

import io

from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 64_000_000
"""Largest image that is packed or decoded: 192 MB of pixels."""

FORMATS = ("JPEG", "PNG", "WEBP")

_WEBP_FLAGS, _WEBP_ANIMATION = 20, 0b10


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


def is_animated_webp(data: bytes | bytearray) -> bool:
    """Whether the header says so: a flag of the extended format (RFC 9649, section 2.7)."""
    extended = data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X"
    return extended and len(data) > _WEBP_FLAGS and bool(data[_WEBP_FLAGS] & _WEBP_ANIMATION)


def _not_an_image(data: bytes | bytearray) -> str:
    if not data:
        return "empty"
    head = bytes(data[:512]).lstrip()
    if head.startswith(b"%!PS"):
        return "PostScript, not JPEG, PNG or WEBP"
    if head.startswith((b"<", b"{")):
        return "text, not JPEG, PNG or WEBP"
    return "damaged, or not a JPEG, PNG or WEBP"
