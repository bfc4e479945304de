"""Per batch, on the device: RandAugment, normalise, erase, mix, and make the targets.

```
images uint8 --ops--> --normalise--> float --erase--> --mixup or cutmix--> x
labels -------------------------------- smooth ---------- mix ----------> target
```

Legend: N = images of this pass, K = classes, C = 3 channels, H and W = height and width, E = images
that are erased, L = layers of operations and P = numbers of each. Order and formulas are timm's:
erasing comes first, so a mixed image may show its partner's erased patch.

Nothing here depends on ranks or passes. An image's own choices come with it (`augment.Choices`).
What images share is drawn for groups of neighbours in the global batch, from (seed, step, group):
`group_images` of them share lambda and box, as the images of one device do in the paper, and the
partner of image i is its neighbour, i + 1 or i - 1. A pass must hold whole pairs, so it has an even
number of images, as timm's mixup asks too.
differs: timm mixes image i of a device's batch with image N - 1 - i.

Every choice is drawn on the CPU, and noise is cut from one sheet of it (`noise_bank`): nothing
reads or moves a global random state, nothing waits for the device.

Source: huggingface/pytorch-image-models 1.0.31 timm/data/random_erasing.py `RandomErasing` (mode
pixel, count 1) and timm/data/mixup.py `Mixup` (mode batch); ConvNeXt Table 5.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convnext_cli.data.augment import NOISE_PX, Choices
from convnext_cli.data.order import mix_rng, philox
from convnext_cli.data.randaugment import ONE_KERNEL, Colour, apply_ops, to_device
from convnext_cli.data.shear import Interpolation

MixKind = Literal["none", "mixup", "cutmix"]


@dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangle of pixels: top <= y < bottom, left <= x < right."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area_px(self) -> int:
        """Pixels inside."""
        return (self.bottom - self.top) * (self.right - self.left)


@dataclass(frozen=True, kw_only=True)
class MixDraw:
    """How one batch is mixed."""

    kind: MixKind
    lam: float
    """Weight of each image's own label; its partner has the rest."""
    box: Box | None = None
    """The patch that cutmix takes from the partner."""


NOT_MIXED = MixDraw(kind="none", lam=1.0)


@lru_cache(maxsize=8)
def colour_constants(mean: Colour, std: Colour, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift of `normalise`, float32 of shape (C, 1, 1)."""
    with torch.inference_mode(mode=False):  # whoever asks first: training is to use them, too
        scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float32)
        shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32)
        return to_device(scale, device).view(-1, 1, 1), to_device(shift, device).view(-1, 1, 1)


def normalise(images_NCHW: Tensor, *, mean: Colour, std: Colour) -> Tensor:
    """uint8 -> float32 (pixel / 255 - mean) / std, of the same shape, device and memory format."""
    # One multiply and one add a pixel.
    scale_C11, shift_C11 = colour_constants(tuple(mean), tuple(std), images_NCHW.device)
    return torch.addcmul(shift_C11, images_NCHW.float(), scale_C11)


def denormalise(x_NCHW: Tensor, *, mean: Colour, std: Colour) -> Tensor:
    """The inverse of `normalise`: float -> uint8, clipped to 0..255."""
    mean_C11 = torch.tensor(mean, device=x_NCHW.device).view(-1, 1, 1)
    std_C11 = torch.tensor(std, device=x_NCHW.device).view(-1, 1, 1)
    return ((x_NCHW.float() * std_C11 + mean_C11) * 255).round().clamp(0, 255).to(torch.uint8)


@lru_cache(maxsize=4)
def noise_bank(seed: int, device: torch.device) -> Tensor:
    """Standard normal noise, float32 of shape (3, `NOISE_PX`, `NOISE_PX`): the same everywhere."""
    generator = torch.Generator()
    generator.manual_seed(int(philox(seed, purpose="noise").random_raw()) >> 1)
    return torch.randn((3, NOISE_PX, NOISE_PX), generator=generator).to(device)


def erase(x_NCHW: Tensor, *, erased_N6: NDArray[np.int32], noise: Tensor) -> Tensor:
    """Fill the boxes with normal noise, pixel by pixel; changes and returns `x_NCHW`.

    Args:
        x_NCHW: Normalised images.
        erased_N6: Boxes on the host, as in `augment.Choices`.
        noise: `noise_bank`, on the same device.
    """
    rows = np.flatnonzero(erased_N6[:, 1])
    if not len(rows):
        return x_NCHW
    device, (height, width) = x_NCHW.device, x_NCHW.shape[-2:]
    index_E = to_device(torch.from_numpy(rows), device)
    boxes_E6 = to_device(torch.from_numpy(erased_N6[rows].astype(np.int64)), device)
    y_H, x_W = torch.arange(height, device=device), torch.arange(width, device=device)
    inside_E1HW = _inside(boxes_E6[:, :4], y_H, x_W)[:, None]
    down_EH1 = ((y_H + boxes_E6[:, 4, None]) % NOISE_PX)[:, :, None]
    across_E1W = ((x_W + boxes_E6[:, 5, None]) % NOISE_PX)[:, None, :]
    noise_ECHW = noise.to(x_NCHW.dtype)[:, down_EH1, across_E1W].transpose(0, 1)
    return x_NCHW.index_copy_(
        0, index_E, torch.where(inside_E1HW, noise_ECHW, x_NCHW.index_select(0, index_E))
    )


def draw_mix(
    *,
    height: int,
    width: int,
    mixup: float | None,
    cutmix: float | None,
    prob: float,
    switch_prob: float,
    rng: np.random.Generator,
) -> MixDraw:
    """How to mix a batch: mixup, cutmix or not at all, its lambda and its box.

    Args:
        height: Of the images, in pixels.
        width: Of the images, in pixels.
        mixup: Alpha of mixup's Beta(alpha, alpha); None: off.
        cutmix: Alpha of cutmix's; None: off.
        prob: Probability of mixing at all.
        switch_prob: Probability of cutmix where both are on.
        rng: Moved on.
    """
    if (mixup is None and cutmix is None) or rng.random() >= prob:
        return NOT_MIXED
    if cutmix is not None and (mixup is None or rng.random() < switch_prob):
        box = cutmix_box(
            float(rng.beta(cutmix, cutmix)),
            height=height,
            width=width,
            center=(int(rng.integers(height)), int(rng.integers(width))),
        )
        return MixDraw(kind="cutmix", lam=1 - box.area_px / (height * width), box=box)
    assert mixup is not None
    return MixDraw(kind="mixup", lam=float(rng.beta(mixup, mixup)))


def cutmix_box(lam: float, *, height: int, width: int, center: tuple[int, int]) -> Box:
    """The box around (y, x) that covers 1 - lam of an image, less what lies outside the image."""
    ratio = math.sqrt(1 - lam)
    cut_height, cut_width = int(height * ratio), int(width * ratio)
    y, x = center
    return Box(
        top=max(0, y - cut_height // 2),
        bottom=min(height, y + (cut_height + 1) // 2),
        left=max(0, x - cut_width // 2),
        right=min(width, x + (cut_width + 1) // 2),
    )


def mix_images(x_NCHW: Tensor, draws: Sequence[MixDraw]) -> Tensor:
    """Mix each image with its partner, as its own draw says."""
    if all(draw.kind == "none" for draw in draws):
        return x_NCHW
    device, (height, width) = x_NCHW.device, x_NCHW.shape[-2:]
    lam_N = torch.tensor([1.0 if d.box else d.lam for d in draws], dtype=x_NCHW.dtype)
    weight_N111 = to_device(lam_N, device)[:, None, None, None]
    if any(draw.box is not None for draw in draws):
        edges_N4 = [
            [d.box.top, d.box.bottom, d.box.left, d.box.right] if d.box else [0] * 4 for d in draws
        ]
        y_H, x_W = torch.arange(height, device=device), torch.arange(width, device=device)
        patch_NHW = _inside(to_device(torch.tensor(edges_N4), device), y_H, x_W)
        weight_N1HW = weight_N111.masked_fill(patch_NHW[:, None], 0.0)
        return torch.lerp(_partners(x_NCHW), x_NCHW, weight_N1HW)
    return torch.lerp(_partners(x_NCHW), x_NCHW, weight_N111)


def _partners(values: Tensor) -> Tensor:
    """Every element's neighbour in the first dimension: 1, 0, 3, 2, ..."""
    return values.view(-1, 2, *values.shape[1:]).flip(1).view(values.shape)


def make_target(
    labels_N: Tensor, *, num_classes: int, smoothing: float, draws: Sequence[MixDraw]
) -> Tensor:
    """Smoothed one-hot targets, mixed with the partners'; float32 of shape (N, K), rows sum to 1.

    The off value is smoothing / K, the on value 1 - smoothing + smoothing / K.
    """
    off = smoothing / num_classes
    target_NK = torch.full((len(labels_N), num_classes), off, device=labels_N.device)
    target_NK.scatter_(1, labels_N[:, None], 1 - smoothing + off)
    if all(draw.kind == "none" for draw in draws):
        return target_NK
    lam_N = to_device(torch.tensor([draw.lam for draw in draws]), labels_N.device)
    return torch.lerp(_partners(target_NK), target_NK, lam_N[:, None])


def pack_numbers(erased_N6: NDArray[np.int32], draws: Sequence[MixDraw]) -> Tensor:
    """All that was drawn for the images of a pass, float32 of shape (N, 12), on the host.

    Columns: `augment.Choices.erased`; edges of the patch as in `Box`; weight of the image outside
    of the patch; weight of its label. The whole numbers are small, so float32 holds them exactly.
    """
    mixed_N6 = [
        (d.box.top, d.box.bottom, d.box.left, d.box.right, 1.0, d.lam)
        if d.box
        else (0, 0, 0, 0, d.lam, d.lam)
        for d in draws
    ]
    numbers_N12 = np.concatenate([erased_N6, np.array(mixed_N6)], axis=1)
    return torch.from_numpy(numbers_N12.astype(np.float32))


def mix_fused(
    images_NCHW: Tensor,
    labels_N: Tensor,
    numbers_N12: Tensor,
    *,
    noise: Tensor,
    scale_C11: Tensor,
    shift_C11: Tensor,
    num_classes: int,
    smoothing: float,
    mixes: bool,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> tuple[Tensor, Tensor]:
    """What `normalise`, `erase`, `mix_images` and `make_target` do, to be compiled into one pass.

    No shape depends on what was drawn, so nothing is compiled anew: each image is erased, most of
    them nowhere, and each is mixed, some of them with all of the weight on themselves.

    Args:
        images_NCHW: uint8.
        labels_N: int64.
        numbers_N12: `pack_numbers`, on the device.
        noise: `noise_bank`.
        scale_C11: `normalise` multiplies by it.
        shift_C11: And adds this.
        num_classes: K.
        smoothing: Of the labels.
        mixes: Whether images have partners; if not, N may be odd.
        dtype: Of the images that are returned; rounded once, at the end.
        memory_format: Of the same.

    Returns:
        Images, and float32 targets of shape (N, K).
    """
    height, width = images_NCHW.shape[-2:]
    y_H = torch.arange(height, dtype=torch.int32, device=images_NCHW.device)
    x_W = torch.arange(width, dtype=torch.int32, device=images_NCHW.device)
    places_N10 = numbers_N12[:, :10].int()
    x_NCHW = torch.addcmul(shift_C11, images_NCHW.float(), scale_C11)
    down_NH = (y_H + places_N10[:, 4, None]) % NOISE_PX
    across_NW = (x_W + places_N10[:, 5, None]) % NOISE_PX
    erased_NHW = _inside(places_N10[:, :4], y_H, x_W)
    # Where nothing is erased all pixels read the same value, which costs no memory traffic.
    place_NHW = (down_NH[:, :, None] * NOISE_PX + across_NW[:, None, :]).where(erased_NHW, 0)
    noise_NCHW = noise.flatten(1)[:, place_NHW].transpose(0, 1)
    x_NCHW = torch.where(erased_NHW[:, None], noise_NCHW, x_NCHW)
    off = smoothing / num_classes
    classes_K = torch.arange(num_classes, device=labels_N.device)
    target_NK = torch.where(labels_N[:, None] == classes_K, 1 - smoothing + off, off)
    if mixes:
        patch_NHW = _inside(places_N10[:, 6:], y_H, x_W)
        weight_N111 = numbers_N12[:, 10, None, None, None]
        weight_N1HW = weight_N111.masked_fill(patch_NHW[:, None], 0.0)
        x_NCHW = torch.lerp(_partners(x_NCHW), x_NCHW, weight_N1HW)
        target_NK = torch.lerp(_partners(target_NK), target_NK, numbers_N12[:, 11, None])
    return x_NCHW.to(dtype, memory_format=memory_format), target_NK


def _inside(edges_N4: Tensor, y_H: Tensor, x_W: Tensor) -> Tensor:
    """Which pixels (N, H, W) lie in boxes of top, bottom, left and right."""
    top_N1, bottom_N1, left_N1, right_N1 = edges_N4[:, :, None].unbind(1)
    inside_NH = (y_H >= top_N1) & (y_H < bottom_N1)
    inside_NW = (x_W >= left_N1) & (x_W < right_N1)
    return inside_NH[:, :, None] & inside_NW[:, None, :]


@lru_cache(maxsize=1)
def compile_mix() -> Callable[..., tuple[Tensor, Tensor]]:
    """`mix_fused` as two kernels: one makes each value of the images, the other the targets."""
    return torch.compile(mix_fused, fullgraph=True, dynamic=False, options=ONE_KERNEL)


@dataclass(frozen=True, kw_only=True)
class BatchMix:
    """Makes the network's input and target from a batch of pixels and labels."""

    num_classes: int
    seed: int
    """The run's."""
    mean: Colour
    std: Colour
    interpolation: Interpolation = "bicubic"
    """Filter of RandAugment's geometric operations."""
    mixup: float | None = None
    """Alpha; None: off. Paper: .8."""
    cutmix: float | None = None
    """Alpha; None: off. Paper: 1."""
    prob: float = 1.0
    """Probability of mixing a group at all."""
    switch_prob: float = 0.5
    """Probability of cutmix where both are on."""
    group_images: int = 128
    """Neighbours in the global batch that share a draw; even. Paper: a device's batch, 128."""
    label_smoothing: float = 0.0
    """Paper: .1."""
    dtype: torch.dtype = torch.float32
    """Of the images; they are computed in float32 and rounded once, as autocast does it."""
    channels_last: bool = False
    """Whether the images are put into NHWC memory format."""
    compiled: bool = False
    """Whether all but RandAugment is done by `mix_fused`, compiled."""

    @property
    def mixes(self) -> bool:
        """Whether images have partners at all."""
        return self.mixup is not None or self.cutmix is not None

    def draw(self, *, step: int, first: int, count: int, px: int) -> list[MixDraw]:
        """How each image of a pass is mixed; depends on its place in the global batch alone.

        Args:
            step: Optimizer steps already taken in the run.
            first: Place of the pass's first image in the global batch.
            count: Images of the pass.
            px: Side of the images.
        """
        if not self.mixes:
            return [NOT_MIXED] * count
        groups = [place // self.group_images for place in range(first, first + count)]
        draws = {
            group: draw_mix(
                height=px,
                width=px,
                mixup=self.mixup,
                cutmix=self.cutmix,
                prob=self.prob,
                switch_prob=self.switch_prob,
                rng=mix_rng(self.seed, step=step, group=group),
            )
            for group in dict.fromkeys(groups)
        }
        return [draws[group] for group in groups]

    def __call__(
        self, images_NCHW: Tensor, labels_N: Tensor, choices: Choices, *, step: int, first: int
    ) -> tuple[Tensor, Tensor]:
        """RandAugment, normalise, erase and mix.

        Args:
            images_NCHW: uint8, on any device; not changed.
            labels_N: int64, 0 <= label < num_classes, on the same device.
            choices: What was drawn for each image, stacked; on the host.
            step: Optimizer steps already taken in the run.
            first: Place of the pass's first image in the global batch.

        Returns:
            Images of `dtype` and float32 targets of shape (N, K).

        Raises:
            ValueError: The pass does not hold whole pairs, and images are mixed.
        """
        if self.mixes and (first % 2 or len(images_NCHW) % 2):
            raise ValueError(
                f"images {first} to {first + len(images_NCHW)} of the batch are not whole pairs"
            )
        if choices.ops.shape[1]:
            images_NCHW = apply_ops(
                images_NCHW,
                choices.ops,
                mean=self.mean,
                interpolation=self.interpolation,
                compiled=self.compiled,
            )
        device, px = images_NCHW.device, images_NCHW.shape[-1]
        noise = noise_bank(self.seed, device)
        draws = self.draw(step=step, first=first, count=len(images_NCHW), px=px)
        memory_format = torch.channels_last if self.channels_last else torch.preserve_format
        if self.compiled:
            scale_C11, shift_C11 = colour_constants(self.mean, self.std, device)
            return compile_mix()(
                images_NCHW,
                labels_N,
                to_device(pack_numbers(choices.erased, draws), device),
                noise=noise,
                scale_C11=scale_C11,
                shift_C11=shift_C11,
                num_classes=self.num_classes,
                smoothing=self.label_smoothing,
                mixes=self.mixes,
                dtype=self.dtype,
                memory_format=memory_format,
            )
        x_NCHW = normalise(images_NCHW, mean=self.mean, std=self.std)
        x_NCHW = erase(x_NCHW, erased_N6=choices.erased, noise=noise)
        target_NK = make_target(
            labels_N, num_classes=self.num_classes, smoothing=self.label_smoothing, draws=draws
        )
        x_NCHW = mix_images(x_NCHW, draws).to(self.dtype, memory_format=memory_format)
        return x_NCHW, target_NK
