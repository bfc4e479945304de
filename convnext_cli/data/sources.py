"""What `data pack` reads: images with their class and split, listed but not opened.

```
folders      SOURCE/<class>/**/*.jpg, or SOURCE/train/<class>/... and SOURCE/val/<class>/...
csv          rows of path,label[,split], with or without a header; paths start at the file's folder
imagenet     ILSVRC2012_img_train.tar (a tar of one tar a class), with ILSVRC2012_img_val.tar
             where a file tells its labels; or SOURCE/train/<class>/... and SOURCE/val/*.JPEG
class_tars   a folder of one tar a class, such as ImageNet-21K (winter21)
```

Classes are in sorted order, which for wnids is the order of the published heads. A CSV whose
labels are all numbers keeps them as they are.

Source: image-net.org ILSVRC 2012 and winter 2021 downloads; torchvision's image folders.
"""

import csv
import errno
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from convnext_cli.data.card import CARD_NAME, STATE_NAME
from convnext_cli.data.index import iter_members
from convnext_cli.errors import DataError, quote_path

SourceKind = Literal["folders", "csv", "imagenet", "class_tars"]

KIND_TITLES: Mapping[SourceKind, str] = {
    "folders": "class folders",
    "csv": "a table of paths and labels",
    "imagenet": "ImageNet's tar of class tars",
    "class_tars": "a folder of class tars",
}

IMAGE_SUFFIXES = frozenset(
    ("", ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".mpo")
)
"""Endings of files that are tried as images; a file without one is tried, too."""

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
_TRAIN_NAMES = ("train", "training")
_VAL_NAMES = ("val", "valid", "validation", "test", "testing")
_WHOLE_NUMBER = re.compile(r"[+-]?\d+(\.0*)?")
"""A label of a table; pandas writes a column with gaps in it with points, as 3.0."""
_LABEL_ENDINGS = frozenset(("cls", "json", "txt"))
"""Of members that hold the labels of shards; beside an image of the same name they do."""
_LITTER = frozenset(("thumbs.db", "desktop.ini"))
_MAX_LABEL = 1_000_000
_SHOWN_CHARS = 80


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a source."""

    path: str
    """Its name inside the source, with `/`."""
    file: str
    """The file that holds its bytes: itself, or a tar."""
    label: int
    split: str
    """train or val."""
    offset: int
    """Where its bytes begin in the file."""
    size: int
    """Its bytes."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """All images of a source."""

    kind: SourceKind
    classes: tuple[str, ...]
    samples: Sequence[Sample]
    left_out: Sequence[tuple[str, str]] = ()
    """Files and folders that are not tried, with the reason."""
    notes: tuple[str, ...] = ()
    """What a person should know."""


@dataclass
class _Found:
    """Images while they are listed: class names, not labels."""

    rows: list[tuple[str, str, str, str, int, int]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def add(self, path: str, file: str, name: str, split: str, offset: int, size: int) -> None:
        self.rows.append((path, file, name, split, offset, size))

    def names(self, split: str) -> set[str]:
        return {row[2] for row in self.rows if row[3] == split}

    def samples(self, labels: Mapping[str, int]) -> list[Sample]:
        return [
            Sample(path, file, labels[name], split, offset, size)
            for path, file, name, split, offset, size in self.rows
        ]


def list_source(source: Path, *, val_labels: Path | None = None) -> Source:
    """Recognise a source and list its images, in an order that depends on names alone.

    Args:
        source: A folder, a CSV file or ImageNet's train tar.
        val_labels: Labels of ImageNet's validation images.

    Raises:
        DataError: It is not there, is of no known kind, or its classes do not fit together.
    """
    with _reading(source):
        kind, train = _recognise(source)
        if val_labels is not None and kind not in ("folders", "imagenet"):
            raise _no_use_of_labels(source, kind, val_labels)
        match kind:
            case "folders":
                return _list_folders(source, val_labels=val_labels)
            case "csv":
                return _list_csv(source)
            case "imagenet":
                return _list_imagenet(train, val_labels=val_labels)
            case "class_tars":
                return _list_class_tars(source)


def list_images(folder: Path) -> list[Path]:
    """The files below a folder that have the ending of an image and would be packed.

    Raises:
        DataError: A folder cannot be read.
    """
    with _reading(folder):
        files = _iter_files(folder, folder.name, _Found(), above=())
        paths = [Path(file) for _, file, _ in files]
    return [path for path in paths if path.suffix and path.suffix.lower() in IMAGE_SUFFIXES]


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Tell a path below a source that cannot be read as a user's error."""
    try:
        yield
    except OSError as error:
        path = error.filename or source
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}",
            hint=f"check the path and your permission: ls -ld {quote_path(path)}",
        ) from error


def _no_use_of_labels(source: Path, kind: SourceKind, val_labels: Path) -> DataError:
    return DataError(
        f"{source} is {KIND_TITLES[kind]}: --val-labels is for {VAL_TAR}, or for validation images"
        " that lie in no class folders",
        hint=f"leave out --val-labels {quote_path(val_labels)}",
    )


def _recognise(source: Path) -> tuple[SourceKind, Path]:
    """The kind, and the file or folder of the training images."""
    if not source.exists():
        raise DataError(
            f"there is no {source}", hint="name a folder of class folders, a CSV or a tar"
        )
    if source.is_file():
        match source.suffix.lower():
            case ".csv" | ".tsv":
                return "csv", source
            case ".tar" if source.name == VAL_TAR:
                raise _val_alone(source.parent)
            case ".tar":
                return "imagenet", source
            case ending:
                unpack = "unpack it first and name the folder" if ending in _ARCHIVES else None
                raise DataError(
                    f"{source} is neither a folder nor a .csv nor a .tar",
                    hint=unpack or "name a folder of class folders, a CSV of path,label or a tar",
                )
    if (source / CARD_NAME).is_file():
        raise DataError(
            f"{source} is a packed data set already: it holds {CARD_NAME}",
            hint=f"train on it: convnext train small_data --data {quote_path(source)}",
        )
    entries = _scan(source)
    if any(entry.name == TRAIN_TAR for entry in entries):
        return "imagenet", source / TRAIN_TAR
    if any(entry.name == VAL_TAR for entry in entries):
        raise _val_alone(source)
    has_folders = any(_is_dir(entry) for entry in entries)
    if not has_folders and any(entry.name.endswith(".tar") for entry in entries):
        if any(re.fullmatch(r".*\d{4,}\.tar", e.name) and "-" in e.name for e in entries):
            raise _shards_error(source)
        return "class_tars", source
    return "folders", source


def _shards_error(source: Path) -> DataError:
    folder = source if source.is_dir() else source.parent
    return DataError(
        f"{source} holds WebDataset shards, not class tars",
        hint=f"index them where they lie: convnext data index {quote_path(folder)} --out OUT",
    )


def _val_alone(folder: Path) -> DataError:
    """The validation tar is named, or lies without the training tar."""
    if (folder / TRAIN_TAR).is_file():
        return DataError(
            f"{VAL_TAR} is packed together with {TRAIN_TAR}",
            hint="name their folder:"
            f" convnext data pack {quote_path(folder)} OUT --val-labels FILE",
        )
    return DataError(
        f"{folder} holds {VAL_TAR} but not {TRAIN_TAR}", hint=f"put {TRAIN_TAR} beside it"
    )


_ARCHIVES = frozenset((".zip", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"))


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, sorted; without hidden files, litter of file managers, `pack-state`."""
    return _scan_both(folder)[0]


def _is_dir(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, as `Path.is_dir` has it: a link in a circle is none."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def _scan_both(folder: Path) -> tuple[list[os.DirEntry[str]], list[os.DirEntry[str]]]:
    """What is taken of a folder, and what is passed over; both sorted."""
    taken: list[os.DirEntry[str]] = []
    passed: list[os.DirEntry[str]] = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: os.fsencode(entry.name)):
            hidden = entry.name.startswith(".") or entry.name.lower() in _LITTER
            (passed if hidden or entry.name == STATE_NAME else taken).append(entry)
    return taken, passed


def _tell_passed(passed: Iterable[os.DirEntry[str]], found: _Found, *, prefix: str) -> None:
    """List the folders that are passed over as left out, where they hold images."""
    for entry in passed:
        if _is_dir(entry) and _has_images(entry.path):
            begins = "begins with a dot" if entry.name.startswith(".") else f"is {STATE_NAME}"
            reason = f"its name {begins}: the images in it are passed over"
            found.left_out.append((f"{prefix}{entry.name}", reason))


def _has_images(folder: str) -> bool:
    """Whether a file below has the ending of an image; without one it may be anything."""
    endings = IMAGE_SUFFIXES - {""}
    return any(
        not name.startswith(".") and Path(name).suffix.lower() in endings
        for _, _, names in os.walk(folder)
        for name in names
    )


def _list_folders(source: Path, *, val_labels: Path | None) -> Source:
    entries = _scan(source)
    folders = [entry.name for entry in entries if _is_dir(entry)]
    if not folders:
        endings = {Path(entry.name).suffix.lower(): entry.name for entry in reversed(entries)}
        archives = endings.keys() & _ARCHIVES
        if archives and not endings.keys() & IMAGE_SUFFIXES:
            raise DataError(
                f"{source} holds archives, such as {endings[min(archives)]}",
                hint="unpack them, and name the folder of what comes out",
            )
        raise DataError(
            f"{source} holds no class folders",
            hint="sort the images into SOURCE/CLASS/, or list them in a CSV of path,label",
        )
    train, val = _find_parts(source, folders)
    unsorted = val is not None and not any(_is_dir(e) for e in _scan(source / val))
    if val_labels is not None and not unsorted:
        raise _no_use_of_labels(source, "folders", val_labels)
    if train is None:
        found = _Found()
        notes = _tell_empty(_walk_classes(source, found, prefix="", split="train"))
        notes += _tell_parts(source, found)
        return _with_sorted_classes("folders", found, source=source, notes=notes)
    found = _Found()
    _tell_passed(_scan_both(source)[1], found, prefix="")
    empty = _walk_classes(source / train, found, prefix=f"{train}/", split="train")
    if val is not None and val_labels is not None:
        files = _iter_files(source / val, val, found, above=())
        images = [(path, file, 0, size) for path, file, size in files if _is_image(path, found)]
        _add_labelled(found, images, val_labels)
    elif val is not None:
        empty += _walk_classes(source / val, found, prefix=f"{val}/", split="val")
    notes = _tell_empty(empty)
    unused = [name for name in folders if name not in (train, val)]
    if unused:
        notes.append(f"not packed: {', '.join(unused)} (only {train} and {val} are)")
    return _with_sorted_classes("folders", found, source=source, notes=notes)


def _find_parts(source: Path, folders: Sequence[str]) -> tuple[str | None, str | None]:
    """The folders of the training and the validation part; (None, None): all are classes.

    A folder called train that holds folders is the training part where one for validation lies
    beside it, whatever else does, or where nothing else does. So `train` and `boat` are classes.
    """
    lower = {name.lower(): name for name in reversed(folders)}
    train = next((lower[name] for name in _TRAIN_NAMES if name in lower), None)
    val = next((lower[name] for name in _VAL_NAMES if name in lower), None)
    if train is None:
        return None, None
    if set(lower) <= {*_TRAIN_NAMES, *_VAL_NAMES}:
        return train, val
    parted = val is not None and all(
        any(_is_dir(entry) for entry in _scan(source / part)) for part in (train, val)
    )
    return (train, val) if parted else (None, None)


def _tell_parts(source: Path, found: _Found) -> list[str]:
    """Folders that are called as parts are, and lie where classes or their images do."""
    below = {tuple(names[:2]) for row in found.rows if len(names := row[0].split("/")) > 2}
    notes = []
    if inside := sorted("/".join(names) for names in below if names[1].lower() in _VAL_NAMES):
        more = f" and {len(inside) - 1:,} more" if len(inside) > 1 else ""
        name, part = inside[0].split("/")
        notes.append(
            f"packed for training: {inside[0]}{more}, for a part lies above its classes, as in"
            f" {part}/{name}"
        )
    if train := [name for name, _ in sorted(below) if name.lower() in _TRAIN_NAMES]:
        notes.append(
            f"{train[0]} is packed as a class; if its folders are the classes:"
            f" convnext data pack {quote_path(source / train[0])} OUT"
        )
    return notes


def _tell_empty(folders: Sequence[str]) -> list[str]:
    if not folders:
        return []
    more = f" and {len(folders) - 3:,} more" if len(folders) > 3 else ""
    return [f"classes without an image, left out: {', '.join(folders[:3])}{more}"]


def _walk_classes(root: Path, found: _Found, *, prefix: str, split: str) -> list[str]:
    """Add the images of a folder of class folders; the class folders without any."""
    folders, empty = 0, []
    above = (_identify(root),)
    entries, passed = _scan_both(root)
    _tell_passed(passed, found, prefix=prefix)
    for entry in entries:
        if _is_dir(entry):
            folders += 1
            before = len(found.rows)
            files = _iter_files(Path(entry.path), f"{prefix}{entry.name}", found, above=above)
            for path, file, size in files:
                _add_file(found, path, file, name=_text(entry.name), split=split, size=size)
            if len(found.rows) == before:
                empty.append(f"{prefix}{_text(entry.name)}")
        else:
            found.left_out.append((f"{prefix}{entry.name}", "outside the class folders"))
    if not folders:
        labelled = " or give their labels by --val-labels FILE," if split == "val" else ""
        raise DataError(
            f"{root} holds no class folders, only files",
            hint=f"sort the images into {root}/CLASS/,{labelled} or list them in a CSV of"
            " path,label",
        )
    return empty


def _iter_files(
    folder: Path, prefix: str, found: _Found, *, above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, str, int]]:
    """Files below a folder; follows links, but not in circles."""
    here = _identify(folder)
    if here in above:
        return
    entries, passed = _scan_both(folder)
    _tell_passed(passed, found, prefix=f"{prefix}/")
    for entry in entries:
        path = f"{prefix}/{entry.name}"
        if _is_dir(entry):
            yield from _iter_files(Path(entry.path), path, found, above=(*above, here))
        else:
            try:
                size = entry.stat().st_size
            except OSError as error:  # a link to nowhere; packing will say so
                if error.errno not in (errno.ENOENT, errno.ELOOP):
                    raise
                size = 0
            yield path, entry.path, size


def _identify(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _add_file(found: _Found, path: str, file: str, *, name: str, split: str, size: int) -> None:
    if _is_image(path, found):
        found.add(path, file, name, split, 0, size)


def _is_image(path: str, found: _Found) -> bool:
    """Whether a file is tried as an image; else it is listed as left out."""
    suffix = Path(path).suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        found.left_out.append((path, f"{suffix} is no ending of an image file"))
    return suffix in IMAGE_SUFFIXES


def _with_sorted_classes(
    kind: SourceKind, found: _Found, *, source: Path, notes: Sequence[str]
) -> Source:
    """Labels by sorted class name.

    Raises:
        DataError: No images, fewer than 2 classes, or val has a class that train lacks.
    """
    if not found.rows:
        raise DataError(
            f"{source} holds no images", hint="name a folder with SOURCE/CLASS/IMAGE.jpg"
        )
    classes = sorted(found.names("train"))
    unknown = sorted(found.names("val") - set(classes))
    if unknown:
        raise DataError(
            f"{source}: the training part lacks {len(unknown)} of the classes of the validation "
            f"part: {', '.join(unknown[:3])}",
            hint="give training images of each of them, and name classes alike in both parts",
        )
    if len(classes) < 2:
        raise DataError(
            f"{source} holds 1 class ({classes[0]}), but 2 or more are needed",
            hint=_deeper(source / classes[0]) or "give images of 2 or more classes",
        )
    return Source(
        kind=kind,
        classes=tuple(classes),
        samples=found.samples({name: label for label, name in enumerate(classes)}),
        left_out=found.left_out,
        notes=tuple(notes),
    )


def _deeper(folder: Path) -> str | None:
    """A hint where the only class of a source is a folder of folders."""
    if not folder.is_dir() or not any(_is_dir(entry) for entry in _scan(folder)):
        return None
    return f"if its folders are the classes: convnext data pack {quote_path(folder)} OUT"


def _text(name: str) -> str:
    """A file name as text, another one for each, also where its bytes are no UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _list_class_tars(source: Path) -> Source:
    found, empty = _Found(), []
    for entry in _scan(source):
        if not entry.name.endswith(".tar"):
            found.left_out.append((entry.name, "no tar"))
            continue
        name = entry.name.removesuffix(".tar")
        if not _add_members(found, Path(entry.path), name=name, begin=0, end=None):
            empty.append(entry.name)
    return _with_sorted_classes("class_tars", found, source=source, notes=_tell_empty(empty))


def _add_members(found: _Found, tar: Path, *, name: str, begin: int, end: int | None) -> bool:
    """Add all images of one class tar, which may lie inside another tar; whether it has any."""
    before = len(found.rows)
    images: set[str] = set()
    others: set[str] = set()
    with tar.open("rb") as file:
        where = f"{tar} ({name}.tar in it)" if end is not None else str(tar)
        for member in iter_members(file, where=where, begin=begin, end=end):
            path = f"{name}/{member.name.removeprefix('./')}"
            stem, _, ending = path.rpartition(".")
            if _is_image(path, found):
                found.add(path, str(tar), name, "train", member.offset, member.size)
                images.add(stem)
            elif ending.lower() in _LABEL_ENDINGS:
                others.add(stem)
    if images & others:  # in either order: a sample's members lie side by side
        raise _shards_error(tar)
    return len(found.rows) > before


def _list_imagenet(train: Path, *, val_labels: Path | None) -> Source:
    found, empty = _Found(), []
    with train.open("rb") as file:
        members = list(iter_members(file, where=str(train), max_bytes=1 << 40))
    others = [member.name for member in members if not member.name.endswith(".tar")]
    if others or not members:
        what = f"{others[0]}, no class tar" if others else "nothing"
        raise DataError(
            f"{train} holds {what}: it is not a tar of one tar a class",
            hint="unpack it, then pack the folder: mkdir images;"
            f" tar xf {quote_path(train)} -C images",
        )
    for member in members:
        name = Path(member.name).name.removesuffix(".tar")
        stop = member.offset + member.size
        if not _add_members(found, train, name=name, begin=member.offset, end=stop):
            empty.append(member.name)
    notes = _tell_empty(empty)
    val = train.with_name(VAL_TAR)
    if val_labels is not None:
        _add_imagenet_val(found, val, val_labels)
    elif val.is_file():
        notes.append(
            f"not packed: {val}, because its labels are not in it (give --val-labels FILE)"
        )
    return _with_sorted_classes("imagenet", found, source=train, notes=notes)


def _add_imagenet_val(found: _Found, tar: Path, labels: Path) -> None:
    if not tar.is_file():
        raise DataError(f"there is no {tar}, which --val-labels is for", hint=f"put it at {tar}")
    with tar.open("rb") as file:
        members = iter_members(file, where=str(tar))
        images = [(member.name, str(tar), member.offset, member.size) for member in members]
    _add_labelled(found, images, labels)


def _add_labelled(found: _Found, images: Sequence[tuple[str, str, int, int]], labels: Path) -> None:
    """Add validation images whose labels are in a file; (name, file, offset, size) of each."""
    images = sorted(images)
    stems = [Path(name).stem for name, *_ in images]
    names = _read_val_labels(labels, stems, classes=sorted(found.names("train")))
    for (name, file, offset, size), stem in zip(images, stems, strict=True):
        path = f"val/{names[stem]}/{Path(name).name}"
        found.add(path, file, names[stem], "val", offset, size)


def _read_val_labels(
    path: Path, stems: Sequence[str], *, classes: Sequence[str]
) -> Mapping[str, str]:
    """The class of each validation image, by the image's name without its ending.

    Raises:
        DataError: The lines do not fit the images or the classes, or are ILSVRC ids.
    """
    rows = [re.split(r"[,\s]+", line) for line in _read_text(path).splitlines() if line.strip()]
    rows = [[cell for cell in row if cell] for row in rows]
    if rows and rows[0][0].lower() in ("imageid", "filename", "file", "image", "path"):
        rows = rows[1:]
    if all(len(row) == 1 for row in rows):
        if any(row[0].isdigit() for row in rows):
            raise DataError(
                f"{path} holds bare numbers: the devkit's numbers are ILSVRC ids, which do not "
                "follow the order of the wnids, so they are no labels",
                hint="give lines of `FILENAME WNID`, such as Kaggle's LOC_val_solution.csv, or one"
                " wnid a line in the order of the files",
            )
        if len(rows) != len(stems):
            raise DataError(
                f"{path} has {len(rows):,} lines for {len(stems):,} images",
                hint="give one wnid a line in the order of the files, or lines of `FILENAME WNID`",
            )
        named = {stem: row[0] for stem, row in zip(stems, rows, strict=True)}
    else:
        short = next((row for row in rows if len(row) < 2), None)
        if short is not None:
            raise DataError(
                f"{path}: {' '.join(short)!r} has no label", hint="give lines of `FILENAME WNID`"
            )
        named = {Path(row[0]).stem: row[1] for row in rows}
    missing = [stem for stem in stems if stem not in named]
    if missing:
        raise DataError(
            f"{path} has no label for {len(missing):,} of {len(stems):,} images, such as "
            f"{missing[0]}",
            hint="give a line for each image",
        )
    if all(name.isdigit() for name in named.values()):
        highest = max(int(name) for name in named.values())
        if highest >= len(classes):
            raise DataError(
                f"{path} holds the label {highest}, but labels end at {len(classes) - 1}: "
                "numbers that start at 1 are ILSVRC ids, not labels",
                hint="give lines of `FILENAME WNID`",
            )
        return {stem: classes[int(name)] for stem, name in named.items()}
    unknown = sorted(set(named.values()) - set(classes))
    if unknown:
        raise DataError(
            f"{path} names {unknown[0]}, which is no class of the training part",
            hint="give lines of `FILENAME WNID` with the wnids of the training part",
        )
    return named


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text", hint="save it as UTF-8") from error


_PATH_COLUMNS = ("path", "file", "filename", "image", "image_path", "filepath")
_LABEL_COLUMNS = ("label", "class", "target", "category", "label_name", "class_name")
_SPLIT_COLUMNS = ("split", "set", "subset", "part")


def _list_csv(source: Path) -> Source:
    text = _read_text(source)
    first = text.split("\n", 1)[0]
    delimiter = "\t" if "\t" in first else ";" if ";" in first and "," not in first else ","
    # a quote after ", " quotes too: else it would be part of the label
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        rows, begin = [], 1
        for row in table:
            cells = [cell.strip() for cell in row]
            if any(cells):
                rows.append((begin, cells))
            begin = table.line_num + 1  # a cell in quotes may span lines
    except csv.Error as error:
        raise DataError(
            f"{source} line {table.line_num} cannot be read: {error}",
            hint="write a line of path,label for each image",
        ) from error
    if not rows:
        raise DataError(f"{source} is empty", hint="write a line of path,label for each image")
    head = rows[0][1]
    columns = _find_columns([cell.lower() for cell in head])
    if columns is None:
        _check_no_header(source, head)
        at_path, at_label = 0, 1
        thirds = {row[2].lower() for _, row in rows if len(row) > 2}
        at_split = 2 if thirds & {*_TRAIN_NAMES, *_VAL_NAMES} else None
    else:
        (at_path, at_label, at_split), rows = columns, rows[1:]
    if not rows:
        raise DataError(
            f"{source} has a header and nothing below it",
            hint="write a line of path,label for each image",
        )
    width = max(len(head), (at_split or 0) + 1)
    found, num_there = _Found(), 0
    for number, row in rows:
        where = f"{source} line {number}"
        if any(row[width:]):
            raise DataError(
                f"{where}: {delimiter.join(row)[:_SHOWN_CHARS]!r} has more cells than the"
                f" {width} of line 1",
                hint=f"put a path or a label that holds {delimiter!r} in quotes",
            )
        if len(row) <= max(at_path, at_label) or not row[at_path] or not row[at_label]:
            raise DataError(
                f"{where}: {delimiter.join(row)[:_SHOWN_CHARS]!r} is not path{delimiter}label",
                hint="write a path and a label on each line; a quote that opens must close",
            )
        path = row[at_path]
        _check_path(path, where=where)
        given = "train" if at_split is None or at_split >= len(row) else row[at_split].lower()
        if given not in (*_TRAIN_NAMES, *_VAL_NAMES):
            raise DataError(f"{where}: the split is {given!r}", hint="write train or val there")
        split = "train" if given in _TRAIN_NAMES else given
        home = path.startswith("~/")
        file = Path(path).expanduser() if home else source.parent / path
        there = file.is_file()
        num_there += there
        found.add(path, str(file), row[at_label], split, 0, file.stat().st_size if there else 0)
    names = {row[3] for row in found.rows}
    val = next((name for name in _VAL_NAMES if name in names), None)
    unused = len(found.rows)
    found.rows = [
        (*row[:3], "val" if row[3] == val else row[3], *row[4:])
        for row in found.rows
        if row[3] in ("train", val)
    ]
    unused -= len(found.rows)
    notes = [f"not packed: {unused:,} rows of other splits than train and {val}"] if unused else []
    notes += _tell_several_labels(found)
    if not found.names("train"):
        raise DataError(
            f"{source} has images for validation alone", hint="give images to train on, too"
        )
    names = {row[2] for row in found.rows}
    words = {name for name in names if not _WHOLE_NUMBER.fullmatch(name)}
    if words and words != names:
        notes.append(f"labels are names in the order of text, because {min(words)!r} is no number")
    listed = (
        _with_numbered_classes(found, source=source, notes=notes)
        if not words
        else _with_sorted_classes("csv", found, source=source, notes=notes)
    )
    if not num_there:
        raise DataError(
            f"{source}: none of its {len(rows):,} images is there, such as {found.rows[0][1]}",
            hint=f"write whole paths, or such that begin at {source.parent}",
        )
    return listed


def _check_path(path: str, *, where: str) -> None:
    if "://" in path:
        raise DataError(
            f"{where}: {path[:_SHOWN_CHARS]} is an address: images are read from disk",
            hint="download the images, and write their paths",
        )
    if "\0" in path:
        raise DataError(
            f"{where}: the path holds a NUL character", hint="write the table as plain text"
        )


def _tell_several_labels(found: _Found) -> list[str]:
    """Images that a table lists more than once, with other labels."""
    label: dict[str, str] = {}
    several = {row[0] for row in found.rows if label.setdefault(row[0], row[2]) != row[2]}
    if not several:
        return []
    return [f"{len(several):,} images come with several labels, such as {min(several)}"]


def _check_no_header(source: Path, row: Sequence[str]) -> None:
    """Refuse a header with unknown names: taken for an image, it would add a class."""
    suffix = Path(row[0]).suffix.lower()
    if not (suffix and suffix in IMAGE_SUFFIXES) and not (source.parent / row[0]).is_file():
        raise DataError(
            f"{source} line 1: {','.join(row)!r} is neither an image nor a header with path and "
            "label",
            hint="write path,label as the first line",
        )


def _find_columns(header: Sequence[str]) -> tuple[int, int, int | None] | None:
    def position(names: Sequence[str]) -> int | None:
        return next((at for at, cell in enumerate(header) if cell in names), None)

    path, label = position(_PATH_COLUMNS), position(_LABEL_COLUMNS)
    if path is None or label is None:
        return None
    return path, label, position(_SPLIT_COLUMNS)


def _with_numbered_classes(found: _Found, *, source: Path, notes: Sequence[str]) -> Source:
    found.rows = [(*row[:2], row[2].partition(".")[0], *row[3:]) for row in found.rows]
    numbers = [int(row[2]) for row in found.rows]
    wrong = next((number for number in numbers if not 0 <= number < _MAX_LABEL), None)
    if wrong is not None:
        raise DataError(
            f"{source}: the label {wrong} is not in 0..{_MAX_LABEL - 1:,}",
            hint="count the classes from 0, or write their names",
        )
    trained = {int(name) for name in found.names("train")}
    unknown = sorted({int(name) for name in found.names("val")} - trained)
    if unknown:
        raise DataError(
            f"{source}: the training part lacks {len(unknown)} of the labels of the validation "
            f"part: {', '.join(map(str, unknown[:3]))}",
            hint="give training images for each of them",
        )
    if len(trained) < 2:
        raise DataError(
            f"{source} holds 1 class ({numbers[0]}), but 2 or more are needed",
            hint="list images of 2 or more classes",
        )
    count = max(numbers) + 1
    empty = count - len(trained)
    said = [f"{empty:,} of the labels 0..{count - 1} have no images"] if empty else []
    return Source(
        kind="csv",
        classes=tuple(map(str, range(count))),
        samples=found.samples({row[2]: int(row[2]) for row in found.rows}),
        notes=(*notes, *said),
    )
