"""`convnext data`: pack images into shards, check a packed data set, show what is trained on."""

import os
from pathlib import Path
from typing import Annotated

import typer

from convnext_cli.cli._console import console, make_table, print_json, print_table
from convnext_cli.cli._inputs import JsonOption
from convnext_cli.cli.data_show import show

app = typer.Typer(no_args_is_help=True, help="Pack, check and show data sets.")


@app.command()
def pack(
    source: Annotated[
        Path, typer.Argument(help="Folder of class folders, CSV of path,label, or ImageNet tars.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the data set.")],
    *,
    val_fraction: Annotated[
        float | None, typer.Option(help="Share of the images to set aside for validation.")
    ] = None,
    val_labels: Annotated[
        Path | None,
        typer.Option(help="Labels of ImageNet's validation tar: lines of FILENAME WNID."),
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
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from convnext_cli.data.pack import UNREADABLE_NAME, PackOptions
    from convnext_cli.data.pack import pack as pack_images
    from convnext_cli.data.sources import KIND_TITLES

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("packing", total=None)
        packed = pack_images(
            source.expanduser(),
            out.expanduser(),
            options=PackOptions(
                images_per_shard=images_per_shard,
                resize_short=resize_short,
                val_fraction=val_fraction,
                seed=seed,
            ),
            val_labels=val_labels,
            workers=workers or len(os.sched_getaffinity(0)),
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
    table = make_table("split", ">images", ">classes", ">shards", ">MB")
    for name, split in card.splits.items():
        table.add_row(
            name,
            f"{split.images:,}",
            f"{sum(1 for images in split.class_images if images):,}",
            f"{len(split.shards):,}",
            f"{sum(shard.bytes for shard in split.shards) / 1e6:,.1f}",
        )
    print_table(table)
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
    console.print(f"\nwritten to {out}; next:", soft_wrap=True)
    console.print(f"  convnext data check {out}", soft_wrap=True)
    console.print(f"  convnext data show {out}", soft_wrap=True)
    console.print(f"  convnext train small_data --data {out}", soft_wrap=True)


app.command()(show)
