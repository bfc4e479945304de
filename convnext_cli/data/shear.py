"""Shears and translations of Pillow images on the CPU, to Pillow's pixels in a quarter of its time.

Four of RandAugment's five geometric operations move whole rows or whole columns: each by its own
distance, which is the same for all of its pixels. So an output row is the input row at a whole
offset, filtered by four (bicubic) or two (bilinear) weights, where Pillow's general transform takes
16 or 4 taps a pixel with weights of its own. The pixels are Pillow's but for one grey level at one
in 500 of them: Pillow computes in double precision and cuts off, this in single.

Legend: H, W and C = height, width and channels; M = H for rows, W for columns.

Source: python-pillow/Pillow 13.0 src/libImaging/Geometry.c (`bicubic_filter32RGB`: cubic with
a = -1, taps clamped to the border, nothing outside the image).
"""

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Image = NDArray[np.uint8]
Interpolation = Literal["bicubic", "bilinear"]
Axis = Literal["rows", "columns"]


def shift_lines(
    image_HWC: Image,
    shift_M: NDArray[np.float64],
    *,
    axis: Axis,
    interpolation: Interpolation,
    fill: tuple[int, ...],
) -> Image:
    """Move each row sideways, or each column up or down, by its own distance.

    Args:
        image_HWC: Not changed.
        shift_M: Where line m takes its pixels from, in pixels to the right (rows) or down.
        axis: Which lines are moved.
        interpolation: Pillow's filter.
        fill: What is put where the image has nothing, per channel.
    """
    height, width, channels = image_HWC.shape
    along = width if axis == "rows" else height
    whole_M = np.floor(shift_M).astype(np.int64)
    weights_TM = _weights(shift_M - whole_M, interpolation)
    if axis == "rows":
        source = np.empty((height, width + 3, channels), dtype=np.uint8)
        _copy_shifted(image_HWC, source, whole_M, along)
        flat = torch.from_numpy(source).view(height, -1).float()
        size = width * channels
        taps = [flat[:, k * channels : k * channels + size] for k in range(4)]
        weights_T1M = weights_TM[:, :, None]
    else:
        source = np.empty((height + 3, width, channels), dtype=np.uint8)
        _copy_shifted(image_HWC.transpose(1, 0, 2), source.transpose(1, 0, 2), whole_M, along)
        flat = torch.from_numpy(source).view(height + 3, -1).float()
        taps = [flat[k : k + height] for k in range(4)]
        weights_T1M = weights_TM.repeat_interleave(channels, 1)[:, None]
    first = 0 if interpolation == "bicubic" else 1  # the outer taps of two have no weight
    mixed = taps[first] * weights_T1M[first]
    for k in range(first + 1, 4 - first):
        mixed.addcmul_(taps[k], weights_T1M[k])
    # Cut off, not rounded, as Pillow; a hair is added, so that a whole number that single precision
    # puts just below itself does not fall to the one before.
    result: Image = mixed.add_(5e-4).clamp_(0, 255).to(torch.uint8).view(image_HWC.shape).numpy()
    _fill_outside(result if axis == "rows" else result.transpose(1, 0, 2), shift_M, along, fill)
    return result


def _weights(frac_M: NDArray[np.float64], interpolation: Interpolation) -> Tensor:
    """Weights of the four neighbours, float32 of shape (4, M)."""
    d, d2, d3 = frac_M, frac_M**2, frac_M**3
    zero = np.zeros_like(d)
    if interpolation == "bilinear":
        weights = [zero, 1 - d, d, zero]
    else:
        weights = [-d + 2 * d2 - d3, 1 - 2 * d2 + d3, d + d2 - d3, -d2 + d3]
    return torch.from_numpy(np.stack(weights)).float()


def _copy_shifted(lines: Image, out: Image, whole_M: NDArray[np.int64], along: int) -> None:
    """Line m of `out` is line m from place whole_M[m] - 1 on, its border repeated outside.

    Neighbouring lines often share their whole distance, and are copied together.
    """
    cuts = (np.flatnonzero(np.diff(whole_M)) + 1).tolist()
    for begin, end in zip([0, *cuts], [*cuts, len(whole_M)], strict=True):
        start = int(whole_M[begin]) - 1
        before = min(max(0, -start), along + 3)
        after = min(max(0, start + 3), along + 3)
        out[begin:end, before : along + 3 - after] = lines[
            begin:end, start + before : start + along + 3 - after
        ]
        if before:
            out[begin:end, :before] = lines[begin:end, :1]
        if after:
            out[begin:end, along + 3 - after :] = lines[begin:end, along - 1 :]


def _fill_outside(
    lines: Image, shift_M: NDArray[np.float64], along: int, fill: tuple[int, ...]
) -> None:
    """Fill the places whose centre lies outside the image."""
    centre_A = np.arange(along) + 0.5
    colour = np.array(fill, dtype=np.uint8)
    # Only the strips at the two ends where some line has nothing.
    before = min(along, max(0, math.ceil(-0.5 - float(shift_M.min()))))
    after = max(0, min(along, math.floor(along - 0.5 - float(shift_M.max()))))
    for strip in (slice(0, before), slice(max(before, after), along)):
        place_MA = centre_A[None, strip] + shift_M[:, None]
        outside_MA = (place_MA < 0) | (place_MA >= along)
        np.copyto(lines[:, strip], colour, where=outside_MA[:, :, None])
