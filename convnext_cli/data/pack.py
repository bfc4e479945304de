"""Images from a source become WebDataset shards with an index, in parallel, to the same bytes.

```
OUT/train-000000.tar            samples: KEY.jpg, KEY.cls (the label), KEY.json (where from)
OUT/train-000000.index.npz      see index.py
OUT/val-000000.tar ...
OUT/unreadable.csv              images that were left out, and why; only where there are any
OUT/dataset.json                classes, splits, hashes; written last: with it the set is complete
OUT/pack-state/                 while packing: the plan, and a record of every finished shard
```

Which image goes into which shard follows from names, seed and options alone, so any number of
workers writes the same bytes, and a shard that a kill left unfinished is simply made again. Every
file gets its name only when it is whole and on the disk.

A JPEG stays as it is, byte for byte; anything else is encoded as JPEG of quality 95 with full
colour resolution: 4:4:4, because small images lose visibly with less. EXIF rotation is not applied,
as in the reader.

Source: webdataset's conventions for tar files; image-net.org for the formats that photos come in.
"""

import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from stat import S_ISDIR, S_ISREG

import numpy as np
from PIL import Image, UnidentifiedImageError

from convnext_cli.data.card import (
    CARD_NAME,
    PLAN_NAME,
    STATE_NAME,
    DatasetCard,
    Shard,
    Split,
    index_name,
    read_card,
    write_card,
)
from convnext_cli.data.decode import decode_rgb
from convnext_cli.data.header import MAX_PIXELS, BadImage
from convnext_cli.data.index import read_index_sha256, scan_shard, write_index
from convnext_cli.data.pool import iter_done
from convnext_cli.data.sources import Sample, Source, SourceKind, list_source
from convnext_cli.errors import DataError, Stopped, StorageError, quote_path
from convnext_cli.runs.record import read_json, sync, write_json, writing_to, written_whole

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Formats that are tried (MPO comes with JPEG); no other reaches a decoder: Pillow would hand
PostScript to its interpreter."""

JPEG_QUALITY = 95
UNREADABLE_NAME = "unreadable.csv"

VERSION = 3
"""Counts up when the same source and options would give other bytes than before."""
_KEY_CHARS = 80
_LEFT_OUT = frozenset(
    (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP)
)

Progress = Callable[[int, int], None]
"""Called with (images done, images in all)."""


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """What shapes the packed bytes, besides the source."""

    images_per_shard: int = 2000
    """220 MB of ImageNet's photos."""

    resize_short: int | None = None
    """Make larger images smaller until the short side has this many pixels; None: keep all."""

    val_fraction: float | None = None
    """Share of the images that becomes the split val, chosen by a hash of the name."""

    seed: int = 0
    """Of the order of the images; the choice of val does not depend on it."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What `pack` did."""

    card: DatasetCard
    kind: SourceKind
    notes: tuple[str, ...]
    unreadable: int
    """Images and files that were left out; see `unreadable.csv`."""
    reused_shards: int
    """Shards that an earlier, interrupted call had finished."""


@dataclass(frozen=True)
class _Entry:
    """One sample with its key."""

    key: str
    sample: Sample


@dataclass(frozen=True)
class _Task:
    """One shard to write."""

    name: str
    folder: str
    classes: tuple[str, ...]
    """Of the entries, one each."""
    entries: tuple[_Entry, ...]
    resize_short: int | None


@dataclass(frozen=True)
class _Record:
    """One shard that is written."""

    name: str
    tried: int
    images: int
    bytes: int
    sha256: str
    labels: Mapping[str, int]
    """Images of each label; keys are text, as JSON has it."""
    unreadable: Sequence[Sequence[str]]
    """(path, reason) pairs."""


class Unreadable(ValueError):  # noqa: N818  # it is the image that cannot be read
    """An image that is left out; the message is the reason."""


def pack(
    source: Path,
    out: Path,
    *,
    options: PackOptions | None = None,
    val_labels: Path | None = None,
    workers: int = 1,
    on_progress: Progress | None = None,
) -> Packed:
    """Pack a source into a data set; the same call again finishes what was interrupted.

    Args:
        source: What `list_source` reads.
        out: Folder of the data set; created when absent.
        options: None: the defaults.
        val_labels: Labels of ImageNet's validation images.
        workers: Processes; 1: this one alone. Their number does not change a byte.
        on_progress: Called as shards are finished.

    Raises:
        DataError: The source or the options cannot be used, or `out` holds another data set.
        StorageError: `out` cannot be written.
        Stopped: Interrupted from the keyboard; the same call goes on.
    """
    options = options or PackOptions()
    _check(options)
    _check_apart(source, out)
    listed = list_source(source, val_labels=val_labels)
    listed = _split_off(listed, fraction=options.val_fraction, source=source)
    fingerprint = _fingerprint(listed, options)
    done = _read_finished(out, fingerprint=fingerprint)
    if done is not None:
        _remove_state(out / STATE_NAME)
        unreadable = int(done.options["unreadable"])
        return Packed(
            card=done,
            kind=listed.kind,
            notes=(*listed.notes, *_tell_newer(listed, than=out / CARD_NAME)),
            unreadable=unreadable,
            reused_shards=sum(len(split.shards) for split in done.splits.values()),
        )
    state = out / STATE_NAME
    _check_own(out)
    with writing_to(out):
        state.mkdir(parents=True, exist_ok=True)
    with _locked(state):
        _check_plan(out, fingerprint=fingerprint, options=options)
        _remove_partial(out)
        tasks = _cut(listed, options, folder=out)
        records = {task.name: _read_record(out, task.name) for task in tasks}
        finished = [record for record in records.values() if record is not None]
        notes = listed.notes
        if finished:
            notes += _tell_newer(listed, than=state / PLAN_NAME)
        try:
            _run(
                [task for task in tasks if records[task.name] is None],
                done_images=sum(record.tried for record in finished),
                all_images=sum(len(task.entries) for task in tasks),
                workers=workers,
                on_progress=on_progress,
            )
        finally:
            _remove_partial(out)  # of workers that were ended
        card, unreadable = _finish(
            listed, options, tasks, folder=out, source=source, fingerprint=fingerprint
        )
        _remove_state(state)
    return Packed(
        card=card,
        kind=listed.kind,
        notes=notes,
        unreadable=unreadable,
        reused_shards=len(finished),
    )


def _check(options: PackOptions) -> None:
    if options.images_per_shard < 1:
        raise DataError(
            f"{options.images_per_shard} images per shard", hint="give 1 or more, such as 2000"
        )
    if options.resize_short is not None and options.resize_short < 1:
        raise DataError(f"a short side of {options.resize_short} px", hint="give 1 px or more")
    if options.val_fraction is not None and not 0 < options.val_fraction < 1:
        raise DataError(
            f"the share {options.val_fraction:g} of images for validation is not between 0 and 1",
            hint="give for example --val-fraction 0.1",
        )


def _check_apart(source: Path, out: Path) -> None:
    """Keep the data set out of its own source, where the next call would list it."""
    inner, outer = out.resolve(), source.resolve()
    if source.is_dir() and (inner == outer or outer in inner.parents):
        raise DataError(
            f"{out} lies inside the source {source}",
            hint=f"name a folder beside it, such as {source.resolve()}-packed",
        )


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _split_off(listed: Source, *, fraction: float | None, source: Path) -> Source:
    """Move a share of the training images to val, by a hash of their names.

    A name keeps its side when images are added to the source; one image of each class stays in
    train in any case.
    """
    if fraction is None:
        return listed
    if any(sample.split == "val" for sample in listed.samples):
        raise DataError(
            f"{source} has a validation part already, so none can be split off",
            hint="leave out --val-fraction",
        )
    limit = int(fraction * (1 << 64))
    keeper: dict[int, tuple[int, str]] = {}
    numbers = []
    for sample in listed.samples:
        number = int.from_bytes(_digest(f"val/{sample.path}")[:8], "big")
        numbers.append(number)
        keeper[sample.label] = max(keeper.get(sample.label, (-1, "")), (number, sample.path))
    samples = [
        replace(sample, split="val")
        if number < limit and (number, sample.path) != keeper[sample.label]
        else sample
        for sample, number in zip(listed.samples, numbers, strict=True)
    ]
    if not any(sample.split == "val" for sample in samples):
        raise DataError(
            f"the share {fraction:g} of {len(samples):,} images leaves none for validation",
            hint="leave out --val-fraction: one image of each class stays for training"
            if len(keeper) == len(samples)
            else f"give a larger share, such as --val-fraction {min(0.9, 2 * fraction):g}",
        )
    return replace(listed, samples=samples)


def _fingerprint(listed: Source, options: PackOptions) -> str:
    """Changes when other bytes could come out: an option, a name, a size, a class."""
    digest = hashlib.sha256()
    settings = {"version": VERSION, "classes": listed.classes, **asdict(options)}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for sample in sorted(listed.samples, key=_place):
        line = f"\n{sample.split} {sample.label} {sample.size} {sample.path}"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _place(sample: Sample) -> tuple[str, str, int, int]:
    return sample.split, sample.path, sample.label, sample.offset


def _tell_newer(listed: Source, *, than: Path) -> tuple[str, ...]:
    """Whether files of the source changed since they were packed, with names and sizes as before.

    The fingerprint knows no times, so that a copy of a source is the same source; a copy whose
    times are new is therefore only told, and its bytes are not read.
    """

    def changed(file: str) -> int:
        try:
            return Path(file).stat().st_mtime_ns
        except OSError:  # packing has said so
            return 0

    limit = changed(str(than))
    newer = [file for file in {sample.file for sample in listed.samples} if changed(file) > limit]
    if not newer:
        return ()
    more = f" and {len(newer) - 1:,} more files are" if len(newer) > 1 else " is"
    return (f"{min(newer)}{more} newer than what is packed: if images changed, name another OUT",)


def _read_finished(out: Path, *, fingerprint: str) -> DatasetCard | None:
    """The card of a set that is complete already.

    Raises:
        DataError: It is another one, or a shard is gone.
    """
    if out.exists() and not out.is_dir():
        raise StorageError(f"{out} is a file, not a folder", hint="name another folder for OUT")
    if not (out / CARD_NAME).is_file():
        return None
    card = read_card(out)
    if card.options.get("source") != fingerprint:
        raise DataError(
            f"{out} holds a data set from another source or with other options",
            hint=f"name another folder for OUT, or remove that one: rm -r {quote_path(out)}",
        )
    lost = _lost_file(out, card)
    if lost is not None:
        raise DataError(
            f"{lost} or its index is gone or cut, but {CARD_NAME} names it",
            hint=f"pack again from the start: rm -r {quote_path(out)}",
        )
    return card


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a packed data set of this version with all its files."""
    try:
        card = read_card(folder)
    except DataError:
        return False
    return card.options.get("version") == VERSION and _lost_file(folder, card) is None


def _lost_file(folder: Path, card: DatasetCard) -> Path | None:
    """A shard that is gone, cut or without its index."""
    for split in card.splits.values():
        for shard in split.shards:
            path, index = folder / shard.name, folder / index_name(shard.name)
            if not index.is_file() or not path.is_file() or path.stat().st_size != shard.bytes:
                return path
    return None


@contextmanager
def _locked(state: Path) -> Iterator[None]:
    """Keep a second packer out of the folder; the system frees the lock if its holder dies."""
    with writing_to(state):
        lock = (state / "lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"another process is packing into {state.parent}",
                hint="wait for it, or name another folder for OUT",
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise  # some network file systems know no locks
        yield


def _check_own(out: Path) -> None:
    """Keep out of a folder that holds anything but an unfinished data set."""
    if not out.is_dir() or (out / STATE_NAME / PLAN_NAME).is_file():
        return
    with writing_to(out):
        strangers = [entry.name for entry in out.iterdir() if entry.name != STATE_NAME]
    if strangers:
        raise DataError(
            f"{out} is not empty: it holds {min(strangers)}",
            hint="name a folder for OUT that is empty or not there yet",
        )


def _check_plan(out: Path, *, fingerprint: str, options: PackOptions) -> None:
    """Begin a data set, or make sure that it is this one that goes on."""
    path = out / STATE_NAME / PLAN_NAME
    if path.is_file():
        if read_json(path).get("source") != fingerprint:
            raise DataError(
                f"{out} holds an unfinished data set from another source or with other options",
                hint=f"repeat that call, or start anew: rm -r {quote_path(out)}",
            )
        return
    _check_own(out)  # again: another packer may have finished since
    write_json(path, {"source": fingerprint, **asdict(options)})


def _remove_partial(out: Path) -> None:
    """Remove what a kill left under temporary names."""
    for folder in (out, out / STATE_NAME):
        for path in folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)


def _remove_state(state: Path) -> None:
    if not state.is_dir():
        return
    with writing_to(state):
        # The plan goes last: without it, what is left would look like somebody's files.
        for path in sorted(state.iterdir(), key=lambda path: path.name == PLAN_NAME):
            path.unlink(missing_ok=True)
        state.rmdir()


def _cut(listed: Source, options: PackOptions, *, folder: Path) -> list[_Task]:
    """Shuffle each split by hash, give keys, cut into shards."""
    tasks: list[_Task] = []
    keys = _make_keys(sorted(listed.samples, key=_place))
    for split in ("train", "val"):
        entries = [entry for entry in keys if entry.sample.split == split]
        entries.sort(key=lambda entry: _digest(f"{options.seed}/{entry.key}"))
        for number, begin in enumerate(range(0, len(entries), options.images_per_shard)):
            part = tuple(entries[begin : begin + options.images_per_shard])
            tasks.append(
                _Task(
                    name=f"{split}-{number:06d}.tar",
                    folder=str(folder),
                    classes=tuple(listed.classes[entry.sample.label] for entry in part),
                    entries=part,
                    resize_short=options.resize_short,
                )
            )
    return tasks


def _make_keys(samples: Iterable[Sample]) -> list[_Entry]:
    """Unique ASCII keys that read like the path and have no dot, which would end a key."""
    taken: set[str] = set()
    entries = []
    for sample in samples:
        path = PurePosixPath(sample.path)
        stem = str(path.with_suffix("") if path.name else path).strip("/")
        key = "/".join(re.sub(r"[^A-Za-z0-9_-]", "_", part) for part in stem.split("/"))
        repeat = 0
        base = key if len(key) <= _KEY_CHARS else key[:_KEY_CHARS].rstrip("/")
        if base != key:
            key = f"{base}-{_digest(sample.path).hex()[:12]}"
        while key in taken:
            repeat += 1
            key = f"{base}-{_digest(f'{sample.path}#{repeat}').hex()[:12]}"
        taken.add(key)
        entries.append(_Entry(key, sample))
    return entries


def _read_record(out: Path, name: str) -> _Record | None:
    """The record of a finished shard whose files are still there; else None."""
    path = _record_path(out, name)
    if not path.is_file():
        return None
    record = _Record(**read_json(path))  # type: ignore[arg-type]  # we wrote it
    if record.images:
        shard = out / name
        if not (out / index_name(name)).is_file() or not shard.is_file():
            return None
        if shard.stat().st_size != record.bytes:
            return None
    return record


def _record_path(out: Path, name: str) -> Path:
    return out / STATE_NAME / f"{name.removesuffix('.tar')}.json"


def _run(
    tasks: Sequence[_Task],
    *,
    done_images: int,
    all_images: int,
    workers: int,
    on_progress: Progress | None,
) -> None:
    """Write the shards that are missing."""
    report = on_progress or (lambda done, total: None)  # noqa: ARG005
    report(done_images, all_images)
    try:
        for images in iter_done(_write_shard, tasks, workers=workers, doing="packing"):
            done_images += images
            report(done_images, all_images)
    except KeyboardInterrupt as error:
        raise Stopped(
            f"packing was interrupted after {done_images:,} of {all_images:,} images",
            hint="the same command goes on where it stopped",
        ) from error


def _write_shard(task: _Task) -> int:
    """Write one shard, its index and its record; the images that were tried.

    Raises:
        DataError: The source fails as a whole.
        StorageError: The shard cannot be written.
    """
    folder = Path(task.folder)
    path = folder / task.name
    partial = folder / f".{task.name}.{os.getpid()}.tmp"
    try:
        with writing_to(path):
            labels, unreadable = _write_tar(task, partial)
        scan = scan_shard(partial)
        record = _Record(
            name=task.name,
            tried=len(task.entries),
            images=len(scan.index),
            bytes=scan.num_bytes,
            sha256=scan.sha256,
            labels=labels,
            unreadable=unreadable,
        )
        if len(scan.index):
            write_index(scan.index, folder / index_name(task.name))
            with writing_to(path):
                partial.replace(path)
                sync(folder)
        write_json(_record_path(folder, task.name), asdict(record))
    finally:
        partial.unlink(missing_ok=True)
    return len(task.entries)


def _write_tar(task: _Task, partial: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Images of each label, and (path, reason) of those that are left out."""
    labels: dict[str, int] = {}
    unreadable: list[tuple[str, str]] = []
    with (
        partial.open("wb") as sink,
        tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for entry, name in zip(task.entries, task.classes, strict=True):
            sample = entry.sample
            shown = os.fsencode(sample.path).decode("utf-8", "replace")
            try:
                jpeg, width, height = make_jpeg(_read(sample), resize_short=task.resize_short)
            except Unreadable as error:
                unreadable.append((shown, str(error)))
                continue
            about = {"source": shown, "class": name, "width": width, "height": height}
            _add(tar, f"{entry.key}.jpg", jpeg)
            _add(tar, f"{entry.key}.cls", str(sample.label).encode())
            _add(tar, f"{entry.key}.json", json.dumps(about, sort_keys=True).encode())
            labels[str(sample.label)] = labels.get(str(sample.label), 0) + 1
        tar.close()
        sink.flush()
        os.fsync(sink.fileno())
    return dict(sorted(labels.items())), unreadable


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file whose header says nothing of time or user."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o444
    tar.addfile(member, io.BytesIO(data))


def _read(sample: Sample) -> bytes:
    """The bytes of a sample.

    Raises:
        Unreadable: This file is not there, not ours to read, or a device or a pipe.
        DataError: The disk itself fails: leaving images out would hide it.
    """
    try:
        kind = Path(sample.file).stat().st_mode
        if not S_ISREG(kind) and not S_ISDIR(kind):  # opening a pipe would wait for ever
            raise Unreadable("not a regular file, but a device or a pipe")
        with Path(sample.file).open("rb") as file:
            if sample.file.lower().endswith(".tar"):
                file.seek(sample.offset)
                return file.read(sample.size)
            return file.read()
    except OSError as error:
        if error.errno in _LEFT_OUT:
            raise Unreadable(str(error.strerror).lower()) from error
        raise DataError(
            f"{sample.file} cannot be read: {error.strerror or error}",
            hint="check the disk; the same command goes on where it stopped",
        ) from error


def make_jpeg(data: bytes, *, resize_short: int | None = None) -> tuple[bytes, int, int]:
    """An image file as JPEG, with its width and height in pixels.

    A gray or colour JPEG comes back byte for byte, unless it is larger than `resize_short`. The
    first of several frames counts; alpha is dropped, 16 bits are scaled to 8.

    Raises:
        Unreadable: Not an image of `FORMATS`, cut, damaged, or larger than `MAX_PIXELS`.
    """
    if not data:
        raise Unreadable("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of metadata that is not used here
            return _encode(data, resize_short=resize_short)
    except Image.DecompressionBombError as error:
        raise Unreadable(f"more than {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise Unreadable("not an image of a known format") from error
    except BadImage as error:
        raise Unreadable(error.reason) from error
    except Unreadable:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError) as error:
        # What Pillow's parsers raise on damaged files.
        raise Unreadable(f"damaged: {str(error).splitlines()[0] if str(error) else error!r}") from (
            error
        )


def _encode(data: bytes, *, resize_short: int | None) -> tuple[bytes, int, int]:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise Unreadable(f"{width} x {height} are more than {MAX_PIXELS:,} pixels")
        too_large = resize_short is not None and min(width, height) > resize_short
        if image.format in ("JPEG", "MPO"):
            decode_rgb(data, key="")  # refuses data without their end mark, which Pillow takes
            if image.mode in ("RGB", "L") and not too_large:
                return data, width, height
        image.load()
        picture = _to_eight_bits(image)
        if resize_short is not None and too_large:
            scale = resize_short / min(width, height)
            width, height = max(1, round(width * scale)), max(1, round(height * scale))
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        sink = io.BytesIO()
        picture.save(sink, "JPEG", quality=JPEG_QUALITY, subsampling="4:4:4")
        return sink.getvalue(), width, height


def _to_eight_bits(image: Image.Image) -> Image.Image:
    match image.mode:
        case "RGB" | "L":
            return image
        case "1" | "LA" | "La":
            return image.convert("L")
        case "I;16" | "I;16B" | "I;16L" | "I;16N":
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        case "I":
            raise Unreadable("gray values of 32 bits, which do not tell what is white")
        case "F":
            raise Unreadable("gray values that are not whole numbers")
        case _:
            return image.convert("RGB")


def _finish(
    listed: Source,
    options: PackOptions,
    tasks: Sequence[_Task],
    *,
    folder: Path,
    source: Path,
    fingerprint: str,
) -> tuple[DatasetCard, int]:
    """Write the list of unreadable images, then the card."""
    records = [_Record(**read_json(_record_path(folder, task.name))) for task in tasks]  # type: ignore[arg-type]  # we wrote them
    pairs = sorted(
        (str(path), str(reason)) for record in records for path, reason in record.unreadable
    )
    pairs += [(os.fsencode(p).decode("utf-8", "replace"), why) for p, why in listed.left_out]
    if pairs:
        _write_unreadable(folder / UNREADABLE_NAME, pairs)
    if not any(record.images for record in records if record.name.startswith("train")):
        raise DataError(
            f"none of the training images of {source} can be read, such as {pairs[0][0]}: "
            f"{pairs[0][1]}",
            hint=f"see all reasons: cat {quote_path(folder / UNREADABLE_NAME)}",
        )
    splits: dict[str, Split] = {}
    for name in ("train", "val"):
        own = [record for record in records if record.name.startswith(f"{name}-")]
        if not any(record.images for record in own):
            continue
        counts = np.zeros(len(listed.classes), dtype=np.int64)
        for record in own:
            for label, images in record.labels.items():
                counts[int(label)] += images
        splits[name] = Split(
            name=name,
            shards=tuple(
                Shard(
                    name=r.name,
                    images=r.images,
                    bytes=r.bytes,
                    sha256=r.sha256,
                    index_sha256=read_index_sha256(folder / index_name(r.name)),
                )
                for r in own
                if r.images
            ),
            class_images=tuple(int(count) for count in counts),
        )
    card = DatasetCard(
        classes=listed.classes,
        splits=splits,
        options={
            "version": VERSION,
            "kind": listed.kind,
            "source": fingerprint,
            **asdict(options),
            "unreadable": len(pairs),
        },
    )
    write_card(card, folder)
    return card, len(pairs)


def _write_unreadable(path: Path, pairs: Sequence[tuple[str, str]]) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("path", "reason"))
    table.writerows(pairs)
    with writing_to(path), written_whole(path) as beside:
        beside.write_text(text.getvalue(), encoding="utf-8")
