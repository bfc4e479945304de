"""Where an attempt begins."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from convnext_cli.data.order import ORDER_VERSION
from convnext_cli.errors import CheckpointError
from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import Plan, make_plan
from convnext_cli.recipe.files import load_recipe
from convnext_cli.runs.layout import RunDir
from convnext_cli.training.start import find_start


@pytest.fixture
def plan() -> Plan:
    plan = make_plan(load_recipe("in1k_tiny"), Cluster(device="cpu"), name="mine")
    return replace(plan, data_fingerprint="of photos")


def write(path: Path, **images: object) -> Path:
    torch.save({"convnext": {"step": 3}, **({"IndexedData": images} if images else {})}, path)
    return path


def test_a_checkpoint_named_by_path_says_its_step(plan, tmp_path):
    streamed = write(tmp_path / "stream.ckpt")
    indexed = write(tmp_path / "x.ckpt", fingerprint="of photos", order_version=ORDER_VERSION)

    for path in (streamed, indexed):
        start = find_start(plan, RunDir(tmp_path / "mine"), resume=path)
        assert (start.checkpoint, start.step) == (path, 3)


@pytest.mark.parametrize(
    ("fingerprint", "version", "told"),
    [
        ("of others", ORDER_VERSION, "made with data set of others, but .* has of photos"),
        ("of photos", 1, f"made with version of the order 1, but .* has {ORDER_VERSION}"),
    ],
)
def test_a_checkpoint_of_other_images_is_refused_before_a_folder_is_made(
    plan, tmp_path, fingerprint, version, told
):
    path = write(tmp_path / "x.ckpt", fingerprint=fingerprint, order_version=version)

    with pytest.raises(CheckpointError, match=told) as refused:
        find_start(plan, RunDir(tmp_path / "mine"), resume=path)

    assert f"init.weights={path}" in str(refused.value.hint)
    assert not (tmp_path / "mine").exists()
