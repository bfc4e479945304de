"""Averaged weights: a second network that follows the first.

average = decay x average + (1 - decay) x weight, after every optimizer step, from the first one on.

Source: timm `ModelEma`, as used by facebookresearch/ConvNeXt@048efce main.py (decay .9999).
"""

import copy

import torch
from torch import nn


def make_averaged(model: nn.Module) -> nn.Module:
    """A copy of a network to hold its averaged weights: not trained, in evaluation mode."""
    averaged = copy.deepcopy(model)
    averaged.requires_grad_(requires_grad=False)
    return averaged.eval()


@torch.no_grad()
def update_averaged(averaged: nn.Module, model: nn.Module, *, decay: float) -> None:
    """Move the averaged weights towards the newest ones; buffers are copied.

    One fused pass over all parameters; the host does not wait for the device. Works on whole and on
    sharded parameters, because each average lies where its parameter lies.
    """
    averages = [_held(weight).detach() for weight in averaged.parameters()]
    weights = [_held(weight).detach() for weight in model.parameters()]
    torch._foreach_lerp_(averages, weights, 1 - decay)  # there is no public fused form
    for average, value in zip(averaged.buffers(), model.buffers(), strict=True):
        average.copy_(value)


def _held(weight: nn.Parameter) -> torch.Tensor:
    """What this device holds of a parameter: under ZeRO-3 a flat share beside an empty tensor."""
    held: torch.Tensor = getattr(weight, "ds_tensor", weight)
    return held
