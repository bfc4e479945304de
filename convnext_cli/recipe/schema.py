"""What a recipe may say: frozen sections, each field with its meaning, unit and the paper's value.

The string under a field is its help (`convnext recipes show --fields`). "Off" is `null`, "choose
for me" is `auto`. A recipe holds what is asked; every derived number is in the plan.

Papers: ConvNeXt (Liu et al. 2022, arXiv 2201.03545), Tables 5 and 6; ConvNeXt V2 (Woo et al. 2023,
arXiv 2301.00808), Tables 8 to 13.
"""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from convnext_cli.catalog.datasets import DATASETS, IMAGENET_MEAN, IMAGENET_STD
from convnext_cli.catalog.models import VARIANTS
from convnext_cli.recipe.durations import AnyDuration, Duration, StepDuration

MAX_IMAGE_PX = 8_000
"""Largest side of a network's input: beyond, no machine has the memory."""

Precision = Literal["fp32", "bf16", "fp16"]
GradientCheckpointing = Literal["none", "selective", "stages", "blocks"]
Strategy = Literal["ddp", "fsdp", "zero1", "zero2", "zero3"]
Kernels = Literal["fused", "compile", "eager"]
ShardGroup = Literal["all", "node"]
DropPathKind = Literal["scale", "skip"]
Interpolation = Literal["bicubic", "bilinear"]
EvalCrop = Literal["center", "warp"]
LayerDecayKind = Literal["grouped", "single"]
Tracker = Literal["csv", "tensorboard", "wandb", "mlflow"]

Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Pair = Annotated[tuple[Positive, Positive], Field(strict=False)]
Triple = Annotated[tuple[float, float, float], Field(strict=False)]


class Section(BaseModel):
    """A group of keys: frozen, strict about types, and closed to unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Model(Section):
    """The network."""

    name: str = "convnext_tiny"
    """Architecture, such as convnext_tiny, convnext_isotropic_small, convnextv2_atto, resnet50."""

    num_classes: Annotated[int, Field(ge=2)] | Literal["auto"] = "auto"
    """Outputs of the head; auto: as many as the data set has classes."""

    drop_path: BelowOne = 0.0
    """Stochastic depth: probability of the last block, rising linearly from 0.
    Paper (1K): T .1, S .4, B .5, L .5."""

    drop_path_kind: DropPathKind = "scale"
    """scale: a block computes all images and drops some. skip: it computes only those it keeps,
    which saves their time and memory. The number kept in a pass is fixed, rounded to whole images,
    so that the probability differs from drop_path (in passes of a few images by much), and images
    are not dropped independently. What it does to accuracy is not measured. Paper: scale."""

    layer_scale_init: Positive | Literal["auto"] | None = "auto"
    """Start value of LayerScale; auto: the architecture's own (V1: 1e-6, V2 and isotropic S/B:
    off)."""

    head_init_scale: Positive = 1.0
    """The head's fresh weights are multiplied by this. Paper: 1 from scratch, 0.001 fine-tuning."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name not in VARIANTS:
            raise ValueError("no such architecture")
        return name


def expand_home_text(location: str) -> str:
    """A path or URL whose ~ no shell has read, as in a recipe or in --data=~/images."""
    return str(Path(location).expanduser()) if location.startswith("~/") else location


HomePath = Annotated[str, AfterValidator(expand_home_text)]


class Init(Section):
    """The weights that training starts from."""

    weights: HomePath | None = None
    """Weight file in any published layout, or a run: its best checkpoint; null: from scratch."""

    source: Literal["auto", "raw", "ema"] = "auto"
    """Which weights of a training checkpoint; auto: the averaged ones where there are any.
    Paper: raw, but for ConvNeXt-L 1K to 384 px (ema)."""

    head: Literal["keep", "reset", "map"] = "keep"
    """keep: the head is taken if its size and the classes that it names fit, else it starts afresh;
    reset: it starts afresh; map: ImageNet-1K's rows are taken from an ImageNet-22K head by class
    (wnid)."""


_STREAM_KEYS = ("val_path", "train_images", "val_images", "allow_pipe")


class Data(Section):
    """Where the images are and how they are read."""

    dataset: str | None = None
    """Known data set whose sizes are used for planning, such as imagenet1k; null: your own."""

    path: HomePath | None = None
    """Packed data set: folder or URL with a dataset.json (`convnext data pack` makes it). The
    flag --data sets it. In stream mode: the training shards, such as shards/{000..127}.tar."""

    mode: Literal["indexed", "stream"] = "indexed"
    """indexed: exact order and resume, through the index beside the shards. stream: plain
    WebDataset streaming of unindexed shards; the order depends on the workers, and a resume
    restarts the epoch."""

    val_path: str | None = None
    """Stream mode only: the validation shards."""

    train_images: Count | None = None
    """Stream mode only: number of training images, which an unindexed stream does not tell."""

    val_images: Count | None = None
    """Stream mode only: number of validation images."""

    allow_pipe: bool = False
    """Stream mode only: allow `pipe:` URLs, which run a shell command."""

    image_px: Annotated[int, Field(ge=8, le=MAX_IMAGE_PX)] = 224
    """Side of the square image that the network sees, in pixels."""

    order: Literal["full", "window"] = "full"
    """full: one permutation of all images an epoch (local disks). window: neighbours are read
    together and shuffled within a window (object stores, spinning disks)."""

    lanes: Count = 256
    """Parallel reading streams of the window order; the world size must divide it."""

    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Loader processes per device; auto: from the number of cores. Paper: 10."""

    cache_dir: str | None = None
    """Node-local folder for shards that come from a URL; null: the user's cache folder."""

    cache_gb: Positive | None = None
    """Largest size of that folder, in 1e9 bytes: the shards used longest ago make room; null: the
    disk, but for 10 GB."""

    bad_frac: Fraction = 1e-4
    """Share of the training images that may turn out unusable, one image at least, before the run
    stops; 0: none."""

    mean: Triple = IMAGENET_MEAN
    """Mean of the normalisation, per channel, for pixels in 0..1."""

    std: Annotated[tuple[Positive, Positive, Positive], Field(strict=False)] = IMAGENET_STD
    """Standard deviation of the normalisation, per channel, for pixels in 0..1."""

    @field_validator("dataset")
    @classmethod
    def _check_dataset(cls, dataset: str | None) -> str | None:
        if dataset is not None and dataset not in DATASETS:
            raise ValueError(f"should be null or one of {', '.join(DATASETS)}")
        return dataset

    @model_validator(mode="after")
    def _check_mode(self) -> Self:
        if self.mode == "indexed":
            asked = [name for name in _STREAM_KEYS if getattr(self, name) not in {None, False}]
            if asked:
                raise ValueError(f"data.{asked[0]} is for data.mode=stream only")
        return self


class Progressive(Section):
    """Smaller training images at first. Not the papers' recipe; evaluation stays at image_px."""

    from_px: Annotated[int, Field(ge=16)] | None = None
    """Side of the first training images, from which it grows in steps of 32 px to data.image_px;
    null: off. The network costs the share of the pixels; the loader does not, for it decodes the
    same crops (from 160 px a core loads 1.2 times as many images as at 224 px where it also does
    RandAugment, else no more). What it does to accuracy is not measured here: ffcv and Mosaic train
    ResNets so, and EfficientNetV2 (Tan and Le 2021) finds that accuracy drops unless augmentation
    grows with the size, which it does not here."""

    until: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Share of the schedule after which images have data.image_px."""


_POLICY = re.compile(r"rand(-(t\w+|(m|n|mmax)\d+|(p|mstd)\d+(\.\d+)?|inc[01]))*")
"""What timm reads: parts that it does not know it refuses, or passes over without a word."""


class Augment(Section):
    """What is done to each training image."""

    crop_scale: Pair = (0.08, 1.0)
    """Share of the image's area that a random crop keeps, from and to."""

    crop_ratio: Pair = (3 / 4, 4 / 3)
    """Aspect ratio of a random crop, from and to."""

    interpolation: Interpolation = "bicubic"
    """Filter of the resize, in training and evaluation. Paper: bicubic."""

    hflip: Fraction = 0.5
    """Probability of a horizontal flip."""

    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment policy in timm's notation; null: off."""

    augment_on: Literal["auto", "cpu", "device"] = "auto"
    """Where RandAugment is done: cpu: in the loader, by Pillow. device: for whole batches there,
    with the same choices, which takes its time. auto: on a GPU whose cores load less than twice
    what it is estimated to take, device."""

    color_jitter: Positive | None = None
    """Strength of colour jitter, used only without RandAugment. Paper: .4, unused for that
    reason."""

    erasing: Fraction | None = 0.25
    """Probability of random erasing; null: off."""

    @field_validator("rand_augment")
    @classmethod
    def _check_policy(cls, policy: str | None) -> str | None:
        if policy is not None and not _POLICY.fullmatch(policy):
            raise ValueError("a policy in timm's notation is wanted, such as rand-m9-mstd0.5-inc1")
        return policy

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _check_range(cls, pair: tuple[float, float]) -> tuple[float, float]:
        if pair[0] > pair[1]:
            raise ValueError("the first value is the smaller one")
        return pair

    @field_validator("crop_scale")
    @classmethod
    def _check_share(cls, pair: tuple[float, float]) -> tuple[float, float]:
        if pair[1] > 1:
            raise ValueError("shares of the area are at most 1")
        return pair


class Mix(Section):
    """What is done to each training batch and its targets."""

    mixup: Positive | None = 0.8
    """Alpha of mixup; null: off."""

    cutmix: Positive | None = 1.0
    """Alpha of cutmix; null: off."""

    prob: Fraction = 1.0
    """Probability that a batch is mixed at all."""

    switch_prob: Fraction = 0.5
    """Probability of cutmix where both are on."""

    group_images: Annotated[int, Field(ge=2, multiple_of=2)] = 128
    """Images of the global batch that share a draw (mixup or cutmix, its lambda and box), whatever
    the number of devices. Paper: those of a device, 128 (T/S/B), 64 (L), 32 (22K and V2)."""

    label_smoothing: BelowOne = 0.1
    """Share of the target that is spread over all classes."""


class Batch(Section):
    """The images of one optimizer step."""

    global_images: Count = 4096
    """Images per optimizer step over all devices: the contract. Paper: 4096 (fine-tuning 512)."""

    per_device_images: Count = 128
    """The most images that one device takes in one pass; fewer are taken, and gradients
    accumulated, as the global batch needs. Paper: 128 (T/S/B), 64 (L)."""


class Optim(Section):
    """AdamW and its learning rate."""

    lr: Positive = 4e-3
    """Peak learning rate at a global batch of `lr_images`. Paper: 4e-3 (fine-tuning 5e-5)."""

    lr_images: Count = 4096
    """Global batch that `lr` was chosen for. A run with another one must say `lr_rule`."""

    lr_rule: Literal["none", "linear", "sqrt"] | None = None
    """How `lr` follows a global batch other than `lr_images`: none (as written), linear, sqrt."""

    min_lr: Annotated[float, Field(ge=0)] = 1e-6
    """Learning rate at the end of the cosine. Paper: 1e-6."""

    betas: Annotated[tuple[BelowOne, BelowOne], Field(strict=False)] = (0.9, 0.999)
    """AdamW's averaging coefficients. Paper: .9, .999."""

    eps: Positive = 1e-8
    """AdamW's epsilon. Paper: 1e-8."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decay of matrices and kernels; biases, norms, LayerScale and GRN never decay. Paper: .05
    (fine-tuning 1e-8)."""

    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor by which each earlier group of layers learns more slowly; null: all alike.
    Paper: .8 (22K to 1K), .7 (1K to 384 px)."""

    layer_decay_kind: LayerDecayKind = "grouped"
    """grouped: the 12 (T: 6) groups of V1; single: a group a block, as the small V2 models."""

    clip_norm: Positive | None = None
    """Largest norm of the gradient; null: not clipped. Paper: none."""


class Schedule(Section):
    """How long, and how the learning rate moves: linear warm-up, then half a cosine, per step."""

    length: StepDuration = Duration(300, "ep")
    """Length of training. Paper: 300ep (22K: 90ep, fine-tuning 30ep)."""

    warmup: StepDuration | None = Duration(20, "ep")
    """Linear warm-up from 0; null: none. Paper: 20ep (22K: 5ep, fine-tuning none)."""


class Ema(Section):
    """Averaged weights, evaluated beside the raw ones."""

    decay: Annotated[float, Field(gt=0, lt=1)] | None = 0.9999
    """Share of the old average kept at each step; null: off. Paper: .9999 (1K from scratch)."""


class Compute(Section):
    """How the mathematics is run."""

    precision: Precision | Literal["auto"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU. Paper: fp32 (V1), fp16 (V2 fine-tuning)."""

    kernels: Kernels | Literal["auto"] = "auto"
    """What computes the network. fused: this project's kernels, the rest by torch.compile; compile:
    torch.compile alone; eager: PyTorch's operators one by one. auto: on a GPU the fastest for each
    stage, measured once and kept on disk; on a CPU eager. The numbers agree to rounding."""

    channels_last: bool | Literal["auto"] = "auto"
    """NHWC memory format; auto: on a GPU."""

    cuda_graphs: bool | Literal["auto"] = "auto"
    """Record the compiled network as CUDA graphs, one forward and one backward, and launch each at
    once: else the GPU waits for its host, with small models the most. auto: on one GPU; on several,
    gradients would be sent only when all are done. Not where weights move in memory."""

    fp8: bool = False
    """Matrix products of blocks of 512 channels or more in fp8, by torchao with a scale a tensor;
    needs bf16 and a GPU of compute capability 8.9. Weights, averages and checkpoints stay as they
    are, and val_ema is computed without it. What it does to accuracy on ImageNet is not measured;
    one layer's output is off by .037 and its gradients by .059 (bf16: .003)."""

    gradient_checkpointing: GradientCheckpointing = "none"
    """Recompute activations in the backward pass to save memory. selective: only what is
    cheap, all but products and convolutions; stages, blocks: everything, a piece at a time."""

    strategy: Strategy = "ddp"
    """What devices share besides the batch. ddp: nothing; fsdp: weights, gradients, optimizer and
    EMA; by DeepSpeed zero1: the optimizer, zero2: gradients too, zero3: weights and EMA too.
    Checkpoints are the same for all, so it may change from one attempt to the next."""

    shard_group: ShardGroup = "all"
    """Devices that share one set of weights under fsdp: all, or those of a node, so that only
    gradients cross between nodes."""


class Evaluate(Section):
    """How images are prepared for evaluation, and when it happens in training."""

    every: StepDuration | None = Duration(1, "ep")
    """Interval of validation in training; null: only at the end."""

    crop: EvalCrop = "center"
    """center: resize the short side to image_px / crop_frac, take the middle. warp: resize both
    sides to image_px. Paper: center at 224 px, warp at 384 px and above."""

    crop_frac: Annotated[float, Field(ge=0.05, le=1)] = 0.875
    """Share of the resized side that the central crop keeps. Paper: .875."""

    per_device_images: Count | Literal["auto"] = "auto"
    """Images per pass; auto: 1.5 times the largest training batch, as the paper's."""


class Checkpoint(Section):
    """What is kept of a run. The best raw and averaged weights by val/top1 are always kept."""

    every: AnyDuration | Literal["auto"] = "auto"
    """Interval of saving; auto: so that a failure costs a minute of work or less, where that takes
    less than 1% of the run, by the measured cost of a save."""

    failure_hours: Annotated[float, Field(gt=0)] = 24.0
    """Mean time between two failures of the run that `every: auto` assumes."""

    keep_last: Count = 3
    """How many of the newest are kept."""

    keep_every: StepDuration | None = None
    """Besides, those at multiples of this interval are kept for ever, where one was saved there."""

    copy_to: str | None = None
    """URL of a folder, such as s3://BUCKET/runs, under which the run's checkpoints and tables are
    copied beside training; `convnext checkpoints fetch` brings them back."""


class Guard(Section):
    """What is done when training goes wrong by itself. The paper's code stops at the first one."""

    max_skipped_steps: Annotated[int, Field(ge=0)] = 3
    """Steps within `window_steps` whose gradient is not finite, and which are left out: weights,
    averages and moments stay as they are. One more, and the run goes back to a checkpoint from
    before the first of them and takes other images from there on."""

    window_steps: Count = 100
    """Length of that window, in optimizer steps."""

    max_rollbacks: Annotated[int, Field(ge=0)] = 2
    """Times that a run goes back before it ends with exit code 71."""

    hang_minutes: Annotated[float, Field(gt=0)] = 10.0
    """Time without an optimizer step or a validation batch after which every rank writes where it
    stands, and the run ends with exit code 76."""

    start_minutes: Annotated[float, Field(gt=0)] = 30.0
    """The same for the first step, before which the ranks find each other and which compiles and
    fills caches, and for the first of a new size of images."""


class Log(Section):
    """What is written down."""

    every_steps: Count = 50
    """Interval of metric rows, in optimizer steps."""

    trackers: Annotated[tuple[Tracker, ...], Field(strict=False)] | Literal["auto"] = "auto"
    """Besides metrics.jsonl; auto: csv, and tensorboard where it is installed."""

    @field_validator("trackers")
    @classmethod
    def _check_trackers(
        cls, trackers: tuple[Tracker, ...] | Literal["auto"]
    ) -> tuple[Tracker, ...] | Literal["auto"]:
        if trackers != "auto" and len(set(trackers)) < len(trackers):
            raise ValueError("should name each tracker once")
        return trackers


class Recipe(Section):
    """One experiment: everything that decides its result, and what of the machine it should use."""

    about: str
    """One line: what is trained on what, and what comes out."""

    published_top1: Annotated[float, Field(gt=0, le=100)] | None = None
    """Top-1 accuracy that the paper reports for this recipe, in percent. A recipe that extends this
    one, or overrides, with another model, data set or image size does not take it over."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Start of every random choice: weights, order, crops, mixing, drop path."""

    model: Model = Model()
    init: Init = Init()
    data: Data = Data()
    progressive: Progressive = Progressive()
    augment: Augment = Augment()
    mix: Mix = Mix()
    batch: Batch = Batch()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    ema: Ema = Ema()
    compute: Compute = Compute()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    log: Log = Log()

    @model_validator(mode="after")
    def _check_head(self) -> Self:
        if self.init.head == "map" and self.init.weights is None:
            raise ValueError("init.head: map needs init.weights, the checkpoint with the 22K head")
        return self
