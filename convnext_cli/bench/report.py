"""What a comparison came to, as plain values that light modules can read."""

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
    """How many times as fast this project is: the median of the rounds."""

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


@dataclass(frozen=True)
class StepRate:
    """Whole training steps of one system over all rounds."""

    system: str
    images_per_second: float
    """Median."""
    low: float
    high: float
    matmul_frac: float
    """FLOPs of the model a second, against those of one large matrix product on this device."""
    peak_bytes: int | None
    """Peak of the device's memory, without what the other systems hold; None on a CPU."""
    start_seconds: float
    """First step: compilation, and the choice of algorithms."""
    loss: float
    """Of the last step: finite, or the rate means nothing."""


@dataclass(frozen=True)
class StepReport:
    """A whole comparison of training steps."""

    model: str
    device: str
    """Its own name."""
    versions: Mapping[str, str]
    images: int
    """In a batch."""
    image_px: int
    precision: str
    compiled: bool
    steps: int
    """In a round."""
    rounds: int
    flops_per_image: float
    """Forward and backward: six for each multiply-add of the forward pass."""
    matmul_flops_per_second: float
    """Measured, in the precision of the step."""
    copy_bytes_per_second: float
    """Measured: bytes read and written."""
    rates: tuple[StepRate, ...]
    ratios: tuple[Ratio, ...]
    failed: Mapping[str, str]
    """Systems that could not be run, and why."""
