"""Where Triton kernels run, and what their launches have in common.

A grid may have 65,535 programs on its second and third axis, and a large batch has more blocks of
rows. So those lie on the first one, and where columns are cut as well, both do, columns fastest.
"""

import sys

import torch
import triton
from torch import Tensor

SUMMING_PROGRAMS = 2
"""Programs for each multiprocessor in a reduction over rows: what its registers leave room for."""


def uses_triton(x: Tensor) -> bool:
    """Whether kernels run on the device of a tensor, or in Triton's interpreter (tests)."""
    return x.is_cuda or bool(triton.knobs.runtime.interpret)


def count_programs(device: torch.device, *, each: int = SUMMING_PROGRAMS) -> int:
    """Programs that fill a device in a reduction over rows, `each` of them a multiprocessor."""
    if device.type != "cuda":
        return each
    return each * torch.cuda.get_device_properties(device).multi_processor_count


def share_tiles(tiles: int, *, programs: int) -> tuple[int, int]:
    """(steps, parts): tiles that a program takes one after the other, and how many programs do.

    Args:
        tiles: Blocks of rows of a reduction.
        programs: How many are wanted at most; below one, one.
    """
    steps = triton.cdiv(tiles, max(1, programs))
    return steps, triton.cdiv(tiles, steps)


def count_shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may have; on a CPU there is no end to it."""
    if device.type != "cuda":
        return sys.maxsize
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def power_of_two_in(number: int, *, most: int) -> int:
    """The largest power of two, `most` or less, that divides a number."""
    return min(most, number & -number)


def dot_precision(dtype: torch.dtype) -> str:
    """Triton's word for products of operands that are not rounded; 16-bit ones never are."""
    return "ieee" if dtype == torch.float32 else "tf32"
