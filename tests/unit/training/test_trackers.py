"""What a run does to wandb and MLflow, and what they can do to it.

The loggers are Lightning's own; both packages are small fakes, for neither need be installed.
"""

import sys
from importlib.machinery import ModuleSpec
from threading import Event
from types import ModuleType, SimpleNamespace

import pytest

from convnext_cli.errors import UserError
from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import Plan, make_plan
from convnext_cli.recipe.files import load_recipe
from convnext_cli.runs.layout import RunDir
from convnext_cli.training import trackers
from convnext_cli.training.trackers import Sender, build_senders

TRACKERS = ("wandb", "mlflow")


class Server:
    """What a tracker's server knows: steps of rows by run."""

    def __init__(self) -> None:
        self.steps: dict[str, list[int]] = {}
        self.status: dict[str, str] = {}
        self.deleted: set[str] = set()
        self.reachable = True

    def answer(self) -> None:
        if not self.reachable:
            raise ConnectionError("https://me:s3cr3t@host\nrefused")


class MlflowException(Exception):  # noqa: N818  # their name
    error_code = "RESOURCE_DOES_NOT_EXIST"


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **content: object) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)


def fake_wandb(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    def init(**asked: str) -> SimpleNamespace:
        server.answer()
        assert asked["resume"] == "allow"
        run_id = asked["id"]
        if run_id in server.deleted:
            raise ConnectionError(f"HTTP 409: run {run_id} was previously created and deleted")
        steps = server.steps.setdefault(run_id, [])
        server.status[run_id] = "RUNNING"
        return SimpleNamespace(
            id=run_id, log=lambda values: steps.append(values["trainer/global_step"])
        )

    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    monkeypatch.delenv("WANDB_FINISH_TIMEOUT", raising=False)
    fake_module(monkeypatch, "wandb", run=None, init=init)
    fake_module(monkeypatch, "wandb.sdk")
    fake_module(monkeypatch, "wandb.sdk.lib", RunDisabled=type("RunDisabled", (), {}))
    fake_module(monkeypatch, "wandb.wandb_run", Run=type("Run", (), {}))


def fake_mlflow(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    class Client:
        def __init__(self, uri: str) -> None:
            assert uri.startswith("sqlite:///")

        def get_experiment_by_name(self, name: str) -> SimpleNamespace:
            assert name == "convnext"
            return SimpleNamespace(experiment_id="1", lifecycle_stage="active")

        def create_run(self, **_: object) -> SimpleNamespace:
            server.answer()
            run_id = f"run{len(server.steps)}"
            server.steps[run_id], server.status[run_id] = [], "RUNNING"
            return self.get_run(run_id)

        def get_run(self, run_id: str) -> SimpleNamespace:
            server.answer()
            if run_id not in server.steps:
                raise MlflowException
            stage = "deleted" if run_id in server.deleted else "active"
            return SimpleNamespace(
                info=SimpleNamespace(run_id=run_id, experiment_id="1", lifecycle_stage=stage)
            )

        def update_run(self, run_id: str, status: str) -> None:
            server.status[run_id] = status

        def set_terminated(self, run_id: str, status: str) -> None:
            server.status[run_id] = status

        def log_batch(self, run_id: str, metrics: list[SimpleNamespace]) -> None:
            server.answer()
            assert run_id not in server.deleted
            server.steps[run_id].append(metrics[0].step)

    monkeypatch.setattr("lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE", True)
    tracking = {"is_tracking_uri_set": lambda: False, "set_tracking_uri": lambda _: None}
    fake_module(monkeypatch, "mlflow", MlflowClient=Client, **tracking)
    fake_module(monkeypatch, "mlflow.entities", Metric=SimpleNamespace)
    fake_module(monkeypatch, "mlflow.exceptions", MlflowException=MlflowException)
    fake_module(monkeypatch, "mlflow.utils")
    fake_module(monkeypatch, "mlflow.utils.mlflow_tags", MLFLOW_RUN_NAME="name")
    fake_module(monkeypatch, "mlflow.tracking", MlflowClient=Client)
    fake_module(monkeypatch, "mlflow.tracking.context", resolve_tags=lambda tags: tags)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()
    fake_wandb(monkeypatch, made)
    fake_mlflow(monkeypatch, made)
    return made


def plan_of(tracker: str, *, rank: int = 0) -> Plan:
    recipe = load_recipe("in1k_tiny", [f"log.trackers=[csv, {tracker}]"])
    return make_plan(recipe, Cluster(device="cpu", devices_per_node=2, rank=rank), name="same name")


def attempt(tracker: str, folder: object, *, steps: list[int], done: bool = True) -> list[str]:
    """One attempt of the run in a folder; what was said."""
    told: list[str] = []
    (sender,) = build_senders(
        plan_of(tracker), RunDir(folder), first_step=steps[0], say=told.append
    )
    sender.start()
    for step in steps:
        sender.send({"train/loss": 1.0}, step=step)
    sender.finish(done=done)
    return told


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_run_is_one_in_its_tracker_over_all_attempts_and_no_other_folder_shares_it(
    server, tmp_path, tracker
):
    mine, theirs = tmp_path / "mine" / "tiny", tmp_path / "theirs" / "tiny"

    told = attempt(tracker, mine, steps=[1, 2], done=False)
    told += attempt(tracker, theirs, steps=[1])
    told += attempt(tracker, mine, steps=[2, 3])

    assert list(server.steps.values()) == [[1, 2, 2, 3], [1]]
    assert told == []


def test_a_run_that_goes_on_is_running_in_mlflow_until_it_is_done(server, tmp_path):
    plan, run, seen = plan_of("mlflow"), RunDir(tmp_path), []
    for done in (False, True):
        (sender,) = build_senders(plan, run, first_step=0, say=pytest.fail)
        sender.start()
        seen.append(server.status["run0"])
        sender.finish(done=done)
        seen.append(server.status["run0"])

    assert seen == ["RUNNING", "FAILED", "RUNNING", "FINISHED"]


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_run_that_was_deleted_in_its_tracker_begins_another_there_and_says_so(
    server, tmp_path, tracker
):
    attempt(tracker, tmp_path, steps=[1], done=False)
    server.deleted.update(server.steps)

    (told,) = attempt(tracker, tmp_path, steps=[2], done=False)
    again = attempt(tracker, tmp_path, steps=[3])

    assert "another begins" in told
    assert again == []
    assert list(server.steps.values()) == [[1], [2, 3]]


def test_a_server_of_mlflow_that_never_heard_of_a_run_gets_another(server, tmp_path):
    attempt("mlflow", tmp_path, steps=[1])
    server.steps = {"of others": []}

    (told,) = attempt("mlflow", tmp_path, steps=[2])

    assert "has no run run0" in told
    assert server.steps == {"of others": [], "run1": [2]}


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_server_that_is_away_for_an_attempt_ends_nothing_and_keeps_its_run(
    server, tmp_path, tracker
):
    attempt(tracker, tmp_path, steps=[1], done=False)
    server.reachable = False
    (told,) = attempt(tracker, tmp_path, steps=[2], done=False)
    server.reachable = True
    attempt(tracker, tmp_path, steps=[3])

    assert told == (
        f"log.trackers: {tracker}: https://<redacted>@host refused; the run goes on without"
        " it, and metrics.jsonl has every row"
    )
    assert list(server.steps.values()) == [[1, 3]]


def test_rows_that_a_server_refuses_are_told_once_and_later_ones_arrive():
    arrived: list[int] = []

    def log_metrics(_: object, *, step: int) -> None:
        if step in {2, 3, 5}:
            raise ConnectionError("refused")
        arrived.append(step)

    logger = SimpleNamespace(log_metrics=log_metrics, save=list, finalize=arrived.append)
    told: list[str] = []
    sender = Sender("mlflow", lambda: logger, say=told.append)
    sender.start()
    for step in range(1, 7):
        sender.send({}, step=step)
    sender.finish(done=True)

    assert arrived == [1, 4, 6, "success"]
    assert [line.split("; ")[1].split(",")[0] for line in told] == [
        "it lacks rows from step 2 on",
        "it lacks rows from step 5 on",
    ]


def test_no_training_waits_for_a_server_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(trackers, "_OPENING_SECONDS", 0.01)
    monkeypatch.setattr(trackers, "_CLOSING_SECONDS", 0.01)
    answered, told = Event(), []

    def open_logger() -> SimpleNamespace:
        answered.wait()
        raise ConnectionError("too late to tell")

    sender = Sender("mlflow", open_logger, say=told.append)
    sender.start()
    sender.send({}, step=1)
    sender.finish(done=True)
    answered.set()
    sender._thread.join()

    assert told == [
        "log.trackers: mlflow does not answer, and lacks rows; metrics.jsonl has every row"
    ]


def test_only_rank_zero_knows_trackers_but_every_rank_that_one_is_not_installed(
    server, tmp_path, monkeypatch
):
    assert build_senders(plan_of("mlflow", rank=1), RunDir(tmp_path), first_step=0, say=print) == []
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    for rank in (0, 1):
        with pytest.raises(UserError, match="wandb is not installed"):
            build_senders(plan_of("wandb", rank=rank), RunDir(tmp_path), first_step=0, say=print)
