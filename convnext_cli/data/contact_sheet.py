"""A picture of what the network sees: originals beside their views, as one PNG.

```
 original    | epoch 0 | epoch 1 | epoch 2 | as trained: erased, mixed
 class, size |         |         |         | 70% its class, 21% its partner's
```

Legend: N = images of a pass, K = classes, C = 3 channels, H and W = height and width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from convnext_cli.data.augment import TrainView
from convnext_cli.data.decode import decode_rgb
from convnext_cli.data.header import BadImage
from convnext_cli.data.mix import BatchMix, denormalise
from convnext_cli.data.order import Order
from convnext_cli.data.reader import ImageReader, collate

TILE_PX = 144
_GAP_PX = 6
_MARGIN_PX = 16
_CAPTION_PX = 32
_TITLE_PX = 30
_FONT_PX = 12
_PASS_IMAGES = 4
"""Images that are mixed alike; another pass draws mixup or cutmix anew."""
_EPOCHS = 3
"""Views of an image that are shown."""

_PAPER = (255, 255, 255)
_INK = (20, 20, 20)
_FAINT = (110, 110, 110)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One picture and the words under it."""

    image_CHW: Tensor  # noqa: N815  # shape suffix
    """uint8, any size."""
    name: str
    """First line, such as the class or the view."""
    detail: str = ""
    """Second line, such as the size."""


Row = tuple[Cell, ...]


def make_train_rows(
    reader: ImageReader,
    *,
    classes: Sequence[str],
    mix: BatchMix,
    num_images: int,
) -> list[Row]:
    """A row an image: the original, views of several epochs, and what the network gets.

    Args:
        reader: Of the training split, with a train view.
        classes: Names, by label.
        mix: What is done to batches.
        num_images: Rows; no more than the split has.

    Raises:
        DataError: The images cannot be read.
    """
    ids = choose_images(reader, num_images=num_images)
    trained: list[Cell] = []
    rows: list[Row] = []
    for start in range(0, len(ids), _PASS_IMAGES):
        # Each pass is a group of its own, so that a sheet shows several ways of mixing.
        trained += _trained_cells(
            reader,
            ids[start : start + _PASS_IMAGES],
            classes=classes,
            mix=mix,
            first=start // _PASS_IMAGES * mix.group_images,
        )
    for sample, last in zip(ids, trained, strict=True):
        original = _original_cell(reader, sample, classes=classes)
        views = [
            Cell(image_CHW=reader[epoch, sample].image_CHW, name=f"epoch {epoch}")
            for epoch in range(_EPOCHS)
        ]
        rows.append((original, *views, last))
    return rows


def make_eval_rows(reader: ImageReader, *, classes: Sequence[str], num_images: int) -> list[Row]:
    """A row an image: the original and its eval view.

    Raises:
        DataError: The images cannot be read.
    """
    rows: list[Row] = []
    for sample in choose_images(reader, num_images=num_images):
        original = _original_cell(reader, sample, classes=classes)
        view = Cell(image_CHW=reader[0, sample].image_CHW, name="as evaluated")
        rows.append((original, view))
    return rows


def choose_images(reader: ImageReader, *, num_images: int) -> list[int]:
    """Sample ids that are shown: as many as asked and there are, by the reader's seed."""
    count = min(num_images, len(reader))
    order = Order(
        shard_images=reader.shard_images, seed=reader.seed, global_images=count, kind="full"
    )
    return [int(sample) for sample in order.batch(0, 0)]


def _original_cell(reader: ImageReader, sample: int, *, classes: Sequence[str]) -> Cell:
    try:
        data, label = reader.read(sample)
        image_CHW = decode_rgb(data, key="")
    except BadImage as error:
        blank_CHW = torch.full((3, TILE_PX, TILE_PX), 200, dtype=torch.uint8)
        return Cell(image_CHW=blank_CHW, name="cannot be read", detail=error.reason)
    height, width = image_CHW.shape[-2:]
    return Cell(image_CHW=image_CHW, name=classes[label], detail=f"original {width} x {height}")


def _trained_cells(
    reader: ImageReader, ids: Sequence[int], *, classes: Sequence[str], mix: BatchMix, first: int
) -> list[Cell]:
    # An odd one finds a partner in the first.
    pairs = [*ids, *ids[: len(ids) % 2]]
    batch = collate([reader[0, sample] for sample in pairs])
    x_NCHW, target_NK = mix(batch.image_NCHW, batch.label_N, batch.choices, step=0, first=first)
    images_NCHW = denormalise(x_NCHW, mean=mix.mean, std=mix.std)
    return [
        _trained_cell(image_CHW, target_K, classes=classes, smoothing=mix.label_smoothing)
        for image_CHW, target_K, _ in zip(images_NCHW, target_NK, ids, strict=False)
    ]


def _trained_cell(
    image_CHW: Tensor, target_K: Tensor, *, classes: Sequence[str], smoothing: float
) -> Cell:
    """A picture with the classes that hold more than the smoothing's share, largest first."""
    shares = target_K.numpy()
    marked = [k for k in np.argsort(-shares)[:2] if shares[k] > smoothing / len(shares) + 5e-3]
    lines = [f"{round(100 * float(shares[k]))}% {classes[k]}" for k in marked]
    return Cell(image_CHW=image_CHW, name=lines[0], detail="".join(lines[1:]))


def render_sheet(rows: Sequence[Row], *, title: str) -> Image.Image:
    """All rows on white paper, side by side in columns where there are more than six."""
    cells_wide = max(len(row) for row in rows)
    num_columns = min(-(-len(rows) // 6), max(1, 10 // cells_wide))
    num_lines = -(-len(rows) // num_columns)
    column_px = cells_wide * (TILE_PX + _GAP_PX) + _MARGIN_PX
    line_px = TILE_PX + _CAPTION_PX + _GAP_PX
    sheet = Image.new(
        "RGB",
        (max(640, num_columns * column_px + _MARGIN_PX), _TITLE_PX + num_lines * line_px + _GAP_PX),
        _PAPER,
    )
    pen = ImageDraw.Draw(sheet)
    font, bold = ImageFont.load_default(size=_FONT_PX), ImageFont.load_default(size=_FONT_PX + 3)
    fitting = _shorten(title, bold, sheet.width - 2 * _MARGIN_PX)
    pen.text((_MARGIN_PX, _GAP_PX), fitting, _INK, font=bold)
    for number, row in enumerate(rows):
        column, line = divmod(number, num_lines)
        for place, cell in enumerate(row):
            left = column * column_px + _MARGIN_PX + place * (TILE_PX + _GAP_PX)
            top = _TITLE_PX + line * line_px
            tile = _fit(cell.image_CHW)
            sheet.paste(
                tile, (left + (TILE_PX - tile.width) // 2, top + (TILE_PX - tile.height) // 2)
            )
            below = top + TILE_PX + 1
            pen.text((left, below), _shorten(cell.name, font, TILE_PX), _INK, font=font)
            detail = _shorten(cell.detail, font, TILE_PX)
            pen.text((left, below + _FONT_PX + 3), detail, _FAINT, font=font)
    return sheet


def _fit(image_CHW: Tensor) -> Image.Image:
    """The whole picture in a tile; small ones grow in whole pixels, so that each one shows."""
    picture = Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().numpy())
    longest = max(picture.size)
    if longest <= TILE_PX // 2:
        factor = TILE_PX // longest
        return picture.resize(
            (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
        )
    size = (
        max(1, round(picture.width * TILE_PX / longest)),
        max(1, round(picture.height * TILE_PX / longest)),
    )
    return picture.resize(size, Image.Resampling.BICUBIC)


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, or as much of its beginning as fits."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text.rstrip()}..."


def make_sheet(
    reader: ImageReader,
    *,
    classes: Sequence[str],
    mix: BatchMix,
    num_images: int,
    title: str,
) -> Image.Image:
    """The sheet of a split: as it is trained on, or as it is evaluated, by the reader's view.

    Raises:
        DataError: The images cannot be read.
    """
    if isinstance(reader.view, TrainView):
        rows = make_train_rows(reader, classes=classes, mix=mix, num_images=num_images)
    else:
        rows = make_eval_rows(reader, classes=classes, num_images=num_images)
    return render_sheet(rows, title=title)
