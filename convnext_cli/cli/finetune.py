"""`convnext finetune`: go on from a checkpoint, by the recipe that fits what it is."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from convnext_cli.catalog.datasets import imagenet1k_wnids, imagenet22k_wnids
from convnext_cli.catalog.models import Variant
from convnext_cli.cli._console import console
from convnext_cli.cli._inputs import (
    DataOption,
    DeviceOption,
    DevicesOption,
    NodesOption,
    PrecisionOption,
    RunsDirOption,
    expand_home,
    find_cluster,
    load_asked_recipe,
)
from convnext_cli.cli.train import (
    NameOption,
    ResumeOption,
    listen_for_stop,
    run_training,
)
from convnext_cli.data.card import read_card
from convnext_cli.errors import CheckpointError, DataError, RecipeError, quote_path
from convnext_cli.plan.cluster import read_rank
from convnext_cli.recipe.files import (
    list_recipes,
    load_recipe,
    parse_override,
    render_override,
)
from convnext_cli.runs.layout import RunDir

Target = Literal["imagenet1k", "imagenet22k", "own"]
"""What is trained on: a published data set, or one's own."""

GENERAL = "small_data"
"""The recipe for everything that no paper has fine-tuned."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a checkpoint is, as far as the choice of a recipe goes."""

    variant: Variant
    num_classes: int | None
    """Outputs of its head; None: it has none (pre-training without labels)."""
    classes: tuple[str, ...] = ()
    """By label; empty where the checkpoint does not say."""
    image_px: int | None = None
    """The size that it was trained at; None: not known."""
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    has_ema: bool = False
    """Whether averaged weights lie beside the raw ones."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A recipe, what is changed in it, and why."""

    recipe: str
    overrides: tuple[str, ...]
    reason: str
    """A sentence for people."""


def finetune(
    recipe: Annotated[
        str | None,
        typer.Argument(help="Recipe: a name or a YAML file (default: chosen from the checkpoint)."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to the recipe, such as optim.lr=2e-5.", metavar="KEY=VALUE"),
    ] = None,
    *,
    checkpoint: Annotated[
        str, typer.Option("--from", help="Weight file in any layout, or a run.", metavar="CKPT")
    ],
    data: DataOption = None,
    weights: Annotated[
        Literal["auto", "raw", "ema"] | None,
        typer.Option(help="Weights of a training checkpoint (default: the recipe's init.source)."),
    ] = None,
    map_head: Annotated[
        bool,
        typer.Option("--map-head", help="Take ImageNet-1K's rows from a 22K head (init.head=map)."),
    ] = False,
    devices: DevicesOption = None,
    nodes: NodesOption = 1,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    name: NameOption = None,
    runs_dir: RunsDirOption = Path("runs"),
    resume: ResumeOption = "auto",
) -> None:
    """Fine-tune a checkpoint; the same command again goes on where it stopped.

    With no recipe, the published one for the checkpoint and the data is taken, else small_data.

    Example: convnext finetune --from convnext_base_22k_224.pth --data /data/imagenet
    """
    request = listen_for_stop()
    checkpoint = str(expand_home(Path(checkpoint)))
    asked = [*([recipe] if recipe is not None else []), *(overrides or ())]
    if asked and "=" in asked[0]:  # the recipe was left out, so its place holds an override
        recipe = None
    elif asked:
        asked = asked[1:]
    if name is not None:
        _check_is_there(checkpoint, RunDir(runs_dir / name))
    start = read_start(checkpoint, prefer=weights or "auto")
    if recipe is None:
        choice = choose_recipe(start, read_target(data, asked), overrides=asked)
    else:
        choice = fit_recipe(recipe, start, overrides=asked)
    changes = [*choice.overrides, *([f"init.source={weights}"] if weights is not None else [])]
    asked += ["init.head=map"] if map_head else []
    # with its weights: a recipe that maps a head and names none is refused
    named = render_override("init.weights", checkpoint)
    source = load_recipe(choice.recipe, [*changes, named, *asked]).init.source
    if source == "ema" and not start.has_ema:
        # a file with one set of weights, such as a published one: there is nothing to choose
        source = "auto"
    # as it is asked: which checkpoint of a run is its best may have changed when this one goes on
    changes += [named, *asked, f"init.source={source}"]
    if read_rank() != 0:
        console.quiet = True
    label = "chosen" if recipe is None else "from"
    console.print(Text(f"{label:8} {choice.recipe}: {choice.reason}"), soft_wrap=True)
    run_training(
        load_asked_recipe(choice.recipe, changes, data=data, precision=precision),
        name=name or Path(choice.recipe).stem,
        cluster=find_cluster(devices=devices, nodes=nodes, device=device),
        runs_dir=runs_dir,
        resume=resume,
        request=request,
    )


def _check_is_there(checkpoint: str, run: RunDir) -> None:
    """Say how a run goes on that was begun from a file which is gone: it needs it no more."""
    if run.is_run() and not Path(checkpoint).exists():
        raise CheckpointError(
            f"there is no file {checkpoint}",
            hint=f"{run.root} was begun already and goes on without it: convnext train"
            f" {quote_path(run.recipe)} --name {run.name} --runs-dir {quote_path(run.root.parent)}",
        )


def read_start(checkpoint: str, *, prefer: Literal["auto", "raw", "ema"]) -> Start:
    """What the checkpoint is.

    Raises:
        CheckpointError: It cannot be read, or timm would have to build it.
    """
    from convnext_cli.models.weights import read_weights
    from convnext_cli.training.loading import TIMM_PREFIX, find_checkpoint, guess_image_px

    if checkpoint.startswith(TIMM_PREFIX):
        raise CheckpointError(
            f"--from {checkpoint}: models of timm can be evaluated, not fine-tuned",
            hint="a ConvNeXt in timm's layout is read by the path of its file",
        )
    path = find_checkpoint(Path(checkpoint), prefer=prefer)
    weights = read_weights(path, prefer=prefer)
    card = weights.card
    return Start(
        variant=weights.variant,
        num_classes=weights.num_classes,
        classes=card.classes if card is not None else (),
        image_px=card.image_px if card is not None else guess_image_px(path.name),
        mean=card.mean if card is not None else None,
        std=card.std if card is not None else None,
        has_ema=weights.has_ema,
    )


@dataclass(frozen=True, kw_only=True)
class TargetData:
    """What is trained on."""

    kind: Target
    classes: tuple[str, ...]


def read_target(data: str | None, overrides: Sequence[str]) -> TargetData:
    """What the data set is, from its classes.

    Raises:
        DataError: None is named, or it is not there.
    """
    path = data or find_override("data.path", overrides)
    if not isinstance(path, str):
        raise DataError(
            "no data set is named, so no recipe can be chosen for it",
            hint="name one with --data DIR (convnext data pack SOURCE DIR makes it)",
        )
    classes = tuple(read_card(path).classes)
    match classes:
        case _ if classes == imagenet1k_wnids():
            return TargetData(kind="imagenet1k", classes=classes)
        case _ if classes == imagenet22k_wnids():
            return TargetData(kind="imagenet22k", classes=classes)
        case _:
            return TargetData(kind="own", classes=classes)


def find_override(key: str, overrides: Sequence[str]) -> object:
    """The value that the overrides give a `section.key`; None where they do not."""
    value: object = None
    for text in overrides:
        if text.partition("=")[0] == key:
            parsed = parse_override(text)
            section, _, name = key.partition(".")
            value = parsed[section][name]
    return value


def choose_recipe(start: Start, target: TargetData, *, overrides: Sequence[str] = ()) -> Choice:
    """The recipe for a checkpoint and a data set; a published one where there is one.

    Args:
        start: What the checkpoint is.
        target: What is trained on.
        overrides: What the person asks; a size in `data.image_px` decides between recipes.

    Raises:
        CheckpointError: The checkpoint is none of a ConvNeXt.
    """
    if start.variant.family == "timm":
        raise CheckpointError(
            f"the checkpoint is a {start.variant.name}: start weights are read for ConvNeXt only",
            hint="evaluate it, or train one from scratch: convnext train RECIPE model.name="
            + start.variant.name,
        )
    asked_px = find_override("data.image_px", overrides)
    image_px = asked_px if isinstance(asked_px, int) else None
    published = _find_published(start, target, image_px=image_px)
    if published is not None:
        return published
    return _choose_general(start, target, image_px=image_px)


def _find_published(start: Start, target: TargetData, *, image_px: int | None) -> Choice | None:
    variant = start.variant
    size = variant.name.rpartition("_")[2]
    head = start.num_classes
    match (variant.family, head, target.kind):
        case ("v1", 21_841, "imagenet1k"):
            stem, reason = f"in22k_in1k_{size}", "its head has the 21,841 classes of ImageNet-22K"
        case ("v2", 21_841, "imagenet1k"):
            stem = f"v2_in22k_in1k_{size}"
            reason = "its head has the 21,841 classes of ImageNet-22K"
        case ("v1", 1_000, "imagenet1k") if (image_px or 0) >= 384 and not _is_own(start, target):
            stem, reason = f"in1k_384_{size}", "it was trained on ImageNet-1K, and 384 px are asked"
        case ("v2", None, "imagenet1k"):
            stem, reason = f"v2_in1k_{size}", "it has no head: it was pre-trained without labels"
        case ("v2", None, "imagenet22k"):
            stem, reason = f"v2_in22k_{size}", "it has no head: it was pre-trained without labels"
        case _:
            return None
    recipe = _nearest_recipe(stem, image_px or 224)
    if recipe is None:
        return None
    return Choice(
        recipe=recipe,
        overrides=_prepare_images(start, image_px),
        reason=f"the checkpoint is a {variant.name}; {reason}",
    )


def _prepare_images(start: Start, image_px: int | None) -> tuple[str, ...]:
    """Images as the checkpoint knows them, and evaluated as published for a size that is asked."""
    return (
        *([f"data.mean={json.dumps(start.mean)}"] if start.mean is not None else []),
        *([f"data.std={json.dumps(start.std)}"] if start.std is not None else []),
        *(["evaluate.crop=warp"] if image_px is not None and image_px >= 384 else []),
    )


def _nearest_recipe(stem: str, image_px: int) -> str | None:
    """The shipped recipe called `stem` or `stem_<size in px>`, of the nearest size."""
    sizes = {
        name: abs(int(tail or image_px) - image_px)
        for name in list_recipes()
        if name.startswith(stem)
        and ((tail := name.removeprefix(stem).removeprefix("_")).isdigit() or name == stem)
    }
    return min(sizes, key=lambda name: (sizes[name], name), default=None)


def _is_own(start: Start, target: TargetData) -> bool:
    """Whether the checkpoint says that its classes are other ones."""
    return bool(start.classes) and start.classes != target.classes


def _choose_general(start: Start, target: TargetData, *, image_px: int | None) -> Choice:
    variant = start.variant
    size_px = image_px or start.image_px or 224
    # unnamed classes in the number of a published data set are taken for its own, as in evaluation
    unnamed = not start.classes and start.num_classes == len(target.classes)
    same = start.classes == target.classes or (unnamed and target.kind != "own")
    head = "keep" if same else "reset"
    overrides = [
        f"model.name={variant.name}",
        f"data.image_px={size_px}",
        f"init.head={head}",
        *_prepare_images(start, size_px),
    ]
    if start.num_classes is not None:
        # weights that were trained with labels are near their goal: the recipe's own rate, which
        # has to serve a start from nothing too, would undo a part of them
        overrides.append("optim.lr=1e-4")
    why = "your own images"
    if target.kind != "own":
        why = f"no published recipe goes from {_describe_head(start)} to {target.kind}"
    kept = "its head is kept" if same else f"a new head for {len(target.classes):,} classes"
    return Choice(
        recipe=GENERAL,
        overrides=tuple(overrides),
        reason=f"the checkpoint is a {variant.name}; {why}, at {size_px} px, {kept}",
    )


def _describe_head(start: Start) -> str:
    if start.num_classes is None:
        return "a checkpoint without a head"
    return f"a head of {start.num_classes:,} classes"


def fit_recipe(recipe: str, start: Start, *, overrides: Sequence[str] = ()) -> Choice:
    """A named recipe with the checkpoint's architecture and, where it names none, normalisation.

    A recipe for a published data set is one for its architecture; any other recipe takes the
    checkpoint's.

    Raises:
        RecipeError: The recipe, or an override, is for another architecture.
    """
    asked = load_recipe(recipe, overrides)
    wanted, found = asked.model.name, start.variant.name
    said = {f"data.{name}" for name in asked.data.model_fields_set}
    images = tuple(o for o in _prepare_images(start, None) if o.partition("=")[0] not in said)
    if wanted == found:
        return Choice(recipe=recipe, overrides=images, reason=f"as asked, from a {found}")
    if asked.data.dataset is None and find_override("model.name", overrides) is None:
        return Choice(
            recipe=recipe,
            overrides=(f"model.name={found}", *images),
            reason=f"as asked, with the checkpoint's architecture, {found}",
        )
    raise RecipeError(
        f"{recipe} trains a {wanted}, but the checkpoint is a {found}",
        hint="leave the recipe out and it is chosen, or ask for the checkpoint's architecture:"
        f" model.name={found}",
    )
