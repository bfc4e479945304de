"""The published state-dict layouts of ConvNeXt as one table of renames.

| layout | who | differences in shape |
|---|---|---|
| official | facebookresearch/ConvNeXt and -V2; this project | |
| timm | huggingface/pytorch-image-models >= 0.9 | GRN as vectors; 1x1 convolutions, atto to nano |
| torchvision | pytorch/vision, V1 T/S/B/L only | LayerScale as (C, 1, 1) |
| huggingface | transformers ConvNext and ConvNextV2, with or without head | no LayerScale in V2 |
| minkowski | checkpoints of the official V2 pre-training, read only | sparse kernels, see below |

In a pattern `*` stands for the number of a block.

Source: facebookresearch/ConvNeXt@048efce models/convnext.py; facebookresearch/ConvNeXt-V2@2553895
utils.py `remap_checkpoint_keys`; pytorch-image-models@aa4b5850 timm/models/convnext.py;
pytorch/vision torchvision/models/convnext.py; transformers models/convnext, models/convnextv2.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["official", "timm", "torchvision", "huggingface", "minkowski"]
WritableLayout = Literal["official", "timm", "torchvision", "huggingface"]
State = Mapping[str, Tensor]

CONV_MLP_WIDTHS = (40, 48, 64, 80)
"""First width of the variants whose 1x1 layers are convolutions in timm: atto to nano."""

_PREFIXES = ("module.", "_orig_mod.", "model.")


@dataclass(frozen=True)
class Row:
    """One module by its name in each layout; None where a layout does not have it."""

    official: str
    timm: str | None
    torchvision: str | None
    huggingface: str | None


def _rows() -> list[Row]:
    rows = [
        Row("downsample_layers.0.0", "stem.0", "features.0.0", "embeddings.patch_embeddings"),
        Row("downsample_layers.0.1", "stem.1", "features.0.1", "embeddings.layernorm"),
        Row("norm", "head.norm", "classifier.0", "layernorm"),
        Row("head", "head.fc", "classifier.2", "classifier"),
    ]
    for stage in (1, 2, 3):
        rows += [
            Row(
                f"downsample_layers.{stage}.{part}",
                f"stages.{stage}.downsample.{part}",
                f"features.{2 * stage}.{part}",
                f"encoder.stages.{stage}.downsampling_layer.{part}",
            )
            for part in (0, 1)
        ]
    parts = (
        ("dwconv", "conv_dw", "block.0", "dwconv"),
        ("norm", "norm", "block.2", "layernorm"),
        ("pwconv1", "mlp.fc1", "block.3", "pwconv1"),
        ("pwconv2", "mlp.fc2", "block.5", "pwconv2"),
        ("gamma", "gamma", "layer_scale", "layer_scale_parameter"),
        ("grn.gamma", "mlp.grn.weight", None, "grn.weight"),
        ("grn.beta", "mlp.grn.bias", None, "grn.bias"),
    )
    for stage in range(4):
        rows += [
            Row(
                f"stages.{stage}.*.{official}",
                f"stages.{stage}.blocks.*.{timm}",
                None if tv is None else f"features.{2 * stage + 1}.*.{tv}",
                f"encoder.stages.{stage}.layers.*.{hf}",
            )
            for official, timm, tv, hf in parts
        ]
    # isotropic: no other library has it
    rows.append(Row("stem", None, None, None))
    rows += [Row(f"blocks.*.{official}", None, None, None) for official, *_ in parts]
    return rows


ROWS = _rows()


def strip_prefixes(state: State) -> dict[str, Tensor]:
    """Without the prefixes that DDP, torch.compile and a module around put before every key."""
    keys = list(state)
    while keys and any(all(key.startswith(prefix) for key in keys) for prefix in _PREFIXES):
        keys = [key.split(".", 1)[1] for key in keys]
    return dict(zip(keys, state.values(), strict=True))


def recognise_layout(keys: Iterable[str]) -> Layout | None:
    """The layout that keys without prefixes belong to; None: not a ConvNeXt."""
    names = set(keys)
    if any(name.startswith("encoder.") and name.endswith(".kernel") for name in names):
        return "minkowski"
    if any(name.endswith("embeddings.patch_embeddings.weight") for name in names):
        return "huggingface"
    if any(re.fullmatch(r"features\.\d+\.\d+\.block\.0\.weight", name) for name in names):
        return "torchvision"
    if any(name.endswith(".conv_dw.weight") for name in names):
        return "timm"
    if any(re.fullmatch(r"(stages\.\d+|blocks)\.\d+\.dwconv\.weight", name) for name in names):
        return "official"
    return None


def _renamer(source: str, target: str) -> tuple[re.Pattern[str], str]:
    """A pattern of one layout as an expression, and its replacement in another."""
    expression = re.escape(source).replace(r"\*", r"(\d+)") + r"(\.weight|\.bias)?"
    wild = 1 if "*" in source else 0
    return re.compile(expression), target.replace("*", r"\g<1>") + rf"\g<{wild + 1}>"


def _rename(name: str, renamers: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, target in renamers:
        if match := pattern.fullmatch(name):
            return match.expand(target)
    return None


def _without_backbone(name: str) -> str:
    return re.sub(r"^convnext(v2)?\.", "", name)


def to_official(state: State, layout: Layout) -> dict[str, Tensor]:
    """The same weights with official names and shapes; tensors are shared where they can be.

    Args:
        state: Keys without prefixes.
        layout: As `recognise_layout` says.

    Raises:
        KeyError: A key has no place in the layout; the key is the argument.
    """
    named_as = layout
    if layout == "minkowski":
        state, named_as = _from_minkowski(state), "official"
    renamers = [
        _renamer(name, row.official) for row in ROWS if (name := getattr(row, named_as)) is not None
    ]
    official: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key
        if layout == "huggingface":
            name = _without_backbone(key)
            # transformers called them gamma and beta before it called them weight and bias
            name = name.replace("grn.gamma", "grn.weight").replace("grn.beta", "grn.bias")
        new = _rename(name, renamers)
        if new is None:
            raise KeyError(key)
        official[new] = _official_shape(new, value)
    return official


def _official_shape(name: str, value: Tensor) -> Tensor:
    if re.search(r"\.grn\.(gamma|beta)$", name):
        return value.reshape(1, 1, 1, -1)
    if name.endswith(".gamma"):
        return value.reshape(-1)
    if re.search(r"\.pwconv[12]\.weight$", name):
        return value.flatten(1)
    return value


def from_official(state: State, layout: WritableLayout) -> dict[str, Tensor]:
    """Official weights with the names and shapes of another layout.

    V1 in timm and torchvision always has LayerScale: where there is none, it gets one of ones.

    Raises:
        KeyError: The layout has no place for a key; the key is the argument.
    """
    renamers = [
        _renamer(row.official, name) for row in ROWS if (name := getattr(row, layout)) is not None
    ]
    v2 = any(".grn." in key for key in state)
    width = len(next(value for key, value in state.items() if key.endswith("dwconv.weight")))
    conv_mlp = layout == "timm" and width in CONV_MLP_WIDTHS
    if layout in {"timm", "torchvision"} and not v2:
        biases = {key: value for key, value in state.items() if key.endswith(".dwconv.bias")}
        ones = {k.replace("dwconv.bias", "gamma"): torch.ones_like(v) for k, v in biases.items()}
        state = {**state, **ones, **state}  # its own LayerScale counts, in its own place
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        new = _rename(key, renamers)
        # transformers leaves a key that it does not know behind, and loads the rest
        lost = layout == "huggingface" and v2 and re.search(r"\.\d+\.gamma$", key)
        if new is None or lost:
            raise KeyError(key)
        if layout == "huggingface" and not new.startswith("classifier"):
            new = f"convnext{'v2' if v2 else ''}.{new}"
        shaped = value
        if layout == "timm" and ".grn." in key:
            shaped = value.reshape(-1)
        elif conv_mlp and re.search(r"\.pwconv[12]\.weight$", key):
            shaped = value[:, :, None, None]
        elif layout == "torchvision" and key.endswith(".gamma"):
            shaped = value.reshape(-1, 1, 1)
        renamed[new] = shaped
    return renamed


def _from_minkowski(state: State) -> dict[str, Tensor]:
    """The encoder of a sparse pre-training checkpoint; its decoder is left behind.

    Kernels are stored as (positions, [in,] out) with the positions column by column.
    """
    official: dict[str, Tensor] = {}
    for key, value in state.items():
        if not key.startswith("encoder."):
            continue  # proj, mask_token, decoder, pred: the pre-training task's own
        name = re.sub(r"\.(ln|linear)\.(weight|bias)$", r".\2", key.removeprefix("encoder."))
        if name.endswith(".kernel"):
            name = name.removesuffix("kernel") + "weight"
            side = math.isqrt(value.shape[0])
            kernel = value if value.ndim == 3 else value[:, None]
            dense = kernel.permute(2, 1, 0).reshape(kernel.shape[2], kernel.shape[1], side, side)
            official[name] = dense.transpose(3, 2).contiguous()
        elif ".grn." in name:
            official[name] = value.reshape(1, 1, 1, -1)
        else:
            official[name] = value.reshape(-1) if name.endswith(".bias") else value
    return official
