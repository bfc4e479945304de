"""Shards that others made: indexed where they lie, in one pass, and from then on exact.

```
URLs --expand, choose split--> shards --scan (index.py), in parallel--> OUT/index-state/
     --classes from names, wnids or numbers--> OUT/dataset.json and one index a shard
```

The shards stay where they are (`DatasetCard.shards_at`); only the small index is written. What was
scanned is not read again: the same command goes on after an interruption.

Known without being told: shards of `convnext data pack`; timm's ImageNet-1K, -12K and -22K on
Hugging Face (`imagenet1k-train-0000.tar` with KEY.jpg and KEY.cls, sizes in `_info.json`); and
others whose samples are neighbours KEY.jpg, .jpeg, .png or .webp and KEY.cls with a number. A label
may also be a name, in KEY.txt or KEY.cls, or a field of KEY.json.
"""

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath

import fsspec
import numpy as np
from numpy.typing import NDArray
from webdataset.shardlists import expand_urls
from xxhash import xxh3_64_intdigest

from convnext_cli.data.card import (
    DatasetCard,
    Shard,
    Split,
    index_name,
    write_card,
)
from convnext_cli.data.fetch import is_url, read_file
from convnext_cli.data.index import (
    NO_NUMBER,
    LabelSource,
    Scan,
    read_index,
    scan_shard,
    scan_stream,
    write_index,
)
from convnext_cli.data.pool import iter_done
from convnext_cli.errors import DataError, Stopped
from convnext_cli.runs.record import read_json, write_json, writing_to

STATE_NAME = "index-state"
INFO_NAMES = ("_info.json", "info.json")
_VALIDATION = re.compile(r"(^|[^a-z])(val|valid|validation|test)([^a-z]|$)")
_WNID = re.compile(r"(?:^|/)(n\d{8})_")
_ATTEMPTS = 3

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
    folder: str
    labels: LabelSource


@dataclass(frozen=True)
class _Record:
    """What a scan found, but for the index itself."""

    name: str
    images: int
    bytes: int
    sha256: str
    texts: tuple[str, ...]
    """The labels that come, each once; the index beside holds places in this list."""
    wnids: tuple[str | None, ...]
    """The wnid that all keys of such a label begin with; None: none, or several."""
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
    kind, _, field = text.partition(":")
    if kind == "json" and field:
        return ("json", field)
    raise DataError(
        f"--label {text}: labels are in cls, txt or json:FIELD", hint="such as --label json:label"
    )


def class_numbers(scan: Scan, card: DatasetCard) -> NDArray[np.int32]:
    """The class of each sample of a shard, by the card; `NO_NUMBER` where it has no such class."""
    if not card.options.get("label_names"):
        return scan.index.labels
    number = {name: place for place, name in enumerate(card.classes)}
    return np.array([number.get(text, NO_NUMBER) for text in scan.label_texts], dtype=np.int32)


def choose_split(url: str) -> str:
    """Val for shards whose name says validation or test, else train."""
    return "val" if _VALIDATION.search(PurePosixPath(url).name.lower()) else "train"


def list_shards(urls: Sequence[str]) -> list[str]:
    """Every shard that URLs, brace patterns and folders name, absolute, in order.

    Raises:
        DataError: A folder holds no shard, one comes twice, or a `pipe:` URL is among them.
    """
    found: list[str] = []
    for url in urls:
        if url.startswith("pipe:"):
            raise DataError(
                f"{url}: a pipe: URL runs a shell command and cannot be indexed",
                hint="name the shards themselves, by path or by URL",
            )
        for one in expand_urls(url):
            place = one if is_url(one) else str(Path(one).expanduser().absolute())
            found += [place] if place.endswith(".tar") else _list_folder(place)
    twice = [shard for shard, times in Counter(found).items() if times > 1]
    if twice:
        raise DataError(f"{twice[0]} is named twice", hint="name every shard once")
    return found


def _list_folder(place: str) -> list[str]:
    try:
        files, _, _ = fsspec.get_fs_token_paths(f"{place.rstrip('/')}/*.tar")
        shards = sorted(files.glob(f"{place.rstrip('/')}/*.tar"))
        named = [files.unstrip_protocol(shard) if is_url(place) else shard for shard in shards]
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"{place}: its shards cannot be listed ({error})",
            hint="name them: URL/train-{0000..0127}.tar",
        ) from error
    if not named:
        raise DataError(
            f"{place}: there is no .tar file in it",
            hint="name the shards, or their folder; other images: convnext data pack",
        )
    return named


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
    labels: LabelSource,
    classes: Sequence[str] | None,
    workers: int,
    on_progress: Progress | None = None,
) -> Indexed:
    """Index shards where they lie; the same command goes on after an interruption.

    Args:
        train: Shards of the training split, from `list_shards`.
        val: Those of the validation split.
        out: Folder for dataset.json and the indexes.
        labels: Which members hold the labels.
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
    state = out / STATE_NAME
    with writing_to(state):
        state.mkdir(parents=True, exist_ok=True)
    every = [name for found in names.values() for name in found]
    missing = [name for name in every if _read_record(state, name) is None]
    report = on_progress or (lambda done, total: None)  # noqa: ARG005
    done = len(every) - len(missing)
    report(done, len(every))
    tasks = [_Task(root, name, str(state), labels) for name in missing]
    try:
        for _ in iter_done(_scan_to_state, tasks, workers=workers, doing="indexing"):
            done += 1
            report(done, len(every))
    except KeyboardInterrupt as error:
        raise Stopped(
            f"indexing was interrupted after {done:,} of {len(every):,} shards",
            hint="the same command goes on where it stopped",
        ) from error
    records = {name: _read_record(state, name) for name in every}
    whole = {name: record for name, record in records.items() if record is not None}
    _check_info(root, whole)
    chosen, by_name, notes = _choose_classes(list(whole.values()), classes)
    card = _write_indexes(
        out, root=root, names=names, records=whole, classes=chosen, by_name=by_name, labels=labels
    )
    notes += _find_repeated_keys(out, names)
    shutil.rmtree(state)
    skipped: Counter[str] = Counter()
    for record in whole.values():
        skipped.update(record.skipped)
    return Indexed(
        card=card,
        skipped=dict(skipped),
        unreadable=sum(record.unreadable for record in whole.values()),
        reused_shards=len(every) - len(missing),
        notes=tuple(notes),
    )


def _scan_to_state(task: _Task) -> str:
    """Scan one shard, and write what was found."""
    scan = _scan(f"{task.root}/{task.name}", labels=task.labels)
    texts = sorted(set(scan.label_texts))
    place = {text: number for number, text in enumerate(texts)}
    wnids: list[set[str | None]] = [set() for _ in texts]
    for row, text in enumerate(scan.label_texts):
        match = _WNID.search(scan.index.key(row))
        wnids[place[text]].add(match[1] if match else None)
    index = replace(
        scan.index,
        labels=np.array([place[text] for text in scan.label_texts], dtype=np.int32),
    )
    state = Path(task.folder)
    write_index(index, state / index_name(task.name))
    record = _Record(
        name=task.name,
        images=len(index),
        bytes=scan.num_bytes,
        sha256=scan.sha256,
        texts=tuple(texts),
        wnids=tuple(next(iter(found)) if len(found) == 1 else None for found in wnids),
        skipped=scan.skipped,
        unreadable=scan.unreadable,
    )
    write_json(_record_path(state, task.name), asdict(record))
    return task.name


def _scan(url: str, *, labels: LabelSource) -> Scan:
    if not is_url(url):
        return scan_shard(Path(url), labels=labels, names=True)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with fsspec.open(url, "rb") as file:
                size = getattr(file, "size", None)
                return scan_stream(file, where=url, num_bytes=size, labels=labels, names=True)
        except FileNotFoundError as error:
            raise DataError(f"{url}: there is no such file", hint="check the address") from error
        except (PermissionError, ImportError) as error:
            raise DataError(
                f"{url}: {error}",
                hint="check the credentials, and that its fsspec package is there",
            ) from error
        except Exception as error:  # every fsspec back end raises classes of its own
            # A body that was cut on its way looks like a shard that is cut.
            if attempt == _ATTEMPTS:
                if isinstance(error, DataError):
                    raise
                raise DataError(
                    f"{url}: {type(error).__name__}: {error} ({attempt} tries)",
                    hint="try again later; the same command goes on where it stopped",
                ) from error
            time.sleep(2**attempt / 4)
    raise AssertionError


def _record_path(state: Path, name: str) -> Path:
    return state / f"{index_name(name)}.json"


def _read_record(state: Path, name: str) -> _Record | None:
    path = _record_path(state, name)
    if not path.is_file() or not (state / index_name(name)).is_file():
        return None
    plain = read_json(path)
    try:
        return _Record(**plain)  # type: ignore[arg-type]  # as it was written
    except TypeError:  # of another version
        return None


def _check_info(root: str, records: Mapping[str, _Record]) -> None:
    """Hold the counts against the sizes that timm's data sets say of themselves.

    Source: huggingface/pytorch-image-models 1.0.31 timm/data/readers/reader_wds.py `_load_info`.
    """
    for info_name in INFO_NAMES:
        try:
            splits = json.loads(read_file(f"{root}/{info_name}")).get("splits", {})
        except (DataError, ValueError, AttributeError):
            continue  # most data sets have none
        for split in splits.values():
            lengths = split.get("shard_lengths") or []
            for name, images in zip(split.get("filenames") or [], lengths, strict=False):
                record = records.get(name)
                if record is not None and record.images != images:
                    raise DataError(
                        f"{root}/{name}: {record.images:,} samples, but {info_name} says"
                        f" {images:,}",
                        hint="copy the shard again, then the same command",
                    )


def _choose_classes(
    records: Sequence[_Record], asked: Sequence[str] | None
) -> tuple[tuple[str, ...], bool, list[str]]:
    """The classes in label order, whether labels are their names, and what to tell of it."""
    texts = sorted({text for record in records for text in record.texts})
    if not texts:
        raise DataError("the shards hold no samples", hint="look inside: tar tf SHARD")
    if "" in texts:
        raise DataError(
            "some samples have an empty label", hint="say where labels are: --label json:FIELD"
        )
    if not all(text.isdigit() for text in texts):
        classes = tuple(asked or texts)
        unknown = [text for text in texts if text not in set(classes)]
        if unknown:
            raise DataError(
                f"label {unknown[0]!r} is none of the {len(classes)} classes of --classes",
                hint="one name a line, as the labels are written",
            )
        return classes, True, []
    count = max(map(int, texts)) + 1
    if asked is not None:
        if count > len(asked):
            raise DataError(
                f"label {count - 1} is none of the {len(asked)} classes of --classes",
                hint="one name a line, in label order from 0",
            )
        return tuple(asked), False, []
    wnids: dict[int, set[str | None]] = {}
    for record in records:
        for text, wnid in zip(record.texts, record.wnids, strict=True):
            wnids.setdefault(int(text), set()).add(wnid)
    found = {label: next(iter(names)) for label, names in wnids.items() if len(names) == 1}
    named = {label: name for label, name in found.items() if name is not None}
    if len(named) == len(wnids) == count and len(set(named.values())) == count:
        return (
            tuple(named[label] for label in range(count)),
            False,
            ["classes are the wnids that keys begin with"],
        )
    if named:
        return (
            tuple(map(str, range(count))),
            False,
            ["keys begin with wnids, but labels and wnids do not pair: classes are numbers"],
        )
    return (
        tuple(map(str, range(count))),
        False,
        ["classes have no names but their numbers; name them with --classes FILE"],
    )


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
        shards = []
        for name in members:
            record = records[name]
            index = read_index(out / STATE_NAME / index_name(name))
            own = np.array(
                [number[text] if by_name else int(text) for text in record.texts], dtype=np.int32
            )
            index = replace(index, labels=own[index.labels] if len(index) else index.labels)
            counts += np.bincount(index.labels, minlength=len(classes))
            write_index(index, out / index_name(name))
            if record.images:
                shards.append(Shard(name, record.images, record.bytes, record.sha256))
        splits[split] = Split(split, tuple(shards), tuple(counts.tolist()))
    card = DatasetCard(
        classes=classes,
        splits=splits,
        options={
            "labels": labels if isinstance(labels, str) else ":".join(labels),
            "label_names": by_name,
        },
        shards_at=None if Path(root) == out.absolute() else root,
    )
    write_card(card, out)
    return card


def _find_repeated_keys(out: Path, names: Mapping[str, Sequence[str]]) -> list[str]:
    """Whether a key comes in several shards, by 8 bytes a key."""
    notes = []
    for split, members in names.items():
        hashes = []
        for name in members:
            index = read_index(out / index_name(name))
            keys = (xxh3_64_intdigest(key.encode()) for key in index.keys)
            hashes.append(np.fromiter(keys, dtype=np.uint64, count=len(index)))
        joined = np.concatenate(hashes)
        repeated = len(joined) - len(np.unique(joined))
        if repeated:
            notes.append(f"{split}: {repeated:,} keys come in several shards, too")
    return notes
