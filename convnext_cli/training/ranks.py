"""Ranks held against each other: the one that all wait for, and weights that should be equal.

Each rank times what it does alone: its wait for data, and its forward passes (by events of the
device on a GPU). The backward pass is left out, for there the ranks wait for each other. The times
travel with `Agreement`; here rank 0 looks at the medians of a window.
"""

import platform
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed, nn

from convnext_cli.errors import DataError, Diverged, Hung, RecipeError, RunError, quote_path
from convnext_cli.plan.resolve import Plan
from convnext_cli.recipe.files import flatten_keys, render_value
from convnext_cli.runs.layout import RunDir
from convnext_cli.runs.lock import is_free
from convnext_cli.runs.record import write_event
from convnext_cli.training.agreement import Agreement, RankTime
from convnext_cli.training.task import as_task
from convnext_cli.training.throughput import DataClock

_OF_A_NODE = ("data.path", "data.val_path", "data.workers", "data.cache_dir", "data.cache_gb")
"""Keys of a recipe that may differ between ranks: where the same images lie, and how they come."""
_WINDOW_STEPS = 50
_SLOW = 1.5
"""Times the median of the ranks."""
_LEAST_SECONDS = 0.02
"""A difference below this is nobody's trouble."""


@dataclass(frozen=True)
class RankStart:
    """What one rank begins with, as it found it on its node."""

    host: str
    step: int
    fingerprint: str | None
    """Of the data set."""
    recipe: Mapping[str, object]
    """`section.key` to value."""
    unlocked: bool = False
    """Whether nobody holds the run's folder on its node, though rank 0 does on its own."""


class SameStart(pl.Callback):
    """Holds what the ranks begin with against rank 0's, before any of them loads a checkpoint."""

    def __init__(self, run: RunDir, plan: Plan, *, step: int) -> None:
        self.run = run
        keys = flatten_keys(plan.recipe.model_dump(mode="json"))
        recipe = {key: value for key, value in keys.items() if key not in _OF_A_NODE}
        self.own = RankStart(platform.node(), step, plan.data_fingerprint, recipe)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compare; on every rank alike.

        Raises:
            UserError: As `check_same_start`.
        """
        del pl_module, stage
        starts = [self.own] * trainer.world_size
        if trainer.world_size > 1:
            # rank 0 took the lock before it came to meet the others
            unlocked = trainer.global_rank != 0 and is_free(self.run.lock)
            distributed.all_gather_object(starts, replace(self.own, unlocked=unlocked))
        check_same_start(starts, run=self.run)


def check_same_start(starts: Sequence[RankStart], *, run: RunDir) -> None:
    """Refuse ranks that would not train one model together.

    Raises:
        RecipeError: A rank was started with another recipe than rank 0.
        DataError: It has another data set.
        RunError: The run's folder is not shared.
        Hung: They found different checkpoints.
    """
    first = starts[0]
    for rank, own in enumerate(starts):
        of = f"rank {rank} on {own.host}"
        for key, value in own.recipe.items():
            if value != first.recipe[key]:
                raise RecipeError(
                    f"{of} has {key}={render_value(value)}, and rank 0 on {first.host} has"
                    f" {render_value(first.recipe[key])}",
                    hint="start every rank with the same command",
                )
        if own.fingerprint != first.fingerprint:
            raise DataError(
                f"{of} has another data set than rank 0 on {first.host}: {own.fingerprint}, not"
                f" {first.fingerprint}",
                hint="copy it to every node anew, or name one on a file system that nodes share:"
                " --data DIR",
            )
        if own.unlocked:
            raise RunError(
                f"{of} does not see that rank 0 on {first.host} has locked {run.root}, which is not"
                " the same folder on both",
                hint=f"put {first.host}'s on a file system that all nodes share, and name that:"
                " --runs-dir DIR",
            )
        if own.step != first.step:  # some nodes may see a new file of a shared disk later
            raise Hung(
                f"{of} would go on from step {own.step}, and rank 0 on {first.host} from step"
                f" {first.step}: they found different checkpoints whole",
                hint="run the same command again; if that does not help, compare what each node"
                f" sees: convnext checkpoints verify {quote_path(run.root)}",
            )


class RankTimer(pl.Callback):
    """Times of this rank, told to `Agreement`; stands before it."""

    def __init__(self, clock: DataClock) -> None:
        self.clock = clock
        self.own = RankTime(0.0, 0.0)
        """Of the newest step whose times are known."""
        self._waited = 0.0
        self._forward_seconds = 0.0
        self._started = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._under_way: deque[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = deque()
        """Events of the passes of steps that the device is not known to be done with."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object
    ) -> None:
        """A forward pass begins."""
        del trainer
        self._started = time.perf_counter()
        if pl_module.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            self._events.append((begin, end))

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """It ends."""
        del trainer, loss
        self._forward_seconds += time.perf_counter() - self._started
        if pl_module.device.type == "cuda":
            self._events[-1][1].record()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object, **__: object
    ) -> None:
        """Add up a step."""
        del trainer
        if not as_task(pl_module).at_step_end:
            return
        forward = self._forward_seconds
        if self._events:
            # Not waited for: the newest step that the device is done with stands in for this one.
            self._under_way.append(self._events)
            self._events = []
            forward = self.own.forward_seconds
            while self._under_way and self._under_way[0][-1][1].query():  # type: ignore[no-untyped-call]
                passes = self._under_way.popleft()
                forward = sum(begin.elapsed_time(end) for begin, end in passes) / 1e3
        self.own = RankTime(self.clock.waited_seconds - self._waited, forward)
        self._waited = self.clock.waited_seconds
        self._forward_seconds = 0.0


class Stragglers(pl.Callback):
    """Names a rank that is slower than the others, once for as long as it is."""

    def __init__(self, run: RunDir, agreement: Agreement, *, say: Callable[[str], None]) -> None:
        self.run = run
        self.agreement = agreement
        self.say = say
        self._hosts: list[str] = []
        self._window: deque[tuple[RankTime, ...]] = deque(maxlen=_WINDOW_STEPS)
        self._named: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Learn where each rank runs."""
        del pl_module
        self._hosts = [""] * trainer.world_size
        if trainer.world_size > 1:
            distributed.all_gather_object(self._hosts, platform.node())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object, **__: object
    ) -> None:
        """Look at the window, on rank 0."""
        task = as_task(pl_module)
        times = self.agreement.wishes.times
        if not (trainer.is_global_zero and task.at_step_end and len(times) > 1):
            return
        self._window.append(times)
        if len(self._window) < _WINDOW_STEPS:
            return
        found = find_straggler(list(self._window))
        self._window.clear()
        if found is None:
            self._named = None
        elif found[0] != self._named:
            self._named = found[0]
            self._tell(*found, step=task.step)

    def _tell(self, rank: int, own: RankTime, others: RankTime, *, step: int) -> None:
        host = self._hosts[rank]
        what = "waits for data" if own.data_seconds - others.data_seconds > (
            own.forward_seconds - others.forward_seconds
        ) else "computes"  # fmt: skip
        self.say(
            f"all ranks wait for rank {rank} on {host}, which {what}: forward"
            f" {own.forward_seconds * 1e3:.0f} ms and data {own.data_seconds * 1e3:.0f} ms a step,"
            f" where the median rank has {others.forward_seconds * 1e3:.0f} and"
            f" {others.data_seconds * 1e3:.0f}"
        )
        write_event(
            self.run.events,
            "straggler",
            step=step,
            rank=rank,
            host=host,
            forward_seconds=round(own.forward_seconds, 4),
            data_seconds=round(own.data_seconds, 4),
            median_forward_seconds=round(others.forward_seconds, 4),
            median_data_seconds=round(others.data_seconds, 4),
        )


def find_straggler(
    steps: list[tuple[RankTime, ...]],
) -> tuple[int, RankTime, RankTime] | None:
    """(the slowest rank, its times, those of the median rank) where it holds the others up.

    Args:
        steps: The times of all ranks, by step; medians are taken over the steps.
    """
    ranks = [
        RankTime(
            statistics.median(times[rank].data_seconds for times in steps),
            statistics.median(times[rank].forward_seconds for times in steps),
        )
        for rank in range(len(steps[0]))
    ]
    totals = [own.data_seconds + own.forward_seconds for own in ranks]
    slowest = max(range(len(ranks)), key=totals.__getitem__)
    # Of the others, so that of two ranks one can stand out.
    others = [own for rank, own in enumerate(ranks) if rank != slowest]
    median = RankTime(
        statistics.median(own.data_seconds for own in others),
        statistics.median(own.forward_seconds for own in others),
    )
    usual = median.data_seconds + median.forward_seconds
    if totals[slowest] < max(_SLOW * usual, usual + _LEAST_SECONDS):
        return None
    return slowest, ranks[slowest], median


class SameWeights(pl.Callback):
    """Before each validation, holds the weights of all ranks against each other.

    Equal gradients and equal updates give weights that are equal to the bit on every rank; memory
    that flips, or one that was overwritten, does not. For strategies with whole weights on each
    rank.
    """

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare.

        Raises:
            Diverged: A rank differs from most.
        """
        if trainer.world_size == 1:
            return
        task = as_task(pl_module)
        own = checksum(task.model)
        parts = [torch.empty_like(own) for _ in range(trainer.world_size)]
        distributed.all_gather(parts, own)
        sums = [tuple(part.tolist()) for part in parts]
        most, _ = Counter(sums).most_common(1)[0]
        odd = [rank for rank, value in enumerate(sums) if value != most]
        if odd:
            named = ", ".join(f"{rank}" for rank in odd)
            raise Diverged(
                f"after step {task.step} the weights of rank {named} are not those of the other"
                f" {len(sums) - len(odd)} ranks",
                hint="its device or memory is at fault: run the same command without that node;"
                " the newest checkpoint is of before",
            )


def checksum(network: nn.Module) -> Tensor:
    """Two int64 that change with any bit of any parameter.

    Sums of the bits as whole numbers wrap and do not round, so the order of adding does not matter.
    """
    weights = [weight.detach() for weight in network.parameters()]
    sums = torch.stack([w.reshape(-1).view(torch.int32).sum(dtype=torch.int64) for w in weights])
    places = torch.arange(1, len(weights) + 1, device=sums.device)
    return torch.stack([sums.sum(), (sums * places).sum()])
