"""How an attempt of a run ends, and what is left to do after the last."""

import gc
import io
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from convnext_cli.errors import CheckpointError, DataError, DeviceError
from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import make_plan
from convnext_cli.recipe.files import load_recipe
from convnext_cli.runs.compare import read_recipe_keys, summarise_run
from convnext_cli.runs.interrupt import StopRequest
from convnext_cli.runs.layout import RunDir, checkpoint_step
from convnext_cli.runs.record import write_json
from convnext_cli.training import fit as fit_module
from convnext_cli.training.checkpoint import write_checkpoint
from convnext_cli.training.fit import _run_trainer, _write_run, fit, make_card
from convnext_cli.training.guard import RolledBack
from convnext_cli.training.progress import ProgressDisplay
from convnext_cli.training.start import Start


def test_a_run_that_was_killed_after_its_last_save_gets_its_names_and_its_end(tmp_path):
    recipe = load_recipe("in1k_tiny", ["schedule.length=8st", "schedule.warmup=null"])
    plan = make_plan(recipe, Cluster(device="cpu"), name="mine")
    run = RunDir(tmp_path / "mine")
    for step in (4, 8):
        known = {"best_step": step, "best_ema_step": 4}
        content = {
            "w": torch.zeros(3),
            "convnext": {"step": step},
            "callbacks": {"Checkpoints": known},
        }
        write_checkpoint(content, run.checkpoint(step), world_size=1)
    write_json(run.plan, {"total_steps": 8})
    for name in run.links:
        name.symlink_to(run.checkpoint(4).name)  # the kill came before they were pointed to step 8

    steps = fit(
        plan,
        run,
        start=Start(run.checkpoint(8), 8),
        request=StopRequest(),
        console=Console(file=io.StringIO()),
    )

    assert steps == 8
    assert [checkpoint_step(name.resolve()) for name in run.links] == [8, 8, 4]
    assert summarise_run(run).state == "finished"


def test_a_run_that_lost_too_many_images_in_its_last_step_is_not_finished_by_a_second_start(
    tmp_path,
):
    run, said = RunDir(tmp_path / "mine"), io.StringIO()
    lost = {"reasons": {f"{number}": "cut" for number in range(200)}}
    content = {
        "w": torch.zeros(3),
        "convnext": {"step": 8},
        "callbacks": {"Checkpoints": {"best_step": 8, "best_ema_step": 8}, "Quarantine": lost},
    }
    write_checkpoint(content, run.checkpoint(8), world_size=1)
    write_json(run.plan, {"total_steps": 8})

    def start_again(*changes: str) -> int:
        asked = ["schedule.length=8st", "schedule.warmup=null", *changes]
        plan = make_plan(load_recipe("in1k_tiny", asked), Cluster(device="cpu"), name="mine")
        console = Console(file=said)
        start = Start(run.checkpoint(8), 8)
        return fit(plan, run, start=start, request=StopRequest(), console=console)

    with pytest.raises(DataError, match="200 of 1,281,167 training images cannot be used") as told:
        start_again()
    assert summarise_run(run).state != "finished"
    assert str(told.value.hint).endswith("goes on with data.bad_frac=0.001")

    assert start_again("data.bad_frac=0.001") == 8
    assert summarise_run(run).state == "finished"
    assert "200 images could not be used, and neighbours stood in" in said.getvalue()


def test_what_a_kill_left_of_a_start_gives_way_to_the_next(tmp_path):
    plan = make_plan(load_recipe("in1k_tiny"), Cluster(device="cpu"), name="mine")
    run = RunDir(tmp_path / "mine")
    run.checkpoints.mkdir(parents=True)
    torn = [run.root / ".plan.json.7.tmp", run.checkpoints / ".step=00000312.ckpt.7.tmp"]
    for path in (run.recipe, *torn):
        path.touch()  # opened, and killed before it was written

    _write_run(plan, run)

    assert read_recipe_keys(run)["model.name"] == "convnext_tiny"
    assert not any(path.exists() for path in torn)


def test_the_recipe_of_a_run_stays_as_it_was_asked_first(tmp_path):
    run = RunDir(tmp_path / "mine")
    for seed in (1, 2):
        plan = make_plan(load_recipe("in1k_tiny", [f"seed={seed}"]), Cluster(), name="mine")
        _write_run(plan, run)

    assert read_recipe_keys(run)["seed"] == 1


def test_a_checkpoint_of_another_model_leaves_no_run_of_the_name(tmp_path, monkeypatch):
    plan = make_plan(load_recipe("in1k_tiny"), Cluster(device="cpu"), name="mine")
    run, theirs = RunDir(tmp_path / "mine"), tmp_path / "theirs.ckpt"
    card = make_card(plan, classes=()).to_dict() | {"variant": "convnext_small", "step": 4}
    write_checkpoint({"convnext": card, "w": torch.zeros(3)}, theirs, world_size=1)
    monkeypatch.setattr(fit_module, "build_data", lambda *_, **__: SimpleNamespace(classes=()))

    with pytest.raises(CheckpointError, match="of convnext_small with 1000 classes") as told:
        fit(
            plan,
            run,
            start=Start(theirs, 4, asked=theirs),
            request=StopRequest(),
            console=Console(quiet=True),
        )

    assert "model.name=convnext_small" in told.value.hint
    assert not run.root.exists()


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ([], "batch.per_device_images=64 or compute.gradient_checkpointing=selective"),
        (
            ["batch.per_device_images=2", "compute.gradient_checkpointing=blocks"],
            "use smaller images or a device with more memory",
        ),
    ],
)
def test_a_full_device_is_told_with_what_takes_less_of_it(tmp_path, changes, hint):
    changes = [*changes, "batch.global_images=256", "optim.lr_rule=none"]
    plan = make_plan(load_recipe("in1k_tiny", changes), Cluster(device="cpu"), name="full")
    told = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.19 GiB"

    def run_out(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(told)

    run = RunDir(tmp_path)
    with pytest.raises(DeviceError, match="no room for step 5, in passes of") as caught:
        _run_trainer(
            SimpleNamespace(fit=run_out),
            SimpleNamespace(step=4),
            None,
            start=Start(None, 0),
            run=run,
            plan=plan,
        )

    assert str(caught.value).endswith("(CUDA out of memory. Tried to allocate 2.00 GiB.)")
    assert caught.value.hint.endswith(hint)
    assert json.loads(run.events.read_text())["event"] == "stopped"


def test_ctrl_c_twice_is_no_bug(tmp_path):
    plan = make_plan(load_recipe("in1k_tiny"), Cluster(device="cpu"), name="mine")

    def interrupt(*_: object, **__: object) -> None:
        end = SystemExit(1)  # as Lightning does
        end.__context__ = KeyboardInterrupt()
        raise end

    run, start = RunDir(tmp_path), Start(None, 0)
    trainer, task = SimpleNamespace(fit=interrupt), SimpleNamespace(step=4)
    with pytest.raises(KeyboardInterrupt):
        _run_trainer(trainer, task, None, start=start, run=run, plan=plan)

    assert json.loads(run.events.read_text())["why"] == "KeyboardInterrupt"


def test_a_run_that_goes_back_leaves_nothing_of_the_attempt_before_in_memory(tmp_path, monkeypatch):
    plan = make_plan(load_recipe("in1k_tiny"), Cluster(device="cpu"), name="back")
    networks: list[weakref.ref[torch.nn.Module]] = []

    def attempt(*_: object, display: ProgressDisplay, **__: object) -> int:
        if networks:
            return 3 if networks[0]() is None else -1
        network = torch.nn.Linear(1, 1)
        network.forward = network.forward  # a cycle, as of one that is compiled or recorded
        display.log = network.forward  # as Lightning does with methods of its module
        networks.append(weakref.ref(network))
        raise RolledBack("the gradient is not finite")

    monkeypatch.setattr(fit_module, "_attempt", attempt)
    monkeypatch.setattr(fit_module, "find_start", lambda *_, **__: Start(None, 0))
    gc.disable()  # it might come by itself
    try:
        taken = fit(
            plan,
            RunDir(tmp_path),
            start=Start(None, 0),
            request=StopRequest(),
            console=Console(quiet=True),
        )
    finally:
        gc.enable()

    assert taken == 3
