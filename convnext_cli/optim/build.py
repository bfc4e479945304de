"""The door of the optimizer: a plan and a network become AdamW over the published groups."""

import torch
from torch import nn

from convnext_cli.errors import PlanError
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
        # fused unscales fp16 gradients inside its step, where they could not be clipped before
        fused=plan.cluster.device == "cuda" and plan.precision != "fp16",
    )
    optimizer.register_load_state_dict_post_hook(lay_out_moments)
    return optimizer


def lay_out_moments(optimizer: torch.optim.Optimizer) -> None:
    """Lay the moments out in memory as their weights lie, whatever wrote them; values stay.

    A run that goes on may hold its weights in another memory format, and fused AdamW refuses
    moments of other strides.
    """
    for weight, state in optimizer.state.items():
        for key, value in state.items():
            if value.shape == weight.shape and value.stride() != weight.stride():
                state[key] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def apply_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group: `lr` times the group's scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
