"""`dataset.json`: the classes, splits, shards and hashes of a packed data set.

Read without numpy or torch, so that planning stays light.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from convnext_cli.data.fetch import read_file
from convnext_cli.errors import DataError
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

    @property
    def fingerprint(self) -> str:
        """Changes when a class or a byte of a shard does."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for name, split in sorted(self.splits.items()):
            for shard in split.shards:
                digest.update(f"\n{name} {shard.name} {shard.images} {shard.sha256}".encode())
        return digest.hexdigest()


def index_name(shard: str) -> str:
    """The name of a shard's index, beside the card; shards in sub-folders have flat ones."""
    return f"{shard.removesuffix('.tar').replace('/', '--')}.index.npz"


def shards_location(card: DatasetCard, location: str) -> str:
    """Folder or URL of the shards of a card that was read at a location."""
    return card.shards_at or location


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
            check = "check the network and try again" if "://" in place else f"ls -ld {place}"
            raise DataError(str(error), hint=error.hint or check) from error
        there = "://" in place or Path(place).is_dir()
        what = f"{place} holds no {CARD_NAME}" if there else f"there is no folder {place}"
        raise DataError(
            f"{what}: it is not a packed data set",
            hint="check the address, or pack one: convnext data pack SOURCE OUT"
            if "://" in place
            else f"pack one: convnext data pack SOURCE {place}",
        ) from error
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
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{place}/{CARD_NAME} is damaged: {error!r}",
            hint="pack the data set again: convnext data pack SOURCE OUT",
        ) from error


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
