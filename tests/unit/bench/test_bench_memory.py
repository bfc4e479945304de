"""The line through two peaks, and the peak of a trace."""

import pytest

from convnext_cli.bench.memory import find_peak, make_memory
from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import make_plan
from convnext_cli.recipe.files import load_recipe

PLAN = make_plan(
    load_recipe("in1k_tiny", ["compute.gradient_checkpointing=stages"]),
    Cluster(num_nodes=4, devices_per_node=8),
    name="memory",
)


@pytest.mark.parametrize(
    ("device_bytes", "most"), [(10_000, 90), (9_050, 80), (900, 0), (None, None)]
)
def test_the_largest_batch_is_where_the_line_meets_the_device(device_bytes, most):
    """1,000 bytes without images and 100 an image; batches are of pairs."""
    memory = make_memory(
        PLAN,
        images=(10, 20),
        peaks=(2000, 3000),
        predicted=(1900, 2900),
        device_bytes=device_bytes,
    )

    assert (memory.bytes_per_image, memory.fixed_bytes) == (100, 1000)
    assert memory.most_images == most
    assert memory.checkpointing == "stages"


def test_a_step_whose_peak_does_not_grow_has_no_largest_batch():
    memory = make_memory(
        PLAN, images=(2, 4), peaks=(500, 500), predicted=(1, 2), device_bytes=10_000
    )

    assert memory.most_images is None


def test_the_peak_of_a_trace_is_of_its_own_allocations_on_the_host():
    sizes = [(5, 300, 0), (1, 100, 0), (2, 200, 0), (3, -100, 0), (4, 9000, 1)]
    events = [
        {
            "cat": "cpu_instant_event",
            "name": "[memory]",
            "ts": ts,
            "args": {"Bytes": size, "Device Type": device, "Total Allocated": 10**9},
        }
        for ts, size, device in sizes
    ]

    assert find_peak(events) == 500
