import json
from pathlib import Path

import pytest

from convnext_cli.errors import RunError
from convnext_cli.runs.goodput import measure_goodput
from convnext_cli.runs.layout import RunDir


def at(second: int) -> str:
    return f"2026-11-23T10:{second // 60:02d}:{second % 60:02d}.000+00:00"


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def event(name: str, second: int, step: int, **more: object) -> dict:
    return {"event": name, "time": at(second), "step": step, **more}


def write_run(folder: Path, *events: dict, rates: dict[int, float], **plan: object) -> RunDir:
    """A run whose rows tell `rates` in images a second by step, and were written at its end."""
    run = RunDir(folder)
    run.plan.write_text(json.dumps({"global_images": 100, **plan}))
    run.events.write_text(lines(*events))
    speed, end = "speed/images_per_second", events[-1]["time"]
    run.metrics.write_text(
        lines(*({"step": step, "time": end, speed: rate} for step, rate in rates.items()))
    )
    return run


def test_lost_steps_starts_and_waits_are_not_goodput(tmp_path):
    # killed after step 50 at second 60; resumed 20 seconds later at step 40; finished
    run = write_run(
        tmp_path,
        event("started", 0, 0),
        event("ready", 10, 0),
        event("checkpoint", 50, 40),
        event("resumed", 80, 40, lost_steps=10),
        event("ready", 90, 40),
        event("finished", 150, 100),
        rates={50: 100.0, 100: 100.0},
        total_steps=100,
    )

    measured = measure_goodput(run)

    first, second = measured.attempts
    assert (first.first_step, first.last_step, first.lost_steps, first.ended) == (
        0,
        40,
        10,
        "killed",
    )
    assert (first.start_seconds, first.waited_seconds) == (10.0, 30.0)
    assert (second.first_step, second.last_step, second.ended) == (40, 100, "finished")
    assert measured.wall_seconds == 150.0
    assert measured.goodput == pytest.approx(100 * 1.0 / 150)


def test_steps_after_the_last_row_are_lost_too_where_a_run_goes_back(tmp_path):
    # goes back from step 16 to 8, with a row of step 12
    run = write_run(
        tmp_path,
        event("started", 0, 0),
        event("rolled_back", 16, 16, to=8),
        event("stopped", 16, 16, why="RolledBack"),
        event("resumed", 16, 8, lost_steps=4),
        event("finished", 48, 40),
        rates={40: 100.0},
        total_steps=40,
    )

    measured = measure_goodput(run)

    assert (measured.attempts[0].lost_steps, measured.lost_steps) == (8, 8)


def test_a_clock_that_was_set_back_makes_no_time_negative(tmp_path):
    # set back by 100 seconds after the checkpoint, and again before the second attempt
    run = write_run(
        tmp_path,
        event("started", 200, 0),
        event("checkpoint", 220, 20),
        event("stopped", 125, 20, why="Stopped"),
        event("resumed", 30, 20, lost_steps=0),
        event("finished", 50, 40),
        rates={20: 100.0, 40: 100.0},
        total_steps=40,
    )

    measured = measure_goodput(run)

    assert [attempt.seconds for attempt in measured.attempts] == [20.0, 20.0]
    assert measured.attempts[0].waited_seconds == 0.0
    assert (measured.wall_seconds, measured.goodput) == (40.0, 1.0)


def test_attempts_and_sizes_of_another_speed_count_with_their_own(tmp_path):
    # 30 small steps of 0.5 s and 30 of 1 s; then half of the devices, and 40 steps of 2 s
    rates = {10: 200.0, 20: 200.0, 30: 200.0, 40: 100.0, 50: 100.0, 60: 100.0}
    rates |= {70: 50.0, 80: 50.0, 90: 50.0, 100: 50.0}
    run = write_run(
        tmp_path,
        event("started", 0, 0),
        event("stopped", 45, 60, why="Stopped"),
        event("resumed", 45, 60, lost_steps=0),
        event("finished", 125, 100),
        rates=rates,
        total_steps=100,
        train_sizes=[{"image_px": 160, "first_step": 0}, {"image_px": 224, "first_step": 30}],
    )

    measured = measure_goodput(run)

    assert measured.step_seconds == pytest.approx(1.25)
    assert measured.goodput == pytest.approx(1.0)


def test_a_run_that_was_killed_before_its_start_was_written_has_no_times(tmp_path):
    run = RunDir(tmp_path)
    run.plan.write_text(json.dumps({"global_images": 100, "total_steps": 100}))

    with pytest.raises(RunError, match="has no times: no start is written in"):
        measure_goodput(run)


def test_a_row_or_event_without_its_time_is_left_out(tmp_path):
    run = RunDir(tmp_path)
    run.plan.write_text(json.dumps({"global_images": 100, "total_steps": 100}))
    run.events.write_text(
        lines(
            {"event": "started", "time": at(0), "step": 0},
            {"event": "note", "time": "yesterday"},
        )
    )
    run.metrics.write_text(lines({"step": 50, "time": at(60)}, {"step": 50, "val/top1": 1.0}))

    assert measure_goodput(run).wall_seconds == 60.0
