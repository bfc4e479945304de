"""Learning rate and weight decay as functions of the step."""

import pytest

from convnext_cli.optim.schedule import cosine_lr

TEN = {"peak": 1.0, "floor": 0.1, "warmup_steps": 3, "total_steps": 10}


def test_warm_up_starts_at_zero_and_its_last_step_has_the_peak():
    assert [cosine_lr(step, **TEN) for step in range(4)] == [0.0, 0.5, 1.0, 1.0]


def test_halfway_down_the_cosine_lies_halfway_between_peak_and_floor():
    even = TEN | {"warmup_steps": 2}

    assert cosine_lr(6, **even) == pytest.approx(0.55, abs=1e-15)


def test_the_cosine_falls_at_every_step_and_ends_one_step_short_of_the_floor():
    tail = [cosine_lr(step, **TEN) for step in range(3, 10)]

    assert tail == sorted(tail, reverse=True)
    assert len(set(tail)) == len(tail)
    assert 0.1 < tail[-1] < 0.16
    assert cosine_lr(10, **TEN) == pytest.approx(0.1, abs=1e-15)


def test_without_warm_up_the_first_step_has_the_peak():
    assert cosine_lr(0, peak=5e-5, floor=1e-6, warmup_steps=0, total_steps=100) == 5e-5


def test_a_warm_up_of_one_step_is_that_step_at_zero():
    one = TEN | {"warmup_steps": 1}

    assert [cosine_lr(step, **one) for step in (0, 1)] == [0.0, 1.0]


def test_a_floor_at_the_peak_is_a_constant_after_warm_up():
    flat = TEN | {"floor": 1.0}

    assert {cosine_lr(step, **flat) for step in range(2, 10)} == {1.0}
