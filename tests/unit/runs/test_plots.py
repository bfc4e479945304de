"""Curves are drawn for one run and for several, also where rows are few or damaged."""

import math
import os
from pathlib import Path

import pytest
from PIL import Image

from convnext_cli.errors import RunError, StorageError
from convnext_cli.runs.layout import RunDir
from convnext_cli.runs.plots import plot_runs, running_mean
from convnext_cli.runs.record import JsonLines, write_json

BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def make_run(root: Path, *, num_rows: int = 120, steps_per_epoch: int = 20) -> RunDir:
    run = RunDir(root)
    root.mkdir(parents=True)
    run.recipe.write_text("optim: {lr: 0.004}\n")
    write_json(run.plan, {"total_steps": num_rows, "steps_per_epoch": steps_per_epoch})
    with JsonLines(run.metrics) as lines:
        for step in range(1, num_rows + 1):
            row = {"step": step, "epoch": step / steps_per_epoch, "train/loss": 7 / step}
            lines.write(row | {"train/lr": 1e-5 * step, "speed/images_per_second": 900.0 + step})
            if step % steps_per_epoch == 0:
                lines.write({"step": step, "epoch": row["epoch"], "val/top1": 0.5 * step})
    return run


def colours_of(path: Path) -> dict[tuple[int, ...], int]:
    with Image.open(path) as image:
        pixels = image.convert("RGB")
        return {colour: count for count, colour in pixels.getcolors(2**24)}


def test_one_run_is_drawn_wide_enough_on_white(tmp_path):
    run = make_run(tmp_path / "a")

    plot_runs([run], run.curves)

    with Image.open(run.curves) as image:
        assert image.format == "PNG"
        assert image.width >= 1200
        assert image.convert("RGB").getpixel((image.width - 1, 0)) == (255, 255, 255)
    assert [path.name for path in run.plots.iterdir()] == ["curves.png"]


def test_each_run_has_its_colour(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", num_rows=90)]

    plot_runs(runs[:1], tmp_path / "one.png")
    plot_runs(runs, tmp_path / "two.png")

    one, two = colours_of(tmp_path / "one.png"), colours_of(tmp_path / "two.png")
    assert one[BLUE] > 1000
    assert ORANGE not in one
    assert two[ORANGE] > 1000


def test_runs_with_epochs_of_different_length_are_drawn_by_epoch(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", steps_per_epoch=30)]

    plot_runs(runs, tmp_path / "two.png")

    assert (tmp_path / "two.png").stat().st_size > 10_000


def test_a_chosen_metric_is_drawn_alone(tmp_path):
    run = make_run(tmp_path / "a")

    plot_runs([run], tmp_path / "one.png", keys=["train/loss"])
    plot_runs([run], tmp_path / "three.png", keys=["train/loss", "train/lr", "val/top1"])

    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "three.png") as three:
        assert one.height < three.height


def test_an_unknown_metric_is_answered_with_those_that_are_there(tmp_path):
    run = make_run(tmp_path / "a")

    with pytest.raises(RunError, match="no run has the metric 'train/los'") as caught:
        plot_runs([run], tmp_path / "a.png", keys=["train/los"])

    assert caught.value.hint == (
        "use one of: speed/images_per_second, train/loss, train/lr, val/top1"
    )


def test_one_row_and_no_validation_can_be_drawn(tmp_path):
    plot_runs([make_run(tmp_path / "a", num_rows=1)], tmp_path / "a.png")

    assert (tmp_path / "a.png").exists()


def test_losses_that_were_not_finite_are_gaps(tmp_path):
    run = make_run(tmp_path / "a")
    with JsonLines(run.metrics) as lines:
        for step in range(121, 200):
            lines.write({"step": step, "epoch": step / 20, "train/loss": math.nan})

    plot_runs([run], tmp_path / "a.png")

    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize("name", ["_$x^{$", os.fsdecode(b"caf\xe9")])
def test_a_name_that_is_no_plain_text_is_drawn(tmp_path, name):
    plot_runs([make_run(tmp_path / name)], tmp_path / "a.png")

    assert colours_of(tmp_path / "a.png")[BLUE] > 1000


def test_a_run_without_rows_is_a_users_error(tmp_path):
    run = make_run(tmp_path / "a")
    run.metrics.unlink()

    with pytest.raises(RunError, match="run 'a' has no metrics yet"):
        plot_runs([run], tmp_path / "a.png")


def test_a_destination_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    run = make_run(tmp_path / "a")
    (tmp_path / "file").touch()

    with pytest.raises(StorageError, match="cannot write"):
        plot_runs([run], tmp_path / "file" / "a.png")

    assert {path.name for path in tmp_path.iterdir()} == {"a", "file"}


def test_the_running_mean_is_centred_and_shrinks_at_both_ends():
    assert running_mean([0.0, 3.0, 6.0, 9.0], window=3) == [1.5, 3.0, 6.0, 7.5]


def test_the_running_mean_passes_over_what_is_not_finite():
    assert running_mean([1.0, math.nan, 3.0], window=3) == [1.0, 2.0, 3.0]
    assert math.isnan(running_mean([math.nan], window=3)[0])
