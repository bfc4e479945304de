"""`convnext plan`: every number a run would use, before anything is spent."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from convnext_cli.cli._console import print_facts, print_json
from convnext_cli.cli._inputs import (
    DataOption,
    JsonOption,
    NodesOption,
    OverridesArgument,
    PrecisionOption,
    RecipeArgument,
    load_asked_recipe,
    read_facts,
)
from convnext_cli.plan.cluster import Cluster, DeviceKind, count_cpus
from convnext_cli.plan.resolve import FAST_DEVICE, SUSTAINED_FLOPS, Plan, make_plan
from convnext_cli.recipe.schema import Kernels


def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    devices: Annotated[int, typer.Option(help="Devices on each node.", min=1)] = 1,
    nodes: NodesOption = 1,
    cpus: Annotated[
        int | None, typer.Option(help="Cores of each node (default: those of this machine).", min=1)
    ] = None,
    data: DataOption = None,
    device: Annotated[DeviceKind, typer.Option(help="Kind of device.")] = "cuda",
    precision: PrecisionOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show every number a run would use: batch, steps, learning rate, cost.

    Nothing is started and no device is needed. Without --data the published sizes of the
    recipe's data set are used.

    Example: convnext plan in1k_tiny --devices 8 --nodes 4 --cpus 96
    """
    asked = load_asked_recipe(recipe, overrides, data=data, precision=precision)
    cluster = Cluster(
        num_nodes=nodes,
        devices_per_node=devices,
        device=device,
        cpus_per_node=cpus or count_cpus(),
    )
    resolved = make_plan(asked, cluster, name=Path(recipe).stem, facts=read_facts(asked))
    if json_output:
        print_json(resolved.to_json())
    else:
        show_plan(resolved, cpus_assumed=cpus is None and device == "cuda")


def show_plan(plan: Plan, *, cpus_assumed: bool = False) -> None:
    """Write a plan for people, on stderr.

    Args:
        plan: What is shown.
        cpus_assumed: Whether its cores are those of this machine, which may be none of its nodes.
    """
    recipe = plan.recipe
    warmup = f"{plan.warmup_steps:,} warm-up" if plan.warmup_steps else "no warm-up"
    rows = [
        ("recipe", f"{plan.name}: {recipe.about}"),
        (
            "model",
            f"{recipe.model.name}, {plan.num_classes} classes: {plan.parameters:,} parameters,"
            f" {plan.gmacs:.2f} GMACs at {recipe.data.image_px} px",
        ),
        (
            "data",
            f"{plan.data_source}: {plan.train_images:,} training,"
            + (
                f" {plan.val_images:,} validation images"
                if plan.val_images
                else " no validation images: accuracy will not be measured"
            ),
        ),
        (
            "cluster",
            f"{plan.cluster.num_nodes} x {plan.cluster.devices_per_node} {plan.cluster.device},"
            f" {plan.precision}{_fp8(plan)}, {_KERNELS[plan.kernels]}"
            f"{', recorded as CUDA graphs' if plan.cuda_graphs else ''}",
        ),
        ("loading", _loading(plan, cpus_assumed=cpus_assumed)),
        ("batch", plan.batch_equation),
        (
            "steps",
            f"{plan.total_steps:,} ({warmup}) = {plan.epochs:g} epochs"
            f" x {plan.steps_per_epoch:,} steps{_leave_out(plan)}",
        ),
        ("lr", f"{plan.lr:g} to {plan.min_lr:g}: {plan.lr_note}"),
        *_savings(plan),
        ("cost", f"{plan.images_read:,} images read, {plan.train_flops:.2g} FLOP{_hours(plan)}"),
        (
            "state",
            f"{plan.state_bytes / 1e9:.2f} GB a device for weights, gradients, optimizer"
            f"{'' if recipe.ema.decay is None else ' and EMA'}; {_activations(plan)}",
        ),
    ]
    if plan.world_size > 1:
        rows.append(("memory", _memory(plan)))
    if recipe.published_top1 is not None:
        rows.insert(1, ("published", f"{recipe.published_top1:g}% top-1"))
    print_facts(rows)


_KERNELS: dict[Kernels | Literal["auto"], str] = {
    "auto": "compiled, with the kernels that are fastest for each stage",
    "fused": "with fused kernels",
    "compile": "compiled",
    "eager": "not compiled",
}


def _loading(plan: Plan, *, cpus_assumed: bool) -> str:
    """Whether the cores of a node can feed its devices."""
    gives = plan.loader_images_per_second
    place = {"cpu": "the loader", "device": "the device"}[plan.augment_on]
    augment = "" if plan.recipe.augment.rand_augment is None else f", RandAugment on {place}"
    assumed = " (as on this machine; --cpus N says a node's)" if cpus_assumed else ""
    told = (
        f"{plan.workers} processes a device{augment}: {plan.cluster.cpus_per_node} cores a node"
        f"{assumed} load about {gives:,.0f} images/s"
    )
    takes = plan.device_images_per_second
    if takes is None:
        return told
    size = f" of {plan.image_px_at(0)} px" if len(plan.train_sizes) > 1 else ""
    devices = plan.cluster.devices_per_node
    takers = "device takes" if devices == 1 else f"{devices} devices take"
    told += (
        f"; its {takers} {takes:,.0f}{size} at a sustained {SUSTAINED_FLOPS / 1e12:g} TFLOP/s each"
    )
    if gives >= FAST_DEVICE * takes:
        return f"{told}: enough"
    if gives >= takes:
        return f"{told}: enough for these, but an H100 takes 2 to 4 times as many and may wait"
    told += f", and would wait {1 - gives / takes:.0%} of the time"
    if cpus_assumed:
        return told
    if augment and plan.augment_on == "cpu":
        return f"{told}; augment.augment_on=device saves the cores RandAugment"
    return f"{told}; smaller images help: pack them with a short side of 256 px"


def _fp8(plan: Plan) -> str:
    if not plan.fp8_layers:
        return ""
    slow = "" if plan.compile else " (not compiled: each cast is a pass over memory of its own)"
    return f", fp8 in {plan.fp8_layers} layers{slow}"


def _savings(plan: Plan) -> list[tuple[str, str]]:
    """What makes a step cheaper than the paper's, and by how much."""
    rows = []
    if len(plan.train_sizes) > 1:
        first, *later = plan.train_sizes
        grown = "".join(f", {size.image_px} from step {size.first_step:,}" for size in later)
        rows.append(("sizes", f"{first.image_px} px{grown}; evaluated at {later[-1].image_px} px"))
    if plan.recipe.model.drop_path_kind == "skip":
        text = "blocks skip the images that they drop"
        if plan.skipped_bytes:
            text += f", which saves {plan.skipped_bytes / 1e9:.2f} GB of activations a device"
        rows.append(("drop path", text))
    if plan.saved_flops_frac > 0:
        rows.append(
            ("saved", f"{plan.saved_flops_frac:.0%} of the FLOP of the paper's way of training")
        )
    return rows


def _activations(plan: Plan) -> str:
    """What is kept for the backward pass, also with more or less of it computed again."""
    sizes = {mode: f"{size / 1e9:.2f} GB" for mode, size in plan.activation_bytes.items()}
    if not sizes:
        return "activations come on top"
    chosen = sizes.pop(plan.recipe.compute.gradient_checkpointing)
    others = ", ".join(f"{mode} {size}" for mode, size in sizes.items())
    return f"activations {chosen} on top (compute.gradient_checkpointing={others})"


def _memory(plan: Plan) -> str:
    """What each strategy keeps on a device, a line each, and whether sharing pays."""
    lines = [plan.memory_note]
    for memory in plan.memory:
        parts = [
            f"{name} {size / 1e9:.2f}"
            for name, size in (
                ("weights", memory.weights),
                ("gradients", memory.gradients),
                ("optimizer", memory.optimizer),
                ("EMA", memory.averaged),
                ("activations", memory.activations),
            )
            if size
        ]
        chosen = ", chosen" if memory.strategy == plan.recipe.compute.strategy else ""
        lines.append(
            f"{memory.strategy:<5} about {memory.total / 1e9:.2f} GB a device"
            f" = {' + '.join(parts)}{chosen}"
        )
    return "\n".join(lines)


def _leave_out(plan: Plan) -> str:
    if not plan.dropped_images:
        return ""
    return f"; each leaves out {plan.dropped_images:,} images that fill no step, others every time"


def _hours(plan: Plan) -> str:
    """The cost in hours, of one device and of all, at a speed that is said: it can be scaled."""
    if plan.cluster.device == "cpu":
        return ""
    hours = plan.train_flops / SUSTAINED_FLOPS / 3600
    wall = f": {hours / plan.world_size:,.3g} h on {plan.world_size}" if plan.world_size > 1 else ""
    return f" = {hours:,.3g} device-hours at a sustained {SUSTAINED_FLOPS / 1e12:g} TFLOP/s{wall}"
