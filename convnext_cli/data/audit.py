"""What is in a packed data set, and whether it is what its card and indexes say.

Always checked: every byte of every shard against its hash, every tar header, every index row and
label, the counts of the card, and which images have the same bytes. A deep check decodes every
image as well, exactly as training does.

What lies behind a URL is fetched anew: a copy in the node's cache tells what lay there once.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from convnext_cli.data.card import (
    DatasetCard,
    Shard,
    Split,
    index_name,
    read_card,
    shards_location,
)
from convnext_cli.data.decode import decode_rgb
from convnext_cli.data.fetch import Expected, Store
from convnext_cli.data.foreign import class_numbers, label_source
from convnext_cli.data.header import BadImage
from convnext_cli.data.index import ShardIndex, read_index, read_index_sha256, scan_shard
from convnext_cli.data.report import Damage, DatasetReport, SplitReport, Spread
from convnext_cli.errors import DataError, StorageError, quote_path

_EXAMPLES = 10


@dataclass(frozen=True)
class _ShardFindings:
    index: ShardIndex | None
    """What the shard holds; None where it cannot be read."""
    damage: tuple[Damage, ...]


def check_dataset(
    location: str | Path,
    *,
    deep: bool,
    on_progress: Callable[[int, int], None] | None = None,
) -> DatasetReport:
    """Read a packed data set from end to end; damage is reported, not raised.

    Args:
        location: Its folder or URL.
        deep: Decode every image as well.
        on_progress: Called with (images done, images in all).

    Raises:
        DataError: There is no card to check against.
        StorageError: The folder for temporary files cannot hold a shard of each CPU.
    """
    card = read_card(location)
    report = on_progress or (lambda done, total: None)  # noqa: ARG005
    total = sum(split.images for split in card.splits.values())
    done, damage = 0, list(_check_card(card))
    splits: list[SplitReport] = []
    findings: dict[str, list[_ShardFindings]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for name, split in card.splits.items():
            jobs = [
                threads.submit(_check_shard, str(location), shard, card=card, deep=deep)
                for shard in split.shards
            ]
            findings[name] = []
            for job, shard in zip(jobs, split.shards, strict=True):
                findings[name].append(job.result())
                done += shard.images
                report(done, total)
            damage += [item for found in findings[name] for item in found.damage]
            damage += _check_counts(card, split, findings[name])
            splits.append(_make_split_report(card, split, findings[name]))
    if not damage and card.recorded not in (None, card.fingerprint):  # all else was held
        damage.append(Damage("dataset.json", "its classes are not those that were packed"))
    shared, examples = _find_shared(findings.get("train", ()), findings.get("val", ()))
    return DatasetReport(
        location=str(location),
        fingerprint=card.fingerprint,
        classes=len(card.classes),
        splits=tuple(splits),
        shared=shared,
        shared_examples=examples,
        damage=tuple(damage),
        deep=deep,
    )


def _check_card(card: DatasetCard) -> list[Damage]:
    found = []
    if len(set(card.classes)) != len(card.classes):
        found.append(Damage("dataset.json", "two classes have the same name"))
    found += [
        Damage("dataset.json", f"{name}: {len(split.class_images)} class counts")
        for name, split in card.splits.items()
        if len(split.class_images) != len(card.classes)
    ]
    return found


def _check_shard(location: str, shard: Shard, *, card: DatasetCard, deep: bool) -> _ShardFindings:
    with TemporaryDirectory(prefix="convnext-check-") as fetched:
        store = Store(location=location, cache_dir=Path(fetched))
        try:
            return _check_files(store, shard, card=card, deep=deep)
        except StorageError as error:
            raise StorageError(
                str(error),
                hint="name another folder for downloads:"
                f" TMPDIR=DIR convnext data check {quote_path(location)}",
            ) from error


def _check_files(store: Store, shard: Shard, *, card: DatasetCard, deep: bool) -> _ShardFindings:
    shard_store = replace(store, location=shards_location(card, store.location))
    damage: list[Damage] = []
    index, index_sha256 = None, None
    try:
        index_path = store.path(index_name(shard.name), expected=Expected())
        index, index_sha256 = read_index(index_path), read_index_sha256(index_path)
    except DataError as error:
        damage.append(Damage(index_name(shard.name), str(error)))
    try:
        path = shard_store.path(shard.name, expected=Expected())
        size = path.stat().st_size
        if size != shard.bytes:
            damage.append(Damage(shard.name, f"{size:,} bytes, but the card says {shard.bytes:,}"))
        scan = scan_shard(path, labels=label_source(card), names=True)
    except (DataError, OSError) as error:
        damage.append(Damage(shard.name, str(error)))
        return _ShardFindings(None, tuple(damage))
    if size == shard.bytes and scan.sha256 != shard.sha256:
        damage.append(Damage(shard.name, "its bytes are not those that were packed (sha256)"))
    scanned = replace(scan.index, labels=class_numbers(scan, card))
    if index is not None and not _is_same(index, scanned):
        damage.append(Damage(index_name(shard.name), "it does not describe its shard"))
    elif index is not None:
        changed = np.flatnonzero(index.digest != scanned.digest)
        damage += [
            Damage(shard.name, f"{index.key(row)}: its bytes are not those that were indexed")
            for row in changed.tolist()
        ]
        if shard.index_sha256 not in (None, index_sha256):
            damage.append(Damage(index_name(shard.name), "it is not the one that the card names"))
    if len(scanned) != shard.images:
        damage.append(
            Damage(shard.name, f"{len(scanned):,} images, but the card says {shard.images:,}")
        )
    outside = (scanned.labels < 0) | (scanned.labels >= len(card.classes))
    damage += [
        Damage(
            shard.name,
            f"{scanned.key(row)}: label {scan.label_texts[row]} of {len(card.classes)} classes",
        )
        for row in np.flatnonzero(outside).tolist()
    ]
    if deep:
        damage += _check_images(path, scanned, shard=shard.name)
    return _ShardFindings(scanned, tuple(damage))


def _is_same(left: ShardIndex, right: ShardIndex) -> bool:
    """Whether two indexes agree in all but the digests and sizes of the images."""
    return left.key_text == right.key_text and all(
        np.array_equal(a, b)
        for a, b in (
            (left.key_end, right.key_end),
            (left.labels, right.labels),
            (left.image_offset, right.image_offset),
            (left.image_bytes, right.image_bytes),
        )
    )


def _check_images(path: Path, index: ShardIndex, *, shard: str) -> list[Damage]:
    """The images that cannot be decoded."""
    bad: list[Damage] = []
    with path.open("rb") as file:
        for row in range(len(index)):
            file.seek(int(index.image_offset[row]))
            try:
                decode_rgb(file.read(int(index.image_bytes[row])), key=index.key(row))
            except BadImage as error:
                bad.append(Damage(shard, f"{error.key}: {error.reason}"))
    return bad


def _check_counts(
    card: DatasetCard, split: Split, findings: Sequence[_ShardFindings]
) -> list[Damage]:
    labels = _join(findings, "labels")
    labels = labels[(labels >= 0) & (labels < len(card.classes))]
    counts = np.bincount(labels, minlength=len(card.classes))
    if any(found.damage for found in findings) or counts.tolist() == list(split.class_images):
        return []
    return [Damage("dataset.json", f"{split.name}: its class counts are not those of the shards")]


def _make_split_report(
    card: DatasetCard, split: Split, findings: Sequence[_ShardFindings]
) -> SplitReport:
    width, height = _join(findings, "width"), _join(findings, "height")
    digests = _join(findings, "digest")
    named = zip(card.classes, split.class_images, strict=False)
    return SplitReport(
        name=split.name,
        images=split.images,
        shards=len(split.shards),
        bytes=sum(shard.bytes for shard in split.shards),
        class_images=_spread(np.array(split.class_images)) or Spread(0, 0.0, 0),
        empty_classes=tuple(name for name, images in named if not images),
        width=_spread(width[width > 0]),
        height=_spread(height[height > 0]),
        duplicates=len(digests) - len(np.unique(digests)),
    )


def _join(
    findings: Sequence[_ShardFindings], column: Literal["labels", "width", "height", "digest"]
) -> NDArray[np.int64]:
    """A column of all shards that can be read, digests by their bits."""
    parts = [getattr(found.index, column) for found in findings if found.index is not None]
    joined = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    return joined.view(np.int64) if column == "digest" else joined


def _spread(values: NDArray[np.int64]) -> Spread | None:
    if not len(values):
        return None
    return Spread(int(np.min(values)), float(np.median(values)), int(np.max(values)))


def _find_shared(
    train: Sequence[_ShardFindings], val: Sequence[_ShardFindings]
) -> tuple[int, tuple[tuple[str, str], ...]]:
    """How many images of val are in train, and some of them."""
    in_train, in_val = _join(train, "digest"), _join(val, "digest")
    rows = np.flatnonzero(np.isin(in_val, in_train))
    examples = []
    for row in rows[:_EXAMPLES]:
        twin = int(np.flatnonzero(in_train == in_val[row])[0])
        examples.append((_key(train, twin), _key(val, int(row))))
    return len(rows), tuple(examples)


def _key(findings: Sequence[_ShardFindings], row: int) -> str:
    for found in findings:
        if found.index is not None:
            if row < len(found.index):
                return found.index.key(row)
            row -= len(found.index)
    raise AssertionError
