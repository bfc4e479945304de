"""`convnext evaluate`: a checkpoint on a data set: accuracy, classes, confusion, calibration."""

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress
from rich.text import Text

from convnext_cli.catalog.datasets import imagenet_class_names
from convnext_cli.cli._console import (
    console,
    count_columns,
    make_table,
    print_facts,
    print_json,
    print_table,
)
from convnext_cli.cli._inputs import (
    DeviceOption,
    DevicesOption,
    JsonOption,
    RequiredDataOption,
    check_folder_of,
    find_cluster,
)
from convnext_cli.cli._models import (
    CheckpointArgument,
    CropFracOption,
    CropOption,
    ImagePxOption,
    WeightsOption,
    name_class,
)
from convnext_cli.errors import StorageError
from convnext_cli.recipe.schema import Precision
from convnext_cli.runs.record import writing_to
from convnext_cli.training.report import TIMM_COLUMNS, ClassRow, PairRow, Report

SHOWN = 10
"""Classes and pairs that are shown to people; --json and --per-class hold more."""

Listener = Callable[[int, int], None]


def evaluate(
    checkpoint: CheckpointArgument,
    *,
    data: RequiredDataOption,
    split: Annotated[str, typer.Option(help="Split to evaluate on.")] = "val",
    weights: WeightsOption = "auto",
    image_px: ImagePxOption = None,
    crop: CropOption = None,
    crop_frac: CropFracOption = None,
    batch: Annotated[int, typer.Option(help="Images per pass and device.", min=1)] = 64,
    workers: Annotated[
        int | None, typer.Option(help="Loader processes per device (default: by cores).", min=0)
    ] = None,
    device: DeviceOption = "auto",
    devices: DevicesOption = None,
    precision: Annotated[Precision, typer.Option(help="Arithmetic.")] = "fp32",
    json_output: JsonOption = False,
    csv_file: Annotated[
        Path | None,
        typer.Option("--csv", help="Add a row with timm's columns to this table.", metavar="FILE"),
    ] = None,
    per_class: Annotated[
        Path | None, typer.Option(help="Write every class's accuracy as CSV.", metavar="FILE")
    ] = None,
) -> None:
    """Evaluate a checkpoint: top-1/5, loss, classes, confused pairs, calibration, speed.

    Every image counts once, for any batch size and number of devices. Images are prepared as the
    checkpoint says; for published weights, as published for their size.

    Example: convnext evaluate runs/in1k_tiny --data /data/imagenet
    """
    from convnext_cli.training.evaluation import EvaluationSetup, evaluate_model
    from convnext_cli.training.loading import AskedView, load_model

    if csv_file is not None:
        _check_target(csv_file, columns=TIMM_COLUMNS)
    if per_class is not None:
        _check_target(per_class, columns=None)
    cluster = find_cluster(devices=devices, nodes=1, device=device)
    if cluster.rank != 0:
        console.quiet = True
    asked = AskedView(image_px=image_px, crop=crop, crop_frac=crop_frac)
    with console.status("reading the weights"):
        model = load_model(checkpoint, prefer=weights, asked=asked)
    share = cluster.cpus_per_node // cluster.devices_per_node
    with _progress() as show:
        report = evaluate_model(
            model,
            data=data,
            split=split,
            setup=EvaluationSetup(
                cluster=cluster,
                precision=precision,
                per_device_images=batch,
                workers=max(0, min(16, share - 1)) if workers is None else workers,
            ),
            listener=show,
        )
    if cluster.rank != 0:
        return
    if csv_file is not None:
        _append_row(csv_file, report)
    if per_class is not None:
        _write_classes(per_class, report)
    if json_output:
        print_json(report.to_json())
    else:
        show_report(report)


@contextmanager
def _progress() -> Iterator[Listener | None]:
    """A bar on a terminal that goes when the work is done; nothing elsewhere."""
    if not console.is_terminal or console.quiet:
        yield None
        return
    with Progress(*count_columns("batches"), console=console, transient=True) as bar:
        task = bar.add_task("evaluating", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show_report(report: Report) -> None:
    """Write an evaluation for people, on stderr."""
    crop = f"center crop {report.crop_frac:g}" if report.crop == "center" else "warp"
    averaged = "averaged (EMA) weights" if report.weights == "ema" else "raw weights"
    top5 = [("top-5", f"{report.top5:.2f}%")] if len(report.per_class) > 5 else []
    facts = (
        ("model", f"{report.model}, {report.parameters:,} parameters"),
        ("weights", f"{averaged} of {report.checkpoint}"),
        ("data", f"{report.data} {report.split}: {report.images:,} images"),
        ("view", f"{report.image_px} px, {crop}, {report.interpolation}: {report.view_reason}"),
        ("top-1", f"{report.top1:.2f}%"),
        *top5,
        ("loss", f"{report.loss:.4f}"),
        ("ECE", f"{report.ece:.4f} (gap between probability and accuracy)"),
        ("speed", f"{report.images_per_second:,.0f} images/s in {report.precision}"),
    )
    print_facts(facts)
    _show_classes(report.per_class)
    _show_pairs(report.worst_pairs)


def _show_classes(rows: Sequence[ClassRow]) -> None:
    measured = [row for row in rows if row.images]
    worst = sorted(measured, key=lambda row: (row.correct / row.images, row.label))[:SHOWN]
    console.print(Text(f"\nlowest accuracy of {len(measured):,} classes", style="bold"))
    table = make_table("class", ">top-1 %", ">images")
    for row in worst:
        table.add_row(
            Text(name_class(row.name)), f"{100 * row.correct / row.images:.1f}", f"{row.images:,}"
        )
    print_table(table)


def _show_pairs(pairs: Sequence[PairRow]) -> None:
    if not pairs:
        return
    console.print(Text("\nmost confused", style="bold"))
    table = make_table("class", "taken for", ">images", ">% of class")
    for pair in pairs[:SHOWN]:
        table.add_row(
            Text(name_class(pair.name)),
            Text(name_class(pair.taken_for)),
            f"{pair.images:,}",
            f"{100 * pair.share:.1f}",
        )
    print_table(table)


def _append_row(path: Path, report: Report) -> None:
    with writing_to(path), path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, TIMM_COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        elif not path.read_bytes().endswith(b"\n"):  # an editor left the last line open
            file.write("\n")
        writer.writerow(report.to_timm_row())


def _write_classes(path: Path, report: Report) -> None:
    with writing_to(path), path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("label", "class", "words", "images", "correct", "top1"))
        for row in report.per_class:
            words = imagenet_class_names().get(row.name, row.name)
            top1 = "" if row.top1 is None else f"{row.top1:.3f}"
            writer.writerow((row.label, row.name, words, row.images, row.correct, top1))


def _check_target(path: Path, *, columns: Sequence[str] | None) -> None:
    """Refuse a file that cannot be written, before the time is spent.

    Raises:
        StorageError: It is a folder, its folder is not there, or it holds another table.
    """
    if path.is_dir():
        raise StorageError(
            f"cannot write {path}: it is a folder",
            hint="name a file in a folder that is there and may be written",
        )
    check_folder_of(path)
    if columns is None or not path.is_file():
        return
    with writing_to(path), path.open(encoding="utf-8", errors="replace") as file:
        header = file.readline().strip()
    if header and header != ",".join(columns):
        raise StorageError(
            f"{path} holds another table: its first line is {header[:60]!r}",
            hint="name a new file, or one that --csv has written",
        )
