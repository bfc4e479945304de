"""Where a run begins: at step 0, or at a checkpoint of the same run on the same images.

Lightning is not loaded here, so that what is refused is refused at once.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from convnext_cli.data.order import ORDER_VERSION, Skip
from convnext_cli.errors import CheckpointError, RunError, quote_path
from convnext_cli.plan.resolve import Plan
from convnext_cli.recipe.files import flatten_keys, render_value
from convnext_cli.recipe.schema import Recipe
from convnext_cli.runs.compare import number, read_recipe_keys, state_of
from convnext_cli.runs.copies import RemoteFolder
from convnext_cli.runs.layout import RunDir
from convnext_cli.runs.manifest import CheckpointState, find_newest_whole, require_whole
from convnext_cli.runs.record import read_json, read_jsonl

ResumeMode = Literal["auto", "never", "must"]

CHANGEABLE = (
    "about",
    "published_top1",
    "data.path",
    "data.val_path",
    "data.val_images",
    "data.workers",
    "data.bad_frac",
    "data.cache_dir",
    "data.cache_gb",
    "batch.per_device_images",
    "compute.precision",
    "compute.kernels",
    "compute.channels_last",
    "compute.cuda_graphs",
    "compute.gradient_checkpointing",
    "compute.strategy",
    "compute.shard_group",
    "evaluate.every",
    "evaluate.per_device_images",
    "checkpoint.",
    "guard.",
    "log.",
)
"""Keys that may change between two attempts of one run: but for rounding, and for what each pass
draws for drop path, they do not decide what is learned."""


@dataclass(frozen=True)
class Start:
    """Where an attempt begins."""

    checkpoint: Path | None
    """None: at step 0."""
    step: int
    damaged: Sequence[CheckpointState] = ()
    """Newer checkpoints that are passed over."""
    abandoned: Sequence[Path] = ()
    """Newer checkpoints whose steps are taken again, and which no later start may take up."""
    asked: Path | None = None
    """The checkpoint that the run was told to go back to, where this attempt does."""


def find_start(plan: Plan, run: RunDir, *, resume: ResumeMode | Path) -> Start:
    """The checkpoint where the same run goes on: the newest one that is whole. Writes nothing.

    A run that is told to go back to a checkpoint does so once: a launcher repeats the command after
    each interruption, and by then there are newer ones.

    Raises:
        RunError: The folder holds another run, or none where one must be.
        CheckpointError: All checkpoints are damaged, or the one that is asked for is, or it was
            made with other images.
    """
    if plan.cluster.rank == 0 and run.is_run():
        _check_same_run(plan, run)
        if resume == "never":
            raise RunError(
                f"{run.root} holds a run already, and --resume never starts a new one",
                hint="give the new run its own folder with --name NAME",
            )
    if isinstance(resume, Path) and not _has_gone_back(run, resume):
        if not resume.is_file():
            raise RunError(
                f"--resume {resume}: {'a folder' if resume.is_dir() else 'there is no such file'}",
                hint="name one of the files that convnext checkpoints list RUN shows, or leave"
                " --resume out to go on from the newest checkpoint of the run",
            )
        require_whole(resume)
        start = _start_from(resume, plan)
        if (
            start.step >= plan.total_steps
            and resume.resolve() != run.checkpoint(start.step).resolve()
        ):
            raise RunError(
                f"--resume {resume}: it stands at step {start.step}, and this run has"
                f" {plan.total_steps} steps: none is left to take",
                hint=f"lengthen the run: schedule.length={2 * start.step}st; or begin another with"
                f" its weights: init.weights={quote_path(resume)} in the place of --resume",
            )
        return replace(start, abandoned=run.list_newer(start.step), asked=resume)
    newest, damaged = find_newest_whole(run)
    if newest is not None:
        return _start_from(newest.path, plan, damaged)
    if damaged:
        trusted = f"if you know it whole: --resume {quote_path(damaged[0].path)}; else "
        raise CheckpointError(
            f"{damaged[0].path} is damaged, and there is no older one that is whole:"
            f" {damaged[0].problem}",
            hint=(trusted if damaged[0].manifest is None else "")
            + f"start the run anew with --name NAME, or first move {run.checkpoints} away",
        )
    copies = find_copies(plan, run) if plan.cluster.rank == 0 else None
    if copies is not None and resume != "never" and copies.list_steps():
        raise RunError(
            f"{run.root} has no checkpoint, but {copies.shown} has copies of one",
            hint=f"move {run.root} away if it is there, then: convnext checkpoints fetch"
            f" {quote_path(copies.shown)} --runs-dir {quote_path(run.root.parent)};"
            " or start anew with --name NAME",
        )
    if resume == "must":
        raise RunError(
            f"{run.root} has no checkpoint to go on from, and --resume must asks for one",
            hint="leave --resume out to start the run",
        )
    return Start(None, 0)


def _start_from(checkpoint: Path, plan: Plan, damaged: Sequence[CheckpointState] = ()) -> Start:
    """Go on from a checkpoint, whose images have to come in the order of before."""
    from convnext_cli.training.checkpoint import read_data_state, read_step  # noqa: PLC0415  # slow

    step, saved = read_step(checkpoint), read_data_state(checkpoint)
    own = {"fingerprint": plan.data_fingerprint, "order_version": ORDER_VERSION}
    for key, what in (("fingerprint", "data set"), ("order_version", "version of the order")):
        if plan.data_fingerprint is not None and saved.get(key, own[key]) != own[key]:
            raise CheckpointError(
                f"the checkpoint was made with {what} {saved[key]}, but {plan.data_source} has"
                f" {own[key]}: images would come twice or never",
                hint="go on with the data set of before, or start a new run from the weights:"
                f" init.weights={quote_path(checkpoint)} --name NAME",
            )
    return Start(checkpoint, step, damaged)


def _has_gone_back(run: RunDir, asked: Path) -> bool:
    """Whether a run that has not ended went back to what is asked, and has newer checkpoints."""
    events = read_jsonl(run.events)
    told = [event for event in events if "asked" in event]
    if not told or told[-1]["asked"] != str(asked.absolute()) or state_of(events) == "finished":
        return False
    return run.newest_step() > (number(told[-1], "step") or 0)


def _check_same_run(plan: Plan, run: RunDir) -> None:
    """Refuse to go on with a run under another recipe, or on other images."""
    # a key that the run's version did not know has the default, under which the run was begun
    defaults = flatten_keys(Recipe(about="").model_dump(mode="json"))
    before = defaults | read_recipe_keys(run)
    asked = flatten_keys(plan.recipe.model_dump(mode="json"))
    differing = [
        key
        for key in sorted(before.keys() | asked.keys())
        if before.get(key) != asked.get(key) and not key.startswith(CHANGEABLE)
    ]
    if differing:
        key = differing[0]
        more = f" (and {len(differing) - 1} more keys)" if len(differing) > 1 else ""
        raise RunError(
            f"{run.root} holds a run with {key}={render_value(before.get(key))}, but"
            f" {render_value(asked.get(key))} is asked now{more}",
            hint="give the new run its own folder with --name NAME",
        )
    recorded = read_json(run.plan)
    fingerprint = recorded.get("data_fingerprint")
    if fingerprint is not None and fingerprint != plan.data_fingerprint:
        raise RunError(
            f"{run.root} holds a run on the data set {recorded.get('data_source')}, and that is not"
            f" what {plan.data_source} holds now: images would come twice or never",
            hint="go on with the data set of before, or give the new run its own folder with"
            " --name NAME",
        )


def find_copies(plan: Plan, run: RunDir) -> RemoteFolder | None:
    """Where the run is copied to; None: nowhere."""
    url = plan.recipe.checkpoint.copy_to
    return None if url is None else RemoteFolder(f"{url.rstrip('/')}/{run.name}")


def read_skips(run: RunDir) -> tuple[Skip, ...]:
    """The images that a run leaves out.

    Raises:
        RunError: The file is damaged.
    """
    if not run.skips.is_file():
        return ()
    try:
        rows = json.loads(run.skips.read_text(encoding="utf-8"))["skips"]
        return tuple(Skip(int(step), int(length)) for step, length in rows)
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{run.skips} cannot be read: {error}",
            hint=f"{run.events} has the same numbers in its rows rolled_back; mend the file",
        ) from error
