"""The door of the optimizer: a plan and a network become AdamW over the published groups."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from convnext_cli.errors import CheckpointError, PlanError
from convnext_cli.optim.groups import make_parameter_groups
from convnext_cli.plan.resolve import Plan


def build_optimizer(plan: Plan, model: nn.Module) -> torch.optim.AdamW:
    """AdamW whose groups carry `lr_scale` and `names`; `apply_lr` sets their learning rates.

    Raises:
        PlanError: Layer decay is asked in a form that the architecture does not have.
    """
    asked = plan.recipe.optim
    try:
        groups = make_parameter_groups(
            model,
            weight_decay=asked.weight_decay,
            layer_decay=asked.layer_decay,
            layer_decay_kind=asked.layer_decay_kind,
        )
    except ValueError as error:
        raise PlanError(
            f"{plan.recipe.model.name}: {error}", hint="set optim.layer_decay_kind=single"
        ) from error
    optimizer = torch.optim.AdamW(
        [
            {
                "params": list(group.parameters),
                "weight_decay": group.weight_decay,
                "lr_scale": group.lr_scale,
                "names": list(group.names),
            }
            for group in groups
        ],
        lr=plan.lr,
        betas=asked.betas,
        eps=asked.eps,
        # fused unscales fp16 gradients inside its step, where they could not be clipped before;
        # None leaves torch the choice of many weights at once
        fused=True if plan.cluster.device == "cuda" and plan.precision != "fp16" else None,
    )
    optimizer.register_load_state_dict_pre_hook(keep_settings)
    optimizer.register_load_state_dict_post_hook(fit_state)
    return optimizer


def check_groups(own: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Make sure that the state of an optimizer is about the same groups of weights.

    Raises:
        CheckpointError: It is not: the run that wrote it had another layer decay.
    """
    if [group["names"] for group in own] != [group.get("names") for group in saved]:
        raise CheckpointError(
            f"the optimizer of the checkpoint has its weights in {len(saved)} groups, and this run"
            f" has others, in {len(own)}",
            hint="go on with optim.layer_decay and its kind as they were, or start a new run from"
            " its weights: init.weights=CHECKPOINT --name NAME",
        )


def keep_settings(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state to load without its settings: what the groups are set to is the plan's.

    torch takes weight decay, betas and the rest from the state, which may be that of another run,
    and whether AdamW is fused, which may have been written on another device.

    Raises:
        CheckpointError: It is about other groups of weights.
    """
    own, saved = optimizer.param_groups, state["param_groups"]
    check_groups(own, saved)
    groups = [a | {"params": b["params"]} for a, b in zip(own, saved, strict=True)]
    return state | {"param_groups": groups}


def fit_state(optimizer: torch.optim.Optimizer) -> None:
    """Fit a state that was loaded to this device and precision, whatever wrote it; values stay.

    A run that goes on may hold its weights in another memory format, and fused AdamW refuses
    moments of other strides. The counts of steps lie where they were written, and fused AdamW reads
    them on the device.
    """
    fused = optimizer.defaults["fused"]
    for weight, state in optimizer.state.items():
        for key, value in state.items():
            if key == "step":
                state[key] = value.to(weight.device if fused else "cpu")
            elif value.shape == weight.shape and value.stride() != weight.stride():
                state[key] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def apply_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group: `lr` times the group's scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
