import numpy as np
import pytest
from PIL import Image

from convnext_cli.data.shear import shift_lines

FILL = (124, 116, 104)
HEIGHT, WIDTH = 61, 83
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
ROWS, COLUMNS = np.arange(HEIGHT) + 0.5, np.arange(WIDTH) + 0.5

CASES = {
    "shear x": ((1, 0.27, 0, 0, 1, 0), "rows", 0.27 * ROWS),
    "shear x back": ((1, -0.9, 0, 0, 1, 0), "rows", -0.9 * ROWS),
    "shear y": ((1, 0, 0, -0.13, 1, 0), "columns", -0.13 * COLUMNS),
    "shift x": ((1, 0, -20.4, 0, 1, 0), "rows", np.full(HEIGHT, -20.4)),
    "shift y": ((1, 0, 0, 0, 1, 13.3), "columns", np.full(WIDTH, 13.3)),
    "by whole pixels": ((1, 0, 7, 0, 1, 0), "rows", np.full(HEIGHT, 7.0)),
    "not at all": ((1, 0, 0, 0, 1, 0), "rows", np.zeros(HEIGHT)),
    "out of sight": ((1, 0, 300, 0, 1, 0), "rows", np.full(HEIGHT, 300.0)),
    "out of sight, back": ((1, 0, 0, 0, 1, -300), "columns", np.full(WIDTH, -300.0)),
    "to the last column": ((1, 0, 82.9, 0, 1, 0), "rows", np.full(HEIGHT, 82.9)),
}


def photo() -> np.ndarray:
    cells = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(cells).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("matrix", "axis", "shift"), CASES.values(), ids=CASES)
def test_moved_lines_are_pillows_to_one_grey_level(matrix, axis, shift, interpolation):
    image = photo()
    theirs = Image.fromarray(image).transform(
        (WIDTH, HEIGHT),
        Image.Transform.AFFINE,
        matrix,
        resample=FILTERS[interpolation],
        fillcolor=FILL,
    )

    ours = shift_lines(image, shift, axis=axis, interpolation=interpolation, fill=FILL)

    difference = np.abs(ours.astype(int) - np.asarray(theirs, dtype=int))
    assert difference.max() <= 1
    assert difference.mean() < 0.1
    assert np.array_equal(image, photo())


def test_a_shift_by_nothing_changes_nothing():
    image = photo()

    moved = shift_lines(image, np.zeros(HEIGHT), axis="rows", interpolation="bicubic", fill=FILL)

    assert np.array_equal(moved, image)
