"""`convnext checkpoints`: which there are, whether they are whole, and one file to publish."""

from pathlib import Path
from typing import Annotated

import typer

from convnext_cli.cli._console import console, print_json, print_rows
from convnext_cli.cli._inputs import JsonOption, RootOption, RunArgument, expand_home
from convnext_cli.cli._models import WeightsOption
from convnext_cli.errors import CheckpointError, quote_path
from convnext_cli.runs.layout import RunDir, checkpoint_step, find_run
from convnext_cli.runs.manifest import CheckpointState, check_checkpoint

app = typer.Typer(no_args_is_help=True, help="List, verify and consolidate checkpoints.")


def _check_run(run: RunDir, *, deep: bool) -> list[CheckpointState]:
    paths = [path for path in run.list_checkpoints() if checkpoint_step(path) is not None]
    if not paths:
        raise CheckpointError(
            f"{run.root} has no checkpoint yet",
            hint="wait for its first one: it is saved within a minute or so of training",
        )
    states = [check_checkpoint(path, deep=deep) for path in paths]
    # a run that goes on has meanwhile removed what it does not keep
    return [state for state in states if state.path.exists()]


def _show(run: RunDir, states: list[CheckpointState], *, json_output: bool, whole: str) -> None:
    named: dict[str, list[str]] = {state.path.name: [] for state in states}
    for name in run.links:
        if name.exists():
            named.setdefault(name.resolve().name, []).append(name.stem)
    if json_output:
        print_json(
            [
                {
                    "path": str(state.path),
                    "step": checkpoint_step(state.path),
                    "named": named[state.path.name],
                    "bytes": state.path.stat().st_size,
                    "time": state.manifest.time if state.manifest else None,
                    "world_size": state.manifest.world_size if state.manifest else None,
                    "sha256": state.manifest.sha256 if state.manifest else None,
                    "problem": state.problem,
                }
                for state in states
            ]
        )
        return
    print_rows(
        (">step", ">MB", "written", "named", "state"),
        [
            (
                f"{checkpoint_step(state.path):,}",
                f"{state.path.stat().st_size / 1e6:,.0f}",
                state.manifest.time[:19].replace("T", " ") if state.manifest else "",
                ", ".join(named[state.path.name]),
                state.problem or whole,
            )
            for state in states
        ],
    )


@app.command("list")
def list_checkpoints(
    run: RunArgument, *, root: RootOption = Path("runs"), json_output: JsonOption = False
) -> None:
    """List the checkpoints of a run; looks at sizes, not at every byte.

    Example: convnext checkpoints list in1k_tiny
    """
    found = find_run(run, root)
    _show(found, _check_run(found, deep=False), json_output=json_output, whole="complete")


@app.command()
def verify(
    run: RunArgument, *, root: RootOption = Path("runs"), json_output: JsonOption = False
) -> None:
    """Read every checkpoint of a run and hold it against its hash; exit code 2 if one is damaged.

    Example: convnext checkpoints verify in1k_tiny
    """
    found = find_run(run, root)
    states = _check_run(found, deep=True)
    _show(found, states, json_output=json_output, whole="whole")
    damaged = [state for state in states if state.problem is not None]
    if damaged:
        raise CheckpointError(
            f"{damaged[-1].path} is damaged: {damaged[-1].problem}",
            hint="training goes on from the newest whole one by itself; remove the damaged file"
            " when it is not wanted for a repair",
        )


@app.command()
def fetch(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="checkpoint.copy_to, and the name of the run.")
    ],
    *,
    runs_dir: Annotated[
        Path, typer.Option(help="Folder that the run is put into.", callback=expand_home)
    ] = Path("runs"),
) -> None:
    """Bring a run back from the copies that checkpoint.copy_to made, to go on with it.

    Example: convnext checkpoints fetch s3://bucket/runs/in1k_tiny
    """
    from convnext_cli.runs.copies import fetch_run

    run, step = fetch_run(url, runs_dir)
    console.print(
        f"{run.root} is back at step {step:,}; the command that started it goes on from there",
        soft_wrap=True,
    )


@app.command()
def consolidate(
    path: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint, or a run.")],
    *,
    out: Annotated[Path, typer.Option(help="File to write, its name ends in .safetensors.")],
    weights: WeightsOption = "auto",
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> None:
    """Write the weights of a checkpoint, of any strategy and number of devices, as one file.

    Example: convnext checkpoints consolidate runs/mine --out mine.safetensors
    """
    from convnext_cli.cli.weights import convert

    if out.suffix != ".safetensors":
        raise CheckpointError(
            f"--out {out}: one file of weights ends in .safetensors",
            hint=f"use --out {quote_path(out.with_suffix('.safetensors'))}; other layouts:"
            " convnext weights convert --help",
        )
    convert(path, to="official", out=out, weights=weights, force=force)
    console.print(f"evaluate it: convnext evaluate {quote_path(out)} --data DIR", soft_wrap=True)
