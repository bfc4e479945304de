"""The door of the models: a plan becomes a network with its start weights."""

import torch
from torch import nn

from convnext_cli.catalog.models import find_variant
from convnext_cli.models.convnext import build_comparison, build_convnext
from convnext_cli.plan.resolve import Plan


def build_model(plan: Plan) -> nn.Module:
    """The network of a plan with fresh weights; the same on every rank, by the recipe's seed."""
    recipe = plan.recipe
    variant = find_variant(recipe.model.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if variant.family == "timm":
            return build_comparison(
                variant, num_classes=plan.num_classes, drop_path=recipe.model.drop_path
            )
        return build_convnext(
            variant,
            num_classes=plan.num_classes,
            drop_path=recipe.model.drop_path,
            layer_scale_init=recipe.model.layer_scale_init,
            head_init_scale=recipe.model.head_init_scale,
            gradient_checkpointing=recipe.compute.gradient_checkpointing,
            drop_path_kind=recipe.model.drop_path_kind,
        )
