"""Parameter groups: what decays, and how much more slowly early layers learn.

```
id 0 ... last    stem ... head            lr of a group = lr x decay^(last - id)
```

grouped   S/B/L/XL of V1, B/L of V2: 14 ids: stem, stage 0, stage 1, nine groups of three blocks of
          stage 2, stage 3, head. T, with nine blocks in stage 2, has 8 by the same rule.
single    the other V2 models: an id a block; a downsampling shares the id of its stage's first
          block; id 0 stays empty. Also for the isotropic models, for which nothing is published.
timm      comparison models have their own ids, whatever the kind.

Source: facebookresearch/ConvNeXt@048efce optim_factory.py `get_num_layer_for_convnext`, and
object_detection/mmcv_custom/layer_decay_optimizer_constructor.py for the eight ids of T;
facebookresearch/ConvNeXt-V2@2553895 optim_factory.py `get_num_layer_for_convnext_single`. Differs:
the official classification code of V1 refuses T, although the paper used layer decay for it; that
of V2 gives `grouped` ids to any depths, and so the wrong ones to most.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, assert_never

from torch import nn

LayerDecayKind = Literal["grouped", "single"]

GROUPED_DEPTHS = ((3, 3, 9, 3), (3, 3, 27, 3))
"""Blocks of each stage for which a grouped form is published."""

_BLOCKS_A_GROUP = 3


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a weight decay and a scale of the learning rate."""

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    weight_decay: float
    lr_scale: float


def count_blocks(names: Iterable[str]) -> tuple[int, ...]:
    """Blocks of each stage, from official parameter names; one number for isotropic models."""
    blocks: dict[int, int] = {}
    for name in names:
        if match := re.match(r"(?:stages\.(\d+)|blocks)\.(\d+)\.", name):
            stage, block = int(match[1] or 0), int(match[2])
            blocks[stage] = max(blocks.get(stage, 0), block + 1)
    return tuple(blocks[stage] for stage in sorted(blocks))


def count_layer_ids(depths: tuple[int, ...], *, kind: LayerDecayKind) -> int:
    """How many ids there are; the head has the last.

    Raises:
        ValueError: The kind is not defined for these depths.
    """
    match kind:
        case "single":
            return sum(depths) + 2
        case "grouped":
            if depths not in GROUPED_DEPTHS:
                published = " and ".join(map(str, GROUPED_DEPTHS))
                raise ValueError(
                    f"grouped layer decay is published for {published} blocks a stage, not for"
                    f" {depths}; the kind 'single' works for all"
                )
            return depths[2] // _BLOCKS_A_GROUP + 5
        case _:
            assert_never(kind)


def layer_id(name: str, *, depths: tuple[int, ...], kind: LayerDecayKind) -> int:
    """The id of a parameter by its official name: 0 or 1 for the stem, the last for the head.

    Args:
        name: Such as `stages.2.5.pwconv1.weight`.
        depths: Blocks of each stage; one number for isotropic models.
        kind: See the table above.

    Raises:
        ValueError: The kind is not defined for these depths.
    """
    last = count_layer_ids(depths, kind=kind) - 1
    block = re.match(r"(?:stages\.(\d+)|blocks)\.(\d+)\.", name)
    down = re.match(r"downsample_layers\.(\d+)\.", name)
    if block:
        stage, number = int(block[1] or 0), int(block[2])
    elif down:
        stage, number = int(down[1]), 0
    elif name.startswith("stem."):
        stage, number = 0, 0
    else:
        return last
    match kind:
        case "single":
            return sum(depths[:stage]) + number + 1
        case "grouped":
            if stage == 0:
                return 1 if block else 0
            if stage == 1:
                return 2
            if stage == 2:
                return 3 + number // _BLOCKS_A_GROUP
            return last - 1
        case _:
            assert_never(kind)


def is_decayed(parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices and kernels, not to one value a channel.

    Biases, norms and LayerScale are vectors. GRN's gamma and beta are vectors too, written in four
    dimensions, so the longest side decides; a matrix always decays, even one of a single row.
    """
    return parameter.ndim == 2 or parameter.numel() != max(parameter.shape, default=1)


def make_parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    layer_decay: float | None,
    layer_decay_kind: LayerDecayKind,
) -> list[ParameterGroup]:
    """Every trainable parameter in exactly one group, groups ordered from the stem to the head.

    Args:
        model: A ConvNeXt with official parameter names, or a model of timm.
        weight_decay: Of the groups that decay; the others get 0.
        layer_decay: Factor a layer id; None: all layers learn alike.
        layer_decay_kind: See the table above; timm's models have their own ids.

    Raises:
        ValueError: Layer decay is asked for a model or kind that it is not defined for.
    """
    named = dict(model.named_parameters())
    scales = dict.fromkeys(named, 1.0)
    if layer_decay is not None:
        # from all names: a frozen head or stage moves no other layer to another id
        ids, last = _number_layers(model, kind=layer_decay_kind)
        scales = {name: layer_decay ** (last - ids[name]) for name in named}
    # timm's transformers name the tables and tokens that must not decay
    exempt: Callable[[], Iterable[str]] | None = getattr(model, "no_weight_decay", None)
    kept = set() if exempt is None else set(exempt())
    members: dict[tuple[float, bool], list[str]] = {}
    for name, parameter in named.items():
        if parameter.requires_grad:
            decays = is_decayed(parameter) and name not in kept
            members.setdefault((scales[name], decays), []).append(name)
    return [
        ParameterGroup(
            names=tuple(names),
            parameters=tuple(named[name] for name in names),
            weight_decay=weight_decay if decays else 0.0,
            lr_scale=scale,
        )
        for (scale, decays), names in sorted(members.items())
    ]


def _number_layers(model: nn.Module, *, kind: LayerDecayKind) -> tuple[Mapping[str, int], int]:
    """The id of every parameter by name, and the last id."""
    if hasattr(model, "group_matcher"):
        ids = _timm_layer_ids(model)
        return ids, max(ids.values())
    names = [name for name, _ in model.named_parameters()]
    depths = count_blocks(names)
    if not depths:
        raise ValueError(f"{type(model).__name__} has no blocks with the official names")
    ids = {name: layer_id(name, depths=depths, kind=kind) for name in names}
    return ids, count_layer_ids(depths, kind=kind) - 1


def _timm_layer_ids(model: nn.Module) -> Mapping[str, int]:
    """One id a block, as timm groups its own models."""
    from timm.models import group_parameters  # noqa: PLC0415  # takes seconds; comparisons only

    matcher = model.group_matcher(coarse=False)  # type: ignore[operator]  # timm models have it
    ids: dict[str, int] = group_parameters(model, matcher, reverse=True)
    return ids
