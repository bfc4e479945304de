"""Shared memory in which loader processes hand over pixels, used again and again.

```
main process                                        loader process
take: a free slot    -------with the places------>  fill: the images' pixels
tensor over the slot <-----a parcel: a number-----
the last view of the tensor is gone: the slot is free again
```

A stock loader makes new shared memory for each batch, whose pages the kernel has to clear and to
map twice: a tenth of all that loading costs. Nothing that somebody still holds is overwritten: a
slot is free only when the memory of its tensor is released.

Legend: S = slots, B = bytes, N = images, C = 3 channels, H and W = height and width.
"""

import math
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from convnext_cli.errors import DeviceError

_numbers = count()
_made_here: "weakref.WeakValueDictionary[int, Slots]" = weakref.WeakValueDictionary()


class Slots:
    """Memory for batches up to one shape; made by the main process before its loader processes.

    Args:
        slots: Batches that can be on their way or in use at once.
        images: In a batch, at most.
        image_px: Side of the images, at most.

    Raises:
        DeviceError: The machine has no such memory to share, as in a container with 64 MB of it.
    """

    def __init__(self, *, slots: int, images: int, image_px: int) -> None:
        num_bytes = slots * images * image_px**2 * 3
        try:
            self._memory_SB = torch.empty((slots, num_bytes // slots), dtype=torch.uint8)
            self._memory_SB.share_memory_()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise DeviceError(
                f"no room for {num_bytes / 1e9:.2f} GB in shared memory (/dev/shm), {slots} batches"
                f" of {images} images at {image_px} px, through which loader processes hand over",
                hint="give the container more, docker run --shm-size=16g; or let fewer loader"
                " processes run: data.workers=1, or 0 for none (convnext evaluate: --workers 0)",
            ) from error
        self._free = deque(range(slots))
        self._number = next(_numbers)
        _made_here[self._number] = self

    def take(self) -> int | None:
        """A slot that nobody uses, until its tensor is gone; None: there is none."""
        return self._free.popleft() if self._free else None

    def fill(self, slot: int, images_HWC: Sequence[Tensor]) -> "Parcel":
        """Copy images into a slot, in a loader process."""
        parcel = Parcel(self._number, slot, len(images_HWC), images_HWC[0].shape[0])
        torch.stack(list(images_HWC), out=self._pixels(parcel))
        return parcel

    def open(self, parcel: "Parcel") -> Tensor:
        """A tensor over a slot, uint8 of shape (N, C, H, W), channels last."""
        # The tensor's memory holds the array for as long as any view of the tensor lives.
        array_NHWC = self._pixels(parcel).numpy()
        weakref.finalize(array_NHWC, self._free.append, parcel.slot).atexit = False
        return torch.from_numpy(array_NHWC).permute(0, 3, 1, 2)

    def _pixels(self, parcel: "Parcel") -> Tensor:
        shape_NHWC = (parcel.images, parcel.image_px, parcel.image_px, 3)
        return self._memory_SB[parcel.slot, : math.prod(shape_NHWC)].view(shape_NHWC)


@dataclass(frozen=True)
class Parcel:
    """Says where pixels lie; on its way to the main process it becomes `Slots.open`'s tensor."""

    number: int
    slot: int
    images: int
    image_px: int

    def __reduce__(self) -> tuple[Callable[..., Tensor], tuple[int, int, int, int]]:
        return _open, (self.number, self.slot, self.images, self.image_px)


def _open(number: int, slot: int, images: int, image_px: int) -> Tensor:
    return _made_here[number].open(Parcel(number, slot, images, image_px))
