"""Whole trainings with fused blocks, through the twins."""

import pytest
from kernel_curves import assert_within_noise


@pytest.mark.parametrize(
    ("ways", "grn"), [(("recomputed", "kept"), False), (("positions", "positions"), True)]
)
def test_a_fused_training_stays_within_the_noise_of_the_plain_one(ways, grn):
    assert_within_noise(device="cpu", ways=ways, grn=grn)
