"""Curves of one or several runs as a PNG of small panels.

```
loss (training, validation) | top-1 (raw weights, EMA)
learning rate               | images per second
```

One colour a run, the same in every panel; the kind of line says what it is. The figure is made
without pyplot, so that no display is needed and no state is shared; Agg draws the PNG.
"""

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import mul
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from convnext_cli.errors import RunError, quote_path
from convnext_cli.runs.compare import labels_for, number
from convnext_cli.runs.layout import RunDir
from convnext_cli.runs.record import read_json, read_jsonl, writing_to, written_whole

# Okabe and Ito's colours, which stay apart for colour-blind readers; yellow is left out, because
# it vanishes on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_INK, _GREY, _GRID = "#222222", "#666666", "#E4E4E4"
_SMOOTHED_FRAC = 0.02
_SMOOTHED_ROWS = 100  # fewer rows stay as logged: 2% of them would be one
_MARKED_POINTS = 40


@dataclass(frozen=True)
class _Curves:
    """The rows of one run and how they are drawn."""

    label: str
    colour: str
    rows: Sequence[Mapping[str, object]]
    steps_per_epoch: float | None


@dataclass(frozen=True)
class _Line:
    """One metric key in a panel."""

    key: str
    name: str
    """What the legend calls it."""
    style: Literal["-", "--"] = "-"
    smoothed: bool = False


@dataclass(frozen=True)
class _Panel:
    title: str
    unit: str
    lines: tuple[_Line, ...]
    from_zero: bool = False


_PANELS = (
    _Panel(
        "Loss",
        "cross-entropy (nats)",
        (
            _Line("train/loss", "training", smoothed=True),
            _Line("val/loss", "validation", "--"),
        ),
    ),
    _Panel(
        "Top-1 accuracy on validation",
        "percent",
        (_Line("val/top1", "raw weights"), _Line("val_ema/top1", "averaged weights (EMA)", "--")),
    ),
    _Panel("Learning rate", "", (_Line("train/lr", "training"),), from_zero=True),
    _Panel(
        "Speed",
        "images per second",
        (_Line("speed/images_per_second", "training", smoothed=True),),
        from_zero=True,
    ),
)


def plot_runs(runs: Sequence[RunDir], out: Path, *, keys: Sequence[str] | None = None) -> None:
    """Draw the curves of one or several runs over each other.

    The horizontal axis is the step, with epochs above, when all runs have equally long epochs;
    else it is the epoch, since steps of different batches cannot be compared.

    Args:
        runs: At least one; beyond seven, colours repeat.
        out: The PNG file; its folder is created, an older file replaced.
        keys: Metric keys to draw instead, one panel each, such as `train/grad_norm`.

    Raises:
        RunError: A run has no metrics yet, or no run has one of the keys.
        StorageError: The file cannot be written.
    """
    curves = [
        _load_curves(run, label, _COLOURS[index % len(_COLOURS)])
        for index, (run, label) in enumerate(zip(runs, labels_for(runs), strict=True))
    ]
    panels = _PANELS if keys is None else tuple(_panel_of(key, curves) for key in keys)
    num_columns = min(2, len(panels))
    num_rows = -(-len(panels) // num_columns)
    figure = Figure(figsize=(12, 0.9 + 3.9 * num_rows), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.12, hspace=0.03, wspace=0.03)
    axes = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    by_epoch = len({run.steps_per_epoch for run in curves}) > 1
    x_key = "epoch" if by_epoch else "step"
    x_end = max((x for run in curves for row in run.rows if (x := number(row, x_key))), default=1.0)
    for panel, axis in zip(panels, axes, strict=False):
        _draw_panel(axis, panel, curves, x_key=x_key)
        axis.set_xlabel(x_key, fontsize=11, color=_INK)
        axis.set_xlim(-0.01 * x_end, 1.02 * x_end)  # the same in all panels
        axis.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
        axis.xaxis.set_major_formatter(FuncFormatter(_render_tick))
        if not by_epoch and curves[0].steps_per_epoch:
            _add_epochs(axis, curves[0].steps_per_epoch)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    names = figure.legend(
        handles=[Line2D([], [], color=run.colour, linewidth=3, label=run.label) for run in curves],
        loc="outside upper left",
        ncols=min(4, len(curves)),
        frameon=False,
        fontsize=12,
        labelcolor=_INK,
    )
    for text in names.get_texts():
        text.set_parse_math(False)  # a name may hold $, which would start a formula
    _write_png(figure, out)


def running_mean(values: Sequence[float], *, window: int) -> list[float]:
    """The mean of the up to `window` values around each value; fewer at both ends.

    Values that are not finite are passed over; where there is no other, the mean is nan.
    """
    before, after = (window - 1) // 2, window // 2
    means = []
    for index in range(len(values)):
        around = values[max(0, index - before) : index + after + 1]
        finite = [value for value in around if math.isfinite(value)]
        means.append(statistics.fmean(finite) if finite else float("nan"))
    return means


def _load_curves(run: RunDir, label: str, colour: str) -> _Curves:
    rows = read_jsonl(run.metrics)
    if not rows:
        raise RunError(
            f"run '{label}' has no metrics yet: {run.metrics} is absent or empty",
            hint=f"leave it out, or see how far it is: convnext runs show {quote_path(run.root)}",
        )
    steps_per_epoch = number(read_json(run.plan), "steps_per_epoch")
    drawn = os.fsencode(label).decode(errors="replace")  # no font has what is not UTF-8
    return _Curves(label=drawn, colour=colour, rows=rows, steps_per_epoch=steps_per_epoch)


def _panel_of(key: str, curves: Sequence[_Curves]) -> _Panel:
    known = {name for run in curves for row in run.rows for name in row if "/" in name}
    if key not in known:
        raise RunError(
            f"no run has the metric '{key}'", hint=f"use one of: {', '.join(sorted(known))}"
        )
    noisy = key.startswith(("train/", "speed/"))
    return _Panel(key, "", (_Line(key, key.partition("/")[2], smoothed=noisy),))


def _draw_panel(axis: Axes, panel: _Panel, curves: Sequence[_Curves], *, x_key: str) -> None:
    handles = []
    for line in panel.lines:
        drawn = [_draw_line(axis, line, run, x_key) for run in curves]
        if not any(drawn):
            continue
        smoothed = line.smoothed and max(drawn) >= _SMOOTHED_ROWS
        name = f"{line.name}: running mean over 2% of the rows" if smoothed else line.name
        handles.append(Line2D([], [], color=_GREY, linestyle=line.style, linewidth=1.8, label=name))
        if smoothed:
            handles.append(
                Line2D(
                    [], [], color=_GREY, alpha=0.4, linewidth=0.8, label=f"{line.name}: as logged"
                )
            )
    _dress(axis, panel)
    if not handles:
        axis.text(0.5, 0.5, "no rows", transform=axis.transAxes, ha="center", color=_GREY)
    elif panel.from_zero:
        axis.set_ylim(bottom=0)
    if len(handles) > 1:
        axis.legend(
            handles=handles,
            fontsize=10,
            framealpha=0.85,
            edgecolor="none",
            labelcolor=_INK,
        )


def _draw_line(axis: Axes, line: _Line, run: _Curves, x_key: str) -> int:
    """Draw one metric of one run; return how many rows have it."""
    xs, ys = [], []
    for row in run.rows:
        x, y = number(row, x_key), number(row, line.key)
        if line.key in row and x is not None:
            xs.append(x)
            ys.append(math.nan if y is None else y)  # not finite: a gap in the curve
    if line.smoothed and len(ys) >= _SMOOTHED_ROWS:
        axis.plot(xs, ys, color=run.colour, linewidth=0.8, alpha=0.25, zorder=2)
        ys = running_mean(ys, window=round(len(ys) * _SMOOTHED_FRAC))
    axis.plot(
        xs,
        ys,
        color=run.colour,
        linestyle=line.style,
        linewidth=1.8,
        zorder=3,
        # Few points are measurements far apart: show where they are.
        marker="o" if len(xs) <= _MARKED_POINTS else None,
        markersize=4,
        markerfacecolor=run.colour if line.style == "-" else "white",
    )
    return len(xs)


def _dress(axis: Axes, panel: _Panel) -> None:
    axis.set_title(panel.title, loc="left", fontsize=13, fontweight="bold", color=_INK, pad=10)
    axis.set_ylabel(panel.unit, fontsize=11, color=_INK)
    axis.tick_params(colors=_GREY, labelsize=10, length=3)
    axis.grid(visible=True, color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(_GREY)
    axis.yaxis.set_major_formatter(FuncFormatter(_render_tick))


def _add_epochs(axis: Axes, steps_per_epoch: float) -> None:
    epochs = axis.secondary_xaxis(
        "top", functions=(partial(mul, 1 / steps_per_epoch), partial(mul, steps_per_epoch))
    )
    epochs.set_xlabel("epoch", fontsize=10, color=_GREY, loc="right")
    epochs.tick_params(colors=_GREY, labelsize=9, length=3)
    epochs.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    epochs.spines["top"].set_color(_GRID)


def _render_tick(value: float, _: int) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _write_png(figure: Figure, out: Path) -> None:
    with writing_to(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(out) as beside:
            figure.savefig(beside, format="png")
