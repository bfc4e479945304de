"""Per batch, on the device: normalise, erase, mix, and make the targets.

```
images uint8 --normalise--> float --erase--> --mixup or cutmix--> x
labels ------------------- smooth ---------------- mix ---------> target
```

Legend: N = images of this pass, K = classes, C = 3 channels, H and W = height and width, E = images
that are erased. Order and formulas are timm's: erasing comes first, so a mixed image may show its
partner's erased patch; the partner of image i is image N - 1 - i.

Every choice is drawn on the CPU from the generator that is given, and noise on the device from a
generator seeded by it: nothing reads or moves a global random state, nothing waits for the device.

Source: huggingface/pytorch-image-models 1.0.31 timm/data/random_erasing.py `RandomErasing` (mode
pixel, count 1) and timm/data/mixup.py `Mixup` (mode batch); ConvNeXt Table 5.
"""

import math
from dataclasses import dataclass
from typing import Literal, assert_never

import numpy as np
import torch
from torch import Tensor

ERASED_AREA = (0.02, 1 / 3)
"""Share of the image that an erased box covers, from and to."""

ERASED_ASPECT = (0.3, 1 / 0.3)
"""Height over width of an erased box, from and to."""

_ATTEMPTS = 10

MixKind = Literal["none", "mixup", "cutmix"]
Colour = tuple[float, float, float]


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


def normalise(
    images_NCHW: Tensor, *, mean: Colour, std: Colour, dtype: torch.dtype = torch.float32
) -> Tensor:
    """uint8 pixels -> (pixel / 255 - mean) / std, of the same shape, device and memory format."""
    # One multiply and one add a pixel; the constants are made on the host and sent without waiting.
    scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float32)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32)
    scale_C11 = _to_device(scale, images_NCHW.device).view(-1, 1, 1)
    shift_C11 = _to_device(shift, images_NCHW.device).view(-1, 1, 1)
    return torch.addcmul(shift_C11, images_NCHW.float(), scale_C11).to(dtype)


def denormalise(x_NCHW: Tensor, *, mean: Colour, std: Colour) -> Tensor:
    """The inverse of `normalise`: float -> uint8, clipped to 0..255."""
    mean_C11 = torch.tensor(mean, device=x_NCHW.device).view(-1, 1, 1)
    std_C11 = torch.tensor(std, device=x_NCHW.device).view(-1, 1, 1)
    return ((x_NCHW.float() * std_C11 + mean_C11) * 255).round().clamp(0, 255).to(torch.uint8)


def draw_erasing(
    num_images: int, *, height: int, width: int, prob: float, rng: np.random.Generator
) -> dict[int, Box]:
    """Which images of a batch are erased, and where: {index: box}.

    An image for which no box fits in ten attempts is left as it is.
    """
    low, high = (math.log(a) for a in ERASED_ASPECT)
    boxes: dict[int, Box] = {}
    for index in np.flatnonzero(rng.random(num_images) < prob):
        for _ in range(_ATTEMPTS):
            area = rng.uniform(*ERASED_AREA) * height * width
            aspect = math.exp(rng.uniform(low, high))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                top = int(rng.integers(0, height - h, endpoint=True))
                left = int(rng.integers(0, width - w, endpoint=True))
                boxes[int(index)] = Box(top=top, bottom=top + h, left=left, right=left + w)
                break
    return boxes


def erase(x_NCHW: Tensor, *, boxes: dict[int, Box], noise_seed: int) -> Tensor:
    """Fill the boxes with standard normal noise, pixel by pixel; changes and returns `x_NCHW`."""
    if not boxes:
        return x_NCHW
    device, (_, channels, height, width) = x_NCHW.device, x_NCHW.shape
    index_E = _to_device(torch.tensor(list(boxes)), device)
    edges = [[b.top, b.bottom, b.left, b.right] for b in boxes.values()]
    top_E, bottom_E, left_E, right_E = _to_device(torch.tensor(edges), device).unbind(1)
    y_H, x_W = torch.arange(height, device=device), torch.arange(width, device=device)
    inside_EH = (y_H >= top_E[:, None]) & (y_H < bottom_E[:, None])
    inside_EW = (x_W >= left_E[:, None]) & (x_W < right_E[:, None])
    inside_E1HW = (inside_EH[:, :, None] & inside_EW[:, None, :])[:, None]
    generator = torch.Generator(device)
    generator.manual_seed(noise_seed)
    noise_ECHW = torch.randn(
        (len(boxes), channels, height, width),
        generator=generator,
        device=device,
        dtype=x_NCHW.dtype,
    )
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


def mix_images(x_NCHW: Tensor, draw: MixDraw) -> Tensor:
    """Mix each image with its partner, the image at the mirrored place of the batch."""
    match draw.kind:
        case "none":
            return x_NCHW
        case "mixup":
            return torch.lerp(x_NCHW.flip(0), x_NCHW, draw.lam)
        case "cutmix":
            assert draw.box is not None
            rows = slice(draw.box.top, draw.box.bottom)
            columns = slice(draw.box.left, draw.box.right)
            mixed_NCHW = x_NCHW.clone()
            mixed_NCHW[:, :, rows, columns] = x_NCHW[:, :, rows, columns].flip(0)
            return mixed_NCHW
        case _:
            assert_never(draw.kind)


def make_target(labels_N: Tensor, *, num_classes: int, smoothing: float, lam: float) -> Tensor:
    """Smoothed one-hot targets, mixed with the partners'; float32 of shape (N, K), rows sum to 1.

    The off value is smoothing / K, the on value 1 - smoothing + smoothing / K.
    """
    off = smoothing / num_classes
    target_NK = torch.full((len(labels_N), num_classes), off, device=labels_N.device)
    target_NK.scatter_(1, labels_N[:, None], 1 - smoothing + off)
    return target_NK if lam == 1 else target_NK * lam + target_NK.flip(0) * (1 - lam)


@dataclass(frozen=True, kw_only=True)
class BatchMix:
    """Makes the network's input and target from a batch of pixels and labels."""

    num_classes: int
    mean: Colour
    std: Colour
    erasing: float | None = None
    """Probability of erasing a box; None: off. Paper: .25."""
    mixup: float | None = None
    """Alpha; None: off. Paper: .8."""
    cutmix: float | None = None
    """Alpha; None: off. Paper: 1."""
    prob: float = 1.0
    """Probability of mixing a batch at all."""
    switch_prob: float = 0.5
    """Probability of cutmix where both are on."""
    label_smoothing: float = 0.0
    """Paper: .1."""

    def __call__(
        self, images_NCHW: Tensor, labels_N: Tensor, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Normalise, erase and mix; local to this rank.

        Args:
            images_NCHW: uint8, on any device; not changed.
            labels_N: int64, 0 <= label < num_classes, on the same device.
            rng: `order.batch_rng` of the seed, step, pass and rank; moved on.

        Returns:
            Float32 images and float32 targets of shape (N, K).
        """
        num_images, _, height, width = images_NCHW.shape
        x_NCHW = normalise(images_NCHW, mean=self.mean, std=self.std)
        draw = draw_mix(
            height=height,
            width=width,
            mixup=self.mixup,
            cutmix=self.cutmix,
            prob=self.prob,
            switch_prob=self.switch_prob,
            rng=rng,
        )
        if self.erasing is not None:
            boxes = draw_erasing(num_images, height=height, width=width, prob=self.erasing, rng=rng)
            x_NCHW = erase(x_NCHW, boxes=boxes, noise_seed=int(rng.integers(2**63)))
        target_NK = make_target(
            labels_N, num_classes=self.num_classes, smoothing=self.label_smoothing, lam=draw.lam
        )
        return mix_images(x_NCHW, draw), target_NK


def _to_device(host: Tensor, device: torch.device) -> Tensor:
    """Send a small tensor without waiting for what the device is doing."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
