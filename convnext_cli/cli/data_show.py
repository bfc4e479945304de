"""`convnext data show`: a contact sheet of what the network sees."""

from pathlib import Path
from typing import Annotated

import typer

from convnext_cli.cli._console import console, print_json
from convnext_cli.cli._inputs import LARGEST, JsonOption, OverridesArgument
from convnext_cli.errors import DataError
from convnext_cli.recipe.files import load_recipe
from convnext_cli.recipe.schema import Recipe
from convnext_cli.runs.record import writing_to, written_whole


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
        int | None,
        typer.Option(
            help="Other images and views (default: the recipe's seed).", min=0, max=LARGEST
        ),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Draw a contact sheet: originals, their views in several epochs, and what is trained on.

    Example: convnext data show packed --recipe small_data --images 16
    """
    from convnext_cli.data.build import (
        build_eval_view,
        build_mix,
        build_train_view,
    )
    from convnext_cli.data.card import read_card
    from convnext_cli.data.contact_sheet import make_sheet
    from convnext_cli.data.fetch import Store, default_cache_dir
    from convnext_cli.data.reader import ImageReader

    asked = _load(recipe, overrides)
    card = read_card(directory)
    data = asked.data
    view = build_train_view(asked) if split == "train" else build_eval_view(asked)
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
    mix = build_mix(asked, num_classes=max(2, len(card.classes)))
    shown = min(images, len(reader))
    title = (
        f"{directory}: {split}, {shown} of {len(reader):,} images, at {data.image_px} px, "
        f"views of {recipe or 'the paper'}"
    )
    with console.status("drawing"):
        sheet = make_sheet(reader, classes=card.classes, mix=mix, num_images=shown, title=title)
    target = out.expanduser()
    with writing_to(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(target) as beside:
            sheet.save(beside, "PNG")
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
