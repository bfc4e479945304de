"""RandAugment: drawn once, done by Pillow on the CPU or for whole batches on the device.

```
policy text --build_policy--> timm's RandAugment
            --draw_ops------> (L, 2): which operation and its argument
image  -----apply_ops_pillow--> image     in a loader process
batch  -----apply_ops---------> batch     on the device
```

Legend: N = images, L = layers of the policy, E = images of a group, C = 3 channels, H and W =
height and width, P = H x W. The operations of a layer fall into four groups, each done in one
batched pass: tables of 256 values (contrast, brightness, equalize, posterize, ...), colour,
sharpness, and the affine ones.

The device's pixels are Pillow's (held by tests/parity/test_randaugment_timm.py):

| operations | largest difference | mean, in grey levels |
|---|---|---|
| Equalize, Invert, Posterize, Solarize, SolarizeAdd | 0 | 0 |
| Color, Contrast, Brightness, Sharpness | 0 | 0 |
| AutoContrast | 1 | 0.00001 |
| Rotate | 1 | 0.0001 |
| Shear, Translate (bicubic) | 1 | 0.0012 |
| Shear, Translate (bilinear) | 1 | 0.026 |

An image's result does not depend on the others of its batch.

Source: huggingface/pytorch-image-models 1.0.31 timm/data/auto_augment.py; python-pillow/Pillow 13.0
src/PIL/ImageOps.py, ImageEnhance.py, src/libImaging/Blend.c, Filter.c, Geometry.c.
"""

import copy
import math
import random
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.auto_augment import AugmentOp, RandAugment, rand_augment_transform
from torch import Tensor
from torch.nn import functional

from convnext_cli.data.shear import Interpolation, shift_lines

Colour = tuple[float, float, float]

OPS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "PosterizeIncreasing",
    "PosterizeOriginal",
    "Solarize",
    "SolarizeIncreasing",
    "SolarizeAdd",
    "Color",
    "ColorIncreasing",
    "Contrast",
    "ContrastIncreasing",
    "Brightness",
    "BrightnessIncreasing",
    "Sharpness",
    "SharpnessIncreasing",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "TranslateXRel",
    "TranslateYRel",
)
"""timm's names; a row of drawn operations holds the place in this list, -1 for none."""

NOTHING = -1.0

_FILTERS: dict[Interpolation, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
_TABLES = frozenset(
    name
    for name in OPS
    if name.startswith(
        ("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "Contrast", "Brightness")
    )
)
_FIXED = ("Invert", "Posterize", "Solarize", "Brightness")
"""Operations whose table looks at no pixels."""
_AFFINE = frozenset(name for name in OPS if name.startswith(("Rotate", "Shear", "Translate")))


ONE_KERNEL: dict[str, str | int | bool | Callable[..., object]] = {
    "realize_reads_threshold": 100,
    "realize_acc_reads_threshold": 100,
    "realize_opcount_threshold": 10_000,
}
"""For torch.compile, which would otherwise store what a value is made of: here, images."""


@lru_cache(maxsize=8)
def build_policy(
    policy: str, *, image_px: int, mean: Colour, interpolation: Interpolation
) -> RandAugment:
    """Timm's transform of a policy such as `rand-m9-mstd0.5-inc1`.

    Args:
        policy: In timm's notation.
        image_px: Side of the images; absolute translations go up to .45 of it.
        mean: Mean colour in 0..1, which fills empty corners.
        interpolation: Filter of the affine operations.

    Raises:
        ValueError: timm does not understand the policy, or it has operations that are not in `OPS`.
    """
    try:
        transform: RandAugment = rand_augment_transform(
            policy,
            {
                "translate_const": int(image_px * 0.45),
                "img_mean": fill_colour(mean),
                "interpolation": _FILTERS[interpolation],
            },
        )
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise ValueError(
            f"RandAugment policy {policy!r} is not understood; such as rand-m9-mstd0.5-inc1"
        ) from error
    for op in transform.ops:
        if op.name not in OPS:
            raise ValueError(f"RandAugment policy {policy!r}: {op.name} is not supported")
        if op.name.startswith("Posterize"):
            op.level_fn = _at_least_one_bit(op.level_fn)
    return transform


def fill_colour(mean: Colour) -> tuple[int, ...]:
    """The mean colour in grey levels."""
    return tuple(min(255, round(255 * channel)) for channel in mean)


def _at_least_one_bit(
    level_to_bits: Callable[[float, object], tuple[int]],
) -> Callable[[float, object], tuple[int]]:
    """Pillow 13 refuses to keep 0 bits, which the highest magnitude asks for.

    differs: older Pillows made the image black there.
    """

    def bits(level: float, settings: object) -> tuple[int]:
        return (max(1, level_to_bits(level, settings)[0]),)

    return bits


@lru_cache(maxsize=8)
def _recorders(policy: RandAugment) -> list[AugmentOp]:
    """Copies of the operations that draw as they do, and write it down in place of doing it."""
    recorders = []
    for op in policy.ops:
        recorder = copy.copy(op)
        recorder.aug_fn = _record(float(OPS.index(op.name)))
        recorders.append(recorder)
    return recorders


def _record(place: float) -> Callable[..., list[tuple[float, float]]]:
    def record(
        drawn: list[tuple[float, float]], *arguments: float, **settings: object
    ) -> list[tuple[float, float]]:
        del settings
        drawn.append((place, float(arguments[0]) if arguments else 0.0))
        return drawn

    return record


def draw_ops(policy: RandAugment) -> NDArray[np.float32]:
    """The operations for one image, drawn from the global `random` state.

    Float32 of shape (L, 2): a row is a place in `OPS` and the operation's argument; the rows of
    layers that do nothing come last and begin with `NOTHING`. timm's operations draw whether they
    are done, their magnitudes and their signs by themselves.
    differs: timm chooses the operations by `numpy.random`, this by `random`, with the same
    probabilities: one random state is seeded for an image, and not two.
    """
    drawn: list[tuple[float, float]] = []
    for op in choose_ops(_recorders(policy), policy):
        op(drawn)
    ops_L2 = np.full((policy.num_layers, 2), (NOTHING, 0.0), dtype=np.float32)
    if drawn:
        ops_L2[: len(drawn)] = drawn
    return ops_L2


def choose_ops(ops: Sequence[AugmentOp], policy: RandAugment) -> list[AugmentOp]:
    """The operations of an image's layers: with replacement, but for policies with weights."""
    if policy.choice_weights is None:
        return random.choices(ops, k=policy.num_layers)
    left, weights = list(ops), list(policy.choice_weights)
    chosen = []
    for _ in range(policy.num_layers):
        place = random.choices(range(len(left)), weights)[0]
        chosen.append(left.pop(place))
        weights.pop(place)
    return chosen


def apply_ops_pillow(
    view_CHW: Tensor, ops_L2: NDArray[np.float32], *, policy: RandAugment
) -> Tensor:
    """Do drawn operations on one image; uint8 in and out.

    By Pillow, but for what is done to the same pixels in less time: tables, sharpness, and shears
    and translations, which move whole lines (`shear`).
    """
    todo = [(OPS[int(place)], float(value)) for place, value in ops_L2 if place >= 0]
    if not todo:
        return view_CHW
    known = {op.name: op for op in policy.ops}
    pixels_HWC = view_CHW.permute(1, 2, 0).contiguous().numpy()
    for name, value in todo:
        settings = known[name].kwargs
        if name.startswith(("Shear", "Translate")):
            pixels_HWC = _move_lines(pixels_HWC, name, value, settings)
        elif name.startswith("Contrast"):
            mean = float(np.asarray(Image.fromarray(pixels_HWC).convert("L")).mean())
            pixels_HWC = _look_up(pixels_HWC, _blended_table(int(mean + 0.5), value))
        elif name.startswith(_FIXED):
            pixels_HWC = _look_up(pixels_HWC, _fixed_table(name, value))
        elif name.startswith("Sharpness"):
            pixels_HWC = _sharpen(pixels_HWC, value)
        else:
            arguments = () if name in {"AutoContrast", "Equalize"} else (value,)
            picture = known[name].aug_fn(Image.fromarray(pixels_HWC), *arguments, **settings)
            pixels_HWC = np.array(picture)
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def _look_up(pixels_HWC: NDArray[np.uint8], table_256: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Every value through a table; a string of bytes has the fastest way to do it."""
    changed = bytearray(pixels_HWC.tobytes().translate(table_256.tobytes()))
    looked_up: NDArray[np.uint8] = np.frombuffer(changed, dtype=np.uint8)
    return looked_up.reshape(pixels_HWC.shape)


def _sharpen(pixels_HWC: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    """Pillow's: blend with the mean of the 3 x 3 neighbours, the middle counted five times."""
    height, width = pixels_HWC.shape[:2]
    if min(height, width) < 3:
        return pixels_HWC
    wide = pixels_HWC.astype(np.uint16)
    rows = wide[:-2] + wide[1:-1] + wide[2:]
    sums = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * wide[1:-1, 1:-1]
    smooth = ((sums + 6) // 13).astype(np.float32)
    inner = pixels_HWC[1:-1, 1:-1].astype(np.float32)
    inner -= smooth
    inner *= np.float32(factor)
    inner += smooth
    sharp_HWC = pixels_HWC.copy()  # its border stays
    sharp_HWC[1:-1, 1:-1] = np.clip(inner, 0, 255, out=inner)
    return sharp_HWC


def _move_lines(
    pixels_HWC: NDArray[np.uint8], name: str, value: float, settings: dict[str, object]
) -> NDArray[np.uint8]:
    height, width = pixels_HWC.shape[:2]
    sideways = name.startswith(("ShearX", "TranslateX"))
    lines, along = (height, width) if sideways else (width, height)
    shift_M: NDArray[np.float64]
    if name.startswith("Shear"):
        shift_M = value * (np.arange(lines, dtype=np.float64) + 0.5)
    else:
        distance = value * along if name.endswith("Rel") else value
        shift_M = np.full(lines, distance, dtype=np.float64)
    cubic = settings["resample"] is Image.Resampling.BICUBIC
    fill = settings["fillcolor"]
    assert isinstance(fill, tuple)
    return shift_lines(
        pixels_HWC,
        shift_M,
        axis="rows" if sideways else "columns",
        interpolation="bicubic" if cubic else "bilinear",
        fill=fill,
    )


def apply_ops(
    images_NCHW: Tensor,
    ops_NL2: NDArray[np.float32],
    *,
    mean: Colour,
    interpolation: Interpolation,
    compiled: bool = False,
) -> Tensor:
    """Do the drawn operations of a whole batch on its device; waits for nothing.

    Args:
        images_NCHW: uint8, on any device; not changed.
        ops_NL2: From `draw_ops`, stacked; on the host.
        mean: Mean colour in 0..1, which fills empty corners.
        interpolation: Filter of the affine operations.
        compiled: Whether these, which read up to 16 neighbours of each pixel, are one kernel.
    """
    result_NCHW = images_NCHW.clone()
    for layer in range(ops_NL2.shape[1]):
        places, values = ops_NL2[:, layer, 0].astype(np.int64), ops_NL2[:, layer, 1]
        names = np.array([OPS[place] if place >= 0 else "" for place in places], dtype=object)
        for members, apply in (
            (_TABLES, _apply_tables),
            (frozenset({"Color", "ColorIncreasing"}), _apply_color),
            (frozenset({"Sharpness", "SharpnessIncreasing"}), _apply_sharpness),
            (_AFFINE, _affine(mean, interpolation, compiled=compiled)),
        ):
            rows = np.flatnonzero([name in members for name in names])
            if not len(rows):
                continue
            index_E = to_device(torch.from_numpy(rows), images_NCHW.device)
            changed = apply(result_NCHW.index_select(0, index_E), list(names[rows]), values[rows])
            result_NCHW.index_copy_(0, index_E, changed)
    return result_NCHW


def _apply_tables(images_ECHW: Tensor, names: list[str], values: NDArray[np.float32]) -> Tensor:
    """Operations that map each value to another, alike at every place."""
    device = images_ECHW.device
    fixed_E256 = np.stack(
        [_fixed_table(name, float(value)) for name, value in zip(names, values, strict=True)]
    )
    table_EC256 = to_device(torch.from_numpy(fixed_E256), device)[:, None].repeat(1, 3, 1)
    for name, make in (
        ("AutoContrast", _autocontrast_table),
        ("Equalize", _equalize_table),
        ("Contrast", _contrast_table),
    ):
        rows = np.flatnonzero([found.startswith(name) for found in names])
        if len(rows):
            index = to_device(torch.from_numpy(rows), device)
            factors = to_device(torch.from_numpy(values[rows]), device)
            table_EC256.index_copy_(0, index, make(images_ECHW.index_select(0, index), factors))
    flat_ECP = images_ECHW.flatten(2)
    return table_EC256.gather(2, flat_ECP.long()).view(images_ECHW.shape)


def _fixed_table(name: str, value: float) -> NDArray[np.uint8]:
    """The table of an operation that looks at no pixels; others are filled in later."""
    levels = np.arange(256)
    if name == "Invert":
        levels = 255 - levels
    elif name.startswith("Posterize"):
        levels = levels & ~((1 << (8 - int(value))) - 1) if value < 8 else levels
    elif name == "SolarizeAdd":
        levels = np.where(levels < 128, np.minimum(255, levels + int(value)), levels)
    elif name.startswith("Solarize"):
        levels = np.where(levels < int(value), levels, 255 - levels)
    elif name.startswith("Brightness"):
        return _blended_table(0, value)
    return levels.astype(np.uint8)


def _blended_table(degenerate: int, factor: float) -> NDArray[np.uint8]:
    """The table of Pillow's blend with one grey level: cut off, not rounded."""
    levels = np.arange(256) - degenerate
    blended = np.float32(degenerate) + np.float32(factor) * levels.astype(np.float32)
    table: NDArray[np.uint8] = np.clip(blended, 0, 255).astype(np.uint8)
    return table


def _autocontrast_table(images_ECHW: Tensor, factors_E: Tensor) -> Tensor:
    del factors_E
    flat_ECP = images_ECHW.flatten(2)
    low_EC1 = flat_ECP.amin(2, keepdim=True).double()
    high_EC1 = flat_ECP.amax(2, keepdim=True).double()
    levels_256 = torch.arange(256, device=images_ECHW.device, dtype=torch.float64)
    scale_EC1 = 255.0 / (high_EC1 - low_EC1).clamp_min(1.0)
    stretched = (levels_256 * scale_EC1 - low_EC1 * scale_EC1).clamp(0, 255)
    return torch.where(high_EC1 > low_EC1, stretched, levels_256).to(torch.uint8)


def _equalize_table(images_ECHW: Tensor, factors_E: Tensor) -> Tensor:
    del factors_E
    flat_ECP = images_ECHW.flatten(2)
    ones = torch.ones((), dtype=torch.int64, device=flat_ECP.device).expand(flat_ECP.shape)
    count_EC256 = torch.zeros((*flat_ECP.shape[:2], 256), dtype=torch.int64, device=ones.device)
    count_EC256.scatter_add_(2, flat_ECP.long(), ones)
    last_EC1 = count_EC256.gather(2, flat_ECP.amax(2, keepdim=True).long())
    step_EC1 = (flat_ECP.shape[2] - last_EC1) // 255
    before_EC256 = count_EC256.cumsum(2) - count_EC256
    safe_EC1 = step_EC1.clamp_min(1)
    spread = ((safe_EC1 // 2 + before_EC256) // safe_EC1).clamp(0, 255)
    levels_256 = torch.arange(256, device=ones.device)
    return torch.where(step_EC1 > 0, spread, levels_256).to(torch.uint8)


def _contrast_table(images_ECHW: Tensor, factors_E: Tensor) -> Tensor:
    gray_EHW = _gray(images_ECHW)
    pixels = gray_EHW[0].numel()
    mean_E = (2 * gray_EHW.flatten(1).sum(1) + pixels) // (2 * pixels)
    levels_256 = torch.arange(256, device=images_ECHW.device, dtype=torch.float32)
    table_E256 = _blend(mean_E[:, None].float(), levels_256, factors_E[:, None])
    return table_E256[:, None].expand(-1, 3, -1)


def _apply_color(images_ECHW: Tensor, names: list[str], values: NDArray[np.float32]) -> Tensor:
    del names
    factors_E = to_device(torch.from_numpy(values), images_ECHW.device)
    gray_E1HW = _gray(images_ECHW)[:, None].float()
    return _blend(gray_E1HW, images_ECHW.float(), factors_E[:, None, None, None])


def _apply_sharpness(images_ECHW: Tensor, names: list[str], values: NDArray[np.float32]) -> Tensor:
    del names
    factors_E = to_device(torch.from_numpy(values), images_ECHW.device)
    x = images_ECHW.float()
    smooth = x.clone()  # its border stays
    if min(x.shape[-2:]) >= 3:
        sums = 9 * functional.avg_pool2d(x, 3, stride=1) + 4 * x[:, :, 1:-1, 1:-1]
        smooth[:, :, 1:-1, 1:-1] = torch.floor(sums / 13 + 0.5)
    return _blend(smooth, x, factors_E[:, None, None, None])


def _gray(images_ECHW: Tensor) -> Tensor:
    """Pillow's luma in integers, int64 of shape (E, H, W)."""
    red, green, blue = images_ECHW.long().unbind(1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _blend(degenerate: Tensor, image: Tensor, factor: Tensor) -> Tensor:
    """Pillow's blend: cut off, not rounded; uint8."""
    return (degenerate + factor * (image - degenerate)).clamp(0, 255).to(torch.uint8)


def _affine(
    mean: Colour, interpolation: Interpolation, *, compiled: bool
) -> Callable[[Tensor, list[str], NDArray[np.float32]], Tensor]:
    transform = compile_affine() if compiled else transform_affine

    def apply(images_ECHW: Tensor, names: list[str], values: NDArray[np.float32]) -> Tensor:
        height, width = images_ECHW.shape[-2:]
        matrices_E6 = torch.tensor(
            [
                _matrix(name, float(value), height=height, width=width)
                for name, value in zip(names, values, strict=True)
            ],
            dtype=torch.float64,
        )
        device, fill = images_ECHW.device, torch.tensor(fill_colour(mean), dtype=torch.uint8)
        return transform(
            images_ECHW,
            to_device(matrices_E6, device),
            interpolation=interpolation,
            fill_C=to_device(fill, device),
        )

    return apply


def _matrix(name: str, value: float, *, height: int, width: int) -> tuple[float, ...]:
    """Where an output pixel comes from: x' = a x + b y + c, y' = d x + e y + f."""
    if name == "ShearX":
        return (1, value, 0, 0, 1, 0)
    if name == "ShearY":
        return (1, 0, 0, value, 1, 0)
    if name.startswith("TranslateX"):
        return (1, 0, value * width if name.endswith("Rel") else value, 0, 1, 0)
    if name.startswith("TranslateY"):
        return (1, 0, 0, 0, 1, value * height if name.endswith("Rel") else value)
    angle = -math.radians(value % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)


def transform_affine(
    images_ECHW: Tensor,
    matrices_E6: Tensor,
    *,
    interpolation: Interpolation,
    fill_C: Tensor,
) -> Tensor:
    """Pillow's `transform(AFFINE)`, each image by its own matrix; uint8."""
    device, (height, width) = images_ECHW.device, images_ECHW.shape[-2:]
    y_H1 = torch.arange(height, device=device, dtype=torch.float64)[:, None] + 0.5
    x_1W = torch.arange(width, device=device, dtype=torch.float64)[None, :] + 0.5
    a, b, c, d, e, f = (entry[:, None, None] for entry in matrices_E6.unbind(1))
    x_EHW, y_EHW = a * x_1W + b * y_H1 + c, d * x_1W + e * y_H1 + f
    inside_EHW = (x_EHW >= 0) & (x_EHW < width) & (y_EHW >= 0) & (y_EHW < height)
    left_EHW, top_EHW = (x_EHW - 0.5).floor(), (y_EHW - 0.5).floor()
    across = _weights((x_EHW - 0.5 - left_EHW).float(), interpolation)
    down = _weights((y_EHW - 0.5 - top_EHW).float(), interpolation)
    left_EHW, top_EHW = left_EHW.long(), top_EHW.long()
    flat_ECP = images_ECHW.flatten(2)
    total_ECHW: Tensor | None = None
    for dy, weight_y in down.items():
        row_EHW = (top_EHW + dy).clamp(0, height - 1) * width
        line_ECHW: Tensor | None = None
        for dx, weight_x in across.items():
            index_EHW = row_EHW + (left_EHW + dx).clamp(0, width - 1)
            index_ECP = index_EHW.flatten(1)[:, None].expand(-1, flat_ECP.shape[1], -1)
            tap = flat_ECP.gather(2, index_ECP).view(images_ECHW.shape) * weight_x[:, None]
            line_ECHW = tap if line_ECHW is None else line_ECHW + tap
        assert line_ECHW is not None
        line_ECHW = line_ECHW * weight_y[:, None]
        total_ECHW = line_ECHW if total_ECHW is None else total_ECHW + line_ECHW
    assert total_ECHW is not None
    # Cut off, not rounded; a hair is added so that a whole number does not fall to the one below.
    moved = (total_ECHW + 5e-4).clamp(0, 255).to(torch.uint8)
    return torch.where(inside_EHW[:, None], moved, fill_C[:, None, None])


@lru_cache(maxsize=1)
def compile_affine() -> Callable[..., Tensor]:
    """`transform_affine` as one kernel, for any number of images."""
    return torch.compile(transform_affine, fullgraph=True, dynamic=True, options=ONE_KERNEL)


def _weights(frac: Tensor, interpolation: Interpolation) -> dict[int, Tensor]:
    """Weights of the neighbours by their distance: Pillow's cubic has a = -1."""
    d = frac
    if interpolation == "bilinear":
        return {0: 1 - d, 1: d}
    d2, d3 = d * d, d * d * d
    return {-1: -d + 2 * d2 - d3, 0: 1 - 2 * d2 + d3, 1: d + d2 - d3, 2: d3 - d2}


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Send a small tensor without waiting for what the device is doing."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
