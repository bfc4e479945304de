"""Where everything that a run leaves behind lies.

```
runs/<name>/
|- recipe.yaml                the recipe as it was asked, overrides included
|- plan.json                  every number that the run uses
|- environment.json           machine, versions, git state, command line
|- metrics.jsonl              one row per logging step or validation
|- metrics.csv                the same rows and keys as a table
|- events.jsonl               started, resumed, checkpoint, skipped, rolled_back, stopped, ...
|- skips.json                 images that are left out after the run went back to a checkpoint
|- bad_batch.json             keys of the images whose gradient was not finite, last time
|- lock.json                  who writes here now; gone when nobody does
|- train.log                  what the console said
|- stacks/rank=00000.txt      where a rank stood when the run hung
|- checkpoints/
|  |- step=00000312.ckpt      kept on purpose, one per step
|  |- step=00000312.json      its size and hash: without it, it does not count
|  |- last.ckpt               link to the newest, for people; a resume looks for itself
|  |- best.ckpt               best val/top1
|  |- best_ema.ckpt           best val_ema/top1
|  `- abandoned/               those that a start from an older one has set aside
|- launch/                     job file and what each process said, where a launcher started them
|- plots/curves.png           written by `convnext runs plot`
`- trackers/                  files of TensorBoard and of other trackers
   `- wandb.id, mlflow.id     the tracker's run that this one goes on in
```

A folder that holds both `recipe.yaml` and `plan.json` is a run; nothing else is.
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from convnext_cli.errors import RunError, quote_path

_STEP_NAME = re.compile(r"step=(\d{8,})\.ckpt")
_SEARCH_DEPTH = 3


@dataclass(frozen=True)
class RunDir:
    """The paths inside one run; only names, nothing is created or read unless said."""

    root: Path

    @property
    def name(self) -> str:
        """The name of the run: that of its folder."""
        return self.root.resolve().name

    @property
    def recipe(self) -> Path:
        """The recipe as it was asked."""
        return self.root / "recipe.yaml"

    @property
    def plan(self) -> Path:
        """Every number that the run uses."""
        return self.root / "plan.json"

    @property
    def environment(self) -> Path:
        """Machine, versions, git state and command line."""
        return self.root / "environment.json"

    @property
    def metrics(self) -> Path:
        """Training and validation rows, one JSON object a line."""
        return self.root / "metrics.jsonl"

    @property
    def metrics_csv(self) -> Path:
        """The rows of `metrics` as a table."""
        return self.root / "metrics.csv"

    @property
    def events(self) -> Path:
        """What happened when, one JSON object a line."""
        return self.root / "events.jsonl"

    @property
    def log(self) -> Path:
        """What the console said."""
        return self.root / "train.log"

    @property
    def skips(self) -> Path:
        """Images that are left out since the run went back to an older checkpoint."""
        return self.root / "skips.json"

    @property
    def bad_batch(self) -> Path:
        """Keys of the images of the newest step whose gradient was not finite."""
        return self.root / "bad_batch.json"

    @property
    def lock(self) -> Path:
        """Who writes to this folder."""
        return self.root / "lock.json"

    def stacks(self, rank: int) -> Path:
        """Where a rank stood when the run hung."""
        return self.root / "stacks" / f"rank={rank:05d}.txt"

    @property
    def checkpoints(self) -> Path:
        """The folder of all checkpoints."""
        return self.root / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after `step` optimizer steps; its name sorts by step."""
        return self.checkpoints / f"step={step:08d}.ckpt"

    @property
    def last(self) -> Path:
        """Link to the newest checkpoint, for people; a resume takes the newest that is whole."""
        return self.checkpoints / "last.ckpt"

    @property
    def best(self) -> Path:
        """The checkpoint with the best `val/top1`."""
        return self.checkpoints / "best.ckpt"

    @property
    def best_ema(self) -> Path:
        """The checkpoint with the best `val_ema/top1`."""
        return self.checkpoints / "best_ema.ckpt"

    @property
    def abandoned(self) -> Path:
        """The folder of checkpoints that no start finds, because one went on from an older one."""
        return self.checkpoints / "abandoned"

    @property
    def links(self) -> tuple[Path, ...]:
        """The names that point to a checkpoint, whether they are there or not."""
        return (self.last, self.best, self.best_ema)

    @property
    def plots(self) -> Path:
        """The folder of drawn curves."""
        return self.root / "plots"

    @property
    def curves(self) -> Path:
        """The curves of this run alone."""
        return self.plots / "curves.png"

    @property
    def trackers(self) -> Path:
        """The folder that TensorBoard and other trackers write to."""
        return self.root / "trackers"

    def tracker_id(self, tracker: str) -> Path:
        """The id of this run in a tracker; a copy of the folder goes on in the same one."""
        return self.trackers / f"{tracker}.id"

    @property
    def launch(self) -> Path:
        """The folder of launchers: the job file, and what each process said."""
        return self.root / "launch"

    def newest_step(self) -> int:
        """The step of the newest checkpoint that is named by its step; 0 where there is none."""
        steps = (checkpoint_step(path) for path in self.list_checkpoints())
        return max((step for step in steps if step is not None), default=0)

    def list_newer(self, step: int) -> list[Path]:
        """The checkpoints of later steps, oldest first."""
        found = [(checkpoint_step(path), path) for path in self.list_checkpoints()]
        return [path for at, path in found if at is not None and at > step]

    def list_torn(self) -> list[Path]:
        """Files that a kill left half-written, under the names of `record.written_whole`."""
        return [path for folder in (self.root, self.checkpoints) for path in folder.glob(".*.tmp")]

    def is_run(self) -> bool:
        """Whether a recipe and a plan are on disk here."""
        return self.recipe.is_file() and self.plan.is_file()

    def list_checkpoints(self) -> list[Path]:
        """The checkpoints on disk: those named by their step, oldest first, then last and best.

        Half-written files have other names and are left out. A checkpoint may be a folder.
        """
        if not self.checkpoints.is_dir():
            return []
        found = ((checkpoint_step(path), path) for path in self.checkpoints.iterdir())
        by_step = sorted((step, path) for step, path in found if step is not None)
        named = [path for path in self.links if path.exists()]
        return [path for _, path in by_step] + named


def checkpoint_step(path: Path) -> int | None:
    """The step in the name of a checkpoint; None for `last.ckpt` and for any other name."""
    match = _STEP_NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def find_runs(root: Path) -> list[RunDir]:
    """The runs below `root`, up to three folders deep, sorted by path; `root` may be one itself.

    A run is not searched for further runs; hidden folders and links to folders are left out.
    """
    return list(_iter_runs(root, depth=_SEARCH_DEPTH))


def find_run(name_or_path: str, root: Path) -> RunDir:
    """The run of that path, or of that name below `root`.

    Raises:
        RunError: There is no such run, several have this name, or the folder is not a run.
    """
    for folder in (Path(name_or_path), root / name_or_path):
        run = RunDir(folder)
        if run.is_run():
            return run
    runs = find_runs(root)
    named = [run for run in runs if run.name == name_or_path]
    if len(named) == 1:
        return named[0]
    if named:
        raise RunError(
            f"{len(named)} runs below {root} are named '{name_or_path}'",
            hint=f"give the path of one: {', '.join(str(run.root) for run in named)}",
        )
    for folder in (Path(name_or_path), root / name_or_path):
        above = _find_above(folder)
        if above is not None and folder.exists():
            what = "a checkpoint" if folder.suffix == ".ckpt" else "a part of a run"
            raise RunError(
                f"{folder} is {what}, not a run", hint=f"name the run's folder: {above.root}"
            )
        if folder.is_dir():
            run = RunDir(folder)
            absent = [path.name for path in (run.recipe, run.plan) if not path.is_file()]
            raise RunError(
                f"{folder} is not a run: it has no {' and no '.join(absent)}",
                hint=_near_hint(name_or_path, runs, root),
            )
        if folder.exists():
            what = "a checkpoint" if folder.suffix == ".ckpt" else "a file"
            raise RunError(
                f"{folder} is {what}, not the folder of a run",
                hint=_near_hint(name_or_path, runs, root),
            )
    raise RunError(
        f"no run '{name_or_path}': neither that path nor {root / name_or_path} is there",
        hint=_near_hint(name_or_path, runs, root),
    )


def _find_above(path: Path) -> RunDir | None:
    """The run that a path lies in; relative where the path leads there itself."""
    folders = (*path.parents, *path.absolute().parents)
    return next((run for run in map(RunDir, folders) if run.is_run()), None)


def _iter_runs(folder: Path, *, depth: int) -> Iterator[RunDir]:
    run = RunDir(folder)
    try:
        if run.is_run():
            yield run
            return
        if depth == 0 or not folder.is_dir():
            return
        children = sorted(
            child
            for child in folder.iterdir()
            if child.is_dir() and not child.is_symlink() and not child.name.startswith(".")
        )
    except PermissionError:  # a folder of somebody else holds no run of this user
        return
    for child in children:
        yield from _iter_runs(child, depth=depth - 1)


def _near_hint(name: str, runs: list[RunDir], root: Path) -> str:
    if not runs:
        return f"{root} holds no run; name another folder with --root, or start one: convnext train"
    near = difflib.get_close_matches(Path(name).name, [run.name for run in runs], n=1)
    if near:
        return f"did you mean '{near[0]}'? all runs: convnext runs list --root {quote_path(root)}"
    return f"see what there is: convnext runs list --root {quote_path(root)}"
