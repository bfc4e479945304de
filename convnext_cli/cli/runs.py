"""`convnext runs`: list, show, compare and plot what runs left behind."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from convnext_cli.cli._console import console, print_json, print_rows, print_text
from convnext_cli.cli._inputs import JsonOption, RootOption, RunArgument
from convnext_cli.errors import RunError, UserError, quote_path
from convnext_cli.recipe.durations import render_duration
from convnext_cli.recipe.files import render_value
from convnext_cli.runs.layout import RunDir, find_run, find_runs

app = typer.Typer(no_args_is_help=True, help="List, show, compare and plot runs.")

RunsArgument = Annotated[list[str], typer.Argument(metavar="RUN", help="Names or paths of runs.")]


@app.command("list")
def list_runs(*, root: RootOption = Path("runs"), json_output: JsonOption = False) -> None:
    """List all runs: state, progress, best accuracy, speed.

    Example: convnext runs list --root runs
    """
    from convnext_cli.runs.compare import summarise_run

    if not root.is_dir():
        raise RunError(
            f"no folder {root}", hint="name the folder that holds the runs: --root FOLDER"
        )
    summaries = []
    for run in find_runs(root):
        try:
            summaries.append(summarise_run(run))
        except UserError as error:  # one damaged run must not hide the others
            console.print(Text(f"left out: {error}", style="yellow"), soft_wrap=True)
    if json_output:
        print_json([dataclasses.asdict(summary) for summary in summaries])
        return
    if not summaries:
        console.print(Text(f"no runs in {root}"), soft_wrap=True)
        return
    print_rows(
        ("run", "state", ">step", ">top-1 %", ">EMA top-1 %", ">loss", ">images/s", ">time"),
        [
            (
                _path_below(root, summary.root),
                summary.state,
                f"{summary.step:,} / {summary.total_steps:,}",
                _render_number(summary.best_top1, ".2f"),
                _render_number(summary.best_ema_top1, ".2f"),
                _render_number(summary.last_loss, ".4f"),
                _render_number(summary.images_per_second, ",.0f"),
                render_duration(summary.wall_seconds),
            )
            for summary in summaries
        ],
    )


@app.command()
def show(
    run: RunArgument, *, root: RootOption = Path("runs"), json_output: JsonOption = False
) -> None:
    """Show one run: state, best results, speed and checkpoints.

    Example: convnext runs show in1k_tiny
    """
    from convnext_cli.runs.compare import summarise_run

    summary = summarise_run(find_run(run, root))
    if json_output:
        print_json(dataclasses.asdict(summary))
        return
    rows = [
        ("run", summary.name),
        ("folder", str(summary.root)),
        ("state", summary.state),
        ("step", f"{summary.step:,} of {summary.total_steps:,}"),
        ("epoch", _render_number(summary.epoch, ".2f")),
        ("best top-1", _render_best(summary.best_top1, summary.best_top1_step)),
        ("best EMA top-1", _render_best(summary.best_ema_top1, summary.best_ema_top1_step)),
        ("last training loss", _render_number(summary.last_loss, ".4f")),
        ("speed", f"{_render_number(summary.images_per_second, ',.0f')} images/s"),
        ("time", f"{render_duration(summary.wall_seconds)} in {summary.attempts} attempt(s)"),
    ]
    rows += [("checkpoint", str(path)) for path in summary.checkpoints]
    print_rows(("", ""), rows)


@app.command()
def compare(
    runs: RunsArgument, *, root: RootOption = Path("runs"), json_output: JsonOption = False
) -> None:
    """Show in which recipe keys and in which results runs differ.

    Example: convnext runs compare baseline lower_lr
    """
    from convnext_cli.runs.compare import compare_runs

    found = _find_distinct(runs, root)
    if len(found) < 2:
        raise RunError(
            f"one run alone cannot be compared: {found[0].root}",
            hint=f"name a second one; all runs: convnext runs list --root {quote_path(root)}",
        )
    comparison = compare_runs(*found)
    labels = comparison.labels
    if json_output:
        print_json(
            {
                "runs": {
                    label: dataclasses.asdict(summary)
                    for label, summary in zip(labels, comparison.summaries, strict=True)
                },
                "recipe": {
                    row.key: dict(zip(labels, row.values, strict=True)) for row in comparison.recipe
                },
                "metrics": {
                    row.key: dict(zip(labels, row.values, strict=True))
                    for row in comparison.metrics
                },
            }
        )
        return
    if comparison.recipe:
        print_rows(
            ("recipe", *(f">{label}" for label in labels)),
            [(row.key, *map(render_value, row.values)) for row in comparison.recipe],
        )
    else:
        console.print("the recipes are the same")
    console.print()
    if comparison.metrics:
        print_rows(
            ("result", *(f">{label}" for label in labels)),
            [
                (row.key, *(_render_result(row.key, value) for value in row.values))
                for row in comparison.metrics
            ],
        )
    else:
        console.print("the results are the same")


@app.command()
def goodput(
    run: RunArgument, *, root: RootOption = Path("runs"), json_output: JsonOption = False
) -> None:
    """Show how much of a run's time survived, and what each interruption cost.

    Example: convnext runs goodput in1k_tiny
    """
    from convnext_cli.runs.goodput import measure_goodput

    measured = measure_goodput(find_run(run, root))
    if json_output:
        print_json(dataclasses.asdict(measured))
        return
    print_rows(
        (">attempt", ">from step", ">to step", ">time", ">start", ">steps lost", ">wait", "ended"),
        [
            (
                str(place),
                f"{attempt.first_step:,}",
                f"{attempt.last_step:,}",
                render_duration(attempt.seconds),
                f"{attempt.start_seconds:.1f} s",
                f"{attempt.lost_steps:,}",
                f"{attempt.waited_seconds:.1f} s",
                attempt.ended,
            )
            for place, attempt in enumerate(measured.attempts, start=1)
        ],
    )
    console.print(
        f"{measured.kept_steps:,} steps of {measured.step_seconds:.3f} s are kept,"
        f" {measured.lost_steps:,} were taken again; {measured.goodput:.1%} of"
        f" {render_duration(measured.wall_seconds)} went into steps that survive",
        soft_wrap=True,
    )


@app.command()
def plot(
    runs: RunsArgument,
    *,
    root: RootOption = Path("runs"),
    out: Annotated[
        Path | None,
        typer.Option(
            help="PNG file. Else plots/curves.png in the run; for several runs, curves.png here."
        ),
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option(help="Draw this metric alone, such as train/grad_norm; may be repeated."),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Draw loss, accuracy, learning rate and speed of one or several runs; print the file.

    Example: convnext runs plot baseline lower_lr --out curves.png
    """
    found = _find_distinct(runs, root)
    target = out or (found[0].curves if len(found) == 1 else Path("curves.png"))
    if target.suffix.lower() != ".png":
        raise RunError(
            f"--out has to be a PNG file, found: {target}", hint=f"use {target.with_suffix('.png')}"
        )

    from convnext_cli.runs.plots import plot_runs

    plot_runs(found, target, keys=key or None)
    if json_output:
        print_json({"plot": str(target), "runs": [str(run.root) for run in found]})
    else:
        print_text(f"{target}\n")


def _find_distinct(names: list[str], root: Path) -> list[RunDir]:
    """The named runs in order, each once however it was named."""
    found = [find_run(name, root) for name in names]
    return list({run.root.resolve(): run for run in found}.values())


def _path_below(root: Path, path: Path) -> str:
    return path.name if path == root else str(path.relative_to(root))


def _render_best(value: float | None, step: int | None) -> str:
    return "-" if value is None else f"{value:.2f}% at step {step:,}"


def _render_result(key: str, value: object) -> str:
    match value:
        case int() | float() if key == "wall_seconds":
            return render_duration(value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.4g}"
        case _:
            return "-" if value is None else str(value)


def _render_number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
