"""Image bytes become pixels: JPEG, PNG and WEBP only, always RGB, never larger than a cap.

What the header says is checked before anything is decoded (`data/header.py`). The decoder is
torchvision's (libjpeg-turbo), whose pixels equal Pillow's; like Pillow, timm and torchvision's
references it leaves the EXIF rotation unapplied, as the published accuracies were made. A PNG goes
to Pillow, because torchvision's decoder dies of a damaged one, and the process with it. torchvision
has announced that its decoder will move to another package; where it is gone, Pillow decodes
everything, to the same pixels at four fifths of the speed.

Training looks at a crop. With nvImageCodec (`pip install 'convnext[decode]'`) only the crop of a
JPEG is decoded (`decode_region`), on the CPU, to the same pixels: rows below it are never
read. What that library cannot do or finds damaged goes to the full decoder, which decides.
"""

import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from convnext_cli.data.header import FORMATS, BadImage, is_animated_webp, read_image_size

try:
    from torchvision.io import ImageReadMode, decode_image
except ImportError:
    decode_image = None

_JPEG_BEGINS, _JPEG_SCAN, _JPEG_ENDS = b"\xff\xd8\xff", b"\xff\xda", b"\xff\xd9"
_PNG_BEGINS = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, kw_only=True)
class CropBox:
    """A part of an image, in pixels from its top left corner."""

    top: int
    left: int
    height: int
    width: int


def decode_rgb(data: bytes | bytearray, *, key: str) -> Tensor:
    """Decode to uint8 of shape (3, H, W); memory lies pixel by pixel (channels last).

    Gray becomes three equal channels, CMYK is converted, alpha is dropped, 16 bits are scaled to 8.

    Raises:
        BadImage: The header is refused (`read_image_size`), or the data are cut or damaged.
    """
    read_image_size(data, key=key)
    return _decode_checked(data, key=key)


def decode_region(data: bytes | bytearray, *, box: CropBox, key: str) -> Tensor:
    """The same pixels as `decode_rgb` followed by a cut; uint8 of shape (3, height, width).

    Args:
        data: Bytes whose header `read_image_size` has accepted.
        box: Inside the image.
        key: Name of the sample, for messages.

    Raises:
        BadImage: The data are cut or damaged. Damage below the box may go unseen.
    """
    image = _decode_region_nv(data, box=box)
    if image is None:
        image = _decode_checked(data, key=key)
        image = image[:, box.top : box.top + box.height, box.left : box.left + box.width]
    return image


@cache
def decodes_regions() -> bool:
    """Whether the library that decodes only a crop is there."""
    try:
        return find_spec("nvidia.nvimgcodec") is not None
    except ModuleNotFoundError:  # not even its namespace is there
        return False


def _decode_region_nv(data: bytes | bytearray, *, box: CropBox) -> Tensor | None:
    if not data.startswith(_JPEG_BEGINS) or not decodes_regions():
        return None
    # A file without its end mark may be cut below the box, where nothing would notice. A thumbnail
    # has a mark of its own, before the image's last scan.
    if not data.endswith(_JPEG_ENDS) and data.rfind(_JPEG_ENDS) < data.rfind(_JPEG_SCAN):
        return None
    nv, decoder, parameters = _nv_decoder(os.getpid())
    region = nv.Region(box.top, box.left, box.top + box.height, box.left + box.width)
    try:
        stream = nv.CodeStream(bytes(data)).get_sub_code_stream(region=region)
        decoded = decoder.decode(stream, params=parameters)
    except RuntimeError:
        return None
    if decoded is None:
        return None
    return torch.from_numpy(np.asarray(decoded)).permute(2, 0, 1)


@lru_cache(maxsize=1)
def _nv_decoder(process: int) -> tuple[Any, Any, Any]:
    """The library and the decoder of this process; its threads do not survive a fork."""
    del process
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
    with _silent_stderr():  # it tells which GPU libraries it does not find
        nv = import_module("nvidia.nvimgcodec")
        decoder = nv.Decoder(
            device_id=nv.NVIMGCODEC_DEVICE_CPU_ONLY,
            backends=[nv.Backend(nv.BackendKind.CPU_ONLY)],
            max_num_cpu_threads=1,
        )
    parameters = nv.DecodeParams(
        color_spec=nv.ColorSpec.SRGB, allow_any_depth=False, apply_exif_orientation=False
    )
    return nv, decoder, parameters


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """What native code writes to the error stream is lost."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _decode_checked(data: bytes | bytearray, *, key: str) -> Tensor:
    pillow = decode_image is None or data.startswith(_PNG_BEGINS)
    image = _decode_pillow(data, key=key) if pillow else _decode(data, key=key)
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
        if is_animated_webp(data):
            raise BadImage(key, "an animated WEBP, not a single image") from error
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
