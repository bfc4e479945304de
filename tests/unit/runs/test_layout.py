"""The names of paths in a run, and how runs are found."""

from pathlib import Path

import pytest

from convnext_cli.errors import RunError
from convnext_cli.runs.layout import RunDir, checkpoint_step, find_run, find_runs


def make_run(root: Path) -> RunDir:
    run = RunDir(root)
    root.mkdir(parents=True)
    run.recipe.write_text("optim: {lr: 0.004}\n")
    run.plan.write_text('{"total_steps": 10}')
    return run


def test_every_path_is_where_the_drawing_says():
    run = RunDir(Path("runs/a"))

    assert {str(path.relative_to("runs/a")) for path in (
        run.recipe, run.plan, run.environment, run.metrics, run.metrics_csv, run.events, run.log,
        run.checkpoint(312), run.last, run.best, run.best_ema, run.curves, run.trackers,
        run.tracker_id("wandb"),
    )} == {
        "recipe.yaml", "plan.json", "environment.json", "metrics.jsonl", "metrics.csv",
        "events.jsonl", "train.log", "checkpoints/step=00000312.ckpt", "checkpoints/last.ckpt",
        "checkpoints/best.ckpt", "checkpoints/best_ema.ckpt", "plots/curves.png", "trackers",
        "trackers/wandb.id",
    }  # fmt: skip


def test_checkpoints_are_listed_by_step_then_last_and_best(tmp_path):
    run = make_run(tmp_path / "a")
    run.checkpoints.mkdir()
    for path in (run.best, run.checkpoint(1000), run.last, run.checkpoint(312)):
        path.touch()
    run.checkpoint(99).mkdir()  # sharded checkpoints are folders
    (run.checkpoints / ".step=00002000.ckpt.tmp").touch()
    (run.checkpoints / "notes.txt").touch()

    names = [path.name for path in run.list_checkpoints()]

    assert names == [
        "step=00000099.ckpt", "step=00000312.ckpt", "step=00001000.ckpt", "last.ckpt", "best.ckpt",
    ]  # fmt: skip


def test_a_run_without_checkpoints_lists_none(tmp_path):
    assert make_run(tmp_path / "a").list_checkpoints() == []


@pytest.mark.parametrize("step", [0, 7, 99_999_999, 1_234_567_890])
def test_the_step_is_read_back_from_the_name(step):
    assert checkpoint_step(RunDir(Path("a")).checkpoint(step)) == step


def test_last_has_no_step_in_its_name():
    assert checkpoint_step(RunDir(Path("a")).last) is None


def test_the_name_of_a_run_is_that_of_its_folder_also_from_inside(tmp_path, monkeypatch):
    make_run(tmp_path / "baseline")
    monkeypatch.chdir(tmp_path / "baseline")

    assert RunDir(Path()).name == "baseline"


def test_only_folders_with_recipe_and_plan_are_runs(tmp_path):
    make_run(tmp_path / "b")
    make_run(tmp_path / "sweep" / "a")
    make_run(tmp_path / ".hidden" / "c")
    make_run(tmp_path / "b" / "inner" / "d")
    (tmp_path / "empty").mkdir()
    half = make_run(tmp_path / "half")
    half.plan.unlink()

    assert [run.root for run in find_runs(tmp_path)] == [tmp_path / "b", tmp_path / "sweep" / "a"]


def test_a_folder_that_is_not_there_has_no_runs(tmp_path):
    assert find_runs(tmp_path / "nowhere") == []


def test_a_run_is_found_by_name_by_path_and_in_a_subfolder(tmp_path):
    run = make_run(tmp_path / "sweep" / "low_lr")

    assert find_run("low_lr", tmp_path) == run
    assert find_run("sweep/low_lr", tmp_path) == run
    assert find_run(str(run.root), tmp_path / "elsewhere") == run


def test_a_misspelt_name_is_answered_with_the_nearest(tmp_path):
    make_run(tmp_path / "in1k_tiny")

    with pytest.raises(RunError, match="no run 'in1k_tinny'") as caught:
        find_run("in1k_tinny", tmp_path)

    assert "did you mean 'in1k_tiny'?" in str(caught.value.hint)


def test_a_name_far_from_all_is_answered_with_how_to_list_them(tmp_path):
    make_run(tmp_path / "in1k_tiny")

    with pytest.raises(RunError) as caught:
        find_run("zzz", tmp_path)

    assert caught.value.hint == f"see what there is: convnext runs list --root {tmp_path}"


def test_without_any_run_the_hint_says_so(tmp_path):
    with pytest.raises(RunError) as caught:
        find_run("a", tmp_path)

    assert "holds no run" in str(caught.value.hint)


def test_a_folder_that_is_not_a_run_is_told_what_it_lacks(tmp_path):
    make_run(tmp_path / "half").plan.unlink()

    with pytest.raises(RunError, match=r"(?m)half is not a run: it has no plan\.json$"):
        find_run("half", tmp_path)


def test_a_checkpoint_in_place_of_its_run_is_told_the_folder(tmp_path, monkeypatch):
    run = make_run(tmp_path / "runs" / "r1")
    run.checkpoints.mkdir()
    run.best.touch()
    monkeypatch.chdir(tmp_path)

    for given in ("./runs/r1/checkpoints/best.ckpt", "r1/checkpoints/best.ckpt"):
        with pytest.raises(RunError, match=r"best\.ckpt is a checkpoint, not a run") as caught:
            find_run(given, Path("runs"))
        assert caught.value.hint == "name the run's folder: runs/r1"

    monkeypatch.chdir(run.checkpoints)
    with pytest.raises(RunError, match=r"best\.ckpt is a checkpoint") as caught:
        find_run("best.ckpt", Path("runs"))
    assert caught.value.hint == f"name the run's folder: {run.root}"


def test_a_file_that_lies_in_no_run_is_not_said_to_be_absent(tmp_path):
    (tmp_path / "weights.ckpt").touch()

    with pytest.raises(RunError, match="is a checkpoint, not the folder of a run"):
        find_run(str(tmp_path / "weights.ckpt"), tmp_path)


def test_a_name_that_two_runs_share_is_refused_with_both_paths(tmp_path):
    first, second = make_run(tmp_path / "x" / "a"), make_run(tmp_path / "y" / "a")

    with pytest.raises(RunError, match="2 runs") as caught:
        find_run("a", tmp_path)

    assert str(first.root) in str(caught.value.hint)
    assert str(second.root) in str(caught.value.hint)


def test_a_run_that_may_not_be_read_does_not_hide_the_others(tmp_path, monkeypatch):
    make_run(tmp_path / "mine")
    theirs, is_file = make_run(tmp_path / "theirs"), Path.is_file

    def refuse(path: Path) -> bool:
        if path.parent == theirs.root:
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuse)

    assert [run.name for run in find_runs(tmp_path)] == ["mine"]
