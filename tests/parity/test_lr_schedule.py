"""The learning rate against the definition in the official code, and against stored values.

Definition (facebookresearch/ConvNeXt@048efce utils.py `cosine_scheduler`): a table with one entry
an optimizer step; the warm-up is a linspace from 0 that includes the peak; after it come n entries
of half a cosine, number i at i / n of the way.
"""

import numpy as np
import pytest

from convnext_cli.optim.schedule import cosine_lr

STORED_IN1K = {
    0: 0.0,
    1: 6.411283859593e-07,
    2: 1.282256771919e-06,
    312: 2.000320564193e-04,
    3_119: 1.999679435807e-03,
    6_238: 3.999358871614e-03,
    6_239: 4.000000000000e-03,
    6_240: 4.000000000000e-03,
    6_241: 3.999999998707e-03,
    28_080: 3.414360008983e-03,
    49_920: 2.000500000000e-03,
    71_760: 5.866399910175e-04,
    93_288: 1.125855018976e-06,
    93_598: 1.000005171612e-06,
    93_599: 1.000001292903e-06,
}
"""Step to learning rate of the ImageNet-1K recipe, printed by the official function itself."""

SCHEDULES = {
    "IN-1K": {"peak": 4e-3, "floor": 1e-6, "warmup_steps": 6_240, "total_steps": 93_600},
    "IN-22K": {"peak": 4e-3, "floor": 1e-6, "warmup_steps": 17_330, "total_steps": 311_940},
    "fine-tuning": {"peak": 5e-5, "floor": 1e-6, "warmup_steps": 0, "total_steps": 75_060},
}


def tabulate(*, peak, floor, warmup_steps, total_steps):
    share = np.arange(total_steps - warmup_steps) / (total_steps - warmup_steps)
    cosine = floor + 0.5 * (peak - floor) * (1 + np.cos(np.pi * share))
    return np.concatenate([np.linspace(0, peak, warmup_steps), cosine])


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_step_of_a_published_recipe_has_the_learning_rate_of_the_definition(name):
    schedule = SCHEDULES[name]

    ours = np.array([cosine_lr(step, **schedule) for step in range(schedule["total_steps"])])

    np.testing.assert_allclose(ours, tabulate(**schedule), rtol=1e-13, atol=0)


def test_the_in1k_recipe_has_the_stored_learning_rates():
    ours = {step: cosine_lr(step, **SCHEDULES["IN-1K"]) for step in STORED_IN1K}

    assert ours == pytest.approx(STORED_IN1K, rel=1e-12, abs=0)
