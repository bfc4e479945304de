"""`convnext launch`: the same training on a Slurm cluster, or kept alive on this machine."""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from convnext_cli.cli._console import console, print_text
from convnext_cli.cli._inputs import (
    DataOption,
    DeviceOption,
    NodesOption,
    OverridesArgument,
    PrecisionOption,
    RecipeArgument,
    RunsDirOption,
    load_asked_recipe,
    read_facts,
)
from convnext_cli.cli.plan import show_plan
from convnext_cli.cli.train import NameOption, check_name, check_start_weights
from convnext_cli.data.card import require_path
from convnext_cli.errors import LaunchError, quote_path
from convnext_cli.launch.exits import repeat
from convnext_cli.launch.local import LocalLaunch
from convnext_cli.launch.slurm import SlurmJob, find_sbatch, render_job, submit
from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import make_plan
from convnext_cli.runs.layout import RunDir

app = typer.Typer(no_args_is_help=True, help="Start training on a cluster, or kept alive here.")

RestartsOption = Annotated[
    int,
    typer.Option(help="Restarts in a row without a new checkpoint before giving up.", min=0),
]


@app.command()
def slurm(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    data: DataOption = None,
    nodes: NodesOption = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a node.", min=1)] = 8,
    cpus_per_gpu: Annotated[int, typer.Option(help="Cores for each GPU.", min=1)] = 12,
    time: Annotated[str, typer.Option(help="Time limit of one attempt.")] = "24:00:00",
    partition: Annotated[str | None, typer.Option(help="Slurm's partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm's account.")] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(help="Another option of sbatch, such as --qos=high; may be repeated."),
    ] = None,
    precision: PrecisionOption = None,
    device: DeviceOption = "cuda",
    name: NameOption = None,
    runs_dir: RunsDirOption = Path("runs"),
    venv: Annotated[
        Path | None,
        typer.Option(help="Virtual environment on the nodes (default: the one in use)."),
    ] = None,
    container: Annotated[
        str | None, typer.Option(help="Image instead: a .sif file, or a name for pyxis.")
    ] = None,
    mounts: Annotated[
        str | None, typer.Option(help="What the container sees, as FROM:TO,...")
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="Folder on each node for shards that come from a URL.")
    ] = None,
    restarts: RestartsOption = 3,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the job file to stdout; submit nothing.")
    ] = False,
) -> None:
    """Show the plan, write the job file beside the run, and submit it.

    The job is slurm/multinode.sh with its variables filled in: a process a GPU, a checkpoint
    before the time limit, and requeued until the run is done.

    Example: convnext launch slurm in1k_tiny --nodes 4 --data /data/imagenet --partition gpu
    """
    name = name or Path(recipe).stem
    check_name(name)
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        raise LaunchError(
            f"--time {time}: a time limit is MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS",
            hint="for example --time 24:00:00",
        )
    asked = load_asked_recipe(recipe, overrides, data=data, precision=precision)
    cluster = Cluster(
        num_nodes=nodes,
        devices_per_node=gpus_per_node,
        device="cpu" if device == "cpu" else "cuda",
        cpus_per_node=gpus_per_node * cpus_per_gpu,
    )
    show_plan(make_plan(asked, cluster, name=name, facts=read_facts(asked)))
    if venv is None and container is None and sys.prefix != sys.base_prefix:
        venv = Path(sys.prefix)
    placed = {"--partition": partition, "--account": account}
    job = SlurmJob(
        recipe=recipe,
        name=name,
        folder=Path.cwd(),
        runs_dir=runs_dir,
        extra=_train_options(overrides, device=device, precision=precision),
        data=data,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        cpus_per_gpu=cpus_per_gpu,
        hours_minutes_seconds=time,
        sbatch_options=(
            *(f"{option}={value}" for option, value in placed.items() if value is not None),
            *(sbatch or ()),
        ),
        venv=venv,
        container=container,
        mounts=mounts,
        cache=cache,
        restarts=restarts,
    )
    if dry_run:
        print_text(render_job(job))
        return
    find_sbatch()
    if asked.data.dataset != "quickstart":
        require_path(asked.data.path)  # else the job says so, when it has waited for its nodes
    if not RunDir(runs_dir / name).is_run():
        check_start_weights(asked)
    number = submit(job)
    launch = RunDir(runs_dir / name).launch
    for word, text in (
        ("submitted", f"job {number}"),
        ("job file", str(job.file)),
        ("watch", f"squeue --jobs={number}; tail -F {quote_path(launch / 'rank0000.log')}"),
        ("save, requeue", f"scancel --signal=USR1 {number}"),
        ("end", f"scancel {number}; the same command again goes on where it stopped"),
    ):
        console.print(Text.assemble((f"{word:<14}", "bold"), text), soft_wrap=True)


@app.command()
def local(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    data: DataOption = None,
    devices: Annotated[int, typer.Option(help="Devices, a process each.", min=1)] = 1,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    name: NameOption = None,
    runs_dir: RunsDirOption = Path("runs"),
    restarts: RestartsOption = 3,
) -> None:
    """Train on this machine, and start again after a signal, a hang or a killed process.

    torchrun starts a process a device. Exit codes 75 and 76 and killed processes are tried again;
    0, 2, 71 and 74 are final. A signal to this command saves, and ends it with 75.

    Example: convnext launch local in1k_tiny --devices 8 --data /data/imagenet --restarts 3
    """
    name = name or Path(recipe).stem
    check_name(name)
    load_asked_recipe(recipe, overrides, data=data, precision=precision)  # before any process
    arguments = ["train", recipe, "--name", name, "--runs-dir", str(runs_dir)]
    arguments += ["--data", data] if data is not None else []
    arguments += _train_options(overrides, device=device, precision=precision)
    launch = LocalLaunch(arguments, num_processes=devices)
    run = RunDir(runs_dir / name)

    def say(text: str) -> None:
        console.print(Text.assemble(("launch     ", "bold"), text), soft_wrap=True)

    def attempt() -> int:
        code = launch.run()
        if launch.received is not None:  # a person's wish, or a scheduler's: not to be undone
            raise typer.Exit(code)
        return code

    code = repeat(attempt, newest_step=run.newest_step, restarts=restarts, say=say)
    if code:
        raise typer.Exit(code)


def _train_options(
    overrides: list[str] | None, *, device: str, precision: str | None
) -> tuple[str, ...]:
    """Overrides and flags, as `convnext train` takes them."""
    flags = ("--precision", precision) if precision is not None else ()
    return (*(overrides or ()), *flags, "--device", device)
