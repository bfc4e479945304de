"""`Plan`: every number that a run uses, derived once from a recipe, a cluster and a data set.

```
global_images = per_device_images x world_size x accumulate_steps       (the contract)
steps_per_epoch = train_images // global_images                         (an epoch's rest is dropped)
total_steps = schedule.length in steps
```

Pure: depends on the arguments alone, imports no torch.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, assert_never

from convnext_cli.catalog.datasets import DATASETS
from convnext_cli.catalog.models import (
    Variant,
    count_fp8_layers,
    count_parameters,
    estimate_macs,
    find_variant,
)
from convnext_cli.errors import PlanError
from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.cost import (
    CHECKPOINTING,
    STRATEGIES,
    Memory,
    block_images,
    estimate_activations,
    estimate_memory,
    estimate_skipped_macs,
    explain_sharding,
)
from convnext_cli.plan.sizes import TrainSize, count_steps, make_train_sizes
from convnext_cli.recipe.durations import Duration
from convnext_cli.recipe.schema import GradientCheckpointing, Kernels, Optim, Precision, Recipe

SUSTAINED_FLOPS = 1e14
"""What a device is assumed to sustain, in floating-point operations a second: said beside every
number that depends on it."""

FAST_DEVICE = 4
"""How many times `SUSTAINED_FLOPS` a fast device sustains at most. Source: benchmarks/README.md, an
H100 trains ConvNeXt-T at 7,865 images/s and L at 1,736: 2.1 and 3.6 times."""

CORE_IMAGES, CORE_IMAGES_AUGMENTED = 500, 350
"""Images that a core loads in a second at 224 px, without and with RandAugment by Pillow: a quarter
less than the 671 and 481 of benchmarks/README.md, for slower cores."""

_AMPLE = 2
"""RandAugment is done by the cores where they load so many times what the devices take: it would
take time of the devices, which are dearer, and may be faster than assumed."""

_SMALL_BATCH = 64
"""Of the recipe `small_data`. A smaller batch that is offered is all images if there are fewer than
this, else a twentieth of them or this, so that an epoch has many steps."""

_MOST_PASSES_OVER_FEWEST = 4
"""A batch that splits into still smaller passes, as a prime number does, would crawl."""


@dataclass(frozen=True)
class DataFacts:
    """What planning needs to know of a data set."""

    train_images: int
    val_images: int
    num_classes: int
    source: str
    """Where the numbers come from, for messages."""
    fingerprint: str | None = None
    """What changes when an image or a class does; None where it is not known."""


@dataclass(frozen=True)
class Plan:
    """What will run. Steps are optimizer steps; images are per step unless said."""

    name: str
    recipe: Recipe
    cluster: Cluster
    data_source: str
    data_fingerprint: str | None
    num_classes: int
    parameters: int
    gmacs: float
    """Multiply-adds of one image's forward pass, 1e9; the papers' "FLOPs"."""
    train_images: int
    val_images: int
    global_images: int
    per_device_images: int
    accumulate_steps: int
    steps_per_epoch: int
    dropped_images: int
    """Images of each epoch that do not fill a last step; other ones every epoch."""
    total_steps: int
    warmup_steps: int
    epochs: float
    lr: float
    lr_note: str
    min_lr: float
    precision: Precision
    fp8_layers: int
    """Pointwise layers whose products are in fp8."""
    kernels: Kernels | Literal["auto"]
    """auto: chosen on the device, see `training.kernels`."""
    cuda_graphs: bool
    """Whether the compiled network is recorded and played."""
    channels_last: bool
    workers: int
    augment_on: Literal["cpu", "device"]
    """Where RandAugment is done."""
    loader_images_per_second: float
    """What the loader processes of a node give, estimated from cores of the benchmark."""
    device_images_per_second: float | None
    """What the devices of a node take, at `SUSTAINED_FLOPS` each, of the smallest training images;
    None on a CPU."""
    eval_per_device_images: int
    eval_every_steps: int | None
    checkpoint_every_steps: int | None
    checkpoint_every_seconds: float | None
    """Both intervals None: by the measured cost of a save."""
    checkpoint_keep_every_steps: int | None
    images_read: int
    """Training images over the whole run, all devices."""
    train_sizes: tuple[TrainSize, ...]
    """Sizes of training images over the schedule."""
    train_flops: float
    """Floating-point operations of the whole run: 2 a multiply-add, backward twice the forward."""
    saved_flops_frac: float
    """Share of them that smaller images and skipped blocks save."""
    skipped_bytes: int
    """Activations of a device that blocks do not keep, as they skip the images they drop."""
    state_bytes: int
    """Per device: weights, gradients, two moments and averaged weights in fp32; no activations."""
    memory: tuple[Memory, ...]
    """Per device, for every strategy on these devices, whichever is chosen."""
    memory_note: str
    """Whether sharing it among the devices pays."""
    activation_bytes: dict[GradientCheckpointing, int]
    """Activations of a device by what is computed again, whichever is chosen; empty where no
    estimate is known."""

    @property
    def world_size(self) -> int:
        """Number of processes, one a device."""
        return self.cluster.world_size

    @property
    def compile(self) -> bool:
        """Whether torch.compile takes the network; on a CPU only where it is asked for."""
        on_gpu = self.cluster.device == "cuda"
        return self.kernels == "compile" or (self.kernels in {"auto", "fused"} and on_gpu)

    @property
    def batch_equation(self) -> str:
        """The contract of the batch, written out."""
        devices = "1 device" if self.world_size == 1 else f"{self.world_size} devices"
        passes = "1 pass" if self.accumulate_steps == 1 else f"{self.accumulate_steps} passes"
        return (
            f"{self.global_images} images = {self.per_device_images} a device"
            f" x {devices} x {passes}"
        )

    def image_px_at(self, step: int) -> int:
        """Side of the training images of an optimizer step; on every rank, in every attempt."""
        return next(size.image_px for size in reversed(self.train_sizes) if size.first_step <= step)

    def validates_at(self, step: int) -> bool:
        """Whether the validation images are evaluated after this optimizer step."""
        if self.val_images == 0:
            return False
        every = self.eval_every_steps
        return step == self.total_steps or (every is not None and step % every == 0)

    def to_json(self) -> dict[str, Any]:
        """Plain values, the derived numbers at the top level, the recipe and cluster below."""
        plain = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in {"recipe", "cluster", "memory", "train_sizes"}
        }
        return plain | {
            "memory": [
                dataclasses.asdict(memory) | {"state": memory.state, "total": memory.total}
                for memory in self.memory
            ],
            "train_sizes": [dataclasses.asdict(size) for size in self.train_sizes],
            "strategy": self.recipe.compute.strategy,
            "world_size": self.world_size,
            "model": self.recipe.model.name,
            "image_px": self.recipe.data.image_px,
            "weight_decay": self.recipe.optim.weight_decay,
            "layer_decay": self.recipe.optim.layer_decay,
            "ema_decay": self.recipe.ema.decay,
            "gradient_checkpointing": self.recipe.compute.gradient_checkpointing,
            "cluster": dataclasses.asdict(self.cluster),
            "recipe": self.recipe.model_dump(mode="json"),
        }


def make_plan(
    recipe: Recipe, cluster: Cluster, *, name: str, facts: DataFacts | None = None
) -> Plan:
    """Resolve every number of a run.

    Args:
        recipe: What is asked.
        cluster: What there is.
        name: The recipe's name, for messages and the run's folder.
        facts: The data set at hand; None: the sizes of the recipe's known data set.

    Raises:
        PlanError: Recipe, cluster and data do not fit together; the hint mends it.
        RecipeError: The architecture takes another image size.
    """
    if facts is None:
        facts = _known_facts(recipe)
    variant = _find_built_variant(recipe)
    num_classes = _resolve_classes(recipe, facts)
    per_device_images, accumulate_steps = _split_batch(recipe, cluster)
    global_images = recipe.batch.global_images
    steps_per_epoch, dropped_images = divmod(facts.train_images, global_images)
    if steps_per_epoch == 0:
        raise PlanError(
            f"one step takes {global_images} images, but {facts.source} has only"
            f" {facts.train_images} to train on",
            hint=_hint_for_few_images(recipe, cluster, train_images=facts.train_images),
        )
    total_steps = _steps(recipe.schedule.length, steps_per_epoch)
    warmup = recipe.schedule.warmup
    warmup_steps = 0 if warmup is None else _steps(warmup, steps_per_epoch)
    if total_steps == 0:
        raise PlanError(
            f"schedule.length {recipe.schedule.length} is less than one step"
            f" ({steps_per_epoch} steps are an epoch)",
            hint="lengthen it: schedule.length=1ep",
        )
    if warmup_steps >= total_steps:
        raise PlanError(
            f"schedule: {warmup_steps} warm-up steps ({warmup}) leave nothing of"
            f" {total_steps} steps ({recipe.schedule.length})",
            hint=f"shorten the warm-up: schedule.warmup={total_steps // 10}st"
            if total_steps >= 10
            else "warm up not at all: schedule.warmup=null",
        )
    lr, lr_note = _resolve_lr(recipe.optim, global_images)
    if recipe.optim.min_lr > lr:
        raise PlanError(
            f"optim.min_lr {recipe.optim.min_lr:g} is above the peak learning rate {lr:g}",
            hint=f"lower it: optim.min_lr={lr / 1000:.0e}",
        )
    sizes = _resolve_sizes(recipe, variant, total_steps=total_steps)
    size_macs = [
        estimate_macs(variant, image_px=size.image_px, num_classes=num_classes) for size in sizes
    ]
    macs = size_macs[-1]
    parameters = count_parameters(variant, num_classes=num_classes)
    compute, on_gpu = recipe.compute, cluster.device == "cuda"
    precision: Precision = "bf16" if on_gpu else "fp32"
    if compute.precision != "auto":
        precision = compute.precision
    _check_strategy(recipe, precision=precision)
    fp8_layers = _resolve_fp8(recipe, cluster, variant=variant, precision=precision)
    shards = cluster.devices_per_node if compute.shard_group == "node" else cluster.world_size
    estimate = partial(
        estimate_activations,
        variant,
        image_px=recipe.data.image_px,
        images=per_device_images,
        parameters=parameters,
        precision=precision,
        fused=compute.kernels == "fused"
        # whole blocks, which GRN has none of: in fp32 a GPU has no room for them
        and (variant.grn or not (on_gpu and precision == "fp32")),
    )
    computed = None
    skipped_macs = [0.0] * len(sizes)
    if recipe.model.drop_path_kind == "skip":
        computed = block_images(variant, images=per_device_images, drop_path=recipe.model.drop_path)
        skipped_macs = [
            estimate_skipped_macs(
                variant, image_px=size.image_px, images=per_device_images, computed=computed
            )
            for size in sizes
        ]
    activation_bytes = {
        mode: size
        for mode in CHECKPOINTING
        if (size := estimate(checkpointing=mode, computed=computed)) is not None
    }
    activations = activation_bytes.get(compute.gradient_checkpointing)
    unskipped = estimate(checkpointing=compute.gradient_checkpointing)
    memory = tuple(
        estimate_memory(
            strategy,
            parameters=parameters,
            shards=shards if strategy == "fsdp" else cluster.world_size,
            averages=recipe.ema.decay is not None,
            accumulates=accumulate_steps > 1,
            activations=activations,
        )
        for strategy in STRATEGIES
    )
    kernels = compute.kernels
    if kernels == "auto" and (not on_gpu or compute.strategy == "zero3"):
        kernels = "eager"
    elif kernels == "auto" and variant.family == "timm":
        kernels = "compile"
    cuda_graphs = _resolve_cuda_graphs(recipe, cluster=cluster, compiled=kernels != "eager")
    workers = _workers(cluster) if recipe.data.workers == "auto" else recipe.data.workers
    device_images = None
    if on_gpu:
        flops = 6 * (size_macs[0] - skipped_macs[0])
        device_images = SUSTAINED_FLOPS / flops * cluster.devices_per_node
    load = partial(estimate_loader_rate, cluster, workers=workers)
    augment_on = recipe.augment.augment_on
    if augment_on == "auto":
        enough = device_images is None or load(augments=True) >= _AMPLE * device_images
        augment_on = "cpu" if enough else "device"
    images_read = total_steps * global_images
    size_images = [steps * global_images for steps in count_steps(sizes, total_steps=total_steps)]
    train_flops = sum(
        6.0 * (whole - skipped) * images
        for whole, skipped, images in zip(size_macs, skipped_macs, size_images, strict=True)
    )
    save = None if recipe.checkpoint.every == "auto" else recipe.checkpoint.every
    return Plan(
        name=name,
        recipe=recipe,
        cluster=cluster,
        data_source=facts.source,
        data_fingerprint=facts.fingerprint,
        num_classes=num_classes,
        parameters=parameters,
        gmacs=macs / 1e9,
        train_images=facts.train_images,
        val_images=facts.val_images,
        global_images=global_images,
        per_device_images=per_device_images,
        accumulate_steps=accumulate_steps,
        steps_per_epoch=steps_per_epoch,
        dropped_images=dropped_images,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        epochs=total_steps / steps_per_epoch,
        lr=lr,
        lr_note=lr_note,
        min_lr=recipe.optim.min_lr,
        precision=precision,
        fp8_layers=fp8_layers,
        kernels=kernels,
        cuda_graphs=cuda_graphs,
        channels_last=on_gpu if compute.channels_last == "auto" else compute.channels_last,
        workers=workers,
        augment_on=augment_on,
        loader_images_per_second=load(
            augments=recipe.augment.rand_augment is not None and augment_on == "cpu"
        ),
        device_images_per_second=device_images,
        eval_per_device_images=recipe.batch.per_device_images * 3 // 2
        if recipe.evaluate.per_device_images == "auto"
        else recipe.evaluate.per_device_images,
        eval_every_steps=_interval(recipe.evaluate.every, steps_per_epoch),
        checkpoint_every_steps=_interval(save, steps_per_epoch),
        checkpoint_every_seconds=save.value * 60 if save and save.unit == "min" else None,
        checkpoint_keep_every_steps=_interval(recipe.checkpoint.keep_every, steps_per_epoch),
        images_read=images_read,
        train_sizes=sizes,
        train_flops=train_flops,
        saved_flops_frac=1 - train_flops / (6.0 * macs * images_read),
        skipped_bytes=(unskipped or 0) - (activations or 0),
        state_bytes=next(m.state for m in memory if m.strategy == compute.strategy),
        memory=memory,
        memory_note=explain_sharding(memory, shards=shards),
        activation_bytes=activation_bytes,
    )


def _find_built_variant(recipe: Recipe) -> Variant:
    """The variant as the recipe builds it, after checks of what it cannot do."""
    model, variant = recipe.model, find_variant(recipe.model.name)
    smallest_px = variant.smallest_px
    if recipe.data.image_px < smallest_px:
        raise PlanError(
            f"data.image_px: {model.name} halves an image down to nothing at"
            f" {recipe.data.image_px} px",
            hint=f"use at least {smallest_px} px: data.image_px={smallest_px}",
        )
    if variant.family == "timm":
        if recipe.compute.kernels == "fused":
            raise PlanError(
                f"compute.kernels: there are none for {model.name}, found fused",
                hint="leave it to torch.compile: compute.kernels=compile",
            )
        checkpointing, start = recipe.compute.gradient_checkpointing, "begins as timm makes it"
        asked: tuple[tuple[str, object, object, str], ...] = (
            ("compute.gradient_checkpointing", checkpointing, "none", "has none"),
            ("model.drop_path_kind", model.drop_path_kind, "scale", "drops images in its own way"),
            ("model.layer_scale_init", model.layer_scale_init, "auto", start),
            ("model.head_init_scale", model.head_init_scale, 1.0, start),
        )
        for key, found, own, why in asked:
            if found != own:
                raise PlanError(
                    f"{key}: {model.name} {why}, found {'null' if found is None else found}",
                    hint=f"leave it: {key}={own}",
                )
        return variant
    if model.layer_scale_init == "auto":
        return variant
    return dataclasses.replace(variant, layer_scale_init=model.layer_scale_init)


def _resolve_sizes(recipe: Recipe, variant: Variant, *, total_steps: int) -> tuple[TrainSize, ...]:
    """The sizes of training images over the schedule, after checks that the model takes them."""
    from_px, image_px = recipe.progressive.from_px, recipe.data.image_px
    if from_px is not None:
        stride_px = 16 if variant.isotropic else 32
        if recipe.data.mode == "stream":
            raise PlanError(
                "progressive.from_px: a stream does not know the step of an image, so its size"
                " cannot follow the steps",
                hint="leave it out with progressive.from_px=null or index the shards with convnext"
                " data index",
            )
        if image_px % stride_px:
            raise PlanError(
                f"data.image_px: sizes that grow are multiples of {stride_px} px for"
                f" {variant.name}, found {image_px}",
                hint=f"use a multiple: data.image_px={-(-image_px // stride_px) * stride_px}",
            )
        below_px = image_px - stride_px
        smaller = f"progressive.from_px={below_px if below_px >= stride_px else 'null'}"
        if from_px >= image_px:
            raise PlanError(
                f"progressive.from_px: training begins with images of {from_px} px, which are not"
                f" smaller than data.image_px {image_px}",
                hint=f"begin smaller, or not at all: {smaller}",
            )
        if from_px % stride_px:
            raise PlanError(
                f"progressive.from_px: sizes that grow are multiples of {stride_px} px for"
                f" {variant.name}, found {from_px}",
                hint=f"use a multiple, or leave it out: {smaller}",
            )
    return make_train_sizes(
        from_px=from_px,
        image_px=image_px,
        until=recipe.progressive.until,
        total_steps=total_steps,
    )


def _resolve_fp8(
    recipe: Recipe, cluster: Cluster, *, variant: Variant, precision: Precision
) -> int:
    """How many layers compute in fp8, after checks of what it goes with."""
    if not recipe.compute.fp8:
        return 0
    if cluster.device == "cpu":
        raise PlanError(
            "compute.fp8: a CPU has no fast fp8 arithmetic",
            hint="turn it off: compute.fp8=false",
        )
    if precision != "bf16":
        raise PlanError(
            f"compute.fp8: everything beside the fp8 products is in bf16, but compute.precision is"
            f" {precision}",
            hint="set compute.precision=bf16 or compute.fp8=false",
        )
    if recipe.compute.strategy not in {"ddp", "fsdp"}:
        raise PlanError(
            f"compute.fp8: it goes with ddp and fsdp, but compute.strategy is"
            f" {recipe.compute.strategy}",
            hint="set compute.strategy=fsdp or compute.fp8=false",
        )
    layers = count_fp8_layers(variant)
    if not layers:
        raise PlanError(
            f"compute.fp8: it is for ConvNeXt blocks of 512 channels or more, and"
            f" {variant.name} has none",
            hint="turn it off: compute.fp8=false",
        )
    return layers


def _check_strategy(recipe: Recipe, *, precision: Precision) -> None:
    """Refuse what a strategy cannot do."""
    compute = recipe.compute
    if compute.shard_group == "node" and compute.strategy != "fsdp":
        raise PlanError(
            f"compute.shard_group: node is for fsdp, but compute.strategy is {compute.strategy}",
            hint="set compute.strategy=fsdp or compute.shard_group=all",
        )
    if not compute.strategy.startswith("zero"):
        return
    if precision == "fp16":
        raise PlanError(
            f"compute.strategy: {compute.strategy} takes no fp16, for DeepSpeed would keep the"
            " weights themselves in it",
            hint="use compute.strategy=fsdp or compute.precision=bf16",
        )
    if compute.strategy == "zero3" and compute.kernels in {"fused", "compile"}:
        raise PlanError(
            f"compute.kernels: {compute.kernels} cannot be had under zero3, which fetches weights"
            " layer by layer in hooks that are neither compiled nor fused",
            hint="set compute.kernels=auto or compute.strategy=fsdp",
        )


def _resolve_cuda_graphs(recipe: Recipe, *, cluster: Cluster, compiled: bool) -> bool:
    """Whether the network is recorded; refused where it is asked for and cannot be."""
    asked = recipe.compute.cuda_graphs
    if asked is False:
        return False
    why = None
    if cluster.device != "cuda":
        why = "a CPU has none"
    elif not compiled:
        why = "only a compiled network is recorded"
    elif recipe.compute.strategy != "ddp":
        why = f"under {recipe.compute.strategy} weights move in memory from step to step"
    elif recipe.model.drop_path_kind == "skip":
        why = "what drop_path_kind=skip compiles to may wait for the device, and cannot be recorded"
    if asked == "auto":
        alone, family = cluster.world_size == 1, find_variant(recipe.model.name).family
        return why is None and alone and family != "timm"
    if why is not None:
        raise PlanError(f"compute.cuda_graphs: {why}", hint="set compute.cuda_graphs=false")
    return True


def _steps(duration: Duration, steps_per_epoch: int) -> int:
    steps = duration.to_steps(steps_per_epoch=steps_per_epoch)
    assert steps is not None  # the schema takes no wall time here
    return steps


def _interval(duration: Duration | None, steps_per_epoch: int) -> int | None:
    """An interval in steps, at least one; None where there is none, or one of wall time."""
    steps = None if duration is None else duration.to_steps(steps_per_epoch=steps_per_epoch)
    return None if steps is None else max(1, steps)


def _known_facts(recipe: Recipe) -> DataFacts:
    if recipe.data.dataset is None:
        raise PlanError(
            "the number of images is not known: the recipe names no known data set",
            hint="name a packed data set with --data DIR (convnext data pack SOURCE DIR makes it)",
        )
    known = DATASETS[recipe.data.dataset]
    return DataFacts(
        train_images=known.train_images,
        val_images=known.val_images,
        num_classes=known.num_classes,
        source=f"{known.name} (published sizes)",
    )


def _resolve_classes(recipe: Recipe, facts: DataFacts) -> int:
    asked = recipe.model.num_classes
    if asked == "auto":
        return facts.num_classes
    if asked != facts.num_classes:
        raise PlanError(
            f"the recipe's head has {asked} classes, but {facts.source} has {facts.num_classes}",
            hint=f"fit the head to the data: model.num_classes={facts.num_classes}",
        )
    return asked


def _split_batch(recipe: Recipe, cluster: Cluster) -> tuple[int, int]:
    """(images a device and pass, passes a step): as few passes as the device's limit allows."""
    global_images, world = recipe.batch.global_images, cluster.world_size
    limit, unit = recipe.batch.per_device_images, _unit(recipe)
    per_step, rest = divmod(global_images, world)
    if rest:
        raise PlanError(
            f"batch.global_images: {global_images} images per step do not split over"
            f" {world} devices",
            hint=_hint_for_devices(recipe, cluster, unit=unit),
        )
    if limit < unit or per_step % unit:
        few = limit < unit
        raise PlanError(
            f"{'batch.per_device_images' if few else 'batch.global_images'}: mixup and cutmix pair"
            f" neighbours, but a device takes {limit if few else per_step} images"
            f" {'a pass' if few else 'a step'}",
            hint="take an even number: batch.per_device_images=2"
            if few
            else _hint_for_batch(recipe, _even_batch(global_images, recipe, cluster, unit=unit)),
        )
    fewest = math.ceil(per_step / limit)
    most = min(per_step, _MOST_PASSES_OVER_FEWEST * fewest)
    passes = next((n for n in range(fewest, most + 1) if per_step % (n * unit) == 0), None)
    if passes is None:
        raise PlanError(
            f"batch.global_images: {global_images} images, {per_step} a device, do not split into"
            f" even passes of {math.ceil(per_step / most)} to {limit}",
            hint=_hint_for_batch(recipe, _even_batch(global_images, recipe, cluster, unit=unit)),
        )
    return per_step // passes, passes


def _even_batch(images: int, recipe: Recipe, cluster: Cluster, *, unit: int) -> int:
    """At most so many images per step, in even passes; the fewest a pass can have at least."""
    per_step = max(1, images // cluster.world_size // unit) * unit
    limit = max(unit, recipe.batch.per_device_images // unit * unit)
    passes = -(-per_step // limit) * unit
    return per_step // passes * passes * cluster.world_size


def _hint_for_few_images(recipe: Recipe, cluster: Cluster, *, train_images: int) -> str:
    """A batch that the images fill; where none does, what else there is to do."""
    world, unit = cluster.world_size, _unit(recipe)
    if train_images < world:
        fewer = f", or use fewer devices: {train_images} at most" if train_images else ""
        return f"pack more images{fewer}"
    twentieth = 1 << (max(1, train_images // 20).bit_length() - 1)
    images = min(train_images, max(_SMALL_BATCH, twentieth))
    if train_images < world * unit:
        odd = _hint_for_batch(recipe, _even_batch(images, recipe, cluster, unit=1))
        return f"pack more images, or mix none and {odd} mix.mixup=null mix.cutmix=null"
    return _hint_for_batch(recipe, _even_batch(images, recipe, cluster, unit=unit))


def _unit(recipe: Recipe) -> int:
    """What the images of a pass are a multiple of: mixing pairs neighbours within a pass."""
    return 1 if recipe.mix.mixup is None and recipe.mix.cutmix is None else 2


def _hint_for_devices(recipe: Recipe, cluster: Cluster, *, unit: int) -> str:
    """Devices of each node over which the batch splits, or a batch that splits over all of them."""
    images, nodes = recipe.batch.global_images, cluster.num_nodes
    counts = range(min(cluster.devices_per_node - 1, images), 0, -1)
    fewer = next((count for count in counts if images % (nodes * count * unit) == 0), None)
    hints = [] if fewer is None else [f"use {fewer} devices on each node"]
    if images >= cluster.world_size * unit:
        other = _even_batch(images, recipe, cluster, unit=unit)
        hints.append(_hint_for_batch(recipe, other))
    return ", or ".join(hints) or f"use {max(1, images // unit)} devices at most"


def _hint_for_batch(recipe: Recipe, global_images: int) -> str:
    hint = f"use another batch: batch.global_images={global_images}"
    if recipe.optim.lr_rule is None and global_images != recipe.optim.lr_images:
        hint += " optim.lr_rule=linear"
    return hint


def _resolve_lr(optim: Optim, global_images: int) -> tuple[float, str]:
    """The peak learning rate and a sentence about it."""
    if global_images == optim.lr_images:
        return optim.lr, "as the recipe says"
    ratio = global_images / optim.lr_images
    match optim.lr_rule:
        case None:
            raise PlanError(
                f"optim.lr {optim.lr:g} is meant for {optim.lr_images} images per step, but"
                f" batch.global_images is {global_images}",
                hint=f"say how it follows: optim.lr_rule=linear (lr {optim.lr * ratio:.3g}),"
                f" sqrt (lr {optim.lr * math.sqrt(ratio):.3g}) or none (lr {optim.lr:g})",
            )
        case "none":
            return optim.lr, f"kept as written for {optim.lr_images} images (lr_rule: none)"
        case "linear":
            lr = optim.lr * ratio
        case "sqrt":
            lr = optim.lr * math.sqrt(ratio)
        case _:
            assert_never(optim.lr_rule)
    return lr, (
        f"{optim.lr:g} at {optim.lr_images} images becomes {lr:.4g} at {global_images}"
        f" (lr_rule: {optim.lr_rule})"
    )


def estimate_loader_rate(cluster: Cluster, *, workers: int, augments: bool) -> float:
    """Images per second that the loader processes of a node give.

    Args:
        cluster: What there is.
        workers: Loader processes a device; with none the training process loads.
        augments: Whether they do RandAugment, too.
    """
    processes = min(max(1, workers) * cluster.devices_per_node, cluster.cpus_per_node)
    return processes * (CORE_IMAGES_AUGMENTED if augments else CORE_IMAGES)


def _workers(cluster: Cluster) -> int:
    """Loader processes a device: all cores of a GPU node, one beside a training CPU."""
    share = cluster.cpus_per_node // cluster.devices_per_node
    return max(1, min(16, share - 1)) if cluster.device == "cuda" else min(2, max(0, share - 1))
