"""`convnext train`: a recipe and a data set become a run directory with a trained model."""

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from convnext_cli.cli._console import console
from convnext_cli.cli._inputs import (
    DataOption,
    DeviceOption,
    DevicesOption,
    NodesOption,
    OverridesArgument,
    PrecisionOption,
    RecipeArgument,
    RunsDirOption,
    find_cluster,
    load_asked_recipe,
    read_facts,
)
from convnext_cli.cli.plan import show_plan
from convnext_cli.errors import CheckpointError, RecipeError, UserError, quote_path
from convnext_cli.plan.cluster import Cluster, read_attempt, read_deadline, read_job
from convnext_cli.plan.resolve import make_plan
from convnext_cli.recipe.schema import Init, Recipe
from convnext_cli.runs.compare import summarise_run
from convnext_cli.runs.interrupt import StopRequest
from convnext_cli.runs.layout import RunDir
from convnext_cli.runs.lock import RunLock

NameOption = Annotated[
    str | None, typer.Option(help="Name of the run's folder (default: the recipe's name).")
]
ResumeOption = Annotated[
    str,
    typer.Option(
        help="auto: go on where the run stopped; never: refuse to; must: refuse to start anew;"
        " or the PATH of a checkpoint to go back to, once.",
        metavar="auto|never|must|PATH",
    ),
]

_FROM_SCRATCH = {"imagenet1k": "in1k_tiny", "imagenet22k": "in22k_tiny"}
"""By data set; a recipe for fine-tuning has a head of nearly nothing and slow early layers."""


def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    data: DataOption = None,
    devices: DevicesOption = None,
    nodes: NodesOption = 1,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    name: NameOption = None,
    runs_dir: RunsDirOption = Path("runs"),
    resume: ResumeOption = "auto",
) -> None:
    """Train a model; the same command again goes on where it stopped.

    Everything lands in runs/NAME: checkpoints, metrics.jsonl, metrics.csv, plots. Ctrl-C saves
    and stops.

    Example: convnext train in1k_tiny --data /data/imagenet optim.lr=2e-3 --name tiny_lr2
    """
    request = listen_for_stop()
    run_training(
        load_asked_recipe(recipe, overrides, data=data, precision=precision),
        name=name or Path(recipe).stem,
        cluster=find_cluster(devices=devices, nodes=nodes, device=device),
        runs_dir=runs_dir,
        resume=resume,
        request=request,
    )


def listen_for_stop() -> StopRequest:
    """Take note of signals and of the job's time from here on, before anything heavy is loaded."""
    request = StopRequest(deadline=read_deadline())
    request.listen()
    return request


def check_name(name: str) -> None:
    """Refuse a name that is no plain folder's.

    Raises:
        RecipeError: The name holds something else than letters, digits, _, -, . and =, or begins
            with . as the folder above and hidden ones do, or with - as options do.
    """
    if not re.fullmatch(r"[\w=][\w.=-]*", name):
        raise RecipeError(
            f"--name {name}: letters, digits, _, -, . and = are allowed in a name, - and . not as"
            " its first",
            hint="for example --name tiny_lr2",
        )


def check_start_weights(recipe: Recipe) -> None:
    """Refuse to begin a recipe for fine-tuning from nothing.

    Raises:
        CheckpointError: The recipe says how given weights are taken, and names none.
    """
    if recipe.init.weights is None and recipe.init != Init():
        scratch = _FROM_SCRATCH.get(recipe.data.dataset or "", "small_data")
        raise CheckpointError(
            f"the recipe goes on from given weights (init.source={recipe.init.source}"
            f" init.head={recipe.init.head}), and none are named",
            hint="name them with convnext finetune --from CKPT, or init.weights=CKPT; from scratch,"
            f" by another recipe: convnext train {scratch} model.name={recipe.model.name}",
        )


def run_training(
    recipe: Recipe,
    *,
    name: str,
    cluster: Cluster,
    runs_dir: Path,
    resume: str,
    request: StopRequest,
) -> None:
    """Plan, train, and say what came out and what to do next."""
    from convnext_cli.training.devices import check_devices, check_strategy
    from convnext_cli.training.start import find_start

    check_name(name)
    if cluster.rank != 0:
        console.quiet = True
    recipe = _with_builtin_data(recipe)
    plan = make_plan(recipe, cluster, name=name, facts=read_facts(recipe))
    check_devices(cluster, precision=plan.precision, fp8=plan.fp8_layers > 0)
    check_strategy(cluster, strategy=recipe.compute.strategy)
    show_plan(plan)
    run = RunDir(runs_dir / name)
    mode = resume if resume in {"auto", "never", "must"} else Path(resume)
    if not run.is_run() and not isinstance(mode, Path):
        check_start_weights(recipe)
    lock = RunLock(run.lock, job=read_job(), attempt=read_attempt(), say=console.print)
    with lock if cluster.rank == 0 else nullcontext():
        start = find_start(plan, run, resume=mode)  # type: ignore[arg-type]  # checked above
        if isinstance(mode, Path) and start.asked is None:
            console.print(
                f"this run went back to {mode} before, and goes on from what it made since; to go"
                " back to it once more, ask for a copy of it under another name",
                soft_wrap=True,
                markup=False,
            )
        # what could be refused is refused by now: this takes seconds to load
        from convnext_cli.training.fit import fit
        from convnext_cli.training.progress import log_error

        try:
            steps = fit(plan, run, start=start, request=request, console=console)
        except UserError as error:
            if cluster.rank == 0 and run.is_run():
                log_error(run.log, error)
            raise
    if cluster.rank == 0:
        _tell_result(run, recipe=recipe, steps=steps, has_val=plan.val_images > 0)


def _with_builtin_data(recipe: Recipe) -> Recipe:
    """The recipe with the packed quick-start images, where it names those and no path."""
    if recipe.data.dataset != "quickstart" or recipe.data.path is not None:
        return recipe
    from convnext_cli.data.quickstart import pack_quickstart

    folder = pack_quickstart()
    data = recipe.data.model_copy(update={"path": str(folder)})
    return recipe.model_copy(update={"data": data})


def _tell_result(run: RunDir, *, recipe: Recipe, steps: int, has_val: bool) -> None:
    from convnext_cli.runs.plots import plot_runs

    plot_runs([run], run.curves)
    summary = summarise_run(run)
    raw, averaged = summary.best_top1, summary.best_ema_top1
    checkpoint = run.last
    text = f"{steps} steps"
    if raw is not None:
        checkpoint = run.best
        text += f", best top-1 {raw:.2f}% (step {summary.best_top1_step})"
    if averaged is not None:
        checkpoint = run.best_ema if raw is None or averaged >= raw else run.best
        text += f", averaged weights {averaged:.2f}% (step {summary.best_ema_top1_step})"
    if recipe.published_top1 is not None:
        text += f"; published {recipe.published_top1:.1f}%"
    following = f"convnext predict {quote_path(checkpoint)} IMAGE"
    if has_val and recipe.data.mode == "indexed":  # shards without an index are not evaluated on
        data = quote_path(recipe.data.path or "DIR")
        following = f"convnext evaluate {quote_path(checkpoint)} --data {data}"
    if averaged is not None and checkpoint == run.best:
        following += " --weights raw"  # the better ones here; averaged ones are the default
    for name, value in (
        ("finished", text),
        ("checkpoint", str(checkpoint)),
        ("plot", str(run.curves)),
        ("next", following),
    ):
        console.print(Text.assemble((f"{name:<11}", "bold"), value), soft_wrap=True)
