"""Where an attempt begins."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from convnext_cli.data.order import ORDER_VERSION
from convnext_cli.errors import CheckpointError, RunError
from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import Plan, make_plan
from convnext_cli.recipe.files import load_recipe, render_recipe
from convnext_cli.runs.layout import RunDir
from convnext_cli.runs.record import write_event, write_json
from convnext_cli.training.checkpoint import write_checkpoint
from convnext_cli.training.start import find_start


@pytest.fixture
def plan() -> Plan:
    plan = make_plan(load_recipe("in1k_tiny"), Cluster(device="cpu"), name="mine")
    return replace(plan, data_fingerprint="of photos")


def write(path: Path, **images: object) -> Path:
    torch.save({"convnext": {"step": 3}, **({"IndexedData": images} if images else {})}, path)
    return path


def test_a_checkpoint_named_by_path_says_its_step(plan, tmp_path):
    streamed = write(tmp_path / "stream.ckpt")
    indexed = write(tmp_path / "x.ckpt", fingerprint="of photos", order_version=ORDER_VERSION)

    for path in (streamed, indexed):
        start = find_start(plan, RunDir(tmp_path / "mine"), resume=path)
        assert (start.checkpoint, start.step) == (path, 3)


def test_a_folder_in_the_place_of_a_checkpoint_is_told_as_one(plan, tmp_path):
    with pytest.raises(RunError, match=f"--resume {tmp_path}: a folder"):
        find_start(plan, RunDir(tmp_path / "mine"), resume=tmp_path)


def test_a_start_from_an_older_checkpoint_of_the_run_abandons_the_newer_ones(plan, tmp_path):
    run = RunDir(tmp_path / "mine")
    run.checkpoints.mkdir(parents=True)
    older, *newer = [write(run.checkpoint(step)) for step in (3, 4, 12)]
    run.last.symlink_to(newer[-1].name)

    start = find_start(plan, run, resume=older)

    assert (start.step, start.abandoned) == (3, newer)


def test_a_command_that_is_repeated_goes_back_to_a_checkpoint_once(plan, tmp_path):
    run = RunDir(tmp_path / "mine")
    older = tmp_path / "older.ckpt"
    torch.save({"convnext": {"step": 3}}, older)

    def tell(event: str, **more: object) -> None:
        write_event(run.events, event, step=3, **more)

    def begins_at() -> Path | None:
        return find_start(plan, run, resume=older).checkpoint

    write_checkpoint({"convnext": {"step": 12}}, run.checkpoint(12), world_size=1)
    tell("started")
    assert begins_at() == older
    run.checkpoint(12).unlink()
    tell("resumed", asked=str(older))
    assert begins_at() == older
    write_checkpoint({"convnext": {"step": 8}}, run.checkpoint(8), world_size=1)
    tell("stopped")
    assert begins_at() == run.checkpoint(8)
    older.rename(tmp_path / "gone")
    assert begins_at() == run.checkpoint(8)
    (tmp_path / "gone").rename(older)
    tell("finished")
    assert begins_at() == older


@pytest.mark.parametrize(
    ("fingerprint", "version", "told"),
    [
        ("of others", ORDER_VERSION, "made with data set of others, but .* has of photos"),
        ("of photos", 1, f"made with version of the order 1, but .* has {ORDER_VERSION}"),
    ],
)
def test_a_checkpoint_of_other_images_is_refused_before_a_folder_is_made(
    plan, tmp_path, fingerprint, version, told
):
    path = write(tmp_path / "x.ckpt", fingerprint=fingerprint, order_version=version)

    with pytest.raises(CheckpointError, match=told) as refused:
        find_start(plan, RunDir(tmp_path / "mine"), resume=path)

    assert f"init.weights={path}" in str(refused.value.hint)
    assert not (tmp_path / "mine").exists()


def begin(plan: Plan, folder: Path) -> RunDir:
    run = RunDir(folder / "mine")
    run.root.mkdir()
    run.recipe.write_text(render_recipe(plan.recipe))
    write_json(run.plan, {"data_fingerprint": plan.data_fingerprint})
    return run


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optim.clip_norm=1.0", "holds a run with optim.clip_norm=null, but 1.0 is asked now"),
        ("compute.fp8=true", "holds a run with compute.fp8=false, but true is asked now"),
    ],
)
def test_a_run_does_not_go_on_as_one_that_learns_otherwise(plan, tmp_path, override, told):
    run = begin(plan, tmp_path)
    other = make_plan(load_recipe("in1k_tiny", [override]), Cluster(device="cuda"), name="mine")

    with pytest.raises(RunError, match=told):
        find_start(other, run, resume="auto")


def test_a_run_may_go_on_with_another_strategy_and_other_kernels(plan, tmp_path):
    run = begin(plan, tmp_path)
    recipe = load_recipe("in1k_tiny", ["compute.strategy=fsdp", "compute.kernels=compile"])
    other = replace(
        make_plan(recipe, Cluster(device="cpu"), name="mine"), data_fingerprint="of photos"
    )

    assert find_start(other, run, resume="auto").checkpoint is None


def test_a_checkpoint_of_another_run_at_the_last_step_leaves_nothing_to_train(plan, tmp_path):
    path = write(tmp_path / "x.ckpt", fingerprint="of photos", order_version=ORDER_VERSION)
    short = replace(plan, total_steps=3)

    with pytest.raises(RunError, match="stands at step 3, and this run has 3 steps: none is left"):
        find_start(short, RunDir(tmp_path / "mine"), resume=path)


def test_the_last_checkpoint_of_the_run_itself_may_be_named_by_any_path(plan, tmp_path):
    run = begin(plan, tmp_path)
    run.checkpoints.mkdir()
    path = write(run.checkpoint(3), fingerprint="of photos", order_version=ORDER_VERSION)
    run.last.symlink_to(path.name)

    assert find_start(replace(plan, total_steps=3), run, resume=run.last).step == 3
