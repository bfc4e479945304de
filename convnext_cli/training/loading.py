"""Any model that a person names becomes a network with its preprocessing and its class names.

```
FILE or FOLDER      any layout that `models.weights` reads
RUN                 a run's folder: its best checkpoint
timm:NAME           a timm model whose pretrained weights are on this machine already
timm:NAME:PATH      a timm model with a local checkpoint
```

Nothing is downloaded. How images are prepared comes from the checkpoint's card, or from the files
that timm and transformers put beside weights; without one, as published: a central crop of 0.875
below 384 px, a warp from there on (ConvNeXt A.2 and the official evaluation); in torchvision's
layout at 224 px as torchvision's own weights. A timm model brings its own.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import assert_never

import torch
from torch import Tensor, nn

from convnext_cli.catalog.datasets import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    imagenet1k_wnids,
    imagenet22k_wnids,
)
from convnext_cli.data.augment import EvalCrop, EvalView
from convnext_cli.data.randaugment import Colour
from convnext_cli.data.shear import Interpolation
from convnext_cli.errors import CheckpointError, RunError, quote_path
from convnext_cli.models.convnext import build_comparison, build_convnext
from convnext_cli.models.weights import (
    WeightChoice,
    Weights,
    WeightSource,
    load_into,
    read_state,
    read_weights,
)
from convnext_cli.runs.layout import RunDir

TIMM_PREFIX = "timm:"
CENTER_FRAC = 0.875
"""Share that the published central crop keeps."""

WARP_FROM_PX = 384
"""From this size on, published evaluations warp the image instead of cropping it."""

_TORCHVISION_SHORT_PX = {
    "convnext_tiny": 236,
    "convnext_small": 230,
    "convnext_base": 232,
    "convnext_large": 232,
}
"""Short side before the central crop of 224 px, by bilinear resizing.
Source: pytorch/vision torchvision/models/convnext.py, `transforms` of IMAGENET1K_V1."""

_PX_IN_NAME = re.compile(r"(?<![a-z\d])(?<!checkpoint-)(224|288|384|512)(?!\d)", re.IGNORECASE)
"""Not the batch of convnext_tiny_bs512.pth, nor the epoch of the official checkpoint-288.pth."""


@dataclass(frozen=True, kw_only=True)
class AskedView:
    """What a person asks of the preprocessing; None: as the model says."""

    image_px: int | None = None
    crop: EvalCrop | None = None
    crop_frac: float | None = None


AS_THE_MODEL_SAYS = AskedView()


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes the network's input."""

    image_px: int
    crop: EvalCrop
    crop_frac: float
    """Share of the resized side that the central crop keeps; 1 for warp."""
    interpolation: Interpolation
    mean: Colour
    std: Colour
    reason: str
    """Where it comes from, in a few words."""

    @property
    def view(self) -> EvalView:
        """The part before the normalisation: pixels to pixels."""
        return EvalView(
            image_px=self.image_px,
            crop=self.crop,
            crop_frac=self.crop_frac,
            interpolation=self.interpolation,
        )


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A network that is ready to classify, on the CPU, in evaluation mode."""

    name: str
    """Architecture; `timm:` in front where timm built it."""
    path: str
    """Where the weights were read from."""
    network: nn.Module
    num_classes: int
    classes: tuple[str, ...]
    """By label; empty where the checkpoint does not say."""
    source: WeightSource
    preprocessing: Preprocessing

    @property
    def num_parameters(self) -> int:
        """Trainable or not."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def likely_classes(self) -> tuple[str, ...]:
        """The classes; where the checkpoint does not say, ImageNet's by their number, else none."""
        if self.classes:
            return self.classes
        match self.num_classes:
            case 1_000:
                return imagenet1k_wnids()
            case 21_841:
                return imagenet22k_wnids()
            case _:
                return ()


def load_model(
    name: str, *, prefer: WeightChoice = "auto", asked: AskedView = AS_THE_MODEL_SAYS
) -> LoadedModel:
    """The model called `name`; see the module's table of what can be named.

    Raises:
        CheckpointError: No such file or model, or its weights cannot be used.
        RunError: A run without a checkpoint.
    """
    if name.startswith(TIMM_PREFIX):
        return _load_timm(name, prefer=prefer, asked=asked)
    path = find_checkpoint(Path(name), prefer=prefer)
    weights = read_weights(path, prefer=prefer)
    if weights.num_classes is None:
        raise CheckpointError(
            f"{path} has no head: it is a pre-trained {weights.variant.name} without classes",
            hint=f"train a head first: convnext finetune --from {quote_path(path)} --data DIR",
        )
    network = _build(weights)
    card = weights.card
    return LoadedModel(
        name=weights.variant.name,
        path=str(path),
        network=network.eval(),
        num_classes=weights.num_classes,
        classes=tuple(card.classes) if card is not None else (),
        source=weights.source,
        preprocessing=choose_preprocessing(weights, asked, file_name=path.name),
    )


def _build(weights: Weights) -> nn.Module:
    variant, num_classes = weights.variant, weights.num_classes
    assert num_classes is not None
    if variant.family == "timm":
        network = build_comparison(variant, num_classes=num_classes)
        network.load_state_dict(weights.state)
        return network
    network = build_convnext(
        variant, num_classes=num_classes, layer_scale_init=weights.layer_scale_init
    )
    load_into(network, weights, head="keep")
    return network


def find_checkpoint(path: Path, *, prefer: WeightChoice) -> Path:
    """A run's best checkpoint, raw or averaged as preferred; any other path as it is.

    Raises:
        RunError: The run has no checkpoint yet.
    """
    run = RunDir(path.parent if path.name == "checkpoints" else path)
    if not run.is_run():
        return path
    match prefer:
        case "auto" | "ema":
            order = [run.best_ema, run.best, run.last]
        case "raw":
            order = [run.best, run.last]
        case _:
            assert_never(prefer)
    found = next((checkpoint for checkpoint in order if checkpoint.exists()), None)
    if found is None:
        raise RunError(
            f"the run {run.root} has no checkpoint yet",
            hint="wait for its first one, or name a file: CKPT is a path",
        )
    return found


def published_crop(image_px: int) -> tuple[EvalCrop, float]:
    """How published evaluations at a size cut the image, and the share that is kept."""
    return ("warp", 1.0) if image_px >= WARP_FROM_PX else ("center", CENTER_FRAC)


def guess_image_px(file_name: str) -> int | None:
    """The size that a file's name tells, as the released weights' names do; None: it does not."""
    found = _PX_IN_NAME.findall(file_name)
    return int(found[-1]) if found else None


def choose_preprocessing(weights: Weights, asked: AskedView, *, file_name: str) -> Preprocessing:
    """What is asked; where nothing is, what the card says, else as published for the size.

    Raises:
        CheckpointError: The network does not take images that small, or a share is asked of a warp.
    """
    variant, card = weights.variant, weights.card
    if asked.image_px is not None and asked.image_px < variant.smallest_px:
        raise CheckpointError(
            f"--image-px {asked.image_px}: {variant.name} halves an image down to nothing at"
            f" {asked.image_px} px",
            hint=f"use at least {variant.smallest_px} px: --image-px {variant.smallest_px}",
        )
    if card is None:
        named_px = guess_image_px(file_name)
        crop, crop_frac = published_crop(asked.image_px or named_px or 224)
        default = Preprocessing(
            image_px=named_px or 224,
            crop=crop,
            crop_frac=crop_frac,
            interpolation="bicubic",
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            reason="size from the file's name, as published" if named_px else "as published",
        )
        short_px = _TORCHVISION_SHORT_PX.get(variant.name)
        if weights.layout == "torchvision" and default.image_px == 224 and short_px is not None:
            default = replace(
                default,
                crop_frac=224 / short_px,
                interpolation="bilinear",
                reason="as torchvision's weights",
            )
    else:
        default = Preprocessing(
            image_px=card.image_px,
            crop=card.crop,
            crop_frac=card.crop_frac if card.crop == "center" else 1.0,
            interpolation=card.interpolation,
            mean=card.mean,
            std=card.std,
            reason="as the checkpoint says",
        )
    return apply_asked(default, asked)


def apply_asked(default: Preprocessing, asked: AskedView) -> Preprocessing:
    """The preprocessing with what is asked in place of its own.

    A size on the other side of 384 px brings the published crop of that side with it.

    Raises:
        CheckpointError: A share is asked of a warp, which keeps everything.
    """
    if asked == AS_THE_MODEL_SAYS:
        return default
    image_px = asked.image_px or default.image_px
    crop, crop_frac = default.crop, default.crop_frac
    if (image_px >= WARP_FROM_PX) != (default.image_px >= WARP_FROM_PX):
        crop, crop_frac = published_crop(image_px)
    if asked.crop is not None and asked.crop != crop:
        crop, crop_frac = asked.crop, CENTER_FRAC if asked.crop == "center" else 1.0
    if asked.crop_frac is not None:
        if asked.crop == "warp":
            raise CheckpointError(
                f"--crop-frac {asked.crop_frac:g} with --crop warp: a warp keeps the whole image",
                hint="leave one of the two out",
            )
        crop, crop_frac = "center", asked.crop_frac
    return replace(default, image_px=image_px, crop=crop, crop_frac=crop_frac, reason="as asked")


def _load_timm(name: str, *, prefer: WeightChoice, asked: AskedView) -> LoadedModel:
    architecture, _, file = name.removeprefix(TIMM_PREFIX).partition(":")
    _check_timm_name(architecture)
    path = Path(file) if file else _find_pretrained(architecture)
    if file:
        network, source = _load_timm_file(architecture, Path(file), prefer=prefer)
    else:
        import timm  # noqa: PLC0415  # takes seconds, and only timm's models need it

        # timm's own loader converts foreign layouts; a file in its hands is not downloaded
        network = timm.create_model(
            architecture, pretrained=True, pretrained_cfg_overlay={"file": str(path)}
        )
        source = "raw"
    return LoadedModel(
        name=f"{TIMM_PREFIX}{architecture}",
        path=str(path),
        network=network.eval(),
        num_classes=int(getattr(network, "num_classes")),  # noqa: B009  # nn.Module knows it not
        classes=(),
        source=source,
        preprocessing=_timm_preprocessing(network, architecture, asked),
    )


def _check_timm_name(architecture: str) -> None:
    import timm  # noqa: PLC0415

    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=1, cutoff=0.0)
        raise CheckpointError(
            f"{TIMM_PREFIX}{architecture}: timm {timm.__version__} has no model of this name",
            hint=f"did you mean {TIMM_PREFIX}{near[0]}?",
        )
    plain, dot, tag = architecture.partition(".")
    known = [each.partition(".")[2] for each in timm.list_pretrained(f"{plain}.*")]
    if dot and tag not in known:
        raise CheckpointError(
            f"{TIMM_PREFIX}{architecture}: {plain} has no weights called {tag!r} in timm",
            hint=f"use one of: {', '.join(known)}" if known else f"use {TIMM_PREFIX}{plain}:PATH",
        )


def _find_pretrained(architecture: str) -> Path:
    """Pretrained weights in the caches of Hugging Face and torch.

    Raises:
        CheckpointError: They are in neither.
    """
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415
    from timm.models import get_pretrained_cfg  # noqa: PLC0415

    config = get_pretrained_cfg(architecture)
    if config is not None and config.hf_hub_id:
        names = (config.hf_hub_filename, "model.safetensors", "pytorch_model.bin")
        for file_name in filter(None, names):
            found = try_to_load_from_cache(config.hf_hub_id, file_name)
            if isinstance(found, str):
                return Path(found)
    if config is not None and config.url:
        name: str = config.url.rpartition("/")[2]
        cached = Path(torch.hub.get_dir()) / "checkpoints" / name
        if cached.is_file():
            return cached
    raise CheckpointError(
        f"{TIMM_PREFIX}{architecture}: its pretrained weights are not on this machine, and nothing"
        " is downloaded here",
        hint=f"give a local file: {TIMM_PREFIX}{architecture}:PATH",
    )


def _load_timm_file(
    architecture: str, path: Path, *, prefer: WeightChoice
) -> tuple[nn.Module, WeightSource]:
    import timm  # noqa: PLC0415

    found = read_state(path, prefer=prefer)
    state = found.state
    network: nn.Module = timm.create_model(
        architecture, pretrained=False, **_head_size(architecture, state)
    )
    own = network.state_dict()
    differing = [
        key
        for key in [*own, *(state.keys() - own.keys())]
        if key not in state or key not in own or state[key].shape != own[key].shape
    ]
    if differing:
        key = differing[0]
        shapes = [tuple(side[key].shape) if key in side else "absent" for side in (state, own)]
        raise CheckpointError(
            f"{path} does not fit timm's {architecture}: {key} is {shapes[0]} there and"
            f" {shapes[1]} in the model ({len(differing)} keys differ)",
            hint=f"name the architecture of the file; a ConvNeXt is read without timm too: {path}",
        )
    network.load_state_dict(state)
    return network, found.source


def _head_size(architecture: str, state: Mapping[str, Tensor]) -> dict[str, int]:
    from timm.models import get_pretrained_cfg  # noqa: PLC0415

    config = get_pretrained_cfg(architecture)
    head = config.classifier if config is not None else None
    if isinstance(head, tuple | list):
        head = head[0]
    bias = state.get(f"{head}.bias")
    return {} if bias is None else {"num_classes": len(bias)}


def _timm_preprocessing(network: nn.Module, architecture: str, asked: AskedView) -> Preprocessing:
    """The preprocessing that timm gives the model, in our words.

    Raises:
        CheckpointError: It does something that evaluation here does not: images that are not
            square, borders, or other filters.
    """
    from timm.data import resolve_model_data_config  # noqa: PLC0415

    config = resolve_model_data_config(network)
    _, height, width = config["input_size"]
    crop_frac, mode, filter_name = config["crop_pct"], config["crop_mode"], config["interpolation"]
    crops: dict[tuple[str, bool], EvalCrop] = {
        ("center", True): "center",
        ("center", False): "center",
        ("squash", True): "warp",
    }
    filters: dict[str, Interpolation] = {"bicubic": "bicubic", "bilinear": "bilinear"}
    crop = crops.get((mode, crop_frac == 1.0))
    interpolation = filters.get(filter_name)
    if crop is None or interpolation is None or height != width:
        raise CheckpointError(
            f"{TIMM_PREFIX}{architecture} wants images of {height} x {width} px, crop mode {mode}"
            f" at {crop_frac:g}, {filter_name}: evaluation here knows square images, center or a"
            " whole squash, bicubic or bilinear",
            hint="evaluate it with timm's own validate.py",
        )
    return apply_asked(
        Preprocessing(
            image_px=height,
            crop=crop,
            crop_frac=crop_frac,
            interpolation=interpolation,
            mean=config["mean"],
            std=config["std"],
            reason="timm's own",
        ),
        asked,
    )
