"""What a comparison came to, as plain values that light modules can read."""

from collections.abc import Mapping
from dataclasses import dataclass

from convnext_cli.bench.operators import OperatorClass
from convnext_cli.bench.roofline import Floor, OpList
from convnext_cli.recipe.schema import GradientCheckpointing


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
    sheet_frac: float | None
    """The same against the data sheet's peak; None where it is not known, or not of bf16."""
    floor_ops: OpList
    """The operator list that the system is built of, as far as is known."""
    floor_images_per_second: float | None
    """What perfect kernels of that list would reach; None for models without a roofline."""
    floor_frac: float | None
    """Share of it that is reached; above 1 where the system fuses more than its list does."""
    best_floor_frac: float | None
    """Share of what the fastest known list would reach."""
    peak_bytes: int | None
    """Peak of what its process allocated of the device's memory; None on a CPU."""
    start_seconds: float
    """First step: compilation, and the choice of algorithms, while the other systems start too."""
    loss: float
    """Of the last step: finite, or the rate means nothing."""


@dataclass(frozen=True)
class KernelTime:
    """One kernel, or one operator on a CPU, over all its launches in a step."""

    name: str
    operators: OperatorClass
    milliseconds: float
    """A step."""
    launches: float
    """A step."""


@dataclass(frozen=True)
class ClassTime:
    """All kernels of one class in a step."""

    operators: OperatorClass
    milliseconds: float
    share: float
    """Of the device's time in the step."""
    floor_milliseconds: float | None
    """Of perfect kernels, on the system's operator list; None where it has none of that class."""


@dataclass(frozen=True)
class StepProfile:
    """Where the time of one system's step goes, from a trace made after the rounds."""

    system: str
    step_milliseconds: float
    """Of the rounds, without a profiler: the median."""
    device_milliseconds: float
    """Of the device's kernels in a step; on a CPU, of its operators. Less than the step: the device
    waits for the host."""
    classes: tuple[ClassTime, ...]
    kernels: tuple[KernelTime, ...]
    """The costliest."""


@dataclass(frozen=True)
class StepMemory:
    """Memory of this project's step at two batch sizes, and the line through them."""

    checkpointing: GradientCheckpointing
    images: tuple[int, int]
    peak_bytes: tuple[int, int]
    """Measured: the device's allocations of weights, states, batches and one step."""
    bytes_per_image: float
    """Slope."""
    fixed_bytes: float
    """What would be left at no image."""
    predicted_bytes: tuple[int, int]
    """What `convnext plan` estimates, without compilation."""
    most_images: int | None
    """On the line at the device's memory: arithmetic, not tried; None on a CPU, or where the peak
    is the optimizer's and does not grow."""


@dataclass(frozen=True)
class StepReport:
    """A whole comparison of training steps."""

    date: str
    """Of the measurement: year-month-day, UTC."""
    model: str
    device: str
    """Its own name."""
    versions: Mapping[str, str]
    images: int
    """In a batch."""
    image_px: int
    precision: str
    compiled: bool
    kernels: str
    """compute.kernels of this project, and the way of each stage where it has its own."""
    steps: int
    """In a round."""
    rounds: int
    flops_per_image: float
    """Forward and backward: six for each multiply-add of the forward pass."""
    matmul_flops_per_second: float
    """Measured, in the precision of the step."""
    copy_bytes_per_second: float
    """Measured: bytes read and written."""
    floors: tuple[Floor, ...]
    """For the rates measured here: `eager` and `compiler` under autocast with an fp32 stream, the
    others without one. Empty for models without a roofline."""
    rates: tuple[StepRate, ...]
    ratios: tuple[Ratio, ...]
    best_peer: Ratio | None
    """Against the fastest peer by its median."""
    profiles: tuple[StepProfile, ...]
    memory: tuple[StepMemory, ...]
    failed: Mapping[str, str]
    """What could not be run or measured, and why."""


@dataclass(frozen=True)
class PassTime:
    """One pass of a depthwise convolution."""

    milliseconds: float
    """Median, cold cache."""
    copy_frac: float
    """Two tensors' bytes a second, against those of a copy."""
    error_frac: float
    """Norm of the difference from the first system's result, over the norm of that."""


@dataclass(frozen=True)
class DepthwiseTime:
    """All passes of one system at one shape."""

    system: str
    channels: int
    side: int
    forward: PassTime
    input_gradient: PassTime
    weight_gradient: PassTime


@dataclass(frozen=True)
class DepthwiseReport:
    """7x7 depthwise convolutions at all shapes."""

    date: str
    device: str
    versions: Mapping[str, str]
    images: int
    precision: str
    copy_bytes_per_second: float
    times: tuple[DepthwiseTime, ...]
