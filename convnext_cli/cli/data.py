"""`convnext data`: pack images into shards, check a packed data set, show what is trained on."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from convnext_cli.cli._console import console, count_columns, make_table, print_json, print_table
from convnext_cli.cli._inputs import JsonOption, expand_home
from convnext_cli.cli.data_index import index, print_splits
from convnext_cli.cli.data_order import order
from convnext_cli.cli.data_show import show
from convnext_cli.data.report import DatasetReport, Spread
from convnext_cli.errors import DataError, quote_path
from convnext_cli.plan.cluster import count_cpus

app = typer.Typer(no_args_is_help=True, help="Pack, check and show data sets.")


@app.command()
def pack(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of class folders, CSV of path,label, or ImageNet tars.",
            callback=expand_home,
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the data set.", callback=expand_home)],
    *,
    val_fraction: Annotated[
        float | None, typer.Option(help="Share of the images to set aside for validation.")
    ] = None,
    val_labels: Annotated[
        Path | None,
        typer.Option(help="Labels of ImageNet's validation images: lines of FILENAME WNID."),
    ] = None,
    resize_short: Annotated[
        int | None, typer.Option(help="Short side of larger images, in pixels.", metavar="PX")
    ] = None,
    images_per_shard: Annotated[int, typer.Option(help="Images in a shard.")] = 2000,
    workers: Annotated[
        int | None, typer.Option(help="Processes (default: one a CPU).", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the images.", min=0)] = 0,
    json_output: JsonOption = False,
) -> None:
    """Pack images into shards; the same command again goes on after an interruption.

    Example: convnext data pack photos packed --val-fraction 0.1
    """
    from convnext_cli.data.pack import UNREADABLE_NAME, PackOptions
    from convnext_cli.data.pack import pack as pack_images
    from convnext_cli.data.sources import KIND_TITLES

    with Progress(*count_columns("images"), console=console, transient=True) as progress:
        bar = progress.add_task("packing", total=None)
        packed = pack_images(
            source,
            out,
            options=PackOptions(
                images_per_shard=images_per_shard,
                resize_short=resize_short,
                val_fraction=val_fraction,
                seed=seed,
            ),
            val_labels=val_labels,
            workers=workers or count_cpus(),
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    card = packed.card
    if json_output:
        print_json(
            {
                "out": str(out),
                "kind": packed.kind,
                "classes": len(card.classes),
                "images": {name: split.images for name, split in card.splits.items()},
                "shards": {name: len(split.shards) for name, split in card.splits.items()},
                "unreadable": packed.unreadable,
                "reused_shards": packed.reused_shards,
                "notes": list(packed.notes),
                "fingerprint": card.fingerprint,
            }
        )
        return
    console.print(f"{source}: {KIND_TITLES[packed.kind]}", soft_wrap=True)
    print_splits(card)
    for note in packed.notes:
        console.print(note, soft_wrap=True)
    if packed.reused_shards:
        console.print(f"{packed.reused_shards} shards were finished before", soft_wrap=True)
    if packed.unreadable:
        console.print(
            f"{packed.unreadable:,} files were left out; see {out / UNREADABLE_NAME}",
            soft_wrap=True,
            style="yellow",
        )
    if "val" not in card.splits:
        console.print(
            "no validation images: accuracy will not be measured; to set some aside, pack into"
            " another folder with --val-fraction 0.1",
            soft_wrap=True,
            style="yellow",
        )
    console.print(f"\nwritten to {out}; next:", soft_wrap=True)
    console.print(f"  convnext data check {quote_path(out)}", soft_wrap=True)
    console.print(f"  convnext data show {quote_path(out)}", soft_wrap=True)
    console.print(f"  convnext train small_data --data {quote_path(out)}", soft_wrap=True)


@app.command()
def check(
    directory: Annotated[str, typer.Argument(help="Packed data set: a folder or URL.")],
    *,
    deep: Annotated[bool, typer.Option("--deep", help="Decode every image as well.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Check every byte; tell totals, class balance, image sizes and duplicates.

    Example: convnext data check packed --deep
    """
    from convnext_cli.data.audit import check_dataset

    with Progress(*count_columns("images"), console=console, transient=True) as progress:
        bar = progress.add_task("checking", total=None)
        report = check_dataset(
            directory,
            deep=deep,
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    if json_output:
        print_json(asdict(report))
    else:
        _tell(report)
    if report.damage:
        first = report.damage[0]
        more = f" and {len(report.damage) - 1:,} more" if len(report.damage) > 1 else ""
        raise DataError(
            f"{directory} is damaged: {first.where}: {first.what}{more}",
            hint="copy the data set again, or pack it again into another folder",
        )


def _tell(report: DatasetReport) -> None:
    table = make_table(
        *("split", ">images", ">shards", ">MB", ">a class: min", ">median", ">max"),
        *(">empty", "width px (median)", "height px (median)", ">repeated"),
    )
    for split in report.splits:
        table.add_row(
            split.name,
            f"{split.images:,}",
            f"{split.shards:,}",
            f"{split.bytes / 1e6:,.1f}",
            f"{split.class_images.min:,}",
            f"{split.class_images.median:,g}",
            f"{split.class_images.max:,}",
            f"{len(split.empty_classes):,}",
            _render_spread(split.width),
            _render_spread(split.height),
            f"{split.duplicates:,}",
        )
    console.print(f"{report.location}: {report.classes:,} classes", soft_wrap=True)
    print_table(table)
    for split in report.splits:
        if split.empty_classes:
            names = ", ".join(split.empty_classes[:5])
            console.print(
                f"{split.name} has no image of {names}"
                + (" ..." if len(split.empty_classes) > 5 else ""),
                soft_wrap=True,
            )
    if report.shared:
        train, val = report.shared_examples[0]
        console.print(
            f"{report.shared:,} images of val are in train, too, such as {val} = {train}: "
            "accuracies will look too good",
            soft_wrap=True,
            style="yellow",
        )
    for damage in report.damage[:20]:
        console.print(f"damaged: {damage.where}: {damage.what}", soft_wrap=True, style="red")
    if not report.damage:
        done = "every byte and every image is" if report.deep else "every byte is"
        console.print(f"{done} as it was packed", soft_wrap=True)


def _render_spread(spread: Spread | None) -> str:
    return "?" if spread is None else f"{spread.min}..{spread.max} ({spread.median:g})"


app.command()(index)
app.command()(order)
app.command()(show)
