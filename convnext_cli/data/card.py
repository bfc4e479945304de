"""`dataset.json`: the classes, splits, shards and hashes of a packed data set.

Read without numpy or torch, so that planning stays light.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from convnext_cli.data.fetch import read_file
from convnext_cli.errors import DataError, quote_path
from convnext_cli.runs.record import write_json

CARD_NAME = "dataset.json"
STATE_NAME = "pack-state"
"""Folder in a data set while it is packed."""
PLAN_NAME = "plan.json"
"""What is being packed, in that folder."""
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    name: str
    images: int
    bytes: int
    sha256: str
    index_sha256: str | None = None
    """Of its index file; None: not known, in cards of before."""


@dataclass(frozen=True)
class Split:
    """The images of one part of a data set."""

    name: str
    shards: tuple[Shard, ...]
    class_images: tuple[int, ...]
    """Images of each class, in label order."""

    @property
    def images(self) -> int:
        """Images in all shards."""
        return sum(shard.images for shard in self.shards)


@dataclass(frozen=True)
class DatasetCard:
    """What a packed data set holds."""

    classes: tuple[str, ...]
    """Names of the classes in label order."""
    splits: Mapping[str, Split]
    options: Mapping[str, Any]
    """How it was packed, or indexed."""
    shards_at: str | None = None
    """Folder or URL that the shards' names are appended to; None: the card's own."""
    recorded: str | None = field(default=None, compare=False)
    """The fingerprint that the file tells: another one where somebody changed it."""

    @property
    def fingerprint(self) -> str:
        """Changes when a class or a byte of a shard or its index does."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for name, split in sorted(self.splits.items()):
            for shard in split.shards:
                digest.update(f"\n{name} {shard.name} {shard.images} {shard.sha256}".encode())
                if shard.index_sha256 is not None:
                    digest.update(f" {shard.index_sha256}".encode())
        return digest.hexdigest()


def index_name(shard: str) -> str:
    """The name of a shard's index, beside the card; shards in sub-folders have flat ones."""
    return f"{shard.removesuffix('.tar').replace('/', '--')}.index.npz"


def shards_location(card: DatasetCard, location: str) -> str:
    """Folder or URL of the shards of a card that was read at a location."""
    return card.shards_at or location


def require_path(path: str | None) -> str:
    """A recipe's `data.path`.

    Raises:
        DataError: The recipe names none.
    """
    if path is None:
        raise DataError(
            "the recipe names no data set to train on",
            hint="name one with --data DIR (convnext data pack SOURCE DIR makes it)",
        )
    return path


def read_card(location: str | Path) -> DatasetCard:
    """The card of a packed data set in a folder or at a URL.

    Raises:
        DataError: There is none, it is damaged, or of a newer format.
    """
    place = str(location).rstrip("/")
    try:
        plain = json.loads(read_file(f"{place}/{CARD_NAME}"))
    except DataError as error:
        if not isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
            check = (
                "check the network and try again"
                if "://" in place
                else f"ls -ld {quote_path(place)}"
            )
            raise DataError(str(error), hint=error.hint or check) from error
        raise _no_card(place) from error
    except ValueError as error:
        raise DataError(
            f"{place}/{CARD_NAME} cannot be read: {error}",
            hint="pack the data set again: convnext data pack SOURCE OUT",
        ) from error
    try:
        if plain["format"] > FORMAT:
            raise DataError(
                f"{place}/{CARD_NAME} has format {plain['format']}, newer than {FORMAT}",
                hint="update this program: pip install -U convnext",
            )
        return DatasetCard(
            classes=tuple(plain["classes"]),
            splits={
                name: Split(
                    name=name,
                    shards=tuple(Shard(**shard) for shard in split["shards"]),
                    class_images=tuple(split["class_images"]),
                )
                for name, split in plain["splits"].items()
            },
            options=plain["options"],
            shards_at=plain.get("shards_at"),
            recorded=plain.get("fingerprint"),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{place}/{CARD_NAME} is damaged: {error!r}",
            hint="pack the data set again: convnext data pack SOURCE OUT",
        ) from error


def _no_card(place: str) -> DataError:
    """Why there is no card: nothing there, packing not at its end, or images as they came."""
    if "://" in place:
        return DataError(
            f"{place} holds no {CARD_NAME}: it is not a packed data set",
            hint="check the address, or pack one: convnext data pack SOURCE OUT",
        )
    folder = Path(place)
    if not folder.is_dir():
        return DataError(
            f"there is no folder {place}: it is not a packed data set",
            hint=f"pack one: convnext data pack SOURCE {quote_path(place)}",
        )
    try:
        names = {entry.name for entry in folder.iterdir()}
    except PermissionError:
        names = set()
    if names == {STATE_NAME} or (folder / STATE_NAME / PLAN_NAME).is_file():
        return DataError(
            f"{place} holds no {CARD_NAME}: its packing is not finished",
            hint=f"repeat the command: convnext data pack SOURCE {quote_path(place)}",
        )
    if not names:
        source, out = "SOURCE", quote_path(place)
    else:
        beside = folder if folder.name not in ("", "..") else folder.resolve()
        source, out = quote_path(place), quote_path(f"{beside}-packed")
    return DataError(
        f"{place} holds no {CARD_NAME}: it is not a packed data set",
        hint=f"pack one: convnext data pack {source} {out}",
    )


def write_card(card: DatasetCard, folder: Path) -> None:
    """Write `dataset.json`, whole or not at all."""
    write_json(
        folder / CARD_NAME,
        {
            "format": FORMAT,
            "fingerprint": card.fingerprint,
            "classes": list(card.classes),
            "splits": {
                name: {
                    "images": split.images,
                    "class_images": list(split.class_images),
                    "shards": [asdict(shard) for shard in split.shards],
                }
                for name, split in sorted(card.splits.items())
            },
            "options": dict(card.options),
            **({} if card.shards_at is None else {"shards_at": card.shards_at}),
        },
    )
