"""What several commands take: recipe, overrides, data, devices; parsed alike everywhere."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import typer

from convnext_cli.data.card import read_card
from convnext_cli.errors import DataError, RecipeError, StorageError
from convnext_cli.plan.cluster import Cluster, check_place, count_cpus, read_rank, read_shape
from convnext_cli.plan.resolve import DataFacts
from convnext_cli.recipe.files import load_recipe, render_override
from convnext_cli.recipe.schema import Precision, Recipe, expand_home_text

LARGEST = 2**63 - 1
"""Of a seed, a step or an epoch: the generators take so much."""


def expand_home(path: Path) -> Path:
    """A path whose ~ no shell has read, as in --root=~/runs: else a folder is called so."""
    return path.expanduser() if path.parts[:1] == ("~",) else path


def _expand_given(location: str | None) -> str | None:
    return None if location is None else expand_home_text(location)


RecipeArgument = Annotated[
    str, typer.Argument(help="Recipe: a name (convnext recipes list) or a YAML file.")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the recipe, such as optim.lr=2e-3.", metavar="KEY=VALUE"),
]
_DATA = typer.Option(
    "--data", help="Packed data set: a folder or URL.", metavar="DIR", callback=_expand_given
)
DataOption = Annotated[str | None, _DATA]
RequiredDataOption = Annotated[str, _DATA]
DevicesOption = Annotated[
    int | None, typer.Option(help="Devices on each node (default: all GPUs, or 1 CPU).", min=1)
]
NodesOption = Annotated[int, typer.Option(help="Nodes.", min=1)]
DeviceChoice = Literal["auto", "cpu", "cuda"]
DeviceOption = Annotated[DeviceChoice, typer.Option(help="Kind of device.")]
PrecisionOption = Annotated[Precision | None, typer.Option(help="Same as compute.precision=...")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Name or path of a run.")]
RunsDirOption = Annotated[Path, typer.Option(help="Folder of all runs.", callback=expand_home)]
RootOption = Annotated[Path, typer.Option(help="Folder that holds the runs.", callback=expand_home)]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")]


def check_folder_of(path: Path) -> None:
    """Refuse a file to write before the work for it is done, where its folder cannot take it.

    Raises:
        StorageError: The folder is not there, or may not be written.
    """
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise StorageError(
            f"cannot write {path}: {path.parent} is no writable folder",
            hint="name a file in a folder that is there and may be written",
        )


def find_cluster(*, devices: int | None, nodes: int, device: DeviceChoice) -> Cluster:
    """The devices of flags and launcher; without flags all GPUs of this machine, or one CPU.

    Raises:
        LaunchError: This process has a place that the run does not have, or none of several nodes.
    """
    import torch

    alone = find_device(device)
    shape = read_shape()
    if shape is not None:
        nodes, devices = shape
    if devices is None:
        devices = max(1, torch.cuda.device_count()) if alone.device == "cuda" else 1
    if shape is None:
        check_place(os.environ, nodes=nodes, devices=devices)
    return replace(alone, num_nodes=nodes, devices_per_node=devices, rank=read_rank())


def find_device(device: DeviceChoice) -> Cluster:
    """One device, for what is no run: a launcher's variables, where some are set, say nothing."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Cluster(device=device, cpus_per_node=count_cpus())


def load_asked_recipe(
    name: str,
    overrides: Sequence[str] | None,
    *,
    data: str | None = None,
    precision: Precision | None = None,
) -> Recipe:
    """The recipe with its overrides and with the flags that stand for one."""
    if data == "":  # as an unset variable of a shell gives it
        raise DataError("--data: the name is empty", hint="name a packed data set: --data DIR")
    flags = [render_override("data.path", data)] if data is not None else []
    if precision:
        flags.append(f"compute.precision={precision}")
    for override in overrides or ():
        if "=" not in override:
            raise RecipeError(
                f"{override}: section.key=value is wanted after the recipe {name}",
                hint="for example optim.lr=2e-3; a data set is given with --data DIR",
            )
    return load_recipe(name, [*(overrides or ()), *flags])


def read_facts(recipe: Recipe) -> DataFacts | None:
    """Sizes of the data set at `data.path`; None where the recipe names none.

    Raises:
        DataError: The data set is not there, unfinished or damaged.
    """
    path = recipe.data.path
    if path is None:
        return None
    if recipe.data.mode == "stream":
        return _stream_facts(recipe, path)
    card = read_card(path)
    if "train" not in card.splits:
        raise DataError(
            f"{path}: the data set has no split named train, only {', '.join(card.splits)}",
            hint="pack it with a training part: convnext data pack SOURCE DIR",
        )
    images = {name: split.images for name, split in card.splits.items()}
    return DataFacts(
        train_images=images["train"],
        val_images=images.get("val", 0),
        num_classes=len(card.classes),
        source=path,
        fingerprint=card.fingerprint,
    )


def _stream_facts(recipe: Recipe, path: str) -> DataFacts:
    data, classes = recipe.data, recipe.model.num_classes
    if data.train_images is None or classes == "auto":
        raise DataError(
            f"{path}: an unindexed stream does not tell its number of images and classes",
            hint="say them: data.train_images=N data.val_images=N model.num_classes=N",
        )
    return DataFacts(
        train_images=data.train_images,
        val_images=(data.val_images or 0) if data.val_path else 0,
        num_classes=classes,
        source=path,
        fingerprint=name_shards(path if data.val_path is None else f"{path}::{data.val_path}"),
    )


def name_shards(paths: str) -> str:
    """The names of shards, wherever they lie: all that is known of a stream without reading it.

    Args:
        paths: Paths or URLs with braces; `::` stands between several, as webdataset has it.
    """
    return "::".join(PurePosixPath(path.partition("?")[0]).name for path in paths.split("::"))
