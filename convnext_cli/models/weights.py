"""Read any checkpoint without running code in it, recognise what it is, fit it to a network.

```
file or folder --read--> plain dict --container, prefixes--> state --layouts--> official names
```

| container | weights |
|---|---|
| this project's checkpoint: `state_dict` with `model.*` and `ema_model.*` | raw, ema |
| official: `model`, `model_ema`; timm: `state_dict`, `state_dict_ema` | raw, ema |
| a state dict itself (.pth, .bin, .safetensors; whole or in shards) | raw |

A pickle may run code when it is read, so torch reads with `weights_only=True`: tensors and plain
values, and the argparse.Namespace of them and of paths that the official code and timm save beside
the weights. A file that needs more is refused.
"""

import argparse
import io
import json
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PosixPath
from typing import Any, Literal, Self, assert_never

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from convnext_cli.catalog.datasets import imagenet1k_wnids, imagenet22k_wnids, map_classes
from convnext_cli.catalog.models import VARIANTS, Variant, find_architecture, find_variant
from convnext_cli.errors import CheckpointError, quote_path
from convnext_cli.models.layouts import (
    Layout,
    State,
    WritableLayout,
    from_official,
    recognise_layout,
    strip_prefixes,
    to_official,
)
from convnext_cli.runs.record import writing_to, written_whole

CARD_KEY = "convnext"
"""Where this project's files keep their model card."""

SOURCE_KEY = "convnext_weights"
"""Where files of one set of weights say which it is: beside the card, for it may be there alone."""

CARD_FORMAT = 1
"""Grows when a card can no longer be read by what read it before."""

WeightSource = Literal["raw", "ema"]
WeightChoice = Literal["auto", "raw", "ema"]
"""Which weights of a training checkpoint; auto: the averaged ones where there are any."""
HeadRule = Literal["keep", "reset", "map"]

_EMA_KEYS = ("model_ema", "state_dict_ema")
_RAW_KEYS = ("model", "state_dict", "module")
_HEAD_STD = 0.02
_HUB_NAMES = ("model", "pytorch_model")
_HF_WARP_FROM_PX = 384
_HF_FILTERS: dict[Literal["bilinear", "bicubic"], int] = {"bilinear": 2, "bicubic": 3}
"""Pillow's numbers."""

_PUBLISHED_ONLY = (
    "the papers' classifiers are read, no detection or segmentation models; those that timm alone"
    " has can be evaluated: convnext evaluate timm:NAME:PATH --data DIR"
)

_ARGUMENTS = (
    argparse.Namespace,
    (PosixPath, "pathlib.PosixPath"),  # of the official launchers for Slurm
    (PosixPath, "pathlib._local.PosixPath"),  # as Python 3.13 calls it
)
"""Classes of a program's arguments; to make one of them does nothing else."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What weights are and how their images are prepared."""

    variant: str
    num_classes: int
    image_px: int
    classes: tuple[str, ...]
    """By label; empty where they are not known."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"]
    crop: Literal["center", "warp"]
    crop_frac: float
    step: int | None = None
    """Optimizer steps that were taken; None where it is not known."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint or for JSON."""
        plain = {"format": CARD_FORMAT, **asdict(self)}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in plain.items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """The card of plain values.

        Raises:
            KeyError: A value is missing.
        """
        names = cls.__dataclass_fields__
        values = {key: plain[key] for key in names if key != "step"}
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**values, step=plain.get("step"))


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights under official names, and what they were recognised as."""

    path: Path
    state: dict[str, Tensor]
    layout: Layout
    container: str
    """The key that held them; "" where the file is the state itself."""
    source: WeightSource
    has_ema: bool
    """Whether the file holds averaged weights as well."""
    variant: Variant
    num_classes: int | None
    """None: there is no head, as in files of self-supervised pre-training."""
    card: ModelCard | None

    @property
    def layer_scale_init(self) -> float | None:
        """What a network for these weights is built with: LayerScale or none, as they have it."""
        has_gamma = any(re.search(r"\.\d+\.gamma$", key) for key in self.state)
        return (self.variant.layer_scale_init or 1e-6) if has_gamma else None


def read_weights(path: Path, *, prefer: WeightChoice = "auto") -> Weights:
    """Weights of a file or folder in any published layout, under official names, on the CPU.

    Args:
        path: .pth, .pt, .ckpt, .bin, .safetensors, an index of shards, or a folder with one.
        prefer: Which weights of a training checkpoint; auto: the averaged ones where there are any.

    Raises:
        CheckpointError: No such file, not a checkpoint, code in it, or no ConvNeXt.
    """
    found = read_state(path, prefer=prefer)
    card, tensors = found.card, found.state
    if card is not None and find_variant(card.variant).family == "timm":
        layout: Layout = "official"  # a comparison model's names are its own
        state, variant = tensors, find_variant(card.variant)
        num_classes: int | None = card.num_classes
    else:
        found_layout = recognise_layout(tensors)
        if found_layout is None:
            raise CheckpointError(
                f"{path} is not a ConvNeXt: its weights begin with {', '.join(list(tensors)[:3])}",
                hint="official, timm, torchvision and Hugging Face ConvNeXt layouts are read",
            )
        layout = found_layout
        try:
            state = to_official(tensors, layout)
        except KeyError as error:
            raise CheckpointError(
                f"{path}: the key {error.args[0]} has no place in the {layout} layout of ConvNeXt",
                hint=_PUBLISHED_ONLY,
            ) from error
        variant = _recognise_variant(state, path)
        num_classes = len(state["head.weight"]) if "head.weight" in state else None
        if card is None and num_classes is not None:
            card = _read_preparation(path, layout, variant, num_classes)
    if card is not None:
        _check_card(card, variant, num_classes, path)
    return Weights(
        path=path,
        state=state,
        layout=layout,
        container=found.container,
        source=found.source,
        has_ema=found.has_ema,
        variant=variant,
        num_classes=num_classes,
        card=card,
    )


@dataclass(frozen=True)
class FoundState:
    """One of the state dicts of a file, under the file's own names."""

    state: dict[str, Tensor]
    container: str
    source: WeightSource
    has_ema: bool
    card: ModelCard | None


def read_state(path: Path, *, prefer: WeightChoice = "auto") -> FoundState:
    """The weights of a file of any model, out of their container and without wrappers' prefixes.

    Raises:
        CheckpointError: No such file, not a checkpoint, code in it, or no such weights.
    """
    content, metadata = read_content(path)
    card = _read_card(content, metadata, path)
    raw, raw_key, ema, ema_key = _unpack(content)
    said = _read_source(content, metadata)
    said_ema = ema is None and said == "ema"
    # the published files hold one set of weights and say in their names which
    named_ema = ema is None and card is None and said is None and "_ema" in path.stem
    if prefer == "ema" and ema is None and not (said_ema or named_ema):
        raise CheckpointError(
            f"{path} holds no averaged weights",
            hint="use the raw ones: --weights raw, in a recipe init.source=raw",
        )
    if prefer == "raw" and (said_ema or (raw is None and ema is not None)):
        raise CheckpointError(
            f"{path} holds averaged weights only",
            hint="use them: --weights ema, in a recipe init.source=ema",
        )
    use_ema = ema is not None and prefer != "raw"
    chosen, container = (ema, ema_key) if use_ema else (raw, raw_key)
    tensors = {
        key: value
        for key, value in (chosen or {}).items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if not tensors:
        found = ", ".join(list(map(str, content))[:5]) or "nothing"
        raise CheckpointError(
            f"{path} holds no weights: its keys are {found}",
            hint="name a file with a state dict, such as one that torch.save(model.state_dict())"
            " wrote",
        )
    return FoundState(
        state=strip_prefixes(tensors),
        container=container,
        source="ema" if use_ema or said_ema or named_ema else "raw",
        has_ema=ema is not None,
        card=card,
    )


def read_content(path: Path) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """The outermost mapping of a file or folder, and the metadata of a safetensors file.

    Raises:
        CheckpointError: No such file, not a checkpoint, or code in it.
    """
    path = _find_file(path)
    if path.suffix != ".json":
        return _read_file(path)
    merged: dict[str, Any] = {}
    for name in _read_shard_names(path):
        merged |= _read_file(path.parent / name)[0]
    return merged, {}


def _find_file(path: Path) -> Path:
    """The file itself, or the one in a folder that holds its weights or their index."""
    try:
        folder, file = path.is_dir(), path.is_file()
    except OSError as error:
        raise _unreadable(path, error) from error
    if folder:
        for name in (
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
        ):
            if (path / name).is_file():
                return path / name
        raise CheckpointError(
            f"{path}: this folder holds no model.safetensors and no pytorch_model.bin",
            hint="name the file with the weights",
        )
    if not file:
        hint = "check the path; the weights of runs: ls runs/*/checkpoints"
        if re.match(r"\w+:/", str(path)):
            hint = "nothing is downloaded: fetch the file first, and name where it is"
        raise CheckpointError(f"there is no file {path}", hint=hint)
    return path


def _read_file(path: Path) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    content, metadata = _parse_file(_find_file(path))
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a state dict",
            hint="save a state dict: torch.save(model.state_dict(), PATH)",
        )
    return content, metadata


def _read_shard_names(path: Path) -> list[str]:
    """The files that an index of shards names; all lie beside it, wherever they are said to lie."""
    try:
        names = json.loads(path.read_bytes())["weight_map"].values()
        return sorted({Path(name).name for name in names})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _unreadable(path, error) from error


_ZIP = b"PK\x03\x04"
_PLAIN_PICKLES = (b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""Of Python's own protocols; torch.save writes the second."""
_SAFETENSORS = b"\0\0\0\0{"
"""From the fifth byte on: a length of 64 bits, which is below 100 MB, and a JSON object."""


def _parse_file(path: Path) -> tuple[object, Mapping[str, str]]:
    """What a file holds, whatever it is, and the metadata of a safetensors file."""
    head = b""
    try:
        with path.open("rb") as begun:
            head = begun.read(9)
        if head[4:] == _SAFETENSORS:  # whatever its ending
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            return load_file(path), metadata
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(_ARGUMENTS)):
            # an unusual pickle either reads or raises; the warnings say no more
            warnings.simplefilter("ignore")
            # by this ending torch takes a file for safetensors, whatever it is
            opened = io.BytesIO(path.read_bytes()) if path.suffix == ".safetensors" else None
            mapped = opened is None and head.startswith(_ZIP)
            read = torch.load(opened or path, map_location="cpu", weights_only=True, mmap=mapped)
            return read, {}
    except pickle.UnpicklingError as error:
        # torch names what the file wants to call, but only in the text of its error
        if what := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise _refused(path, f"to read it, {what[1]} would have to be run") from error
        if head.startswith(_PLAIN_PICKLES):
            raise _refused(path, "it is a pickle that torch.save did not write") from error
        raise _unreadable(path, error) from error
    except Exception as error:  # foreign bytes: a damaged pickle may raise anything
        if "TorchScript" in str(error):
            raise _refused(path, "it is a TorchScript program") from error
        raise _unreadable(path, error) from error


def _refused(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is refused: {reason}",
        hint="save its state dict alone, where it was made:"
        " safetensors.torch.save_file(model.state_dict(), 'model.safetensors')",
    )


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    if isinstance(error, OSError) and error.strerror:
        return CheckpointError(
            f"cannot read {path}: {error.strerror}",
            hint=f"check the path and its permission: ls -ld {quote_path(path)}",
        )
    size = path.stat().st_size
    return CheckpointError(
        f"{path} cannot be read as a checkpoint ({size:,} bytes): it is cut, or no checkpoint",
        hint="download or copy it again, and compare its size",
    )


def _read_card(
    content: Mapping[str, Any], metadata: Mapping[str, str], path: Path
) -> ModelCard | None:
    try:
        plain = content.get(CARD_KEY)
        if plain is None and CARD_KEY in metadata:
            plain = json.loads(metadata[CARD_KEY])
        if plain is None:
            return None
        if plain.get("format", CARD_FORMAT) > CARD_FORMAT:
            raise CheckpointError(
                f"{path}: its model card has format {plain['format']}, and this version reads"
                f" {CARD_FORMAT}",
                hint="pip install --upgrade convnext",
            )
        card = ModelCard.from_dict(plain)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _damaged_card(path, repr(error)) from error
    if card.variant not in VARIANTS:
        raise _damaged_card(path, f"it names a model {card.variant!r}")
    return card


def _check_card(card: ModelCard, variant: Variant, num_classes: int | None, path: Path) -> None:
    """Refuse a card that is not about the weights beside it."""
    if card.variant != variant.name:
        raise _damaged_card(path, f"it says {card.variant}, and the weights are {variant.name}")
    if num_classes not in {None, card.num_classes}:
        raise _damaged_card(path, f"it says {card.num_classes} classes, and the head {num_classes}")
    if card.classes and len(card.classes) != card.num_classes:
        raise _damaged_card(path, f"it names {len(card.classes)} of {card.num_classes} classes")


def _damaged_card(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: its model card is damaged: {reason}", hint="use another checkpoint of the run"
    )


def _read_source(content: Mapping[str, Any], metadata: Mapping[str, str]) -> WeightSource | None:
    sources: dict[object, WeightSource] = {"raw": "raw", "ema": "ema"}
    said = content.get(SOURCE_KEY, metadata.get(SOURCE_KEY))
    return sources.get(said) if isinstance(said, str) else None


def _unpack(
    content: Mapping[str, Any],
) -> tuple[Mapping[Any, Any] | None, str, Mapping[Any, Any] | None, str]:
    """(raw weights, their key, averaged weights, their key)."""
    state = content.get("state_dict")
    if (
        CARD_KEY in content
        and isinstance(state, Mapping)
        # a file in timm's layout has a card and a state_dict too, but no such prefix
        and any(str(key).startswith("model.") for key in state)
    ):
        parts = {
            prefix: {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            for prefix in ("model.", "ema_model.")
        }
        ema = parts["ema_model."] or None
        return parts["model."], "state_dict model", ema, "state_dict ema_model"
    raw_key = next((key for key in _RAW_KEYS if isinstance(content.get(key), Mapping)), "")
    ema_key = next((key for key in _EMA_KEYS if isinstance(content.get(key), Mapping)), "")
    if not raw_key and not ema_key:
        return content, "", None, ""
    return content.get(raw_key), raw_key, content.get(ema_key), ema_key


def _recognise_variant(state: State, path: Path) -> Variant:
    variant = _find_variant_of(state)
    if variant is None:
        depths, dims = read_shape(state)
        raise CheckpointError(
            f"{path}: a ConvNeXt with {depths} blocks of width {dims} is no published one",
            hint=_PUBLISHED_ONLY,
        )
    return variant


def _find_variant_of(state: State) -> Variant | None:
    depths, dims = read_shape(state)
    grn = any(".grn." in key for key in state)
    isotropic = any(key.startswith("blocks.") for key in state)
    return find_architecture(depths, dims, has_grn=grn, isotropic=isotropic)


def read_shape(state: State) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(blocks of each stage, width of each stage) of weights under official names."""
    depths: dict[int, int] = {}
    dims: dict[int, int] = {}
    for key, value in state.items():
        if match := re.fullmatch(r"(?:stages\.(\d+)|blocks)\.(\d+)\.dwconv\.weight", key):
            stage = int(match[1] or 0)
            depths[stage] = max(depths.get(stage, 0), int(match[2]) + 1)
            dims[stage] = len(value)
    return tuple(depths[s] for s in sorted(depths)), tuple(dims[s] for s in sorted(dims))


def load_into(
    model: nn.Module,
    weights: Weights,
    *,
    head: HeadRule = "keep",
    target_classes: Sequence[str] = (),
) -> str:
    """Load weights into a ConvNeXt; what they lack keeps the network's own fresh values.

    Returns a sentence: what was taken, and what became of the head.

    Args:
        model: Changed in place.
        weights: As `read_weights` gives them.
        head: keep: taken where its size fits and its classes, if it names them, are the network's,
            else fresh; reset: fresh; map: row by row, by class.
        target_classes: Classes of the network by label; empty, or their numbers: not known, for map
            those of ImageNet.

    Raises:
        CheckpointError: The weights are of another architecture, or the classes do not map.
    """
    own = model.state_dict()
    state = dict(weights.state)
    num_classes = len(own["head.weight"])
    named = weights.card.classes if weights.card is not None else ()
    fresh = True
    if weights.num_classes is None:
        said = "it has no head, so the head starts afresh"
    elif head == "reset":
        said = "its head was left, the new one starts afresh"
    elif head == "map":
        rows, missing = _map_head(weights, num_classes, target_classes)
        for key in ("head.weight", "head.bias"):
            state[key] = _take_rows(state[key], own[key], rows)
        fresh = False
        said = _say_mapped(rows, missing)
    elif weights.num_classes != num_classes:
        said = (
            f"its head has {weights.num_classes} classes and {num_classes} are wanted,"
            " so the head starts afresh"
        )
    elif named and target_classes and tuple(target_classes) != named:
        said = f"its head of {num_classes} classes tells others apart, so the head starts afresh"
    else:
        fresh = False
        said = f"its head of {num_classes} classes was kept"
    if fresh:
        state |= {key: own[key] for key in ("head.weight", "head.bias")}
    for key in ("norm.weight", "norm.bias"):
        if key not in state and weights.num_classes is None:
            state[key] = own[key]  # self-supervised pre-training has no final norm either
    _check_shapes(state, own, weights)
    model.load_state_dict(state)
    return f"{_say_taken(weights)}; {said}"


def _check_shapes(state: State, own: State, weights: Weights) -> None:
    """Refuse weights of another network in one sentence."""
    differing = [
        key
        for key in sorted(state.keys() | own.keys())
        if key not in state or key not in own or state[key].shape != own[key].shape
    ]
    if not differing:
        return
    wanted = _find_variant_of(own)
    if wanted is not None and wanted != weights.variant:
        raise CheckpointError(
            f"{weights.path} is {weights.variant.name}, but the model is {wanted.name}",
            hint=f"use model.name={weights.variant.name}, or other weights",
        )
    key = differing[0]
    shapes = [tuple(side[key].shape) if key in side else "missing" for side in (state, own)]
    scale = key.endswith(".gamma") and ".grn." not in key
    raise CheckpointError(
        f"{weights.path}: {key} is {shapes[0]} there and {shapes[1]} in the model"
        f" ({len(differing)} keys differ)",
        hint="build the network as the weights are: model.layer_scale_init="
        + ("1e-6" if key in state else "null")
        if scale
        else "name another file: this one was changed after training, or not written to its end",
    )


def _map_head(
    weights: Weights, num_classes: int, target_classes: Sequence[str]
) -> tuple[tuple[int | None, ...], tuple[str, ...]]:
    """For each class of the network its row in the weights' head, and the classes without one."""
    known = {1_000: imagenet1k_wnids, 21_841: imagenet22k_wnids}
    source: Sequence[str] = weights.card.classes if weights.card else ()
    if not source and weights.num_classes in known:
        source = known[weights.num_classes]()
    target = target_classes
    numbered = all(name == str(label) for label, name in enumerate(target))  # or no names at all
    if numbered and num_classes in known:
        target = known[num_classes]()
    rows = map_classes(source, target)
    missing = tuple(name for name, row in zip(target, rows, strict=True) if row is None)
    if len(target) != num_classes or len(missing) == len(target):
        raise CheckpointError(
            f"{weights.path}: its head cannot be mapped: none of the {num_classes} classes is known"
            f" among its {weights.num_classes}",
            hint="leave out --map-head; in a recipe, start the head afresh with init.head=reset",
        )
    return rows, missing


def map_head_to_imagenet1k(weights: Weights) -> tuple[Weights, str]:
    """The same weights with a head for ImageNet-1K, made of rows of its own by class; a sentence.

    A row that the head lacks is drawn as in a new network, from a fixed seed: the same every time.

    Raises:
        CheckpointError: There is no head, or its classes are not known.
    """
    if weights.num_classes is None:
        raise CheckpointError(
            f"{weights.path} has no head whose classes could be mapped", hint="leave out --map-head"
        )
    target = imagenet1k_wnids()
    rows, missing = _map_head(weights, len(target), target)
    old = weights.state["head.weight"]
    weight = nn.init.trunc_normal_(
        torch.empty(len(target), old.shape[1]),
        std=_HEAD_STD,
        generator=torch.Generator().manual_seed(0),
    ).to(old.dtype)
    bias = torch.zeros(len(target), dtype=old.dtype)
    state = weights.state | {
        "head.weight": _take_rows(old, weight, rows),
        "head.bias": _take_rows(weights.state["head.bias"], bias, rows),
    }
    card = weights.card and replace(weights.card, num_classes=len(target), classes=target)
    mapped = replace(weights, state=state, num_classes=len(target), card=card)
    return mapped, f"{_say_taken(weights)}; {_say_mapped(rows, missing)}"


def _say_taken(weights: Weights) -> str:
    return f"took {weights.variant.name} ({weights.source} weights) from {weights.path}"


def _say_mapped(rows: Sequence[int | None], missing: Sequence[str]) -> str:
    said = f"its head was mapped by class, {len(rows) - len(missing)} of {len(rows)} rows"
    if missing:
        few = ", ".join(missing[:5])
        more = f" and {len(missing) - 5:,} more" if len(missing) > 5 else ""
        said += f"; {few}{more} start{'s' if len(missing) == 1 else ''} afresh"
    return said


def _take_rows(source: Tensor, fresh: Tensor, rows: Sequence[int | None]) -> Tensor:
    taken = fresh.clone()
    for label, row in enumerate(rows):
        if row is not None:
            taken[label] = source[row]
    return taken


def count_non_finite(state: State) -> int:
    """Values that are NaN or infinite."""
    return sum(int((~torch.isfinite(v)).sum()) for v in state.values() if v.is_floating_point())


def write_weights(weights: Weights, path: Path, *, layout: WritableLayout) -> None:
    """Write weights in a layout: .safetensors, or .pth/.pt as {'model' or 'state_dict': weights}.

    The file says whether they are raw or averaged; torchvision's .pth has no place for it.
    For huggingface `path` is a folder, which gets a config.json as well, and where the preparation
    of images is known and is one of transformers', a preprocessor_config.json.

    Raises:
        CheckpointError: The layout has no place for the architecture.
        StorageError: The place cannot be written; what was there is untouched.
    """
    try:
        renamed = from_official(weights.state, layout)
    except KeyError as error:
        raise CheckpointError(
            f"{weights.variant.name} has no place in the {layout} layout: no name for"
            f" {error.args[0]}",
            hint="torchvision has V1 T/S/B/L only, Hugging Face no LayerScale in V2, and isotropic"
            " models are official only; use another --to",
        ) from error
    state = {key: value.detach().clone().contiguous() for key, value in renamed.items()}
    about: dict[str, Any] = {SOURCE_KEY: weights.source}
    if weights.card is not None:
        about[CARD_KEY] = weights.card.to_dict()
    match layout:
        case "huggingface":
            with writing_to(path):
                path.mkdir(parents=True, exist_ok=True)
                for name, content in (
                    ("config.json", _hf_config(weights)),
                    ("preprocessor_config.json", _hf_preprocessor(weights.card)),
                ):
                    if content is None:
                        (path / name).unlink(missing_ok=True)  # of what was there before
                        continue
                    with written_whole(path / name) as beside:
                        beside.write_text(json.dumps(content, indent=2) + "\n")
            _write_state(state, path / "model.safetensors", about, key="")
        case "timm":
            _write_state(state, path, about, key="state_dict")
        case "official":
            _write_state(state, path, about, key="model")
        case "torchvision":
            _write_state(state, path, about, key="")
        case _:
            assert_never(layout)


def _write_state(state: dict[str, Tensor], path: Path, about: dict[str, Any], *, key: str) -> None:
    if path.suffix == ".safetensors":
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()}
        content = save_bytes(state, metadata={"format": "pt"} | texts)
    else:
        file = io.BytesIO()
        torch.save({key: state} | about if key else state, file)
        content = file.getvalue()
    # From memory, because both libraries have errors of their own for a disk that is full.
    with writing_to(path), written_whole(path) as beside:
        beside.write_bytes(content)


def _hf_config(weights: Weights) -> dict[str, Any]:
    """The configuration that transformers builds the same network from."""
    v2 = weights.variant.grn
    num_classes = weights.num_classes or 0
    classes = weights.card.classes if weights.card and weights.card.classes else ()
    names = classes or [f"LABEL_{label}" for label in range(num_classes)]
    config: dict[str, Any] = {
        "architectures": [
            f"ConvNext{'V2' if v2 else ''}{'ForImageClassification' if num_classes else 'Model'}"
        ],
        "model_type": "convnextv2" if v2 else "convnext",
        "num_channels": 3,
        "patch_size": 4,
        "num_stages": 4,
        "depths": list(weights.variant.depths),
        "hidden_sizes": list(weights.variant.dims),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,  # transformers' own default, 1e-12, is not the published one
        "drop_path_rate": 0.0,
        "image_size": weights.card.image_px if weights.card else 224,
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
    }
    if not v2:
        config["layer_scale_init_value"] = weights.layer_scale_init or 0.0
    return config


def _hf_preprocessor(card: ModelCard | None) -> dict[str, Any] | None:
    """How transformers' ConvNextImageProcessor prepares images for evaluation; None: it cannot.

    It crops below 384 px and warps from there on, whatever it is told.
    """
    if card is None or card.crop != ("warp" if card.image_px >= _HF_WARP_FROM_PX else "center"):
        return None
    return {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": card.image_px},
        "crop_pct": card.crop_frac,
        "resample": _HF_FILTERS[card.interpolation],
        "image_mean": list(card.mean),
        "image_std": list(card.std),
    }


def _read_preparation(
    path: Path, layout: Layout, variant: Variant, num_classes: int
) -> ModelCard | None:
    """What other libraries' files beside the weights say of images; None: there are none.

    Class names are left: those of published models are words, not the data set's own names.

    Raises:
        CheckpointError: It is nothing that evaluation here does.
    """
    weights = _find_file(path)
    names: dict[Layout, str] = {"huggingface": "preprocessor_config.json", "timm": "config.json"}
    file = weights.parent / names.get(layout, "")
    # Hugging Face's own file names: others may lie beside a config.json of anything
    if layout not in names or not weights.name.startswith(_HUB_NAMES) or not file.is_file():
        return None
    try:
        said = json.loads(file.read_bytes())
        if layout == "timm" and "pretrained_cfg" not in said:
            return None
        view = _read_hf_view(said) if layout == "huggingface" else _read_timm_view(said)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{file} does not say how images are prepared as that of a ConvNeXt does",
            hint="move it away, and images are prepared as published",
        ) from error
    return ModelCard(variant=variant.name, num_classes=num_classes, classes=(), **view)


def _read_hf_view(said: Mapping[str, Any]) -> dict[str, Any]:
    """The card's part of a preprocessor_config.json; `_hf_preprocessor` is the way back."""
    size = said["size"]
    image_px = int(size["shortest_edge"] if isinstance(size, dict) else size)
    filters = {number: name for name, number in _HF_FILTERS.items()}
    warps = image_px >= _HF_WARP_FROM_PX
    return {
        "image_px": image_px,
        "crop": "warp" if warps else "center",
        "crop_frac": 1.0 if warps else float(said.get("crop_pct") or 0.875),
        "interpolation": filters[said.get("resample", 3)],
        "mean": _read_colour(said["image_mean"]),
        "std": _read_colour(said["image_std"]),
    }


def _read_timm_view(said: Mapping[str, Any]) -> dict[str, Any]:
    """The card's part of the config.json that timm puts beside weights on Hugging Face."""
    view = said["pretrained_cfg"]
    _, height, width = view["input_size"]
    crops = {("center", True): "center", ("center", False): "center", ("squash", True): "warp"}
    if height != width or view["interpolation"] not in _HF_FILTERS:
        raise ValueError(view)
    return {
        "image_px": int(height),
        "crop": crops[view.get("crop_mode", "center"), view["crop_pct"] == 1.0],
        "crop_frac": float(view["crop_pct"]),
        "interpolation": view["interpolation"],
        "mean": _read_colour(view["mean"]),
        "std": _read_colour(view["std"]),
    }


def _read_colour(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)
