"""`convnext bench`: steps, their convolutions and loaders against peers; what an order costs."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from convnext_cli.bench.report import LoaderReport, StepReport
from convnext_cli.bench.tables import (
    Table,
    make_depthwise_table,
    make_floor_table,
    make_limit_table,
    make_memory_table,
    make_profile_table,
    make_ratio_table,
    make_speed_table,
    render_best,
    render_depthwise_markdown,
    render_rates,
    render_step_markdown,
)
from convnext_cli.catalog.models import find_variant
from convnext_cli.cli._console import (
    console,
    make_table,
    print_json,
    print_rows,
    print_table,
    telling,
)
from convnext_cli.cli._inputs import (
    DeviceOption,
    JsonOption,
    OverridesArgument,
    PrecisionOption,
    find_device,
    load_asked_recipe,
)
from convnext_cli.errors import DataError, RecipeError
from convnext_cli.plan.resolve import Plan, make_plan
from convnext_cli.runs.record import writing_to

app = typer.Typer(no_args_is_help=True, help="Measure speed, paired with named peers.")

PEERS = ("timm", "timm-unfetched", "timm-uint8", "timm-plain", "torchvision", "webdataset", "dali")
STEP_PEERS = (
    *("timm", "timm-max-autotune", "timm-max-autotune-no-cudagraphs", "timm-eager"),
    *("torchvision", "convnext-compile"),
)

_CHECKPOINTING = "compute.gradient_checkpointing"
_HALVES = 4
"""The smallest batch whose half has a pair of images to mix."""

OutOption = Annotated[
    Path | None,
    typer.Option(help="Folder for the report as JSON and as Markdown.", metavar="DIR"),
]


@app.command()
def step(
    recipe: Annotated[
        str, typer.Argument(help="Recipes: names with commas between them, or a YAML file.")
    ],
    overrides: OverridesArgument = None,
    *,
    against: Annotated[
        str, typer.Option(help="Peers, with commas between them.", metavar="NAMES")
    ] = "timm,torchvision",
    batch: Annotated[int, typer.Option(help="Images in a batch.", min=2)] = 128,
    size: Annotated[
        int | None, typer.Option(help="Side of the images (default: recipe's).")
    ] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    kernels: Annotated[
        Literal["auto", "fused", "compile", "eager"] | None,
        typer.Option(help="compute.kernels; eager compiles no system (default: recipe's)."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of each system in a round.", min=1)] = 20,
    rounds: Annotated[int, typer.Option(help="How often each system is measured.", min=1)] = 5,
    profiled: Annotated[
        bool, typer.Option("--profile", help="Trace each system's step to its kernels, afterwards.")
    ] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Measure memory with and without checkpointing.")
    ] = False,
    out: OutOption = None,
    json_output: JsonOption = False,
) -> None:
    """Compare whole training steps on one device: images per second, images on the device.

    A step is erasing and mixing, forward, backward, AdamW and averaged weights, with the numbers
    of the recipe; RandAugment is left to the loader. Peers: timm (compiled as this project is),
    timm-max-autotune, timm-max-autotune-no-cudagraphs, timm-eager, torchvision, and
    convnext-compile, which is this project without its kernels.

    Beside the rates: the share of a large matrix product's rate and of the data sheet's, and the
    share of the floor, which is the time of perfect kernels at the measured rates of this device.

    Each system is a process of its own; those of all recipes start at once, and the recipes are
    measured one after the other when all are ready.

    Example: convnext bench step in1k_tiny --batch 128 --against timm,timm-max-autotune --profile
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler writes into these lines
    from convnext_cli.bench.step import compare_steps
    from convnext_cli.training.devices import check_devices

    names = _read_peers(against, STEP_PEERS)
    if out is not None:
        _make_folder(out)
    asked = ["optim.lr_rule=linear"]
    if size is not None:
        asked.append(f"data.image_px={size}")
    if kernels is not None:
        asked.append(f"compute.kernels={kernels}")
    asked += overrides or ()
    cluster = find_device(device)

    def make(recipe: str, images: int, *more: str) -> Plan:
        batches = (f"batch.global_images={images}", f"batch.per_device_images={images}")
        changes = [*batches, *asked, *more]
        asked_recipe = load_asked_recipe(recipe, changes, precision=precision)
        return make_plan(asked_recipe, cluster, name="bench")

    recipes = list(dict.fromkeys(each.strip() for each in recipe.split(",") if each.strip()))
    plans = [make(each, batch) for each in recipes or [recipe]]
    for plan in plans:
        if plan.accumulate_steps > 1 or plan.precision == "fp16":
            raise RecipeError(
                "a step is measured as one pass, in bf16 or fp32",
                hint="leave batch.per_device_images out, and take --precision bf16",
            )
        check_devices(plan.cluster, precision=plan.precision, fp8=plan.fp8_layers > 0)
    if out is not None:
        _check_files(plans)
    few, many = (batch // 4 * 2, batch) if batch >= _HALVES else (batch, 2 * batch)
    memory_plans = []
    for each, plan in zip(recipes, plans, strict=True) if memory else ():
        pieces = tuple(plan.activation_bytes) or ("none",)  # timm's models keep all
        changes = [f"{_CHECKPOINTING}={piece}" for piece in pieces]
        memory_plans.append([(make(each, few, one), make(each, many, one)) for one in changes])
    reports: list[StepReport] = []
    try:
        with telling() as tell:
            for report in compare_steps(
                plans,
                peers=names,  # type: ignore[arg-type]  # checked above
                steps=steps,
                rounds=rounds,
                profiled=profiled,
                memory_plans=memory_plans,
                on_progress=tell,
            ):
                reports.append(report)
                if not json_output:
                    _show_steps(report)
                if out is not None:
                    name = f"step-{report.model}"
                    _write(out, name, asdict(report), render_step_markdown(report))
    finally:  # an error does not lose what was measured before it
        if json_output and reports:
            print_json(asdict(reports[0]) if len(plans) == 1 else [*map(asdict, reports)])


@app.command()
def depthwise(
    *,
    models: Annotated[
        str, typer.Option(help="Models whose stages are measured, with commas.", metavar="NAMES")
    ] = "convnext_tiny,convnext_base,convnext_large",
    batch: Annotated[int, typer.Option(help="Images in a batch.", min=1)] = 128,
    size: Annotated[int, typer.Option(help="Side of the images.", min=32)] = 224,
    device: DeviceOption = "auto",
    out: OutOption = None,
    json_output: JsonOption = False,
) -> None:
    """Time the 7x7 depthwise convolution and its two gradients alone, at the models' shapes.

    In bf16 on a GPU, in fp32 on a CPU; in both memory formats by torch's own operator. A perfect
    pass takes as long as a copy of the tensor.

    Example: convnext bench depthwise --models convnext_tiny --batch 128
    """
    from convnext_cli.bench.depthwise import measure_depthwise
    from convnext_cli.training.devices import check_devices

    variants = [find_variant(name.strip()) for name in models.split(",")]
    others = [variant.name for variant in variants if variant.family == "timm"]
    if others:
        raise RecipeError(
            f"--models: {others[0]} has no depthwise convolutions",
            hint="take models of ConvNeXt, such as convnext_tiny",
        )
    if out is not None:
        _make_folder(out)
    cluster = find_device(device)
    precision: Literal["bf16", "fp32"] = "bf16" if cluster.device == "cuda" else "fp32"
    check_devices(cluster, precision=precision)
    with telling() as tell:
        report = measure_depthwise(
            variants,
            device=cluster.device,
            precision=precision,
            images=batch,
            image_px=size,
            on_progress=tell,
        )
    if json_output:
        print_json(asdict(report))
    else:
        console.print(
            f"7x7 depthwise, batches of {report.images}, {report.precision}, on {report.device};"
            f" a copy {report.copy_bytes_per_second / 1e9:,.0f} GB/s",
            soft_wrap=True,
        )
        _print(make_depthwise_table(report))
    if out is not None:
        _write(out, "depthwise", asdict(report), render_depthwise_markdown(report))


@app.command()
def loader(
    *,
    data: Annotated[str, typer.Option(help="Packed data set: a folder.", metavar="DIR")],
    against: Annotated[
        str, typer.Option(help="Peers, with commas between them.", metavar="NAMES")
    ] = "timm,timm-uint8,timm-plain,torchvision,webdataset",
    workers: Annotated[int, typer.Option(help="Loader processes of each system.", min=1)] = 2,
    batch: Annotated[int, typer.Option(help="Images in a batch.", min=1)] = 64,
    image_px: Annotated[int, typer.Option(help="Side of the images.", min=8)] = 224,
    images: Annotated[
        int, typer.Option(help="Images that a system loads in a round.", min=1)
    ] = 1000,
    rounds: Annotated[int, typer.Option(help="How often each system is measured.", min=1)] = 5,
    json_output: JsonOption = False,
) -> None:
    """Compare the loader with others on your images: images per second and core.

    All systems run at once and load in turn; ratios are of CPU time, the median of the rounds.
    Peers: timm, timm-unfetched (without its prefetcher), timm-uint8 (what its prefetcher is fed),
    timm-plain (that without RandAugment), torchvision, webdataset, and dali where it is installed.

    Example: convnext bench loader --data packed --against timm,torchvision
    """
    from convnext_cli.bench.loader import compare_loaders
    from convnext_cli.data.fetch import is_url

    names = _read_peers(against, PEERS)
    if is_url(data):
        raise DataError(
            f"--data {data}: a loader is measured on local files",
            hint="copy the data set first; the network would be measured otherwise",
        )
    with telling() as tell:
        report = compare_loaders(
            str(Path(data).expanduser()),
            peers=names,  # type: ignore[arg-type]  # checked above
            image_px=image_px,
            batch=batch,
            workers=workers,
            images=images,
            rounds=rounds,
            on_progress=tell,
        )
    if json_output:
        fracs = {rate.system: report.limit_frac(rate.system) for rate in report.rates}
        print_json(asdict(report) | {"limit_frac": fracs})
        return
    _show(report)


@app.command()
def order(
    *,
    images: Annotated[int, typer.Option(help="Images of the data set.", min=1)] = 14_197_122,
    shards: Annotated[int, typer.Option(help="Its shards.", min=1)] = 1420,
    global_images: Annotated[int, typer.Option(help="Images a step.", min=1)] = 4096,
    kind: Annotated[Literal["full", "window"], typer.Option(help="data.order.")] = "window",
    lanes: Annotated[int, typer.Option(help="data.lanes.", min=1)] = 256,
    world: Annotated[int, typer.Option(help="Devices.", min=1)] = 64,
    json_output: JsonOption = False,
) -> None:
    """Time the plan of any step of a large data set, and show how well its order mixes.

    The data set itself is not needed.

    Example: convnext bench order --images 14197122 --shards 1420
    """
    from convnext_cli.bench.order import measure_order

    if images < shards or images < global_images:
        raise DataError(
            f"--images {images} is fewer than --shards {shards} or --global-images {global_images}",
            hint=f"take --images {max(shards, global_images)} or more",
        )
    try:
        report = measure_order(
            images=images,
            shards=shards,
            global_images=global_images,
            kind=kind,
            lanes=lanes,
            world=world,
        )
    except ValueError as error:
        raise DataError(str(error), hint="take another --world") from error
    if json_output:
        print_json(asdict(report))
        return
    console.print(
        f"{report.images:,} images in {report.shards:,} shards, {report.global_images:,} a step,"
        f" order {report.kind}: any step of any epoch is known to a rank after"
        f" {report.first_seconds:.3f} s and {report.peak_mib:,.0f} MiB, the next one after"
        f" {report.next_seconds * 1e3:.2f} ms",
        soft_wrap=True,
    )
    console.print(
        f"pairs of a batch from the same shard: {report.same_shard_rate:.2f} times a uniform"
        f" shuffle; one of eight nodes reads {report.node_shards:,} shards in an epoch",
        soft_wrap=True,
    )


def _read_peers(against: str, known: tuple[str, ...]) -> list[str]:
    """The names of --against.

    Raises:
        DataError: One is not known.
    """
    names = [name.strip() for name in against.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise DataError(
                f"--against: there is no system named {name}",
                hint=f"take some of {','.join(known)}",
            )
    return names


def _show_steps(report: StepReport) -> None:
    console.print(
        f"{report.model} at {report.image_px} px, batches of {report.images}, {report.precision},"
        f" {'compiled' if report.compiled else 'eager'}, kernels {report.kernels},"
        f" on {report.device};"
        f" {report.rounds} rounds of {report.steps} steps",
        soft_wrap=True,
    )
    _print(make_speed_table(report))
    if report.ratios:
        _print(make_ratio_table(report.ratios))
        console.print(render_best(report), soft_wrap=True)
    console.print("\nshare of what the device could do", style="bold")
    _print(make_limit_table(report))
    console.print(render_rates(report), soft_wrap=True)
    if report.floors:
        _print(make_floor_table(report))
    if report.profiles:
        console.print("\ndevice time by what it is spent on", style="bold")
        _print(make_profile_table(report))
    if report.memory:
        console.print("\nmemory of this project's step", style="bold")
        _print(make_memory_table(report))
    _show_failed(report.failed)


def _print(table: Table) -> None:
    print_rows(table.columns, table.rows)


def _check_files(plans: Sequence[Plan]) -> None:
    """Refuse two reports with the name of one model.

    Raises:
        RecipeError: There would be such.
    """
    models = Counter(plan.recipe.model.name for plan in plans)
    name, times = models.most_common(1)[0]
    if times > 1:
        raise RecipeError(
            f"--out: {times} recipes have the model {name}, and the report's name is the model's",
            hint="measure these recipes in commands of their own, with other folders",
        )


def _make_folder(folder: Path) -> None:
    """Before anything is measured, so that no measurement is lost.

    Raises:
        DataError: There cannot be such a folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"--out {folder}: {error.strerror or error}", hint="name a folder that can be written"
        ) from error


def _write(folder: Path, name: str, report: Mapping[str, object], markdown: str) -> None:
    """A report beside its Markdown; it has been shown, so that a full disk does not lose it."""
    for ending, text in (("json", json.dumps(report, indent=2) + "\n"), ("md", markdown)):
        path = folder / f"{name}.{ending}"
        with writing_to(path):
            path.write_text(text, encoding="utf-8")


def _show_failed(failed: Mapping[str, str]) -> None:
    for name, why in failed.items():
        console.print(f"{name} was left out: {why}", soft_wrap=True, style="yellow")


def _show(report: LoaderReport) -> None:
    console.print(
        f"{report.images:,} images of {report.mean_bytes / 1e3:,.0f} kB, {report.image_px} px,"
        f" batches of {report.batch}, {report.workers} processes, {report.rounds} rounds"
    )
    table = make_table(
        *("system", ">images/s a core", ">low", ">high", ">share of the limit", ">images/s")
    )
    for rate in sorted(report.rates, key=lambda rate: -rate.images_per_core_second):
        table.add_row(
            rate.system,
            f"{rate.images_per_core_second:,.0f}",
            f"{rate.low:,.0f}",
            f"{rate.high:,.0f}",
            f"{report.limit_frac(rate.system):.0%}",
            f"{rate.wall_images_per_second:,.0f}",
        )
    print_table(table)
    _print(make_ratio_table(report.ratios))
    stages = ", ".join(f"{stage.name} {stage.milliseconds:.2f}" for stage in report.stages)
    console.print(
        f"milliseconds an image, alone: {stages}; reading and decoding the crop alone are the"
        f" limit: {report.limit_images_per_core_second:,.0f} images/s a core",
        soft_wrap=True,
    )
    _show_failed(report.failed)
