"""What came of a run in one record, and in what several runs differ.

Reads the files of a run and nothing else: no torch, no model, no checkpoint is loaded.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from typing import Literal

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from convnext_cli.errors import RunError
from convnext_cli.recipe.files import flatten_keys
from convnext_cli.runs.layout import RunDir
from convnext_cli.runs.record import hint_aside, read_json, read_jsonl

State = Literal["finished", "stopped", "incomplete"]

STARTS = ("started", "resumed")
ENDS = ("stopped", "finished")
"""Events with which an attempt begins and ends."""

_COMPARED = (
    "state", "step", "best_top1", "best_top1_step", "best_ema_top1", "best_ema_top1_step",
    "last_loss", "images_per_second", "wall_seconds",
)  # fmt: skip


@dataclass(frozen=True)
class RunSummary:
    """One run in numbers; None is a number that the run has not produced."""

    name: str
    root: Path
    state: State
    """`finished`; `stopped` by a signal, to be resumed; `incomplete`: under way or killed."""
    step: int
    """Optimizer steps taken so far."""
    total_steps: int
    """Optimizer steps that the plan asks for."""
    epoch: float | None
    best_top1: float | None
    """Highest `val/top1` of the raw weights, in percent."""
    best_top1_step: int | None
    """The first step that reached it."""
    best_ema_top1: float | None
    """Highest `val_ema/top1` of the averaged weights, in percent."""
    best_ema_top1_step: int | None
    last_loss: float | None
    """`train/loss` of the last training row; None also when it was not finite."""
    images_per_second: float | None
    """Harmonic mean over the training rows: images over time for rows of equal length."""
    wall_seconds: float
    """Time under way, summed over the attempts; the waits between them do not count.

    An attempt that was killed counts up to its last row or event.
    """
    attempts: int
    """How often it was started or resumed."""
    checkpoints: tuple[Path, ...]


@dataclass(frozen=True)
class Difference:
    """One key that is not the same in all runs."""

    key: str
    values: tuple[object | None, ...]
    """One value a run, in the order of the runs; None for null and for a key that is not there."""


@dataclass(frozen=True)
class Comparison:
    """Several runs next to each other."""

    labels: tuple[str, ...]
    """One unique label a run: its name, or its path where names repeat."""
    summaries: tuple[RunSummary, ...]
    recipe: tuple[Difference, ...]
    """Keys of `recipe.yaml`, flattened to `section.key`."""
    metrics: tuple[Difference, ...]
    """Fields of `RunSummary` in which the runs differ."""


def summarise_run(run: RunDir) -> RunSummary:
    """Read what came of a run.

    Raises:
        RunError: A file of the run cannot be read, or the plan names no `total_steps`.
    """
    total_steps = read_json(run.plan).get("total_steps")
    if not isinstance(total_steps, int):
        raise RunError(
            f"{run.plan} has no whole number 'total_steps', but {total_steps!r}",
            hint="it was not written by this version: make the run anew under another name",
        )
    rows, events = read_jsonl(run.metrics), read_jsonl(run.events)
    top1 = _best(rows, "val/top1")
    ema_top1 = _best(rows, "val_ema/top1")
    losses = [number(row, "train/loss") for row in rows if "train/loss" in row]
    rates = [rate for row in rows if (rate := number(row, "speed/images_per_second"))]
    epochs = [epoch for row in rows if (epoch := number(row, "epoch")) is not None]
    return RunSummary(
        name=run.name,
        root=run.root,
        state=state_of(events),
        step=max([_step(item) for item in (*rows[-1:], *events[-1:])], default=0),
        total_steps=total_steps,
        epoch=epochs[-1] if epochs else None,
        best_top1=top1[0] if top1 else None,
        best_top1_step=top1[1] if top1 else None,
        best_ema_top1=ema_top1[0] if ema_top1 else None,
        best_ema_top1_step=ema_top1[1] if ema_top1 else None,
        last_loss=losses[-1] if losses else None,
        images_per_second=statistics.harmonic_mean(rates) if rates else None,
        wall_seconds=_wall_seconds(rows, events),
        attempts=sum(event.get("event") in STARTS for event in events),
        checkpoints=tuple(run.list_checkpoints()),
    )


def compare_runs(*runs: RunDir) -> Comparison:
    """Find in which recipe keys and in which results the runs differ.

    Raises:
        RunError: A file of a run cannot be read.
    """
    summaries = tuple(summarise_run(run) for run in runs)
    results = [{field: getattr(summary, field) for field in _COMPARED} for summary in summaries]
    return Comparison(
        labels=labels_for(runs),
        summaries=summaries,
        recipe=_differences([read_recipe_keys(run) for run in runs]),
        metrics=_differences(results),
    )


def labels_for(runs: Sequence[RunDir]) -> tuple[str, ...]:
    """One unique label a run: the name where it is unique, the path elsewhere."""
    names = [run.name for run in runs]
    return tuple(run.name if names.count(run.name) == 1 else str(run.root) for run in runs)


def read_recipe_keys(run: RunDir) -> dict[str, object]:
    """The recipe of a run as `section.key` to value; a list is one value.

    Raises:
        RunError: The recipe cannot be read or is no mapping.
    """
    try:
        recipe = YAML(typ="safe", pure=True).load(run.recipe)
    except OSError as error:
        raise RunError(f"cannot read {run.recipe}: {error.strerror}") from error
    except (YAMLError, ValueError) as error:
        raise RunError(
            f"{run.recipe} is not YAML: {' '.join(str(error).split())}",
            hint=hint_aside(run.root),
        ) from error
    if not isinstance(recipe, dict):
        raise RunError(f"{run.recipe} holds no recipe", hint=hint_aside(run.root))
    return flatten_keys(recipe)


def last_step(run: RunDir) -> int:
    """The last step that a run has written a row of; 0 for none."""
    return max((_step(row) for row in read_jsonl(run.metrics)), default=0)


def number(row: Mapping[str, object], key: str) -> float | None:
    """The number under a key; None where it is absent or was not finite."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else None


def time_of(item: Mapping[str, object]) -> datetime | None:
    """When a row or an event was written; None where it does not say, or not where in the world."""
    try:
        time = datetime.fromisoformat(str(item.get("time")))
    except ValueError:
        return None
    return time if time.tzinfo else None


def _differences(mappings: Sequence[Mapping[str, object]]) -> tuple[Difference, ...]:
    keys = dict.fromkeys(key for mapping in mappings for key in mapping)
    rows = ((key, tuple(mapping.get(key) for mapping in mappings)) for key in keys)
    return tuple(
        Difference(key, values)
        for key, values in rows
        if any(value != values[0] for value in values)
    )


def _best(rows: Sequence[Mapping[str, object]], key: str) -> tuple[float, int] | None:
    """The highest value and the first step that reached it."""
    found = [(value, _step(row)) for row in rows if (value := number(row, key)) is not None]
    return max(found, key=lambda pair: pair[0]) if found else None


def _step(item: Mapping[str, object]) -> int:
    return int(number(item, "step") or 0)


def state_of(events: Sequence[Mapping[str, object]]) -> State:
    """How the last attempt ended, if it told."""
    turns = [event["event"] for event in events if event.get("event") in (*STARTS, *ENDS)]
    match turns[-1] if turns else None:
        case "finished":
            return "finished"
        case "stopped":
            return "stopped"
        case _:
            return "incomplete"


def _wall_seconds(
    rows: Sequence[Mapping[str, object]], events: Sequence[Mapping[str, object]]
) -> float:
    starts = [time for event in events if event.get("event") in STARTS and (time := time_of(event))]
    times = sorted(time for item in (*rows, *events) if (time := time_of(item)))
    seconds = 0.0
    for start, next_start in zip_longest(starts, starts[1:]):
        during = [
            time for time in times if time >= start and (next_start is None or time < next_start)
        ]
        seconds += (during[-1] - start).total_seconds() if during else 0.0
    return seconds
