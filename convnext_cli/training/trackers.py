"""Sends the rows of a run to its trackers; no tracker ends a run, or keeps it waiting for long.

MLflow's client asks a server that does not answer for more than six minutes, wandb's at its start
for 100 seconds and at its end for ever, so each tracker has a thread. It has one run for each run's
folder, whose id lies there. Steps that are taken again are in wandb and MLflow twice, for neither
forgets; TensorBoard's are purged.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from queue import SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING
from uuid import uuid4

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from convnext_cli.errors import UserError
from convnext_cli.plan.resolve import Plan
from convnext_cli.recipe.schema import Tracker
from convnext_cli.runs.layout import RunDir
from convnext_cli.runs.record import redact_text, written_whole

if TYPE_CHECKING:
    from mlflow import MlflowClient

_OPENING_SECONDS = 30.0
"""So that what a tracker has to say stands before the first row, where its server answers."""
_CLOSING_SECONDS = 15.0
"""A job that is preempted has little time to end."""


class Sender:
    """Gives rows to one tracker in a thread of its own.

    Args:
        tracker: Its name.
        open_logger: Makes Lightning's logger and its run; called in the thread.
        say: Tells a person what the tracker refuses.
    """

    def __init__(
        self,
        tracker: Tracker,
        open_logger: Callable[[], Logger],
        *,
        say: Callable[[str], None],
    ) -> None:
        self.tracker = tracker
        self.open_logger = open_logger
        self.say = say
        self._opened = Event()
        self._given_up = False
        self._rows: SimpleQueue[tuple[dict[str, float], int] | str] = SimpleQueue()
        # a daemon, for Python would wait at its end for a server that does not answer
        self._thread = Thread(target=self._work, name=f"tracker-{tracker}", daemon=True)

    def start(self) -> None:
        """Open the tracker's run; waits a moment for it."""
        self._thread.start()
        self._opened.wait(_OPENING_SECONDS)

    def send(self, values: Mapping[str, float], *, step: int) -> None:
        """Hand over one row; never waits."""
        if self._thread.is_alive():
            self._rows.put((dict(values), step))

    def finish(self, *, done: bool) -> None:
        """Close the tracker's run after the rows that are left; gives up after a moment."""
        if not self._thread.is_alive():
            return
        self._rows.put("success" if done else "failed")
        self._thread.join(_CLOSING_SECONDS)
        self._given_up = self._thread.is_alive()
        if self._given_up:
            self.say(
                f"log.trackers: {self.tracker} does not answer, and lacks rows; metrics.jsonl has"
                " every row"
            )

    def _work(self) -> None:
        try:
            logger = self.open_logger()
        except Exception as error:  # noqa: BLE001  # each tracker raises its own
            self._tell(error, "the run goes on without it")
            return
        finally:
            self._opened.set()
        well = True
        while not isinstance(row := self._rows.get(), str):
            values, step = row
            try:
                logger.log_metrics(values, step=step)
                logger.save()
                well = True
            except Exception as error:  # noqa: BLE001
                if well:
                    self._tell(error, f"it lacks rows from step {step} on")
                well = False
        try:
            logger.finalize(row)
        except Exception as error:  # noqa: BLE001
            self._tell(error, "its run was not closed")

    def _tell(self, error: Exception, so: str) -> None:
        if self._given_up:
            return
        why = redact_text(" ".join(str(error).split())) or type(error).__name__  # MLflow tells URLs
        self.say(f"log.trackers: {self.tracker}: {why}; {so}, and metrics.jsonl has every row")


def chosen_trackers(plan: Plan) -> tuple[Tracker, ...]:
    """The trackers of a recipe; auto: csv, and tensorboard where it is installed."""
    asked = plan.recipe.log.trackers
    if asked != "auto":
        return asked
    return ("csv", "tensorboard") if find_spec("tensorboard") else ("csv",)


def build_senders(
    plan: Plan, run: RunDir, *, first_step: int, say: Callable[[str], None]
) -> list[Sender]:
    """One for each tracker of a recipe; none on ranks that write nothing.

    Raises:
        UserError: A tracker is asked for that is not installed.
    """
    openers: dict[Tracker, Callable[[], Logger]] = {
        "tensorboard": partial(_open_tensorboard, run, first_step=first_step),
        "wandb": partial(_open_wandb, run, say=say),
        "mlflow": partial(_open_mlflow, run, say=say),
    }
    # metrics.csv is written from metrics.jsonl by the recorder
    trackers = [tracker for tracker in chosen_trackers(plan) if tracker != "csv"]
    for tracker in trackers:
        if not find_spec(tracker):
            raise UserError(
                f"log.trackers: {tracker} is not installed",
                hint="install the trackers: pip install 'convnext[trackers]'",
            )
    if plan.cluster.rank != 0:
        return []
    return [Sender(tracker, openers[tracker], say=say) for tracker in trackers]


def _open_tensorboard(run: RunDir, *, first_step: int) -> Logger:
    return TensorBoardLogger(
        run.trackers, name="", version="tensorboard", purge_step=first_step + 1
    )


def _open_wandb(run: RunDir, *, say: Callable[[str], None]) -> Logger:
    known = _read_id(run, "wandb")
    if known is not None:
        try:
            return _begin_wandb(run, known)
        except Exception as error:
            if "deleted" not in str(error):  # wandb's server has no code for it
                raise
            say(f"wandb has deleted its run {known}: another begins")
    fresh = uuid4().hex
    _write_id(run, "wandb", fresh)  # first, so that a kill leaves no run that nobody goes on with
    return _begin_wandb(run, fresh)


def _begin_wandb(run: RunDir, run_id: str) -> Logger:
    # of a process; else one whose server is gone never ends
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", f"{_CLOSING_SECONDS:.0f}")
    logger = WandbLogger(
        project="convnext", name=run.name, id=run_id, resume="allow", save_dir=run.trackers
    )
    _ = logger.experiment  # Lightning opens it when it is asked for
    return logger


def _open_mlflow(run: RunDir, *, say: Callable[[str], None]) -> Logger:
    import mlflow  # noqa: PLC0415  # may not be installed

    run.trackers.mkdir(parents=True, exist_ok=True)
    beside = f"sqlite:///{run.trackers.resolve() / 'mlflow.db'}"
    # a server that MLFLOW_TRACKING_URI names goes before a file beside the run
    uri = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else beside
    client = mlflow.MlflowClient(uri)
    known = _read_id(run, "mlflow")
    if known is not None and not _knows_run(client, known):
        say(f"mlflow has no run {known}, or has deleted it: another begins")
        known = None
    logger = MLFlowLogger(
        experiment_name="convnext", run_name=run.name, run_id=known, tracking_uri=uri
    )
    assert logger.run_id is not None  # Lightning opens it when it is asked for
    if known is None:
        _write_id(run, "mlflow", logger.run_id)
    else:
        client.update_run(known, status="RUNNING")  # the attempt before has closed it
    return logger


def _knows_run(client: "MlflowClient", run_id: str) -> bool:
    from mlflow.exceptions import MlflowException  # noqa: PLC0415  # may not be installed

    try:
        stage: str = client.get_run(run_id).info.lifecycle_stage
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return stage == "active"


def _read_id(run: RunDir, tracker: Tracker) -> str | None:
    path = run.tracker_id(tracker)
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _write_id(run: RunDir, tracker: Tracker, run_id: str) -> None:
    path = run.tracker_id(tracker)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as beside:
        beside.write_text(run_id + "\n", encoding="utf-8")
