"""`convnext data index`: an index for shards that others made, without copying them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from convnext_cli.cli._console import console, count_columns, make_table, print_json, print_table
from convnext_cli.cli._inputs import JsonOption, expand_home
from convnext_cli.data.card import DatasetCard
from convnext_cli.errors import DataError, quote_path
from convnext_cli.plan.cluster import count_cpus

_MAX_KINDS = 8


def index(
    shards: Annotated[
        list[str],
        typer.Argument(help="Shards: paths or URLs with {0000..1023}, or their folder."),
    ],
    *,
    out: Annotated[
        Path, typer.Option(help="Folder for dataset.json and the indexes.", callback=expand_home)
    ],
    val: Annotated[
        list[str] | None,
        typer.Option(help="Shards for validation (default: those named val or valid, else test)."),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(help="Where labels are: cls, txt or json:FIELD (default: found out)."),
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(help="Names of the classes, one a line, in label order.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes (default: one a CPU).", min=1)
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Index WebDataset shards where they lie, in one pass; the shards are not copied.

    Example: convnext data index hf://datasets/timm/imagenet-1k-wds --out imagenet1k
    """
    from convnext_cli.data.foreign import (
        choose_splits,
        index_shards,
        list_shards,
        parse_label_source,
    )

    train_shards, val_shards, left_out = choose_splits(
        list_shards(shards), val=list_shards(val or ())
    )
    names = None if classes is None else _read_classes(classes)
    with Progress(*count_columns("shards"), console=console, transient=True) as progress:
        bar = progress.add_task("indexing", total=None)
        made = index_shards(
            train_shards,
            val_shards,
            out=out,
            labels=None if label is None else parse_label_source(label),
            classes=names,
            workers=workers or count_cpus(),
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    card, notes = made.card, (*left_out, *made.notes)
    if json_output:
        print_json(
            {
                "out": str(out),
                "shards_at": card.shards_at,
                "classes": len(card.classes),
                "images": {name: split.images for name, split in card.splits.items()},
                "shards": {name: len(split.shards) for name, split in card.splits.items()},
                "skipped_members": dict(made.skipped),
                "unreadable": made.unreadable,
                "reused_shards": made.reused_shards,
                "notes": list(notes),
                "fingerprint": card.fingerprint,
            }
        )
        return
    print_splits(card)
    for note in notes:
        console.print(note, soft_wrap=True)
    if made.skipped:
        kinds = [f"{times:,} {kind}" for kind, times in made.skipped.items()]
        told = ", ".join(kinds[:_MAX_KINDS]) + (" ..." if len(kinds) > _MAX_KINDS else "")
        console.print(f"members that are no images or labels: {told}", soft_wrap=True)
    if made.unreadable:
        console.print(
            f"{made.unreadable:,} images have no readable header:"
            f" convnext data check {quote_path(out)} --deep",
            soft_wrap=True,
            style="yellow",
        )
    if made.reused_shards:
        console.print(f"{made.reused_shards} shards were scanned before", soft_wrap=True)
    console.print(f"\nwritten to {out}; next:", soft_wrap=True)
    console.print(f"  convnext data check {quote_path(out)}", soft_wrap=True)
    if "train" in card.splits:
        console.print(f"  convnext train small_data --data {quote_path(out)}", soft_wrap=True)


def print_splits(card: DatasetCard) -> None:
    """Show the totals of each split to people."""
    table = make_table("split", ">images", ">classes", ">shards", ">MB")
    for name, split in card.splits.items():
        table.add_row(
            name,
            f"{split.images:,}",
            f"{sum(1 for count in split.class_images if count):,}",
            f"{len(split.shards):,}",
            f"{sum(shard.bytes for shard in split.shards) / 1e6:,.1f}",
        )
    print_table(table)


def _read_classes(path: Path) -> list[str]:
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--classes {path} cannot be read: {error}", hint="a text file of one name a line"
        ) from error
    names = [line.strip() for line in lines if line.strip()]
    if not names or len(set(names)) < len(names):
        raise DataError(
            f"--classes {path}: {'no name' if not names else 'a name comes twice'}",
            hint="one name a line, in label order",
        )
    return names
