"""`fit`: one attempt of a run, from the run directory to the last validation.

```
fit    builds data and model and loads weights; then makes the run's folder; then trains, from an
       older checkpoint again where the run goes back
```
"""

import gc
import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from rich.console import Console
from torch import nn

from convnext_cli.catalog.models import find_variant
from convnext_cli.data.build import ImageData, build_batch_mix, build_data
from convnext_cli.data.reader import from_worker, is_lost_worker, make_lost_worker_error
from convnext_cli.data.stream import WEAKER_PROMISE
from convnext_cli.errors import CheckpointError, DeviceError, UserError
from convnext_cli.models.build import build_model
from convnext_cli.models.fp8 import use_fp8
from convnext_cli.models.weights import (
    ModelCard,
    count_non_finite,
    load_into,
    read_content,
    read_weights,
)
from convnext_cli.optim.ema import make_averaged
from convnext_cli.plan.resolve import Plan
from convnext_cli.recipe.files import render_recipe
from convnext_cli.runs.compare import last_step, summarise_run
from convnext_cli.runs.copies import Copier
from convnext_cli.runs.interrupt import StopRequest
from convnext_cli.runs.layout import RunDir
from convnext_cli.runs.manifest import manifest_path
from convnext_cli.runs.record import (
    record_environment,
    write_event,
    write_json,
    writing_to,
    written_whole,
)
from convnext_cli.training.agreement import Agreement
from convnext_cli.training.build import build_trainer
from convnext_cli.training.checkpoint import (
    BackgroundWriter,
    Checkpoints,
    mend_names,
    read_best_steps,
)
from convnext_cli.training.devices import quiet_lightning
from convnext_cli.training.guard import FiniteGuard, RolledBack
from convnext_cli.training.kernels import ChooseKernels
from convnext_cli.training.loading import find_checkpoint
from convnext_cli.training.preempt import StopOnRequest
from convnext_cli.training.progress import ProgressDisplay
from convnext_cli.training.quarantine import (
    Quarantine,
    find_too_many,
    read_reasons,
    tell_lost,
)
from convnext_cli.training.ranks import RankTimer, SameStart, SameWeights, Stragglers
from convnext_cli.training.recorder import Recorder
from convnext_cli.training.start import Start, find_copies, find_start, read_skips
from convnext_cli.training.strategy import WHOLE_WEIGHTS, compile_network
from convnext_cli.training.task import Classifier
from convnext_cli.training.throughput import DataClock
from convnext_cli.training.trackers import build_senders
from convnext_cli.training.watch import HangWatch, is_lost_peer, make_lost_peer_error


def _write_run(plan: Plan, run: RunDir) -> None:
    """Make a run's folder, now that everything it needs is there.

    Raises:
        StorageError: The folder cannot be written.
    """
    with writing_to(run.root):
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        for path in run.list_torn():  # each may be as large as a checkpoint
            path.unlink()
        if not run.is_run():  # a start that was killed here may have left another's
            with written_whole(run.recipe) as beside:
                beside.write_text(render_recipe(plan.recipe), encoding="utf-8")
        write_json(run.plan, plan.to_json())
        write_json(run.environment, record_environment())


def fit(plan: Plan, run: RunDir, *, start: Start, request: StopRequest, console: Console) -> int:
    """Train to the end of the schedule, or go on from a checkpoint; returns the steps taken.

    Raises:
        UserError: Data, weights or checkpoint do not fit, or a device is full (see `errors`).
        Stopped: A signal came, or the job's time is over; a checkpoint is written.
        Diverged: Gradients are not finite, again and again.
        Hung: Another rank or a loader process was lost.
    """
    quiet_lightning()
    display = ProgressDisplay(plan, console=console, log=run.log)
    told: str | None = None
    while start.step < plan.total_steps or start.checkpoint is None:
        try:
            return _attempt(
                plan, run, start=start, request=request, display=display, back=told is not None
            )
        except RolledBack as back:
            start, told = find_start(plan, run, resume="auto"), str(back)
            if plan.cluster.rank == 0:
                display.say(f"going back to step {start.step}: {told}")
        # The next attempt needs the device's memory, of which this one's is held in cycles, and by
        # its callbacks, to which Lightning gives methods of the module.
        display = ProgressDisplay(plan, console=console, log=run.log)
        gc.collect()
    if plan.cluster.rank == 0:
        _make_up_for_end(plan, run, start=start, say=display.say)
    return start.step


def _make_up_for_end(plan: Plan, run: RunDir, *, start: Start, say: Callable[[str], None]) -> None:
    """Do what an attempt that was killed after the last save left undone: names, end, copies.

    Raises:
        DataError: The run lost more images than it may, and ended for that.
    """
    if summarise_run(run).state != "finished":
        assert start.checkpoint is not None  # of the last step
        mend_names(run, start.step, best_steps=read_best_steps(run, start.checkpoint))
        lost = read_reasons(start.checkpoint)
        if (error := find_too_many(lost, run=run, plan=plan)) is not None:
            raise error
        tell_lost(lost, run=run, say=say)
        _record(run, plan, event="resumed", step=start.step, lost_steps=0)
        _record(run, plan, event="finished", step=start.step)
    copier = _build_copier(run, plan, say=say)
    if copier is not None:
        copier.start()
        copier.finish()


def _attempt(
    plan: Plan,
    run: RunDir,
    *,
    start: Start,
    request: StopRequest,
    display: ProgressDisplay,
    back: bool,
) -> int:
    data = build_data(plan, first_step=start.step, skips=read_skips(run))
    model = build_model(plan)
    told = f"run: {run.root}"
    if start.checkpoint is None and plan.recipe.init.weights is not None:
        told += f"; {load_start_weights(model, plan, classes=data.classes)}"
    task = Classifier(
        model,
        averaged=None if plan.recipe.ema.decay is None else make_averaged(model),
        plan=plan,
        mix=build_batch_mix(plan),
        card=make_card(plan, classes=data.classes),
    )
    if start.checkpoint is not None:
        task.check_fits(read_content(start.checkpoint)[0])
        told += f", going on from {start.checkpoint.name} at step {start.step}"
    if plan.cluster.rank == 0:
        _write_run(plan, run)
        for state in start.damaged:
            display.say(f"passed over {state.path.name}: {state.problem}")
        display.say(told)
        if plan.recipe.data.mode == "stream":
            display.say(WEAKER_PROMISE)
    if plan.fp8_layers:
        use_fp8(model)  # after the averages are copied from it, which stay plain
    if plan.channels_last:
        task.to_channels_last()
    writer = BackgroundWriter(run, plan, copier=_build_copier(run, plan, say=display.say))
    clock = DataClock()
    timer = RankTimer(clock)
    agreement = Agreement(request, writer, timer=timer)
    checkpoints = Checkpoints(run, plan, writer=writer, agreement=agreement)
    quarantine = Quarantine(run, plan, checkpoints=checkpoints, say=display.say)
    senders = build_senders(plan, run, first_step=start.step, say=display.say)
    recorder = Recorder(
        run, plan, clock=clock, quarantine=quarantine, senders=senders, show=display.show
    )
    watch = HangWatch(run, plan, request=request)
    trainer = build_trainer(
        plan,
        # At the end of a step: time, agree, look whether it is good, write, save, stop.
        callbacks=[
            SameStart(run, plan, step=start.step),
            ChooseKernels(plan, say=display.say),
            timer,
            agreement,
            *([SameWeights()] if plan.recipe.compute.strategy in WHOLE_WEIGHTS else []),
            Stragglers(run, agreement, say=display.say),
            watch,
            FiniteGuard(run, plan, writer=writer),
            recorder,
            quarantine,
            checkpoints,
            StopOnRequest(agreement, checkpoints, plan),
            display,
        ],
        clock=clock,
        checkpoint_io=writer,
    )
    if plan.compile:
        compile_network(
            model,
            sizes=len(plan.train_sizes),
            cuda_graphs=plan.cuda_graphs,
            passes=plan.accumulate_steps,
        )
    if plan.cluster.rank == 0 and start.abandoned:
        _set_aside(run, start.abandoned)
        names = ", ".join(path.name for path in start.abandoned)
        display.say(f"newer checkpoints are set aside in {run.abandoned}: {names}")
    if start.checkpoint is None and not back:
        _record(run, plan, event="started", step=start.step)
    else:
        lost = max(0, last_step(run) - start.step)
        # told when newer ones are out of the way: what is newer from now on was made since
        asked = {} if start.asked is None else {"asked": str(start.asked.absolute())}
        _record(run, plan, event="resumed", step=start.step, lost_steps=lost, **asked)
    # of this attempt, and so after its start: before it, the wait would be time of the last one
    for state in start.damaged:
        _record(run, plan, event="damaged", step=start.step, file=state.path.name)
    if start.abandoned:
        files = [path.name for path in start.abandoned]
        _record(run, plan, event="abandoned", step=start.step, files=files)
    watch.start()
    try:
        _run_trainer(trainer, task, data, start=start, run=run, plan=plan)
    finally:
        writer.teardown()  # Lightning's own call may be cut short by a second loader that is lost
        watch.stop()  # no step is waited for any more, and copies may take longer than one
        for sender in senders:
            sender.finish(done=task.step == plan.total_steps)
        writer.finish_copies()
    return task.step


def _set_aside(run: RunDir, checkpoints: Sequence[Path]) -> None:
    """Take checkpoints from where a start looks for them; the user asked for an older one."""
    with writing_to(run.abandoned):
        run.abandoned.mkdir(exist_ok=True)
        for path in checkpoints:
            for file in (manifest_path(path), path):  # without the first, the second does not count
                if file.exists():
                    file.replace(run.abandoned / file.name)


def _build_copier(run: RunDir, plan: Plan, *, say: Callable[[str], None]) -> Copier | None:
    copies = find_copies(plan, run)
    if copies is None or plan.cluster.rank != 0:
        return None
    return Copier(run, copies, say=say)


def _run_trainer(
    trainer: pl.Trainer,
    task: Classifier,
    data: ImageData,
    *,
    start: Start,
    run: RunDir,
    plan: Plan,
) -> None:
    try:
        trainer.fit(task, datamodule=data, ckpt_path=start.checkpoint, weights_only=True)
    except BaseException as error:
        if is_lost_worker(error):
            # torch's handler raises for each further one, in whatever runs then.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # of Ctrl-C twice Lightning makes exit code 1, which is that of a bug
        twice = isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
        why = KeyboardInterrupt if twice else type(error)
        _record(run, plan, event="stopped", step=task.step, why=why.__name__)
        if twice:
            raise KeyboardInterrupt from error
        if isinstance(error, RolledBack):
            # Lightning ends nothing after an exception: a watch of this attempt would end the next.
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                callback.teardown(trainer, task, "fit")
            data.teardown("fit")
        if isinstance(error, UserError) and (told := from_worker(error)) is not error:
            raise told from error
        if is_lost_worker(error):
            raise make_lost_worker_error(
                error,
                when=f"after step {task.step}",
                hint="the same command goes on from the last checkpoint; if it happens again, use"
                f" fewer: data.workers={max(0, plan.workers // 2)}",
            ) from error
        if is_lost_peer(error):
            raise make_lost_peer_error(
                error,
                when=f"after step {task.step}",
                hint="the same command goes on from the last checkpoint",
            ) from error
        if isinstance(error, torch.OutOfMemoryError):
            raise _make_no_room_error(error, plan, step=task.step) from error
        raise
    _record(run, plan, event="finished", step=task.step)


def _make_no_room_error(error: torch.OutOfMemoryError, plan: Plan, *, step: int) -> DeviceError:
    """What is told of a device that is full, and what makes the same run take less of it."""
    fewer = plan.per_device_images // 4 * 2
    smaller = [f"batch.per_device_images={fewer}"] if fewer else []
    if plan.recipe.compute.gradient_checkpointing == "none" and plan.activation_bytes:
        smaller.append("compute.gradient_checkpointing=selective")
    return DeviceError(
        f"the device of rank {plan.cluster.rank} has no room for step {step + 1}, in passes of"
        f" {plan.per_device_images} images ({str(error).split(' GPU ')[0]})",
        hint=f"the same command goes on with {' or '.join(smaller)}"
        if smaller
        else "use smaller images or a device with more memory",
    )


def _record(run: RunDir, plan: Plan, *, event: str, step: int, **more: object) -> None:
    if plan.cluster.rank == 0:
        write_event(run.events, event, step=step, **more)


def make_card(plan: Plan, *, classes: tuple[str, ...]) -> ModelCard:
    """What the weights of a plan are, for everyone who reads them later."""
    recipe = plan.recipe
    return ModelCard(
        variant=recipe.model.name,
        num_classes=plan.num_classes,
        image_px=recipe.data.image_px,
        classes=classes,
        mean=recipe.data.mean,
        std=recipe.data.std,
        interpolation=recipe.augment.interpolation,
        crop=recipe.evaluate.crop,
        crop_frac=recipe.evaluate.crop_frac,
    )


def load_start_weights(model: nn.Module, plan: Plan, *, classes: tuple[str, ...]) -> str:
    """Load `init.weights` into a fresh model; says what was taken and what was not.

    Raises:
        CheckpointError: The file cannot be read, is of another architecture, or holds NaN.
        RunError: It is a run, which has no checkpoint yet.
    """
    init = plan.recipe.init
    assert init.weights is not None
    if find_variant(plan.recipe.model.name).family == "timm":
        raise CheckpointError(
            f"init.weights: start weights are read for ConvNeXt models, not for"
            f" {plan.recipe.model.name}",
            hint="leave init.weights out, or train a ConvNeXt",
        )
    path = find_checkpoint(Path(init.weights), prefer=init.source)
    weights = read_weights(path, prefer=init.source)
    report = load_into(model, weights, head=init.head, target_classes=classes)
    if bad := count_non_finite(model.state_dict()):
        raise CheckpointError(
            f"{weights.path}: {bad:,} of its values are NaN or infinite, so nothing is learned from"
            " it",
            hint="use an earlier checkpoint of the run that it comes from",
        )
    data, card = plan.recipe.data, weights.card
    if card is not None and (card.mean, card.std) != (data.mean, data.std):
        report += (
            "; it knows images normalised with"
            f" data.mean={json.dumps(card.mean)} data.std={json.dumps(card.std)}, not as here"
        )
    return report
