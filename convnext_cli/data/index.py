"""What is in a shard: key, label, place, size and digest of every image.

A shard is a plain ustar file of samples, each of them neighbours that share a key:

```
KEY.jpg     the image            offset and length are in the index
KEY.cls     its label as text    the label is in the index
KEY.json    where it came from   not needed to read
```

The scanner reads a shard once, from its begin to its end, from a file or a network. It verifies
each header's checksum, that nothing follows the end mark, and pairs every member; damage is an
error with its offset. Members that are neither image nor label are counted and never opened. A key
is a name and never a path: nothing is written or opened by it. The tar reader of Python's standard
library, which WebDataset uses, takes a damaged header in the middle of a stream for the end of the
file and drops the rest without a word.

A digest is the 64-bit xxh3 of an image's bytes: for 0.002 ms an image a reader notices any flipped
bit.
"""

import hashlib
import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from convnext_cli.data.header import BadImage, read_image_size
from convnext_cli.errors import DataError, quote_path
from convnext_cli.runs.record import writing_to, written_whole

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_BLOCK = 512
_READ_BYTES = 4 << 20
_MAX_MEMBER_BYTES = 1 << 30
_MAX_LABEL = (1 << 31) - 1
NO_NUMBER = -1
_MAX_TEXT_BYTES = 1 << 20
"""Of a label, or a name in a header of its own."""
_COPY_AGAIN = "copy the file again, or make it again"
_FILES = (b"0", b"\0", b"7")
_NAMES = (b"L", b"x")
_ABOUT_OTHERS = (b"K", b"g")
_WITHOUT_BYTES = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Kinds of members: links, devices, folders and queues hold none, whatever size they tell."""
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_REPACK = "make the shard again, such as from its images: convnext data pack SOURCE OUT"


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard, in its order; all columns have the same length."""

    key_text: bytes
    """All keys, one after the other, in UTF-8."""
    key_end: NDArray[np.int64]
    """Where each ends in that text."""
    labels: NDArray[np.int32]
    image_offset: NDArray[np.int64]
    """Where the image's bytes begin in the shard."""
    image_bytes: NDArray[np.int64]
    digest: NDArray[np.uint64]
    """xxh3 of the image's bytes."""
    width: NDArray[np.int32]
    """Of the image in pixels; 0 where it was not measured."""
    height: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, row: int) -> str:
        """The key of one sample; others are not decoded."""
        begin = int(self.key_end[row - 1]) if row else 0
        return self.key_text[begin : int(self.key_end[row])].decode()

    @property
    def keys(self) -> list[str]:
        """All keys."""
        return [self.key(row) for row in range(len(self.key_end))]


LABEL_FIELDS = ("label", "cls", "class")
"""Fields of .json that are known to hold labels, the first one first."""

LabelSource = Literal["cls", "txt"] | tuple[Literal["json"], str]
"""Which member of a sample holds its label: .cls or .txt as a whole, or a field of .json."""


@dataclass(frozen=True)
class Scan:
    """All that one pass over a shard tells."""

    index: ShardIndex
    """Its labels are `NO_NUMBER` where they are names."""
    label_texts: tuple[str, ...]
    """Labels as they are written."""
    num_bytes: int
    sha256: str
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Members that are neither image nor label, by ending."""
    unreadable: int = 0
    """Images whose size could not be read from their header."""


@dataclass(frozen=True)
class Member:
    """One file inside a tar file."""

    name: str
    offset: int
    size: int
    is_file: bool = True
    """False: a link, a device, ...: it holds no bytes of its own."""


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
            cut = min(end, file.tell())
            raise DataError(
                f"{where}: the tar is cut at byte {cut:,}: its end mark is missing",
                hint=_COPY_AGAIN,
            )
        if header == bytes(_BLOCK):
            _check_end(file, end=end, where=where, mark=at)
            return
        if at == begin and header.startswith(_COMPRESSED):
            raise DataError(
                f"{where}: the shard is compressed; shards are plain tar files",
                hint="unpack it first, such as with gunzip or zstd -d",
            )
        # the sum of the header's bytes, with blanks in place of the sum itself
        wanted = sum(header[:148]) + 8 * 32 + sum(header[156:])
        if _octal(header[148:156]) != wanted:
            raise DataError(
                f"{where}: the header at byte {at:,} is damaged"
                + (", or it is no tar" if at == begin else ""),
                hint=_COPY_AGAIN,
            )
        kind = header[156:157]
        size = 0 if kind in _WITHOUT_BYTES else _octal(header[124:136])
        largest = _MAX_TEXT_BYTES if kind in _NAMES else max_bytes
        if size is None or not 0 <= size <= largest or at + _BLOCK + size > end:
            raise DataError(
                f"{where}: the member at byte {at:,} is cut or larger than {largest >> 20:,} MiB",
                hint=_COPY_AGAIN,
            )
        if kind == b"L":  # GNU: the next member's name, too long for its header
            long_name = file.read(size).rstrip(b"\0").decode("utf-8", "backslashreplace")
        elif kind == b"x":  # pax: the same, as a record
            long_name = _pax_path(file.read(size)) or long_name
        elif kind not in _ABOUT_OTHERS:
            name = long_name or _name(header)
            long_name = None
            if kind != b"5" and not name.endswith("/"):  # no folder
                yield Member(name, at + _BLOCK, size, is_file=kind in _FILES)
        at += _BLOCK + -(-size // _BLOCK) * _BLOCK


def _check_end(file: BinaryIO, *, end: int, where: str, mark: int) -> None:
    """Zeros alone may follow the end mark: a header that was zeroed looks like one."""
    while block := file.read(min(_READ_BYTES, max(0, end - file.tell()))):
        if block.strip(b"\0"):
            raise DataError(
                f"{where}: the header at byte {mark:,} is zeroed: data follow this end mark",
                hint=_COPY_AGAIN,
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
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "backslashreplace")


def _pax_path(records: bytes) -> str | None:
    """The name in records of `LENGTH KEY=VALUE` and a newline; a name may hold newlines, too."""
    while length := re.match(rb"(\d{1,7}) ", records):
        end = max(1, int(length[1]))
        key, _, value = records[length.end() : end - 1].partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "backslashreplace")
        records = records[end:]
    return None


class _Forward(io.RawIOBase):
    """A file that is read once, from its begin to its end, and hashed on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._at = 0
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        parts = []
        while size and (block := self._file.read(_READ_BYTES if size < 0 else size)):
            self.digest.update(block)
            self._at += len(block)
            parts.append(block)
            size = size if size < 0 else size - len(block)
        return b"".join(parts)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go forward, by reading."""
        assert whence == 0
        assert offset >= self._at
        while self._at < offset and self.read(min(_READ_BYTES, offset - self._at)):
            pass
        return self._at

    def tell(self) -> int:
        return self._at


def scan_shard(path: Path, *, labels: LabelSource = "cls", names: bool = False) -> Scan:
    """Read a shard once from begin to end.

    Args:
        path: A local file.
        labels: Which members hold the labels.
        names: Whether a label may be a name; else it must be a class number.

    Raises:
        DataError: The shard is damaged or compressed, an image has no label, a label no image, a
            number is no label, or a key or a member comes twice.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            return scan_stream(file, where=str(path), num_bytes=size, labels=labels, names=names)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}",
            hint=f"look: ls -l {quote_path(path)}",
        ) from error


def scan_stream(
    file: BinaryIO,
    *,
    where: str,
    num_bytes: int | None,
    labels: LabelSource = "cls",
    names: bool = False,
) -> Scan:
    """The same of a shard that may come over a network.

    Args:
        file: Read forward only.
        where: What the shard is called in messages.
        num_bytes: Its size; None: not known.
        labels: Which members hold the labels.
        names: Whether a label may be a name; else it must be a class number.

    Raises:
        DataError: As `scan_shard`.
    """
    forward = _Forward(file)
    end = 1 << 62 if num_bytes is None else num_bytes
    keys: dict[str, None] = {}
    columns: list[tuple[int, int, int, int, int]] = []
    texts: list[str] = []
    skipped: Counter[str] = Counter()
    members = iter_members(forward, where=where, end=end)  # type: ignore[arg-type]  # it reads on
    for key, parts in _iter_samples(_read_parts(members, forward, labels, skipped), where=where):
        if key in keys:
            raise DataError(f"{where}: sample {key} comes twice", hint=_REPACK)
        keys[key] = None
        found = (parts.get("image"), parts.get("label"))
        if not isinstance(found[0], tuple) or not isinstance(found[1], str):
            lacking = "image" if found[0] is None else f"label ({_ending(labels)})"
            raise DataError(
                f"{where}: sample {key} has no {lacking}",
                hint="a sample's members lie side by side; where labels are elsewhere, say so:"
                " convnext data index --label json:FIELD",
            )
        if not found[1]:
            if isinstance(labels, str):
                raise DataError(f"{where}: sample {key} has an empty label", hint=_REPACK)
            raise DataError(
                f"{where}: the .json of sample {key} has no label under {labels[1]!r}",
                hint="say which field is the label: convnext data index --label json:FIELD",
            )
        columns.append(found[0])
        texts.append(found[1])
    if num_bytes is not None and forward.tell() != num_bytes:
        raise DataError(
            f"{where}: {forward.tell():,} bytes came, {num_bytes:,} were expected",
            hint="copy the shard again",
        )
    encoded = [key.encode() for key in keys]
    offset, size, digest, width, height = (
        zip(*columns, strict=True) if columns else ((), (), (), (), ())
    )
    index = ShardIndex(
        key_text=b"".join(encoded),
        key_end=np.cumsum([len(key) for key in encoded], dtype=np.int64),
        labels=np.array(
            [
                _class_number(text, where=f"{where}: sample {key}", names=names)
                for text, key in zip(texts, keys, strict=True)
            ],
            dtype=np.int32,
        ),
        image_offset=np.array(offset, dtype=np.int64),
        image_bytes=np.array(size, dtype=np.int64),
        digest=np.array(digest, dtype=np.uint64),
        width=np.array(width, dtype=np.int32),
        height=np.array(height, dtype=np.int32),
    )
    return Scan(
        index=index,
        label_texts=tuple(texts),
        num_bytes=forward.tell(),
        sha256=forward.digest.hexdigest(),
        skipped=dict(skipped),
        unreadable=int((index.width == 0).sum()),
    )


_Image = tuple[int, int, int, int, int]
"""Offset, size, digest, width and height."""
_Part = tuple[str, str, str, _Image | str]
"""Key, the member's name, image or label, and what was read of it."""


def _read_parts(
    members: Iterator[Member],
    file: _Forward,
    labels: LabelSource,
    skipped: Counter[str],
) -> Iterator[_Part]:
    """What each member tells, read as it comes by."""
    for member in members:
        key, ending = _split_name(member.name)
        if not member.is_file:
            skipped["(link)"] += 1
        elif ending in IMAGE_EXTENSIONS:
            data = file.read(member.size)
            try:
                width, height = read_image_size(data, key=key)
            except BadImage:
                width, height = 0, 0
            digest = xxh3_64_intdigest(data)
            yield key, member.name, "image", (member.offset, member.size, digest, width, height)
        elif ending == _ending(labels)[1:]:
            data = file.read(member.size) if member.size <= _MAX_TEXT_BYTES else b""
            yield key, member.name, "label", _label_text(data, labels)
        else:
            skipped[f".{ending}" if ending else "(none)"] += 1


def _split_name(name: str) -> tuple[str, str]:
    """Key and ending of a member; the key ends at the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return folder + slash + stem, ending.lower()


def find_label_source(file: BinaryIO, *, where: str) -> LabelSource:
    """Where labels are, by the first sample: .cls, else a field of .json, else .txt.

    Args:
        file: A shard, read forward only.
        where: What it is called in messages.

    Raises:
        DataError: The begin of the shard is damaged, or the sample holds no label.
    """
    forward = _Forward(file)
    current: str | None = None
    endings: set[str] = set()
    fields: list[str] = []
    members = iter_members(forward, where=where, end=1 << 62)  # type: ignore[arg-type]  # it reads on
    for member in members:
        key, ending = _split_name(member.name)
        if key != current:
            if endings & set(IMAGE_EXTENSIONS):
                break
            current, endings, fields = key, set(), []
        endings.add(ending)
        if ending == "json" and member.size <= _MAX_TEXT_BYTES:
            fields = _label_fields(forward.read(member.size))
    if "cls" in endings or not endings & {"json", "txt"}:
        return "cls"
    for name in LABEL_FIELDS:
        if name in fields:
            return ("json", name)
    if "txt" in endings:
        return "txt"
    raise DataError(
        f"{where}: sample {current} has no .cls and no .txt, and its .json no field label",
        hint=f"say which field is the label: --label json:{fields[0] if fields else 'FIELD'}",
    )


def _label_fields(data: bytes) -> list[str]:
    """The fields of a JSON object that could be labels."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return []
    pairs = content.items() if isinstance(content, dict) else ()
    return [name for name, value in pairs if _field_text(value) is not None]


def _field_text(value: object) -> str | None:
    """A field as a label, a whole number without its point; None: it is neither number nor text."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() if isinstance(value, (int, str)) else None


def _ending(labels: LabelSource) -> str:
    return f".{labels}" if isinstance(labels, str) else ".json"


def _label_text(data: bytes, labels: LabelSource) -> str:
    """The label as it is written; a field that is not there reads as nothing."""
    if isinstance(labels, str):
        return data.decode("utf-8", "backslashreplace").strip()
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return ""
    value = content.get(labels[1]) if isinstance(content, dict) else None
    return _field_text(value) or ""


def _iter_samples(
    parts: Iterator[_Part], *, where: str
) -> Iterator[tuple[str, dict[str, _Image | str]]]:
    """Neighbours with the same key."""
    current: str | None = None
    found: dict[str, _Image | str] = {}
    for key, name, kind, value in parts:
        if key != current:
            if current is not None:
                yield current, found
            current, found = key, {}
        if kind in found:
            raise DataError(f"{where}: {name} is a second {kind} of its sample", hint=_REPACK)
        found[kind] = value
    if current is not None:
        yield current, found


def _class_number(text: str, *, where: str, names: bool) -> int:
    number = parse_class_number(text)
    if names or number != NO_NUMBER:
        return number
    raise DataError(f"{where}: the label is {text[:32]!r}, not a class number", hint=_REPACK)


def parse_class_number(text: str) -> int:
    """The class number that a label is; `NO_NUMBER`: it is none."""
    digits = text.isascii() and text.isdigit() and len(text) <= len(str(_MAX_LABEL))
    return int(text) if digits and int(text) <= _MAX_LABEL else NO_NUMBER


def write_index(index: ShardIndex, path: Path) -> None:
    """Write an index file, whole or not at all; the same index gives the same bytes."""
    with writing_to(path), written_whole(path) as beside, beside.open("wb") as file:
        np.savez(
            file,
            key_text=np.frombuffer(index.key_text, dtype=np.uint8),
            key_end=index.key_end,
            labels=index.labels,
            image_offset=index.image_offset,
            image_bytes=index.image_bytes,
            digest=index.digest,
            width=index.width,
            height=index.height,
        )


def read_index_sha256(path: Path) -> str:
    """The digest of an index file, which the card keeps: labels change without the shard."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_index(path: Path) -> ShardIndex:
    """Read an index file; nothing in it is unpickled.

    Raises:
        DataError: It is missing or damaged.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as columns:
            index = ShardIndex(
                key_text=columns["key_text"].tobytes(),
                key_end=columns["key_end"],
                labels=columns["labels"],
                image_offset=columns["image_offset"],
                image_bytes=columns["image_bytes"],
                digest=columns["digest"],
                width=columns["width"],
                height=columns["height"],
            )
        lengths = {
            len(column)
            for column in (
                *(index.key_end, index.labels, index.image_offset, index.image_bytes),
                *(index.digest, index.width, index.height),
            )
        }
        if len(lengths) > 1:
            raise ValueError("its columns differ in length")  # noqa: TRY301  # told like the rest
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        # RuntimeError: a damaged flag makes the archive look encrypted or of an unknown kind.
        raise DataError(
            f"{path}: the shard's index cannot be read: {error}",
            hint="pack the data set again: convnext data pack SOURCE OUT",
        ) from error
    return index
