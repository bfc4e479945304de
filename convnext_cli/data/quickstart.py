"""Real images that the package carries: 1,797 handwritten digits, as class folders.

```
OUT/train/0/0000.png ... OUT/train/1/1436.png     the first 1,437 digits
OUT/val/2/1437.png   ... OUT/val/8/1796.png       the last 360
```

The name of a file is the digit's place in `digits.npz`. An image is a digit of 8x8 counts from 0 to
16, enlarged four times to the 32x32 px that the pen's bitmap had. The last part is held out and not
a random one, because neighbours in the list look alike, as if from one hand: a support vector
machine gets 99% on a random part and 94% on the last.

Source: the test set of UCI "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak,
1998, doi:10.24432/C50P49; CC BY 4.0), `counts` (1797, 8, 8) and `digits` (1797) in uint8, in its
order. It lies here, because all that scikit-learn's copy brings along costs each start a second.
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Final

import numpy as np
from PIL import Image

from convnext_cli.data.fetch import default_cache_home
from convnext_cli.data.pack import is_complete, pack
from convnext_cli.errors import StorageError
from convnext_cli.runs.record import writing_to

TRAIN_IMAGES: Final = 1437
SIDE_PX: Final = 32

_INK_MAX: Final = 16


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Counts of ink (1797, 8, 8) from 0 to 16, and digits (1797,); both uint8."""
    with np.load(Path(__file__).with_name("digits.npz")) as known:
        return known["counts"], known["digits"]


def write_quickstart_images(out: Path) -> None:
    """Write the digits as PNG files, `out/train/<digit>/` and `out/val/<digit>/`.

    Depends on the installed package alone; needs no network. Files of the same name are written
    anew, with the same bytes.

    Raises:
        StorageError: `out` cannot be written.
    """
    counts, digits = read_digits()
    pixels = np.rint(counts * (255 / _INK_MAX)).astype(np.uint8)
    try:
        for place, (image, digit) in enumerate(zip(pixels, digits, strict=True)):
            part = "train" if place < TRAIN_IMAGES else "val"
            folder = out / part / str(digit)
            folder.mkdir(parents=True, exist_ok=True)
            enlarged = Image.fromarray(image).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
            enlarged.save(folder / f"{place:04d}.png")
    except OSError as error:
        raise StorageError(
            f"{out}: the quick start's images cannot be written ({error.strerror or error})",
            hint="set TMPDIR to a folder with 10 MB of free space that you may write to",
        ) from error


def pack_quickstart(cache: Path | None = None) -> Path:
    """The digits as a packed data set; packed once, then reused.

    Args:
        cache: Folder of what can be made again; None: `default_cache_home`.

    Returns:
        The folder of the data set, `cache/quickstart`.

    Raises:
        StorageError: The folder, or one for temporary files, cannot be written.
    """
    cache = default_cache_home() if cache is None else cache
    folder = cache / "quickstart"
    if is_complete(folder):
        return folder
    with TemporaryDirectory(prefix="convnext-quickstart-") as images:
        write_quickstart_images(Path(images))
        with writing_to(folder):
            cache.mkdir(parents=True, exist_ok=True)
            # Packed beside its place and renamed: two first starts at once do not collide, and
            # what an earlier version or a kill left there gives way.
            partial = Path(mkdtemp(prefix=".quickstart-", dir=cache))
        try:
            pack(Path(images), partial)
            with writing_to(folder):
                _move(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _move(partial: Path, folder: Path) -> None:
    partial.chmod(0o755)
    try:
        partial.rename(folder)
    except OSError:
        if is_complete(folder):  # another process was quicker
            return
        shutil.rmtree(folder)
        partial.rename(folder)
