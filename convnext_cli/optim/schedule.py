"""The learning rate as a function of the step; no clock, no state, no torch."""

import math


def cosine_lr(
    step: int, *, peak: float, floor: float, warmup_steps: int, total_steps: int
) -> float:
    """Linear warm-up from 0 to `peak`, then half a cosine down towards `floor`.

    Args:
        step: Optimizer steps already taken, 0 <= step < total_steps.
        peak: Highest learning rate; the last warm-up step and the first one after it have it.
        floor: Where the cosine would arrive at step `total_steps`.
        warmup_steps: 0: none, the first step has `peak`.
        total_steps: Length of training.

    Source: facebookresearch/ConvNeXt@048efce utils.py `cosine_scheduler`; ConvNeXt Table 5. (The
    code of V2 spreads its warm-up over one step more; for V2 too we use this one.)
    """
    if step < warmup_steps:
        # the official table is a linspace that includes both ends
        return peak * step / max(1, warmup_steps - 1)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2
