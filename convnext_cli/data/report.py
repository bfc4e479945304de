"""What a check of a packed data set found; no numpy, so that a command can name it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Smallest, middle and largest of some numbers."""

    min: int
    median: float
    max: int


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it should be."""

    where: str
    what: str


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """What one split holds."""

    name: str
    images: int
    shards: int
    bytes: int
    class_images: Spread
    """Images of a class, over the classes."""
    empty_classes: tuple[str, ...]
    width: Spread | None
    """In pixels; None where no image was measured."""
    height: Spread | None
    duplicates: int
    """Images whose bytes an earlier image of the split has already."""


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """What a check found."""

    location: str
    fingerprint: str
    classes: int
    splits: tuple[SplitReport, ...]
    shared: int
    """Images of val whose bytes are in train, too: they make an accuracy look better than it is."""
    shared_examples: tuple[tuple[str, str], ...]
    """Some of them as (key in train, key in val)."""
    damage: tuple[Damage, ...]
    deep: bool
