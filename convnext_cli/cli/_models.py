"""What the commands that take a model share: its arguments and its name for people."""

from typing import Annotated, Literal

import typer

from convnext_cli.catalog.datasets import imagenet_class_names
from convnext_cli.recipe.schema import MAX_IMAGE_PX

CheckpointArgument = Annotated[
    str,
    typer.Argument(
        metavar="CKPT",
        help="Weight file or folder in any published layout, a run, timm:NAME or timm:NAME:PATH.",
    ),
]
WeightsOption = Annotated[
    Literal["auto", "raw", "ema"],
    typer.Option(help="Weights of a training checkpoint; auto: the averaged ones if it has them."),
]
ImagePxOption = Annotated[
    int | None,
    typer.Option(
        help="Side of the network's input, in pixels (default: the model's).",
        min=8,
        max=MAX_IMAGE_PX,
    ),
]
CropOption = Annotated[
    Literal["center", "warp"] | None,
    typer.Option(help="How an image becomes a square (default: the model's)."),
]
CropFracOption = Annotated[
    float | None,
    typer.Option(help="Share of the resized side that the central crop keeps.", min=0.05, max=1.0),
]


def name_class(name: str) -> str:
    """A class's name for people: the first word of a wnid, any other name as it is."""
    return imagenet_class_names().get(name, name).partition(",")[0]
