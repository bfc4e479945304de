"""Shards that others made: indexed where they lie, in one pass, and from then on exact.

```
URLs --expand, choose split--> shards --scan (index.py), in parallel--> OUT/SHARD.index.npz
     --classes from names, wnids or numbers--> labels in the indexes, OUT/dataset.json last
OUT/index-state/    of each shard: its version, the labels as they are written, and whose they are
```

The shards stay where they are (`DatasetCard.shards_at`); only the small index is written. A shard
whose size and version (ETag, time of change) are as they were is not read again: the same command
goes on after an interruption, and does nothing where all is done.

Known without being told: shards of `convnext data pack`; timm's ImageNet-1K, -12K and -22K on
Hugging Face (`imagenet1k-train-0000.tar` with KEY.jpg and KEY.cls, sizes in `_info.json`); and
others whose samples are neighbours KEY.jpg, .jpeg, .png or .webp and a label, as a number or a
name: KEY.cls, a field of KEY.json (label, cls or class), or KEY.txt.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from fsspec.core import url_to_fs
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from convnext_cli.data.card import (
    CARD_NAME,
    DatasetCard,
    Shard,
    Split,
    index_name,
    read_card,
    write_card,
)
from convnext_cli.data.fetch import is_url, read_file, read_stream, without_secrets
from convnext_cli.data.index import (
    NO_NUMBER,
    LabelSource,
    Scan,
    find_label_source,
    parse_class_number,
    read_index,
    read_index_sha256,
    scan_shard,
    scan_stream,
    write_index,
)
from convnext_cli.data.pool import iter_done
from convnext_cli.errors import DataError, Stopped, quote_path
from convnext_cli.runs.record import write_json, writing_to, written_whole

STATE_NAME = "index-state"
INFO_NAMES = ("_info.json", "info.json")
_VALIDATION = re.compile(r"(^|[^a-z])(val|valid|validation)([^a-z]|$)")
_TEST = re.compile(r"(^|[^a-z])(test|testing)([^a-z]|$)")
_TRAINING = re.compile(r"(^|[^a-z])(train|training)([^a-z]|$)")
_WNID = re.compile(r"(?<![0-9A-Za-z])n\d{8}(?![0-9])")
_COMPRESSED_TAR = re.compile(r"\.(tgz|tar\.(gz|bz2|xz|zst))$", re.IGNORECASE)
_LIKE_A_NUMBER = re.compile(r"[+-]?[\d.]+")
_MAX_CLASSES = 1_000_000
_VERSION_FIELDS = (
    *("ETag", "etag", "blob_id", "md5Hash"),
    *("LastModified", "Last-Modified", "mtime", "created"),
)
"""What fsspec's back ends call that which changes with a file."""
_ASKING_AT_ONCE = 16

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Indexed:
    """What came out."""

    card: DatasetCard
    skipped: Mapping[str, int]
    """Members that are neither image nor label, by ending."""
    unreadable: int
    """Images whose header could not be read; they are indexed, and quarantined when met."""
    reused_shards: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Task:
    """One shard to be scanned."""

    root: str
    name: str
    out: str
    labels: LabelSource


@dataclass(frozen=True)
class _Text:
    """A label as it is written."""

    text: str
    key: str
    """The first sample that has it."""
    wnids: tuple[str, ...]
    """Of the keys of its samples; two stand for more."""


@dataclass(frozen=True)
class _Record:
    """What a scan found, but for the index itself."""

    url: str
    version: str
    label_source: str
    images: int
    bytes: int
    sha256: str
    texts: tuple[_Text, ...]
    skipped: Mapping[str, int]
    unreadable: int


def label_source(card: DatasetCard) -> LabelSource:
    """Where the labels of a data set are."""
    return parse_label_source(str(card.options.get("labels", "cls")))


def parse_label_source(text: str) -> LabelSource:
    """`cls`, `txt` or `json:FIELD`.

    Raises:
        DataError: Something else.
    """
    whole: dict[str, LabelSource] = {"cls": "cls", "txt": "txt"}
    if text in whole:
        return whole[text]
    kind, _, name = text.partition(":")
    if kind == "json" and name:
        return ("json", name)
    raise DataError(
        f"--label {text}: labels are in cls, txt or json:FIELD", hint="such as --label json:label"
    )


def _render_label_source(labels: LabelSource) -> str:
    return labels if isinstance(labels, str) else ":".join(labels)


def class_numbers(scan: Scan, card: DatasetCard) -> NDArray[np.int32]:
    """The class of each sample of a shard, by the card; `NO_NUMBER` where it has no such class."""
    if not card.options.get("label_names"):
        return scan.index.labels
    number = {name: place for place, name in enumerate(card.classes)}
    return np.array([number.get(text, NO_NUMBER) for text in scan.label_texts], dtype=np.int32)


def choose_split(url: str, *, root: str) -> Literal["train", "val", "test"]:
    """Val or test for a shard whose name says so, else train.

    Where its name says neither, the folders that it lies in below the root of all shards do.
    """
    for part in reversed(PurePosixPath(url.removeprefix(root).lower()).parts):
        if _VALIDATION.search(part):
            return "val"
        if _TEST.search(part):
            return "test"
        if _TRAINING.search(part):
            return "train"
    return "train"


def choose_splits(
    shards: Sequence[str], *, val: Sequence[str]
) -> tuple[list[str], list[str], tuple[str, ...]]:
    """The shards of train and of val, and what to tell of the others.

    Where val is asked for, the rest is for train; else val is what is named so, or else test.
    """
    asked = frozenset(val)
    others = [url for url in shards if url not in asked]
    root = common_root([*others, *val])
    named: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for url in others:
        named[choose_split(url, root=root)].append(url)
    if val:
        held_out = len(named["val"]) + len(named["test"])
        told = f"trained on: {held_out:,} shards named val or test (name the others, no folder)"
        return others, list(val), (told,) if held_out and named["train"] else ()
    if named["val"] and named["test"]:
        told = f"not indexed: {len(named['test']):,} test shards (name them with --val)"
        return named["train"], named["val"], (told,)
    return named["train"], named["val"] or named["test"], ()


def list_shards(urls: Sequence[str]) -> list[str]:
    """Every shard that URLs, brace patterns and folders name, absolute, in order.

    Raises:
        DataError: A folder holds no shard, one comes twice, or a `pipe:` URL is among them.
    """
    from webdataset.shardlists import expand_urls  # noqa: PLC0415  # loads torch

    found: list[str] = []
    for url in urls:
        if url.startswith("pipe:"):
            raise DataError(
                f"{url}: a pipe: URL runs a shell command and cannot be indexed",
                hint="name the shards themselves, by path or by URL",
            )
        try:
            expanded = expand_urls(url)
        except ValueError as error:  # braceexpand's word for braces that do not close
            raise DataError(
                f"{without_secrets(url)}: {error}", hint="such as train-{0000..0127}.tar"
            ) from error
        for one in expanded:
            if is_url(one) and without_secrets(one) != one:
                raise DataError(
                    f"{without_secrets(one)}: an address with a password or a ?query cannot be kept"
                    " in dataset.json",
                    hint="give credentials as the environment of this machine",
                )
            if "*" in one:
                raise DataError(
                    f"{one}: patterns with * are not read",
                    hint="name the folder of the shards, or use braces: train-{0000..0127}.tar",
                )
            path = one.removeprefix("file://")
            place = one if is_url(one) else str(Path(path).expanduser().absolute())
            found += [place] if place.endswith(".tar") else _list_folder(place)
    twice = [shard for shard, times in Counter(found).items() if times > 1]
    if twice:
        raise DataError(f"{twice[0]} is named twice", hint="name every shard once")
    return found


def _list_folder(place: str) -> list[str]:
    try:
        files, folder = url_to_fs(place)
        listed = sorted(files.ls(folder, detail=False))
    except FileNotFoundError as error:
        raise DataError(
            f"there is no {place}", hint="name shards that end with .tar, or their folder"
        ) from error
    except Exception as error:  # every fsspec back end raises classes of its own
        raise DataError(
            f"{place}: its shards cannot be listed ({type(error).__name__}: {error})",
            hint="name them: URL/train-{0000..0127}.tar",
        ) from error
    shards = [  # hidden ones are what macOS leaves beside a copy
        name
        for name in listed
        if name.endswith(".tar") and not PurePosixPath(name).name.startswith(".")
    ]
    if not shards:
        raise _no_shards(place, listed)
    return [files.unstrip_protocol(shard) if is_url(place) else shard for shard in shards]


def _no_shards(place: str, listed: Sequence[str]) -> DataError:
    """Why a folder has none: they are compressed, or lie one level below."""
    compressed = next((name for name in listed if _COMPRESSED_TAR.search(name)), None)
    if compressed is not None:
        return DataError(
            f"{compressed} is compressed; shards are plain tar files",
            hint="unpack it first, such as with gunzip or zstd -d",
        )
    below = () if is_url(place) else sorted({shard.parent for shard in Path(place).glob("*/*.tar")})
    return DataError(
        f"{place}: there is no .tar file in it",
        hint=f"name the folders of the shards: {' '.join(map(quote_path, below[:5]))}"
        + (" ..." if len(below) > 5 else "")
        if below
        else "name the shards, or their folder; other images: convnext data pack",
    )


def common_root(shards: Sequence[str]) -> str:
    """The longest folder that all shards lie in.

    Raises:
        DataError: They have none in common.
    """
    parts = [shard.split("/")[:-1] for shard in shards]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    root = "/".join(shared)
    if not root or root.endswith((":", ":/")):
        raise DataError(
            f"{shards[0]} and {shards[-1]} have no folder in common",
            hint="index data sets that lie in one bucket or folder",
        )
    return root


def index_shards(
    train: Sequence[str],
    val: Sequence[str],
    *,
    out: Path,
    labels: LabelSource | None,
    classes: Sequence[str] | None,
    workers: int,
    on_progress: Progress | None = None,
) -> Indexed:
    """Index shards where they lie; the same command goes on after an interruption.

    Args:
        train: Shards of the training split, from `list_shards`.
        val: Those of the validation split.
        out: Folder for dataset.json and the indexes.
        labels: Which members hold the labels; None: found out from the first sample.
        classes: Names of the classes in label order; None: found out.
        workers: Processes.
        on_progress: Called with (shards done, shards in all).

    Raises:
        DataError: A shard is damaged or not there, labels make no classes, or sizes are not those
            that the data set says of itself.
        StorageError: The folder cannot be written.
        Stopped: Ctrl-C.
    """
    root = common_root([*train, *val])
    names = {
        split: [url[len(root) + 1 :] for url in urls]
        for split, urls in (("train", train), ("val", val))
        if urls
    }
    _check_out(out, [name for found in names.values() for name in found])
    urls = {name: f"{root}/{name}" for found in names.values() for name in found}
    source = labels or _find_labels(next(iter(urls.values())))
    with writing_to(out):
        (out / STATE_NAME).mkdir(parents=True, exist_ok=True)
    done = {
        name: record
        for name, record in _read_records(out, urls).items()
        if record.label_source == _render_label_source(source)
    }
    report = on_progress or (lambda done, total: None)  # noqa: ARG005
    report(len(done), len(urls))
    tasks = [_Task(root, name, str(out), source) for name in urls if name not in done]
    if tasks:  # the card must never stand beside other indexes than its own
        with writing_to(out):
            (out / CARD_NAME).unlink(missing_ok=True)
    reused_shards = len(done)
    try:
        for name, record in iter_done(_scan_shard, tasks, workers=workers, doing="indexing"):
            done[name] = record
            report(len(done), len(urls))
    except KeyboardInterrupt as error:
        raise Stopped(
            f"indexing was interrupted after {len(done):,} of {len(urls):,} shards",
            hint="the same command goes on where it stopped",
        ) from error
    records = {name: done[name] for name in urls}
    _check_info(root, records)
    chosen, by_name, notes = _choose_classes(records, classes)
    if labels is None and source != "cls":
        notes.insert(0, f"labels are in {_render_label_source(source)} of each sample")
    notes += [f"{name} holds no sample" for name, record in records.items() if not record.images]
    card = _write_indexes(
        out, root=root, names=names, records=records, classes=chosen, by_name=by_name, labels=source
    )
    notes += [*_tell_untrained(card), *_find_repeated_keys(out, names)]
    skipped: Counter[str] = Counter()
    for record in records.values():
        skipped.update(record.skipped)
    return Indexed(
        card=card,
        skipped=dict(skipped.most_common()),
        unreadable=sum(record.unreadable for record in records.values()),
        reused_shards=reused_shards,
        notes=tuple(notes),
    )


def _check_out(out: Path, names: Sequence[str]) -> None:
    """Nothing that somebody packed is written over, and no index by another.

    Raises:
        DataError: The folder holds a packed data set, or two indexes would have one name.
    """
    if (out / CARD_NAME).is_file() and "label_names" not in read_card(out).options:
        raise DataError(
            f"{out} holds a packed data set, which has its indexes",
            hint="use it as it is, or choose another --out",
        )
    flat: dict[str, str] = {}
    for name in names:
        other = flat.setdefault(index_name(name), name)
        if other != name:
            raise DataError(
                f"{other} and {name} would have one index, {index_name(name)}",
                hint="index them into two folders",
            )


def _scan_shard(task: _Task) -> tuple[str, _Record]:
    """Scan one shard, and write what was found; the record last."""
    url = f"{task.root}/{task.name}"
    version = _read_version(url)
    scan = _scan(url, labels=task.labels)
    first: dict[str, str] = {}
    wnids: dict[str, set[str]] = {}
    for row, text in enumerate(scan.label_texts):
        key = scan.index.key(row)
        first.setdefault(text, key)
        match = _WNID.search(key)
        wnids.setdefault(text, set()).update([match[0]] if match else [])
    texts = sorted(first)
    place = {text: number for number, text in enumerate(texts)}
    record = _Record(
        url=url,
        version=version,
        label_source=_render_label_source(task.labels),
        images=len(scan.index),
        bytes=scan.num_bytes,
        sha256=scan.sha256,
        texts=tuple(_Text(text, first[text], tuple(sorted(wnids[text])[:2])) for text in texts),
        skipped=scan.skipped,
        unreadable=scan.unreadable,
    )
    out = Path(task.out)
    places = np.array([place[text] for text in scan.label_texts], dtype=np.int32)
    path = _places_path(out, task.name)
    with writing_to(path):
        # until its successor is there, for it knows nothing of the files that are written now
        _record_path(out, task.name).unlink(missing_ok=True)
        with written_whole(path) as beside, beside.open("wb") as file:
            np.save(file, places)
    write_index(scan.index, out / index_name(task.name))
    write_json(_record_path(out, task.name), asdict(record))
    return task.name, record


def _scan(url: str, *, labels: LabelSource) -> Scan:
    if not is_url(url):
        return scan_shard(Path(url), labels=labels, names=True)
    return read_stream(
        url,
        lambda file, size: scan_stream(file, where=url, num_bytes=size, labels=labels, names=True),
    )


def _find_labels(url: str) -> LabelSource:
    if is_url(url):
        return read_stream(url, lambda file, _: find_label_source(file, where=url))
    try:
        with Path(url).open("rb") as file:
            return find_label_source(file, where=url)
    except OSError as error:
        raise DataError(
            f"{url} cannot be read: {error.strerror or error}",
            hint=f"look: ls -l {quote_path(url)}",
        ) from error


def _read_version(url: str) -> str:
    """Changes when the shard does: its size, and its ETag or time of change; "": cannot be told."""
    try:
        if not is_url(url):
            status = Path(url).stat()
            return f"{status.st_size} {status.st_mtime_ns}"
        files, path = url_to_fs(url)
        about = files.info(path)
    except Exception:  # noqa: BLE001  # of any back end; reading the shard tells what is wrong
        return ""
    marks = [str(about[name]) for name in _VERSION_FIELDS if about.get(name)]
    return " ".join([str(about.get("size")), *marks])


def _record_path(out: Path, name: str) -> Path:
    return out / STATE_NAME / f"{index_name(name)}.json"


def _places_path(out: Path, name: str) -> Path:
    """Of each sample, the place of its label in the record's texts."""
    return out / STATE_NAME / f"{index_name(name)}.npy"


def _read_records(out: Path, urls: Mapping[str, str]) -> dict[str, _Record]:
    """Records of shards that are as they were when they were scanned."""
    found = {name: record for name in urls if (record := _read_record(out, name)) is not None}
    with ThreadPoolExecutor(_ASKING_AT_ONCE) as threads:
        versions = threads.map(_read_version, [urls[name] for name in found])
        return {
            name: record
            for (name, record), version in zip(found.items(), versions, strict=True)
            if record.url == urls[name] and version and record.version == version
        }


def _read_record(out: Path, name: str) -> _Record | None:
    if not (out / index_name(name)).is_file() or not _places_path(out, name).is_file():
        return None
    try:
        plain = json.loads(_record_path(out, name).read_bytes())
        texts = tuple(_Text(one["text"], one["key"], tuple(one["wnids"])) for one in plain["texts"])
        return _Record(**{**plain, "texts": texts})
    except (OSError, ValueError, TypeError, KeyError):  # absent, or of another version
        return None


def _check_info(root: str, records: Mapping[str, _Record]) -> None:
    """Hold the counts against the sizes that timm's data sets say of themselves.

    Source: huggingface/pytorch-image-models 1.0.31 timm/data/readers/reader_wds.py `_load_info`.
    """
    for info_name in INFO_NAMES:
        try:
            splits = json.loads(read_file(f"{root}/{info_name}"))["splits"].values()
            said = [
                (str(name), int(images))
                for split in splits
                for name, images in zip(
                    split.get("filenames") or (), split.get("shard_lengths") or (), strict=False
                )
            ]
        except (DataError, ValueError, LookupError, TypeError, AttributeError):
            continue  # most data sets have none, or one of another form
        for name, images in said:
            record = records.get(name)
            if record is not None and record.images != images:
                raise DataError(
                    f"{root}/{name}: {record.images:,} samples, but {info_name} says {images:,}",
                    hint="copy the shard again, then the same command",
                )


def _choose_classes(
    records: Mapping[str, _Record], asked: Sequence[str] | None
) -> tuple[tuple[str, ...], bool, list[str]]:
    """The classes in label order, whether labels are their names, and what to tell of it.

    Raises:
        DataError: There are no labels, or one is no class.
    """
    found: dict[str, str] = {}
    for name, record in records.items():
        for one in record.texts:
            found.setdefault(one.text, f"{name}: sample {one.key}: label {one.text!r}")
    if not found:
        kinds = Counter(kind for record in records.values() for kind in record.skipped)
        held = f", only {', '.join(list(kinds)[:5])}" if kinds else ""
        raise DataError(
            f"the shards hold no samples{held}",
            hint="look inside: tar tf SHARD; a key ends at the first dot of a file's name",
        )
    numbers = {text: parse_class_number(text) for text in found}
    if any(number == NO_NUMBER for number in numbers.values()):
        return _choose_named(found, numbers, asked, images=sum(r.images for r in records.values()))
    largest = max(numbers, key=lambda text: numbers[text])
    count = numbers[largest] + 1
    if asked is not None:
        if count > len(asked):
            raise DataError(
                f"{found[largest]} is none of the {len(asked)} classes of --classes",
                hint="one name a line, in label order from 0",
            )
        return tuple(asked), False, []
    if count > _MAX_CLASSES:
        raise DataError(
            f"{found[largest]} is beyond {_MAX_CLASSES:,} classes",
            hint="say where labels are: --label json:FIELD",
        )
    notes = []
    used = set(numbers.values())
    if count < 2:
        raise _one_class(found)
    if len(used) < count:
        gap = next(number for number in range(count) if number not in used)
        notes.append(f"{count - len(used):,} of {count:,} class numbers have no sample, as {gap}")
    names, told = _pair_wnids(records, count)
    return names, False, [told, *notes]


def _choose_named(
    found: Mapping[str, str],
    numbers: Mapping[str, int],
    asked: Sequence[str] | None,
    *,
    images: int,
) -> tuple[tuple[str, ...], bool, list[str]]:
    """Classes of labels that are names."""
    if asked is not None:
        unknown = sorted(set(found) - set(asked))
        if unknown:
            raise DataError(
                f"{found[unknown[0]]} is none of the {len(asked)} classes of --classes",
                hint="one name a line, as the labels are written",
            )
        return tuple(asked), True, []
    odd = [text for text in found if numbers[text] == NO_NUMBER and _LIKE_A_NUMBER.fullmatch(text)]
    if odd or any(number != NO_NUMBER for number in numbers.values()):
        one = min(odd or (text for text in found if numbers[text] == NO_NUMBER))
        raise DataError(
            f"{found[one]}: labels are class numbers from 0, or all of them names",
            hint="name the classes as they are written, one a line: --classes FILE",
        )
    notes = []
    if len(found) < 2:
        raise _one_class(found)
    if 2 * len(found) > images:
        notes.append(f"{len(found):,} names for {images:,} images: perhaps they are no labels")
    return tuple(sorted(found)), True, notes


def _one_class(found: Mapping[str, str]) -> DataError:
    return DataError(
        f"{next(iter(found.values()))} is the only class, but 2 or more are needed",
        hint="say where labels are: --label json:FIELD; or name all classes: --classes FILE",
    )


def _pair_wnids(records: Mapping[str, _Record], count: int) -> tuple[tuple[str, ...], str]:
    """Names of numbered classes: the wnids of their keys, where these pair with the numbers."""
    wnids: dict[int, set[str]] = {}
    for record in records.values():
        for one in record.texts:
            wnids.setdefault(int(one.text), set()).update(one.wnids)
    plain = tuple(map(str, range(count)))
    if not any(wnids.values()):
        return plain, "classes have no names but their numbers; name them with --classes FILE"
    several = [(label, names) for label, names in sorted(wnids.items()) if len(names) > 1]
    owners: dict[str, list[int]] = {}
    for label, names in sorted(wnids.items()):
        for wnid in names:
            owners.setdefault(wnid, []).append(label)
    shared = [(wnid, labels) for wnid, labels in owners.items() if len(labels) > 1]
    if several:
        label, names = several[0]
        reason = f"label {label} comes with {' and '.join(sorted(names)[:2])}"
    elif shared:
        wnid, labels = shared[0]
        reason = f"{wnid} comes with labels {labels[0]} and {labels[1]}"
    elif len(owners) < count:
        reason = f"{count - len(owners):,} labels come with none"
    else:
        by_label = {labels[0]: wnid for wnid, labels in owners.items()}
        return tuple(by_label[label] for label in range(count)), "classes are the wnids in the keys"
    return plain, f"the wnids in the keys do not pair with labels ({reason}): classes are numbers"


def _write_indexes(
    out: Path,
    *,
    root: str,
    names: Mapping[str, Sequence[str]],
    records: Mapping[str, _Record],
    classes: tuple[str, ...],
    by_name: bool,
    labels: LabelSource,
) -> DatasetCard:
    """Write the indexes with the labels that the classes give, then the card."""
    number = {name: place for place, name in enumerate(classes)}
    splits: dict[str, Split] = {}
    for split, members in names.items():
        counts = np.zeros(len(classes), dtype=np.int64)
        for name in members:
            own = [number[one.text] if by_name else int(one.text) for one in records[name].texts]
            index = read_index(out / index_name(name))
            places = np.load(_places_path(out, name), allow_pickle=False)
            labels_N = np.array(own, dtype=np.int32)[places]
            counts += np.bincount(labels_N, minlength=len(classes))
            if not np.array_equal(labels_N, index.labels):
                with writing_to(out):  # as above
                    (out / CARD_NAME).unlink(missing_ok=True)
                write_index(replace(index, labels=labels_N), out / index_name(name))
        shards = tuple(
            Shard(
                name,
                records[name].images,
                records[name].bytes,
                records[name].sha256,
                read_index_sha256(out / index_name(name)),
            )
            for name in members
            if records[name].images
        )
        if shards:
            splits[split] = Split(split, shards, tuple(counts.tolist()))
    card = DatasetCard(
        classes=classes,
        splits=splits,
        options={"labels": _render_label_source(labels), "label_names": by_name},
        shards_at=None if Path(root) == out.absolute() else root,
    )
    write_card(card, out)
    return card


def _tell_untrained(card: DatasetCard) -> list[str]:
    """Classes that val alone has, such as those whose names are written in another way there."""
    if not {"train", "val"} <= card.splits.keys():
        return []
    train, val = (card.splits[name].class_images for name in ("train", "val"))
    only = [name for name, a, b in zip(card.classes, train, val, strict=True) if b and not a]
    told = f"{len(only):,} classes of val have no image in train, such as {min(only, default='')}"
    return [told] if only else []


def _find_repeated_keys(out: Path, names: Mapping[str, Sequence[str]]) -> list[str]:
    """Whether a key comes in several shards, by 8 bytes a key."""
    notes = []
    for split, members in names.items():
        hashes = [np.zeros(0, dtype=np.uint64)]
        for name in members:
            index = read_index(out / index_name(name))
            keys = (xxh3_64_intdigest(key.encode()) for key in index.keys)
            hashes.append(np.fromiter(keys, dtype=np.uint64, count=len(index)))
        joined = np.concatenate(hashes)
        repeated = len(joined) - len(np.unique(joined))
        if repeated:
            notes.append(f"{split}: {repeated:,} keys come in several shards, too")
    return notes
