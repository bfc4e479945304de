"""Per image: the train view and the eval view. Pixels in, pixels out: uint8 of shape (3, H, W).

```
train   draw: crop box, flip, RandAugment's ops (or colour jitter), erased box
        make: the box's pixels -> antialiased resize -> flip -> ops, here or on the device
eval    center: resize the short side to image_px / crop_frac, central crop
        warp:   resize both sides to image_px
```

Legend: C = 3 channels, H and W = height and width in pixels, L = layers of RandAugment, P = numbers
that say one operation. Normalisation, erasing, mixup and cutmix follow on the device (`mix.py`).

What is random is drawn first, from the size of the image and its own seed alone, so that only
the pixels that the crop needs are decoded, and so that the device can do what was drawn here. A
view neither reads nor leaves a trace in the global random states: pixels do not depend on
processes. The resize is torch's on uint8, with Pillow's filters: 0.03 grey levels from Pillow's
own, at a sixth of its time. RandAugment's choices and magnitudes are drawn by timm itself.

Source: huggingface/pytorch-image-models 1.0.31 timm/data/transforms_factory.py
`transforms_imagenet_train`, `transforms_imagenet_eval`; facebookresearch/ConvNeXt@048efce
datasets.py `build_transform`; ConvNeXt Table 5.
"""

import math
import random
from dataclasses import dataclass
from typing import Literal, NamedTuple, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data.auto_augment import RandAugment
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as pixels

from convnext_cli.data.decode import CropBox, decode_region, decode_rgb
from convnext_cli.data.header import read_image_size
from convnext_cli.data.order import seeded_random
from convnext_cli.data.randaugment import Colour, apply_ops_pillow, build_policy, draw_ops
from convnext_cli.data.shear import Interpolation

AugmentPlace = Literal["cpu", "device"]
EvalCrop = Literal["center", "warp"]

_MODES: dict[Interpolation, InterpolationMode] = {
    "bicubic": InterpolationMode.BICUBIC,
    "bilinear": InterpolationMode.BILINEAR,
}
_JITTERS = (pixels.adjust_brightness, pixels.adjust_contrast, pixels.adjust_saturation)

ERASED_AREA = (0.02, 1 / 3)
"""Share of the image that an erased box covers, from and to."""

ERASED_ASPECT = (0.3, 1 / 0.3)
"""Height over width of an erased box, from and to."""

NOISE_PX = 1024
"""Side of the noise that erased boxes are cut from (`mix.noise_bank`)."""

_ATTEMPTS = 10


class Choices(NamedTuple):
    """What was drawn for an image and is done to it on the device; a batch stacks them.

    Arrays, not tensors: they stay on the host, where the device's work is planned.
    """

    ops: NDArray[np.float32]
    """RandAugment's operations, (L, P) as in `randaugment`; L = 0 where they are done already."""
    erased: NDArray[np.int32]
    """(6,): box to erase as top, bottom, left, right, and where its noise begins; zeros: none."""


NO_CHOICES = Choices(np.zeros((0, 0), dtype=np.float32), np.zeros(6, dtype=np.int32))


@dataclass(frozen=True, kw_only=True)
class TrainDraw:
    """Every random choice about one image in one epoch."""

    box: CropBox
    flipped: bool
    ops: NDArray[np.float32]
    jitter: tuple[tuple[int, float], ...]
    """Colour changes in order: which of brightness, contrast and saturation, and the factor."""
    erased: NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class TrainView:
    """What training makes of an image; the paper's is the default but for `image_px`.

    Depends on its arguments alone: the same image and seed give the same pixels on any rank,
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

    augment_on: AugmentPlace = "cpu"
    """Where RandAugment's operations are done; they are drawn here in any case."""

    color_jitter: float | None = None
    """Strength; like timm, ignored where RandAugment is on."""

    erasing: float | None = None
    """Probability that a box is erased, on the device; None: off. Paper: .25."""

    mean: Colour = (0.485, 0.456, 0.406)
    """Mean colour of the data set in 0..1: what RandAugment fills empty corners with."""

    def draw(self, height: int, width: int, *, seed: int) -> TrainDraw:
        """Every random choice about an image of this size, in pixels.

        Args:
            height: Of the whole image.
            width: Of the whole image.
            seed: `order.image_seed` of the run's seed, the epoch and the sample.
        """
        ops = NO_CHOICES.ops
        jitter: tuple[tuple[int, float], ...] = ()
        with seeded_random(seed):
            flipped = random.random() < self.hflip
            erased = draw_erased(self.image_px, prob=self.erasing or 0.0)
            box = draw_crop(height, width, scale=self.crop_scale, ratio=self.crop_ratio)
            if self.rand_augment is not None:
                ops = draw_ops(self._policy())
            elif self.color_jitter is not None:
                jitter = _draw_jitter(self.color_jitter)
        return TrainDraw(box=box, flipped=flipped, ops=ops, jitter=jitter, erased=erased)

    def make(self, region_CHW: Tensor, draw: TrainDraw) -> tuple[Tensor, Choices]:
        """The view of the pixels in the drawn box, and what is left for the device.

        Args:
            region_CHW: uint8 of shape (3, box.height, box.width); not changed.
            draw: What `draw` chose for the image.
        """
        view_CHW: Tensor = pixels.resize(
            region_CHW,
            [self.image_px, self.image_px],
            interpolation=_MODES[self.interpolation],
            antialias=True,
        )
        if draw.flipped:
            view_CHW = view_CHW.flip(-1)
        for which, factor in draw.jitter:
            view_CHW = _JITTERS[which](view_CHW, factor)
        if self.augment_on == "device":
            return view_CHW, Choices(draw.ops, draw.erased)
        if self.rand_augment is not None:
            view_CHW = apply_ops_pillow(view_CHW, draw.ops, policy=self._policy())
        return view_CHW, Choices(NO_CHOICES.ops, draw.erased)

    def __call__(self, image_CHW: Tensor, *, seed: int) -> Tensor:
        """One random view of a whole image, uint8 of shape (3, image_px, image_px).

        Operations that are left for the device are not in it.
        """
        height, width = image_CHW.shape[-2:]
        draw = self.draw(height, width, seed=seed)
        box = draw.box
        region_CHW = image_CHW[:, box.top : box.top + box.height, box.left : box.left + box.width]
        return self.make(region_CHW, draw)[0]

    def _policy(self) -> RandAugment:
        assert self.rand_augment is not None
        return build_policy(
            self.rand_augment,
            image_px=self.image_px,
            mean=self.mean,
            interpolation=self.interpolation,
        )


@dataclass(frozen=True, kw_only=True)
class EvalView:
    """What evaluation makes of an image; nothing about it is random."""

    image_px: int
    crop: EvalCrop = "center"
    crop_frac: float = 0.875
    """Share of the resized side that the central crop keeps; unused by warp."""
    interpolation: Interpolation = "bicubic"

    def __call__(self, image_CHW: Tensor) -> Tensor:
        """The view of a whole image, uint8 of shape (3, image_px, image_px)."""
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


def view_bytes(
    data: bytes,
    *,
    view: View,
    seed: int,
    key: str,
    size: tuple[int, int] | None = None,
) -> tuple[Tensor, Choices]:
    """Decode what a view needs of an image file, and make it; also what is left for the device.

    Args:
        data: The file's bytes.
        view: What is made.
        seed: `order.image_seed` of the run's seed, the epoch and the sample.
        key: Name of the sample, for messages.
        size: Width and height, where an index knows them; None: read from the header.

    Raises:
        BadImage: The image cannot be decoded.
    """
    match view:
        case TrainView():
            width, height = size or read_image_size(data, key=key)
            draw = view.draw(height, width, seed=seed)
            return view.make(decode_region(data, box=draw.box, key=key), draw)
        case EvalView():
            return view(decode_rgb(data, key=key)), NO_CHOICES
        case _:
            assert_never(view)


def draw_crop(
    height: int, width: int, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> CropBox:
    """A random crop box, drawn from the global `random` state exactly as timm draws it.

    differs: timm's box may have no pixels when the image has a few of them, and lie at its very end
    then; this keeps one.
    """
    size = torch.empty((3, height, width), device="meta")
    top, left, rows, columns = RandomResizedCropAndInterpolation.get_params(size, scale, ratio)
    return CropBox(
        top=min(top, height - 1),
        left=min(left, width - 1),
        height=max(rows, 1),
        width=max(columns, 1),
    )


def draw_erased(image_px: int, *, prob: float) -> NDArray[np.int32]:
    """The box that is erased: top, bottom, left, right, and two places in the noise; or zeros.

    Drawn from the global `random` state. An image for which no box fits in ten attempts is left as
    it is.

    Source: huggingface/pytorch-image-models 1.0.31 timm/data/random_erasing.py `RandomErasing`
    (mode pixel, count 1); ConvNeXt Table 5.
    """
    erased_6 = np.zeros(6, dtype=np.int32)
    if random.random() >= prob:
        return erased_6
    low, high = (math.log(aspect) for aspect in ERASED_ASPECT)
    for _ in range(_ATTEMPTS):
        area = random.uniform(*ERASED_AREA) * image_px * image_px
        aspect = math.exp(random.uniform(low, high))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < image_px and width < image_px:
            top = random.randint(0, image_px - height)
            left = random.randint(0, image_px - width)
            noise = (random.randrange(NOISE_PX), random.randrange(NOISE_PX))
            erased_6[:] = (top, top + height, left, left + width, *noise)
            break
    return erased_6


def _draw_jitter(strength: float) -> tuple[tuple[int, float], ...]:
    """Brightness, contrast and saturation by factors in 1 +- strength, in random order."""
    low, high = max(0.0, 1.0 - strength), 1.0 + strength
    order = random.sample(range(len(_JITTERS)), len(_JITTERS))
    return tuple((which, random.uniform(low, high)) for which in order)


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
