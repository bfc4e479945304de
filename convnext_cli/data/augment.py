"""Per image: the train view and the eval view. Pixels in, pixels out: uint8 of shape (3, H, W).

```
train   crop box -> antialiased resize -> flip -> RandAugment (or colour jitter)
eval    center: resize the short side to image_px / crop_frac, central crop
        warp:   resize both sides to image_px
```

Legend: C = 3 channels, H and W = height and width in pixels. Normalisation, erasing, mixup and
cutmix follow on the device (`mix.py`).

A view is a function of (pixels, random stream): it neither reads nor leaves a trace in the global
random states, so pixels do not depend on processes. The resize is torch's on uint8, with Pillow's
filters: 0.03 grey levels from Pillow's own, at a sixth of its time. RandAugment is timm's, on the
resized crop; its magnitudes and choices are drawn by timm itself.

Source: huggingface/pytorch-image-models 1.0.31 timm/data/transforms_factory.py
`transforms_imagenet_train`, `transforms_imagenet_eval`; facebookresearch/ConvNeXt@048efce
datasets.py `build_transform`; ConvNeXt Table 5.
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, assert_never

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment, rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as pixels

Interpolation = Literal["bicubic", "bilinear"]
EvalCrop = Literal["center", "warp"]
Colour = tuple[float, float, float]

_MODES: dict[Interpolation, InterpolationMode] = {
    "bicubic": InterpolationMode.BICUBIC,
    "bilinear": InterpolationMode.BILINEAR,
}
_PILLOW_FILTERS: dict[Interpolation, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}


@contextmanager
def seeded_globals(stream: np.random.Philox) -> Iterator[None]:
    """Inside, `random` and `numpy.random` are seeded from the stream; after it, as they were.

    timm's augmentations draw from these two.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    seeds = stream.random_raw(2)
    try:
        random.seed(int(seeds[0]))
        np.random.seed(int(seeds[1]) & 0xFFFFFFFF)  # noqa: NPY002  # what timm draws from
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


@dataclass(frozen=True, kw_only=True)
class CropBox:
    """A part of an image, in pixels from its top left corner."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class TrainView:
    """What training makes of an image; the paper's is the default but for `image_px`.

    Depends on its arguments alone: the same image and stream give the same pixels on any rank,
    worker and machine.
    """

    image_px: int
    """Side of the square result."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that the crop keeps, from and to."""

    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio of the crop, from and to."""

    interpolation: Interpolation = "bicubic"

    hflip: float = 0.5
    """Probability of a horizontal flip."""

    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """Policy in timm's notation; None: off."""

    color_jitter: float | None = None
    """Strength; like timm, ignored where RandAugment is on."""

    mean: Colour = (0.485, 0.456, 0.406)
    """Mean colour of the data set in 0..1: what RandAugment fills empty corners with."""

    def __call__(self, image_CHW: Tensor, stream: np.random.Philox) -> Tensor:
        """One random view, uint8 of shape (3, image_px, image_px).

        Args:
            image_CHW: uint8, any size; not changed.
            stream: `order.image_rng` of the seed, epoch and sample.
        """
        rng = np.random.Generator(stream)
        flipped = bool(rng.random() < self.hflip)
        with seeded_globals(stream):
            view_CHW = self._crop(image_CHW)
            if flipped:
                view_CHW = view_CHW.flip(-1)
            if self.rand_augment is not None:
                policy = _rand_augment(
                    self.rand_augment, self.image_px, self.mean, self.interpolation
                )
                return _apply_pillow(view_CHW, policy)
        if self.color_jitter is not None:
            return _jitter(view_CHW, strength=self.color_jitter, rng=rng)
        return view_CHW

    def _crop(self, image_CHW: Tensor) -> Tensor:
        box = draw_crop(image_CHW, scale=self.crop_scale, ratio=self.crop_ratio)
        resized: Tensor = pixels.resized_crop(
            image_CHW,
            box.top,
            box.left,
            box.height,
            box.width,
            [self.image_px, self.image_px],
            interpolation=_MODES[self.interpolation],
            antialias=True,
        )
        return resized


@dataclass(frozen=True, kw_only=True)
class EvalView:
    """What evaluation makes of an image; nothing about it is random."""

    image_px: int
    crop: EvalCrop = "center"
    crop_frac: float = 0.875
    """Share of the resized side that the central crop keeps; unused by warp."""
    interpolation: Interpolation = "bicubic"

    def __call__(self, image_CHW: Tensor, stream: np.random.Philox | None = None) -> Tensor:
        """The view, uint8 of shape (3, image_px, image_px); the stream is not used."""
        del stream
        mode = _MODES[self.interpolation]
        match self.crop:
            case "center":
                side_px = eval_side_px(self.image_px, crop_frac=self.crop_frac)
                middle_CHW = _cut_extreme(image_CHW)
                resized = pixels.resize(middle_CHW, [side_px], interpolation=mode, antialias=True)
                view: Tensor = pixels.center_crop(resized, [self.image_px, self.image_px])
            case "warp":
                view = pixels.resize(
                    image_CHW, [self.image_px, self.image_px], interpolation=mode, antialias=True
                )
            case _:
                assert_never(self.crop)
        return view


View = TrainView | EvalView


def draw_crop(
    image_CHW: Tensor, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> CropBox:
    """A random crop box, drawn from the global `random` state exactly as timm draws it."""
    top, left, height, width = RandomResizedCropAndInterpolation.get_params(image_CHW, scale, ratio)
    return CropBox(top=top, left=left, height=height, width=width)


@lru_cache(maxsize=8)
def _rand_augment(
    policy: str, image_px: int, mean: Colour, interpolation: Interpolation
) -> RandAugment:
    transform: RandAugment = rand_augment_transform(
        policy,
        {
            "translate_const": int(image_px * 0.45),
            "img_mean": tuple(min(255, round(255 * channel)) for channel in mean),
            "interpolation": _PILLOW_FILTERS[interpolation],
        },
    )
    for op in transform.ops:
        if op.name.startswith("Posterize"):
            op.level_fn = _at_least_one_bit(op.level_fn)
    return transform


def _at_least_one_bit(
    level_to_bits: Callable[[float, object], tuple[int]],
) -> Callable[[float, object], tuple[int]]:
    """Pillow 13 refuses to keep 0 bits, which the highest magnitude asks for.

    differs: older Pillows made the image black there.
    """

    def bits(level: float, settings: object) -> tuple[int]:
        return (max(1, level_to_bits(level, settings)[0]),)

    return bits


def _apply_pillow(view_CHW: Tensor, transform: RandAugment) -> Tensor:
    """Run a Pillow transform on a tensor; free of copies where memory lies channels last."""
    picture = Image.fromarray(view_CHW.permute(1, 2, 0).contiguous().numpy())
    changed = transform(picture)
    return torch.from_numpy(np.array(changed)).permute(2, 0, 1)


def _jitter(view_CHW: Tensor, *, strength: float, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast and saturation by factors in 1 +- strength, in random order."""
    low, high = max(0.0, 1.0 - strength), 1.0 + strength
    changes = (pixels.adjust_brightness, pixels.adjust_contrast, pixels.adjust_saturation)
    for which in rng.permutation(len(changes)):
        view_CHW = changes[which](view_CHW, float(rng.uniform(low, high)))
    return view_CHW


def eval_side_px(image_px: int, *, crop_frac: float) -> int:
    """Short side before the central crop, in pixels: rounded down, as published."""
    return math.floor(image_px / crop_frac)


def _cut_extreme(image_CHW: Tensor) -> Tensor:
    """The middle of an image that is more than 16 times as long as it is wide.

    The central crop needs no more of it, and resizing all of a 1 x 65,535 image would take GBs.
    """
    height, width = image_CHW.shape[-2:]
    longest = 16 * min(height, width)
    cut: Tensor = pixels.center_crop(image_CHW, [min(height, longest), min(width, longest)])
    return cut if max(height, width) > longest else image_CHW
