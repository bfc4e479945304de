"""`convnext data show`: a contact sheet of what the network sees."""

import os
from pathlib import Path
from typing import Annotated

import typer

from convnext_cli.cli._console import console, print_json
from convnext_cli.cli._inputs import JsonOption, OverridesArgument
from convnext_cli.errors import DataError, StorageError
from convnext_cli.recipe.files import load_recipe
from convnext_cli.recipe.schema import Recipe


def show(
    directory: Annotated[str, typer.Argument(help="Packed data set: a folder or URL.")],
    overrides: OverridesArgument = None,
    *,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe whose views are shown (default: the paper's).")
    ] = None,
    split: Annotated[
        str, typer.Option(help="Split; any other than train is shown as evaluated.")
    ] = "train",
    images: Annotated[int, typer.Option(help="Number of images.", min=1, max=400)] = 32,
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("contact-sheet.png"),
    seed: Annotated[
        int | None, typer.Option(help="Other images and views (default: the recipe's seed).", min=0)
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Draw a contact sheet: originals, their views in several epochs, and what is trained on.

    Example: convnext data show photos --recipe small_data --images 16
    """
    from convnext_cli.data.augment import EvalView, TrainView
    from convnext_cli.data.build import default_cache_dir
    from convnext_cli.data.card import read_card
    from convnext_cli.data.contact_sheet import make_sheet
    from convnext_cli.data.fetch import Store
    from convnext_cli.data.mix import BatchMix
    from convnext_cli.data.reader import ImageReader

    asked = _load(recipe, overrides)
    card = read_card(directory)
    data, augment = asked.data, asked.augment
    view: TrainView | EvalView
    if split == "train":
        view = TrainView(
            image_px=data.image_px,
            crop_scale=augment.crop_scale,
            crop_ratio=augment.crop_ratio,
            interpolation=augment.interpolation,
            hflip=augment.hflip,
            rand_augment=augment.rand_augment,
            color_jitter=augment.color_jitter,
            mean=data.mean,
        )
    else:
        view = EvalView(
            image_px=data.image_px,
            crop=asked.evaluate.crop,
            crop_frac=asked.evaluate.crop_frac,
            interpolation=augment.interpolation,
        )
    cache_dir = Path(data.cache_dir) if data.cache_dir else default_cache_dir()
    reader = ImageReader(
        card,
        store=Store(location=directory, cache_dir=cache_dir),
        split=split,
        view=view,
        seed=asked.seed if seed is None else seed,
        on_bad="replace" if split == "train" else "raise",
    )
    if not len(reader):
        raise DataError(f"{directory}: the split {split} has no images", hint="name another split")
    mix = BatchMix(
        num_classes=max(2, len(card.classes)),
        mean=data.mean,
        std=data.std,
        erasing=augment.erasing,
        mixup=asked.mix.mixup,
        cutmix=asked.mix.cutmix,
        prob=asked.mix.prob,
        switch_prob=asked.mix.switch_prob,
        label_smoothing=asked.mix.label_smoothing,
    )
    shown = min(images, len(reader))
    title = (
        f"{directory}: {split}, {shown} of {len(reader):,} images, at {data.image_px} px, "
        f"views of {recipe or 'the paper'}"
    )
    with console.status("drawing"):
        sheet = make_sheet(reader, classes=card.classes, mix=mix, num_images=shown, title=title)
    target = out.expanduser()
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        sheet.save(partial, "PNG")
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(
            f"{target}: {error.strerror or error}", hint="choose another file: --out FILE.png"
        ) from error
    if json_output:
        print_json({"sheet": str(target), "images": shown, "split": split})
    else:
        console.print(f"{shown} images on {target}", markup=False)


def _load(recipe: str | None, overrides: list[str] | None) -> Recipe:
    """The recipe asked for; without one, the schema's defaults, which are the paper's."""
    if recipe is not None:
        return load_recipe(recipe, overrides or ())
    if overrides:
        raise DataError(
            f"{overrides[0]}: changes need a recipe to change", hint="add --recipe NAME"
        )
    return Recipe(about="the paper's views")
