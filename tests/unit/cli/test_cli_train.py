"""What `convnext train` refuses, and what it says at the end."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from convnext_cli.cli._inputs import read_facts
from convnext_cli.cli.train import _tell_result, check_name, check_start_weights
from convnext_cli.errors import CheckpointError, RecipeError, RunError, Stopped
from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import Plan, make_plan
from convnext_cli.recipe.files import load_recipe, render_recipe
from convnext_cli.runs.layout import RunDir
from convnext_cli.runs.record import JsonLines, write_event, write_json
from convnext_cli.training.checkpoint import write_checkpoint
from convnext_cli.training.start import find_start


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A finished run without validation."""
    run = RunDir(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    run.recipe.write_text("model:\n  name: convnext_tiny\n")
    write_json(run.plan, {"total_steps": 2, "steps_per_epoch": 1})
    with JsonLines(run.metrics) as lines:
        lines.write({"step": 2, "epoch": 2.0, "time": "2026-01-01T10:00:00.000+00:00",
                     "train/loss": 6.5})  # fmt: skip
    return run


@pytest.mark.parametrize(
    ("has_val", "mode", "words"),
    [
        (True, "indexed", "evaluate {} --data packed"),
        (True, "stream", "predict {} IMAGE"),
        (False, "indexed", "predict {} IMAGE"),
    ],
)
def test_the_next_command_is_one_that_the_data_allow(run, has_val, mode, words, capsys):
    recipe = load_recipe("small_data", ["data.path=packed", f"data.mode={mode}"])

    _tell_result(run, recipe=recipe, steps=2, has_val=has_val)

    assert f"convnext {words.format(run.last)}\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "-x", "a b", "a/b"])
def test_a_name_that_leads_elsewhere_is_refused(name):
    with pytest.raises(RecipeError, match="are allowed in a name"):
        check_name(name)


def test_names_of_every_other_kind_are_taken():
    for name in ("tiny_lr2", "a=b.c-d", "=x", "2", "naïve"):
        check_name(name)


@pytest.mark.parametrize("name", ["v2_in1k_atto", "v2_in22k_base", "in22k_in1k_small_224"])
def test_a_recipe_for_fine_tuning_without_weights_is_refused_and_the_hint_works(name):
    asked = load_recipe(name)
    with pytest.raises(CheckpointError, match=r"init\.source=raw init\.head=") as refused:
        check_start_weights(asked)

    *_, recipe, model = str(refused.value.hint).split()
    scratch = load_recipe(recipe, [model])
    check_start_weights(scratch)
    check_start_weights(load_recipe(name, ["init.weights=x.pt"]))
    assert (scratch.model.name, scratch.data) == (asked.model.name, asked.data)
    assert (scratch.model.head_init_scale, scratch.optim.layer_decay) == (1.0, None)


def test_a_recipe_for_fine_tuning_goes_on_from_a_checkpoint_that_is_given(run_cli, tiny_shards):
    small = ("batch.global_images=8", "optim.lr_rule=linear", "model.num_classes=3")

    done = run_cli("train", "v2_in1k_atto", "--data", tiny_shards, "--device", "cpu",
                   "--resume", "nowhere.ckpt", *small)  # fmt: skip

    assert done.exit_code == 2
    assert "--resume nowhere.ckpt: there is no such file" in done.stderr


def test_a_command_that_went_back_before_says_that_it_goes_on(
    run_cli, tiny_shards, tmp_path, monkeypatch
):
    def stop(*_: object, **__: object) -> int:
        raise Stopped("stopped by SIGINT")

    monkeypatch.setattr("convnext_cli.training.fit.fit", stop)
    older, run = tmp_path / "older.ckpt", RunDir(tmp_path / "runs/small_data")
    torch.save({"convnext": {"step": 1}}, older)
    told = []
    for _ in range(2):
        done = run_cli("train", "small_data", "--data", tiny_shards, "--device", "cpu", "--resume",
                       older, "batch.global_images=8", "optim.lr_rule=linear")  # fmt: skip
        assert done.exit_code == 75
        told.append(f"this run went back to {older} before" in done.stderr)
        write_event(run.events, "resumed", step=1, asked=str(older))
        write_checkpoint({"convnext": {"step": 2}}, run.checkpoint(2), world_size=1)

    assert told == [False, True]


@pytest.mark.parametrize(
    ("now", "same"),
    [
        (["data.path=/b/c/train-{00..63}.tar", "data.val_path=/b/c/val-{0..3}.tar"], True),
        (
            ["data.path=https://x/train-{00..63}.tar?sign=1", "data.val_path=/v/val-{0..3}.tar"],
            True,
        ),
        (
            [
                "data.path=/a/train-{00..63}.tar",
                "data.val_path=/a/val-{0..3}.tar",
                "data.val_images=91",
            ],
            True,
        ),
        (["data.path=/a/train-{00..31}.tar", "data.val_path=/a/val-{0..3}.tar"], False),
        (["data.path=/a/train-{00..63}.tar", "data.val_path=/a/test-{0..3}.tar"], False),
        (["data.path=/a/train-{00..63}.tar"], False),
        (
            ["data.path=/a/train-{00..63}.tar::/a/more.tar", "data.val_path=/a/val-{0..3}.tar"],
            False,
        ),
    ],
)
def test_a_streamed_run_goes_on_with_shards_of_the_same_names_alone(tmp_path, now, same):
    def plan(*paths: str) -> Plan:
        asked = ["data.mode=stream", "data.train_images=9000", "data.val_images=90", *paths]
        recipe = load_recipe("in1k_tiny", asked)
        return make_plan(recipe, Cluster(device="cpu"), name="s", facts=read_facts(recipe))

    run = RunDir(tmp_path / "s")
    begun = plan("data.path=/a/train-{00..63}.tar", "data.val_path=/a/val-{0..3}.tar")
    run.root.mkdir()
    run.recipe.write_text(render_recipe(begun.recipe))
    write_json(run.plan, begun.to_json())

    with (
        nullcontext() if same else pytest.raises(RunError, match=r"holds a run on the data set /a")
    ):
        assert find_start(plan(*now), run, resume="auto").step == 0


@pytest.mark.parametrize("begun", [True, False])
def test_what_ends_a_run_is_in_its_log_too(run_cli, tiny_shards, tmp_path, monkeypatch, begun):
    run = RunDir(tmp_path / "runs" / "small_data")

    def stop(*_: object, **__: object) -> int:
        if begun:
            run.recipe.touch()
            run.plan.touch()
        raise Stopped("stopped by SIGINT after step 3 of 4")

    monkeypatch.setattr("convnext_cli.training.fit.fit", stop)
    done = run_cli("train", "small_data", "--data", tiny_shards, "--device", "cpu",
                   "batch.global_images=8", "optim.lr_rule=linear")  # fmt: skip

    assert done.exit_code == 75
    assert run.root.exists() == begun
    if begun:
        assert run.log.read_text() == "error: stopped by SIGINT after step 3 of 4\n"


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--device", "cuda"], "a GPU was asked for, but torch finds none"),
        (["--precision", "fp16"], "fp16 needs a GPU"),
        (["model.num_classes=10"], "the recipe's head has 10 classes, but"),
        (["augment.rand_augment=rand-t3a"], "Desaturate is not supported"),
        (["--resume", "must"], "has no checkpoint to go on from"),
        (["init.weights=/no/such/file.pth"], "there is no file /no/such/file.pth"),
        (["--runs-dir", "/dev/null/runs"], "cannot write /dev/null/runs/run"),
        (["--data", "/no/such/folder"], "there is no folder /no/such/folder"),
        (
            ["--devices", 3, "batch.global_images=12", "data.order=window", "data.lanes=4"],
            "3 devices cannot share 4 lanes of a window order",
        ),
    ],
)
def test_a_mistake_gets_one_sentence_and_a_hint(
    run_cli, tiny_shards, tmp_path, monkeypatch, more, sentence
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    done = run_cli(
        *("train", "small_data", "--data", tiny_shards, "--name", "run", "--device", "cpu"),
        *("batch.global_images=8", "optim.lr_rule=linear", "--runs-dir", "runs", *more),
    )

    assert done.exit_code == 2, done.stderr
    assert sentence in done.stderr
    assert "hint: " in done.stderr
    assert not (tmp_path / "runs" / "run").exists()
