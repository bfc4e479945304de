"""Averaged weights: a second network that follows the first.

average = decay x average + (1 - decay) x weight, after every optimizer step, from the first one on.

Source: timm `ModelEma`, as used by facebookresearch/ConvNeXt@048efce main.py (decay .9999).
"""

import copy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def make_averaged(model: nn.Module) -> nn.Module:
    """A copy of a network to hold its averaged weights: not trained, in evaluation mode."""
    averaged = copy.deepcopy(model)
    averaged.requires_grad_(requires_grad=False)
    return averaged.eval()


@torch.no_grad()
def update_averaged(
    averaged: nn.Module, model: nn.Module, *, decay: float, left_out: Tensor | None = None
) -> None:
    """Move the averaged weights towards the newest ones; buffers are copied.

    The average is a step of gradient descent on (average - weight)^2 / 2 with learning rate
    1 - decay, and torch has a fused one: one pass over all parameters, which reads on the device
    whether it is to be left out, so the host does not wait. Works on whole and on sharded
    parameters, because each average lies where its parameter lies.

    Args:
        averaged: Changed.
        model: Laid out in memory alike.
        decay: Share of the old average that is kept.
        left_out: 1 where the step was left out and no average is to move, else 0; on the device of
            the weights. None: it was not. Buffers are what the forward passes made them.
    """
    averages = [_held(weight) for weight in averaged.parameters()]
    weights = [_held(weight) for weight in model.parameters()]
    torch._fused_sgd_(  # what `torch.optim.SGD(fused=True)` calls
        averages,
        weights,  # only read
        [],
        weight_decay=1.0,
        momentum=0.0,
        lr=1 - decay,
        dampening=0.0,
        nesterov=False,
        maximize=True,  # the gradient of the loss is weight_decay * average - weight
        is_first_step=False,
        found_inf=left_out,
    )
    buffers = list(averaged.buffers())
    if buffers:
        torch._foreach_copy_(buffers, list(model.buffers()))


def _held(weight: nn.Parameter) -> Tensor:
    """What this device holds: its share under fsdp; under ZeRO-3 a flat one beside an empty one."""
    held: Tensor = (
        weight.to_local() if isinstance(weight, DTensor) else getattr(weight, "ds_tensor", weight)
    )
    return held.detach()
