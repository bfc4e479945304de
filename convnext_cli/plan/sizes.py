"""The size of training images over the schedule: a function of the step, no torch.

```
image_px                         _________
                          ______|
from_px          ________|
                 0              until    1     of the steps
```

Sizes are `STEP_PX` apart, so that few shapes are compiled and searched for kernels. All but the
last take about equal numbers of steps, which is the line from `from_px` to `image_px`, rounded down
to a size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

STEP_PX = 32
"""From one size to the next; the last may be nearer."""


@dataclass(frozen=True)
class TrainSize:
    """A size, and the step that it begins with."""

    image_px: int
    first_step: int


def make_train_sizes(
    *, from_px: int | None, image_px: int, until: float, total_steps: int
) -> tuple[TrainSize, ...]:
    """The sizes of a run in order; the first begins with step 0, the last is `image_px`.

    Args:
        from_px: The first size, below `image_px`; None: there is one size.
        image_px: The last size.
        until: Share of the steps after which images have the last size.
        total_steps: Of the run; the last step has the last size in any case.
    """
    if from_px is None:
        return (TrainSize(image_px, 0),)
    full_step = min(round(until * total_steps), total_steps - 1)
    sizes: dict[int, TrainSize] = {}  # by first step: of several sizes without a step, the largest
    for px in (*range(from_px, image_px, STEP_PX), image_px):
        first_step = -(-full_step * (px - from_px) // (image_px - from_px))
        sizes[first_step] = TrainSize(px, first_step)
    return tuple(sizes.values())


def count_steps(sizes: Sequence[TrainSize], *, total_steps: int) -> tuple[int, ...]:
    """Steps that each size takes."""
    ends = [size.first_step for size in sizes[1:]] + [total_steps]
    return tuple(end - size.first_step for size, end in zip(sizes, ends, strict=True))
