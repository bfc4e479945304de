import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from convnext_cli.data import decode
from convnext_cli.data.decode import CropBox, decode_region, decode_rgb
from convnext_cli.data.header import BadImage, read_image_size

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def encode(image: Image.Image, format_: str, **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format_, **options)
    return sink.getvalue()


def picture(mode: str) -> Image.Image:
    return Image.fromarray(PIXELS).convert(mode)


def rotated_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    return encode(picture("RGB"), "JPEG", exif=exif)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, with almost no data behind it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


def damaged_png() -> bytes:
    """A PNG whose compressed pixels are no zlib stream any more."""
    data = bytearray(encode(picture("RGB"), "PNG"))
    at = data.index(b"IDAT") + 100
    data[at : at + 8] = bytes(8)
    return bytes(data)


IMAGES = {
    "jpeg": encode(picture("RGB"), "JPEG", quality=90),
    "jpeg 4:2:0": encode(picture("RGB"), "JPEG", subsampling=2),
    "progressive jpeg": encode(picture("RGB"), "JPEG", progressive=True),
    "gray jpeg": encode(picture("L"), "JPEG"),
    "cmyk jpeg": encode(picture("CMYK"), "JPEG"),
    "jpeg to be turned": rotated_exif(),
    "jpeg with rubbish behind": encode(picture("RGB"), "JPEG") + b"rubbish" * 9,
    "png": encode(picture("RGB"), "PNG"),
    "gray png": encode(picture("L"), "PNG"),
    "palette png": encode(picture("P"), "PNG"),
    "bilevel png": encode(picture("1"), "PNG"),
    "png with alpha": encode(picture("RGBA"), "PNG"),
    "webp": encode(picture("RGB"), "WEBP"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_pixels_equal_pillows(name):
    expected = np.asarray(Image.open(io.BytesIO(IMAGES[name])).convert("RGB"))

    image = decode_rgb(IMAGES[name], key=name)

    assert tuple(image.shape) == (3, 24, 40)
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("name", IMAGES)
def test_pillow_stands_in_for_a_torchvision_without_decoder(name, monkeypatch):
    expected = decode_rgb(IMAGES[name], key=name)
    monkeypatch.setattr(decode, "decode_image", None)

    np.testing.assert_array_equal(decode_rgb(IMAGES[name], key=name).numpy(), expected.numpy())


@pytest.mark.parametrize("name", IMAGES)
def test_a_region_is_cut_from_the_same_pixels(name):
    whole = decode_rgb(IMAGES[name], key=name)

    for top, left, height, width in (
        (0, 0, 24, 40),
        (3, 5, 11, 17),
        (13, 0, 11, 40),
        (23, 33, 1, 7),
    ):
        box = CropBox(top=top, left=left, height=height, width=width)
        region = decode_region(IMAGES[name], box=box, key=name)
        expected = whole[:, top : top + height, left : left + width]
        np.testing.assert_array_equal(region.numpy(), expected.numpy())


def test_a_photo_that_is_cut_below_a_region_is_refused_in_spite_of_its_thumbnail():
    thumbnail = b"Exif\0\0" + IMAGES["jpeg"]
    header = b"\xff\xd8\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    cut = header + IMAGES["jpeg 4:2:0"][2:-50]

    with pytest.raises(BadImage, match="truncated"):
        decode_region(cut, box=CropBox(top=0, left=0, height=2, width=40), key="cut")


def test_an_animated_webp_is_not_called_damaged():
    later = picture("RGB").transpose(Image.Transpose.ROTATE_180)
    data = encode(picture("RGB"), "WEBP", save_all=True, append_images=[later])

    with pytest.raises(BadImage, match="an animated WEBP, not a single image"):
        decode_rgb(data, key="dance")


@pytest.mark.parametrize("decoder", ["torchvision", "pillow"])
def test_sixteen_bits_are_scaled_and_not_clipped(decoder, monkeypatch):
    if decoder == "pillow":
        monkeypatch.setattr(decode, "decode_image", None)
    deep = PIXELS[..., 0].astype(np.uint16) * 257

    image = decode_rgb(encode(Image.fromarray(deep), "PNG"), key="deep")

    np.testing.assert_array_equal(image[0].numpy(), PIXELS[..., 0])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"<!DOCTYPE html><html>not found</html>", "text"),
        (encode(picture("RGB"), "GIF"), "not a JPEG, PNG or WEBP"),
        (encode(picture("RGB"), "TIFF"), "not a JPEG, PNG or WEBP"),
        (b"\0" * 1000, "not a JPEG, PNG or WEBP"),
        (IMAGES["jpeg"][:12], "damaged header"),
        (IMAGES["jpeg"][:-300], "damaged data"),
        (IMAGES["png"][:-300], "damaged data"),
        (damaged_png(), "damaged data"),
        (png_of_size(9000, 9000), "9000 x 9000 are more than 64,000,000 pixels"),
        (png_of_size(12000, 12000), "more than 64,000,000 pixels"),
        (png_of_size(40000, 40000), "more than 64,000,000 pixels"),
    ],
)
def test_what_is_no_usable_image_is_refused_with_its_key_and_the_reason(data, reason):
    with pytest.raises(BadImage) as refused:
        decode_rgb(data, key="n01440764/x.jpg")

    assert refused.value.key == "n01440764/x.jpg"
    assert reason in refused.value.reason


def test_the_size_is_read_without_decoding():
    cut = IMAGES["jpeg"][:-300]

    assert read_image_size(cut, key="cut") == (40, 24)


def test_a_refusal_crosses_processes_whole():
    error = pickle.loads(pickle.dumps(BadImage("a/b", "empty")))

    assert (error.key, error.reason, str(error)) == ("a/b", "empty", "a/b: empty")
