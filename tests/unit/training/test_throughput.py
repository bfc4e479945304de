import time

import pytest

from convnext_cli.training.throughput import DataClock, Meter, read_memory_gib


def test_the_rate_counts_images_of_all_passes_over_the_time_between_readings():
    meter = Meter(images_per_pass=32, clock=DataClock())
    started = time.perf_counter()
    for _ in range(3):
        time.sleep(0.02)
        meter.end_batch()

    row = meter.read()

    assert row["speed/images_per_second"] == pytest.approx(
        96 / (time.perf_counter() - started), rel=0.1
    )
    assert row["speed/data_wait_frac"] < 0.2


def test_time_spent_waiting_for_data_is_told():
    clock = DataClock()
    meter = Meter(images_per_pass=1, clock=clock)
    for _ in range(3):
        clock.start("[_TrainingEpochLoop].train_dataloader_next")
        time.sleep(0.03)
        clock.stop("[_TrainingEpochLoop].train_dataloader_next")
        time.sleep(0.01)
        meter.end_batch()

    assert meter.read()["speed/data_wait_frac"] == pytest.approx(0.75, abs=0.12)


def test_a_reading_takes_nothing_from_the_clock_which_a_rank_is_timed_by_too():
    clock = DataClock()
    meter = Meter(images_per_pass=1, clock=clock)
    clock.waited_seconds += 0.5
    meter.end_batch()
    meter.read()

    assert clock.waited_seconds == 0.5
    time.sleep(0.02)
    assert meter.read()["speed/data_wait_frac"] == 0.0


def test_a_pause_for_validation_is_left_out():
    meter = Meter(images_per_pass=10, clock=DataClock())
    time.sleep(0.02)
    meter.end_batch()
    time.sleep(0.2)
    meter.pause()

    assert meter.read()["speed/images_per_second"] > 10 / 0.1


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_tells_its_own_memory(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)

    assert read_memory_gib("cpu") > 0.05
