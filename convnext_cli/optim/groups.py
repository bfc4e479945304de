"""Parameter groups: what decays, and how much more slowly early layers learn.

```
id 0 ... last    stem ... head            lr of a group = lr x decay^(last - id)
```

grouped   V1 S/B/L/XL and V2 B/L: 14 ids: stem, stage 0, stage 1, nine groups of three blocks of
          stage 2, stage 3, head. T, with nine blocks in stage 2, has 8 by the same rule.
single    the other V2 models and the isotropic ones: an id a block; a downsampling shares the id
          of its stage's first block; id 0 stays empty.

Source: facebookresearch/ConvNeXt@048efce optim_factory.py `get_num_layer_for_convnext`;
facebookresearch/ConvNeXt-V2@2553895 optim_factory.py. Differs: the official V1 code refuses T,
although the paper used layer decay for it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, assert_never

from torch import nn

LayerDecayKind = Literal["grouped", "single"]

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
    """How many different ids `layer_id` gives; the head has the last."""
    match kind:
        case "single":
            return sum(depths) + 2
        case "grouped":
            if len(depths) != 4 or depths[2] % _BLOCKS_A_GROUP:
                raise ValueError(
                    f"grouped layer decay is not defined for {depths} blocks a stage;"
                    " use optim.layer_decay_kind=single"
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

    Biases, norms and LayerScale are vectors; GRN's gamma and beta are vectors in four dimensions,
    so the longest side decides and not the number of dimensions.
    """
    return parameter.numel() != max(parameter.shape, default=1)


def make_parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    layer_decay: float | None,
    layer_decay_kind: LayerDecayKind,
) -> list[ParameterGroup]:
    """Every trainable parameter in exactly one group, groups ordered from the stem to the head.

    Raises:
        ValueError: Layer decay is asked for a model or kind that it is not defined for.
    """
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    names = [name for name, _ in named]
    ids: Mapping[str, int] = dict.fromkeys(names, 0)
    if layer_decay is not None:
        ids = _layer_ids(names, model=model, kind=layer_decay_kind)
    last = max(ids.values())
    # timm's transformers name tables and tokens that must not decay
    named_by_timm = getattr(model, "no_weight_decay", None)
    kept: set[str] = set(named_by_timm()) if callable(named_by_timm) else set()
    members: dict[tuple[int, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, weight in named:
        members.setdefault((ids[name], is_decayed(weight) and name not in kept), []).append(
            (name, weight)
        )
    return [
        ParameterGroup(
            names=tuple(name for name, _ in group),
            parameters=tuple(weight for _, weight in group),
            weight_decay=weight_decay if decayed else 0.0,
            lr_scale=1.0 if layer_decay is None else layer_decay ** (last - number),
        )
        for (number, decayed), group in sorted(members.items(), key=lambda item: item[0])
    ]


def _layer_ids(names: list[str], *, model: nn.Module, kind: LayerDecayKind) -> Mapping[str, int]:
    depths = count_blocks(names)
    if "head.weight" in names and any(name.endswith("dwconv.weight") for name in names):
        return {name: layer_id(name, depths=depths, kind=kind) for name in names}
    return _timm_layer_ids(names, model=model)


def _timm_layer_ids(names: list[str], *, model: nn.Module) -> Mapping[str, int]:
    """One id a block as timm groups its own models."""
    from timm.models import group_parameters  # noqa: PLC0415  # takes seconds; comparisons only

    matcher = model.group_matcher(coarse=False)  # type: ignore[operator]  # timm models have it
    ids: dict[str, int] = group_parameters(model, matcher, reverse=True)
    return {name: ids[name] for name in names}
