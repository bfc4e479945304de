"""`convnext predict`: what a checkpoint sees in image files."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from convnext_cli.cli._console import console, make_table, print_json, print_table
from convnext_cli.cli._inputs import DeviceOption, JsonOption, find_device
from convnext_cli.cli._models import (
    CheckpointArgument,
    CropFracOption,
    CropOption,
    ImagePxOption,
    WeightsOption,
    name_class,
)
from convnext_cli.errors import DataError
from convnext_cli.training.report import Prediction, Unread

_NAMED = 5


def predict(
    checkpoint: CheckpointArgument,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Image files, folders or patterns.")
    ],
    *,
    top: Annotated[int, typer.Option(help="Classes to name for each image.", min=1)] = 5,
    weights: WeightsOption = "auto",
    image_px: ImagePxOption = None,
    crop: CropOption = None,
    crop_frac: CropFracOption = None,
    device: DeviceOption = "auto",
    json_output: JsonOption = False,
) -> None:
    """Name the most probable classes of images.

    Files that are no images are named at the end, after the results of the others; then the exit
    code is 2.

    Example: convnext predict runs/in1k_tiny cat.jpg holiday/ --top 3
    """
    paths, unread = find_images(images)
    num_asked = len(paths) + len(unread)
    if not paths:
        raise _explain(unread, num_files=num_asked)
    from convnext_cli.training.devices import check_devices
    from convnext_cli.training.loading import AskedView, load_model
    from convnext_cli.training.prediction import predict_images

    cluster = find_device(device)
    check_devices(cluster, precision="fp32")
    asked = AskedView(image_px=image_px, crop=crop, crop_frac=crop_frac)
    with console.status("reading the weights"):
        model = load_model(checkpoint, prefer=weights, asked=asked)
    seen: list[Prediction] = []
    with console.status("looking at the images"):
        for result in predict_images(model, paths, device=cluster.device, top=top):
            match result:
                case Prediction():
                    seen.append(result)
                case Unread():
                    unread.append(result)
    if json_output and seen:
        print_json([prediction.to_json() for prediction in seen])
    elif seen:
        _show(seen)
    if unread:
        raise _explain(unread, num_files=num_asked)


def find_images(asked: Sequence[str]) -> tuple[list[Path], list[Unread]]:
    """The files of paths, folders and patterns, each once; and what is not there.

    A named file is taken whatever its name says, if it is a regular file; from folders those that
    `convnext data pack` would take.
    """
    from convnext_cli.data.sources import list_images

    found: dict[Path, None] = {}
    unread: list[Unread] = []
    for name in asked:
        path = Path(name).expanduser()
        if path.is_dir():
            files = list_images(path)
            if not files:
                unread.append(Unread(image=name, reason="a folder without images"))
        elif path.exists() or not set(name) & set("*?["):
            files = [path]
        else:
            files = _match(path)
            if not files:
                unread.append(Unread(image=name, reason="no file matches"))
        found |= dict.fromkeys(files)
    special = [path for path in found if path.exists() and not path.is_file()]
    reason = "not a regular file, but a device or a pipe"
    unread += [Unread(image=str(path), reason=reason) for path in special]
    return [path for path in found if path not in special], unread


def _match(pattern: Path) -> list[Path]:
    """Files that match a quoted pattern, sorted; hidden ones only where it begins with a dot."""
    root = Path(pattern.anchor) if pattern.anchor else Path()
    parts = pattern.relative_to(pattern.anchor) if pattern.anchor else pattern
    hidden = pattern.name.startswith(".")
    return sorted(
        path
        for path in root.glob(str(parts))
        if not path.is_dir() and (hidden or not path.name.startswith("."))
    )


def _explain(unread: Sequence[Unread], *, num_files: int) -> DataError:
    named = "; ".join(f"{bad.image}: {bad.reason}" for bad in unread[:_NAMED])
    more = f"; and {len(unread) - _NAMED} more" if len(unread) > _NAMED else ""
    many = f"{len(unread)} of {num_files} images cannot be read: " if len(unread) > 1 else ""
    return DataError(f"{many}{named}{more}", hint=_hint_for(Path(unread[0].image)))


def _hint_for(path: Path) -> str:
    if not path.exists():
        return "check the path"
    if path.is_file() and os.access(path, os.R_OK):
        return "save it again as JPEG or PNG, or leave it out"
    return "name JPEG, PNG, WEBP, BMP, GIF or TIFF files that may be read"


def _show(predictions: Sequence[Prediction]) -> None:
    """Write predictions for people, on stderr."""
    table = make_table("image", ">%", "class")
    for number, prediction in enumerate(predictions):
        if number:
            table.add_section()
        for rank, guess in enumerate(prediction.guesses):
            table.add_row(
                Text(prediction.image if rank == 0 else ""),
                f"{100 * guess.probability:.1f}",
                Text(name_class(guess.name), style="bold" if rank == 0 else ""),
            )
    print_table(table)
