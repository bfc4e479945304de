"""What is in a shard: key, label, place and size of every image; written beside it, checked by it.

A shard is a plain ustar file of samples, each of them neighbours that share a key:

```
KEY.jpg     the image            offset and length are in the index
KEY.cls     its label as text    the label is in the index
KEY.json    where it came from   not needed to read
```

The scanner verifies each header's checksum, that nothing follows the end mark, and pairs every
member; damage is an error with its offset. The tar reader of Python's standard library, which
WebDataset uses, takes a damaged header in the middle of a stream for the end of the file and drops
the rest without a word.
"""

import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from convnext_cli.errors import DataError
from convnext_cli.runs.record import writing_to

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_BLOCK = 512
_READ_BYTES = 4 << 20
_MAX_MEMBER_BYTES = 1 << 30
_MAX_LABEL = (1 << 31) - 1


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard, in its order; all columns have the same length."""

    keys: Sequence[str]
    labels: NDArray[np.int32]
    image_offset: NDArray[np.int64]
    """Where the image's bytes begin in the shard."""
    image_bytes: NDArray[np.int64]
    width: NDArray[np.int32]
    """Of the image in pixels; 0 where it was not measured."""
    height: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Member:
    """One file inside a tar file."""

    name: str
    offset: int
    size: int


def iter_members(
    file: BinaryIO,
    *,
    where: str,
    begin: int = 0,
    end: int | None = None,
    max_bytes: int = _MAX_MEMBER_BYTES,
) -> Iterator[Member]:
    """The members of a tar file in order, without reading their contents.

    Args:
        file: The file that holds the tar.
        where: What it is called in messages.
        begin: Where the tar begins in the file, in bytes; offsets count from the file's begin.
        end: Where it ends; None: with the file.
        max_bytes: Largest member that is believed.

    Raises:
        DataError: A header is damaged, the file ends before its end mark, or goes on behind it.
    """
    end = file.seek(0, 2) if end is None else end
    at, long_name = begin, None
    while True:
        file.seek(at)
        header = file.read(min(_BLOCK, max(0, end - at)))
        if len(header) < _BLOCK:
            raise DataError(
                f"{where}: the shard is cut at byte {end:,}: its end mark is missing",
                hint="copy the shard again, or pack the data set again",
            )
        if header == bytes(_BLOCK):
            _check_end(file, end=end, where=where, mark=at)
            return
        # the sum of the header's bytes, with blanks in place of the sum itself
        wanted = sum(header[:148]) + 8 * 32 + sum(header[156:])
        if _octal(header[148:156]) != wanted:
            raise DataError(
                f"{where}: the header at byte {at:,} is damaged",
                hint="copy the shard again, or pack the data set again",
            )
        size = _octal(header[124:136])
        if size is None or not 0 <= size <= max_bytes or at + _BLOCK + size > end:
            raise DataError(
                f"{where}: the member at byte {at:,} is cut or larger than {max_bytes >> 30:,} GiB",
                hint="copy the shard again, or pack the data set again",
            )
        kind = header[156:157]
        if kind == b"L":  # GNU: the next member's name, too long for its header
            long_name = file.read(size).rstrip(b"\0").decode("utf-8", "replace")
        elif kind in b"0\0" and kind:
            name = long_name or _name(header)
            yield Member(name, at + _BLOCK, size)
            long_name = None
        elif kind == b"x":  # pax: the same, as a record
            long_name = _pax_path(file.read(size)) or long_name
        at += _BLOCK + -(-size // _BLOCK) * _BLOCK


def _check_end(file: BinaryIO, *, end: int, where: str, mark: int) -> None:
    """Zeros alone may follow the end mark: a header that was zeroed looks like one."""
    while block := file.read(min(_READ_BYTES, max(0, end - file.tell()))):
        if block.strip(b"\0"):
            raise DataError(
                f"{where}: the header at byte {mark:,} is zeroed: data follow this end mark",
                hint="copy the shard again, or pack the data set again",
            )


def _octal(field: bytes) -> int | None:
    text = field.strip(b" \0")
    try:
        return int(text, 8) if text else 0
    except ValueError:
        return None


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:262] == b"ustar" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "replace")


def _pax_path(records: bytes) -> str | None:
    for record in records.split(b"\n"):
        _, _, pair = record.partition(b" ")
        key, _, value = pair.partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "replace")
    return None


def scan_shard(path: Path) -> ShardIndex:
    """Read the headers and labels of a shard.

    Raises:
        DataError: The shard is damaged, an image has no label, a label no image, or a key or a
            member comes twice.
    """
    keys: dict[str, None] = {}
    labels: list[int] = []
    offsets: list[int] = []
    sizes: list[int] = []
    try:
        with path.open("rb") as file:
            for key, parts in _iter_samples(iter_members(file, where=str(path)), where=path):
                if key in keys:
                    raise DataError(
                        f"{path}: sample {key} comes twice",
                        hint="pack the data set again: convnext data pack SOURCE OUT",
                    )
                image = next((parts[ext] for ext in IMAGE_EXTENSIONS if ext in parts), None)
                if image is None or "cls" not in parts:
                    lacking = "image" if image is None else "label (.cls)"
                    raise DataError(
                        f"{path}: sample {key} has no {lacking}",
                        hint="pack the data set again: convnext data pack SOURCE OUT",
                    )
                keys[key] = None
                labels.append(_read_label(file, parts["cls"], where=f"{path}: sample {key}"))
                offsets.append(image.offset)
                sizes.append(image.size)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    return ShardIndex(
        keys=list(keys),
        labels=np.array(labels, dtype=np.int32),
        image_offset=np.array(offsets, dtype=np.int64),
        image_bytes=np.array(sizes, dtype=np.int64),
        width=np.zeros(len(keys), dtype=np.int32),
        height=np.zeros(len(keys), dtype=np.int32),
    )


def _iter_samples(
    members: Iterator[Member], *, where: Path
) -> Iterator[tuple[str, dict[str, Member]]]:
    """Neighbours with the same key; the key ends at the first dot of the base name."""
    current: str | None = None
    parts: dict[str, Member] = {}
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        key = folder + slash + stem
        if key != current:
            if current is not None:
                yield current, parts
            current, parts = key, {}
        if extension.lower() in parts:
            raise DataError(
                f"{where}: {member.name} comes twice",
                hint="pack the data set again: convnext data pack SOURCE OUT",
            )
        parts[extension.lower()] = member
    if current is not None:
        yield current, parts


def _read_label(file: BinaryIO, member: Member, *, where: str) -> int:
    file.seek(member.offset)
    text = file.read(min(member.size, 32)).decode("ascii", "replace").strip()
    if not text.isdigit() or int(text) > _MAX_LABEL:
        raise DataError(
            f"{where}: the label is {text!r}, not a class number",
            hint="pack the data set again: convnext data pack SOURCE OUT",
        )
    return int(text)


def write_index(index: ShardIndex, path: Path) -> None:
    """Write an index file; the same index gives the same bytes."""
    keys = [key.encode() for key in index.keys]
    with writing_to(path), path.open("wb") as file:
        np.savez(
            file,
            key_text=np.frombuffer(b"".join(keys), dtype=np.uint8),
            key_end=np.cumsum([len(key) for key in keys], dtype=np.int64),
            labels=index.labels,
            image_offset=index.image_offset,
            image_bytes=index.image_bytes,
            width=index.width,
            height=index.height,
        )


def read_index(path: Path) -> ShardIndex:
    """Read an index file; nothing in it is unpickled.

    Raises:
        DataError: It is missing or damaged.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as columns:
            text, ends = columns["key_text"].tobytes(), columns["key_end"]
            starts = np.concatenate(([0], ends[:-1])) if len(ends) else ends
            index = ShardIndex(
                keys=[text[a:b].decode() for a, b in zip(starts, ends, strict=True)],
                labels=columns["labels"],
                image_offset=columns["image_offset"],
                image_bytes=columns["image_bytes"],
                width=columns["width"],
                height=columns["height"],
            )
        columns_of = (index.keys, index.image_offset, index.image_bytes, index.width, index.height)
        if any(len(column) != len(index) for column in columns_of):
            raise ValueError("its columns differ in length")  # noqa: TRY301  # told like the rest
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        # RuntimeError: a damaged flag makes the archive look encrypted or of an unknown kind.
        raise DataError(
            f"{path}: the shard's index cannot be read: {error}",
            hint="pack the data set again: convnext data pack SOURCE OUT",
        ) from error
    return index


def hash_file(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
