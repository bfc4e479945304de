"""Whole plans are those of tests/golden/plan/*.json; `make golden` writes them anew."""

import json
import os
from pathlib import Path

import pytest

from convnext_cli.plan.cluster import Cluster, DeviceKind
from convnext_cli.plan.resolve import make_plan
from convnext_cli.recipe.files import load_recipe

GOLDEN = Path(__file__).parents[1] / "golden" / "plan"


@pytest.mark.parametrize(
    ("name", "nodes", "devices", "device"),
    [
        ("in1k_tiny", 4, 8, "cuda"),
        ("in22k_in1k_xlarge_384", 1, 8, "cuda"),
        ("v2_in1k_atto", 1, 1, "cpu"),
    ],
)
def test_a_plan_is_the_recorded_one(name: str, nodes: int, devices: int, device: DeviceKind):
    cluster = Cluster(
        num_nodes=nodes, devices_per_node=devices, device=device, cpus_per_node=12 * devices
    )
    plan = json.dumps(make_plan(load_recipe(name), cluster, name=name).to_json(), indent=2) + "\n"
    golden = GOLDEN / f"{name}.json"
    if os.environ.get("CONVNEXT_GOLDEN"):
        GOLDEN.mkdir(parents=True, exist_ok=True)
        golden.write_text(plan)

    assert golden.read_text() == plan
