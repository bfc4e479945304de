"""What a comparison of loaders came to, as plain values that light modules can read."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rate:
    """What one system came to over all rounds."""

    system: str
    images_per_core_second: float
    """Median."""
    low: float
    high: float
    wall_images_per_second: float
    """Median, with all workers; other work on the machine slows it."""


@dataclass(frozen=True)
class Ratio:
    """How many times as many images a core loads here as there: the median of the rounds."""

    ours: str
    peer: str
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Stage:
    """One step of this project's loader, alone in one process."""

    name: str
    milliseconds: float
    """CPU time an image."""


@dataclass(frozen=True)
class LoaderReport:
    """A whole comparison."""

    images: int
    """Distinct images."""
    mean_bytes: float
    image_px: int
    batch: int
    workers: int
    rounds: int
    rates: tuple[Rate, ...]
    ratios: tuple[Ratio, ...]
    stages: tuple[Stage, ...]
    limit_images_per_core_second: float
    """Reading and decoding the crop alone: no loader of these files can be faster."""
    failed: Mapping[str, str]
    """Systems that could not be run, and why."""

    def limit_frac(self, system: str) -> float:
        """Share of the limit that a system reaches."""
        rate = next(rate for rate in self.rates if rate.system == system)
        return rate.images_per_core_second / self.limit_images_per_core_second
