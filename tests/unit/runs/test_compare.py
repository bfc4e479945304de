"""What is said about a run is what its files say."""

from pathlib import Path

import pytest

from convnext_cli.errors import RunError
from convnext_cli.runs.compare import compare_runs, labels_for, read_recipe_keys, summarise_run
from convnext_cli.runs.layout import RunDir
from convnext_cli.runs.record import JsonLines, write_json

ROWS = (
    {"step": 5, "epoch": 0.5, "time": "2026-01-01T10:01:00+00:00", "train/loss": 6.0,
     "speed/images_per_second": 100.0},
    {"step": 10, "epoch": 1.0, "time": "2026-01-01T10:02:00+00:00", "train/loss": 5.0,
     "speed/images_per_second": 300.0},
    {"step": 10, "epoch": 1.0, "time": "2026-01-01T10:03:00+00:00", "val/top1": 40.0,
     "val_ema/top1": 30.0},
    {"step": 20, "epoch": 2.0, "time": "2026-01-01T12:01:00+00:00", "val/top1": 40.0,
     "val_ema/top1": 45.5},
)  # fmt: skip


def event(name: str, time: str, step: int) -> dict[str, object]:
    return {"event": name, "time": f"2026-01-01T{time}+00:00", "step": step}


STARTED = event("started", "10:00:00", 0)
STOPPED = event("stopped", "10:03:00", 10)
RESUMED = event("resumed", "12:00:00", 10)
FINISHED = event("finished", "12:02:00", 20)


def make_run(
    root: Path,
    *,
    recipe: str = "optim:\n  lr: 4e-3\n",
    rows: tuple[dict[str, object], ...] = ROWS,
    events: tuple[dict[str, object], ...] = (STARTED, STOPPED, RESUMED, FINISHED),
) -> RunDir:
    run = RunDir(root)
    root.mkdir(parents=True)
    run.recipe.write_text(recipe)
    write_json(run.plan, {"total_steps": 20, "steps_per_epoch": 10})
    with JsonLines(run.metrics) as lines:
        for row in rows:
            lines.write(row)
    with JsonLines(run.events) as lines:
        for row in events:
            lines.write(row)
    return run


def test_a_finished_run_in_numbers(tmp_path):
    run = make_run(tmp_path / "a")
    run.checkpoints.mkdir()
    run.last.touch()

    summary = summarise_run(run)

    assert (summary.name, summary.state) == ("a", "finished")
    assert (summary.step, summary.total_steps, summary.epoch) == (20, 20, 2.0)
    assert (summary.best_top1, summary.best_top1_step) == (40.0, 10)
    assert (summary.best_ema_top1, summary.best_ema_top1_step) == (45.5, 20)
    assert summary.last_loss == 5.0
    assert summary.checkpoints == (run.last,)


def test_mean_speed_is_images_over_time(tmp_path):
    # As many images at 100/s as at 300/s take 4 units of time for 600 images: 150/s, not 200/s.
    assert summarise_run(make_run(tmp_path / "a")).images_per_second == pytest.approx(150.0)


def test_time_counts_the_attempts_and_not_the_wait_between_them(tmp_path):
    summary = summarise_run(make_run(tmp_path / "a"))

    assert (summary.wall_seconds, summary.attempts) == (180 + 120, 2)


def test_a_killed_attempt_counts_up_to_its_last_row(tmp_path):
    run = make_run(tmp_path / "a", rows=ROWS[:2], events=(STARTED,))

    assert summarise_run(run).wall_seconds == 120


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ((), "incomplete"),
        ((STARTED,), "incomplete"),
        ((STARTED, event("checkpoint", "10:01:00", 5)), "incomplete"),
        ((STARTED, STOPPED), "stopped"),
        ((STARTED, STOPPED, event("checkpoint", "10:03:01", 10)), "stopped"),
        ((STARTED, STOPPED, RESUMED), "incomplete"),
        ((STARTED, STOPPED, RESUMED, FINISHED), "finished"),
    ],
)
def test_the_last_turn_in_the_events_is_the_state(tmp_path, events, state):
    assert summarise_run(make_run(tmp_path / "a", events=events)).state == state


def test_a_run_that_has_done_nothing_yet_has_no_numbers(tmp_path):
    summary = summarise_run(make_run(tmp_path / "a", rows=(), events=()))

    assert (summary.step, summary.epoch, summary.best_top1, summary.best_top1_step) == (
        0, None, None, None,
    )  # fmt: skip
    assert (summary.last_loss, summary.images_per_second, summary.wall_seconds) == (None, None, 0)


def test_a_last_loss_that_was_not_finite_does_not_hide_behind_an_older_one(tmp_path):
    rows = (*ROWS, {"step": 20, "train/loss": float("nan")})

    assert summarise_run(make_run(tmp_path / "a", rows=rows)).last_loss is None


def test_a_plan_without_its_steps_is_a_users_error(tmp_path):
    run = make_run(tmp_path / "a")
    write_json(run.plan, {"total_steps": "many"})

    with pytest.raises(RunError, match="no whole number 'total_steps', but 'many'"):
        summarise_run(run)


def test_recipes_are_compared_key_by_key(tmp_path):
    one = "optim:\n  lr: 4e-3\n  betas: [0.9, 0.999]\nema: null\nname: no\n"
    two = "optim:\n  lr: 2e-3\n  betas: [0.9, 0.95]\nema:\n  decay: 0.9999\nname: no\n"

    comparison = compare_runs(
        make_run(tmp_path / "one", recipe=one), make_run(tmp_path / "two", recipe=two)
    )

    assert comparison.labels == ("one", "two")
    assert {row.key: row.values for row in comparison.recipe} == {
        "optim.lr": (0.004, 0.002),
        "optim.betas": ([0.9, 0.999], [0.9, 0.95]),
        "ema.decay": (None, 0.9999),
    }
    assert comparison.metrics == ()


def test_results_that_differ_are_named(tmp_path):
    first = make_run(tmp_path / "one")
    second = make_run(tmp_path / "two", rows=ROWS[:3], events=(STARTED, STOPPED))

    differences = {row.key: row.values for row in compare_runs(first, second).metrics}

    assert differences == {
        "state": ("finished", "stopped"),
        "step": (20, 10),
        "best_ema_top1": (45.5, 30.0),
        "best_ema_top1_step": (20, 10),
        "wall_seconds": (300.0, 180.0),
    }


def test_yaml_is_read_as_1_2(tmp_path):
    run = make_run(tmp_path / "a", recipe="a:\n  x: no\n  y: 4e-3\n  empty: {}\n")

    assert read_recipe_keys(run) == {"a.x": "no", "a.y": 0.004, "a.empty": {}}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [("a: [", "is not YAML"), ("- 1\n", "holds no recipe"), ("", "holds no recipe")],
)
def test_a_broken_recipe_is_named(tmp_path, recipe, message):
    with pytest.raises(RunError, match=message):
        read_recipe_keys(make_run(tmp_path / "a", recipe=recipe))


def test_an_absent_recipe_is_named(tmp_path):
    with pytest.raises(RunError, match=r"cannot read .*recipe\.yaml"):
        read_recipe_keys(RunDir(tmp_path))


def test_runs_of_one_name_are_told_apart_by_their_paths():
    runs = [RunDir(Path("x/a")), RunDir(Path("y/a")), RunDir(Path("y/b"))]

    assert labels_for(runs) == ("x/a", "y/a", "b")
