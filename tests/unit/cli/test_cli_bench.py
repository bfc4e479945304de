"""`convnext bench`: what is refused before anything is measured, and the order of no data."""

import json

import pytest


def test_what_is_no_peer_is_refused(run_cli, tiny_shards):
    done = run_cli("bench", "loader", "--data", tiny_shards, "--against", "tmim")

    assert done.exit_code == 2
    assert "there is no system named tmim" in done.stderr
    assert "timm-plain" in done.stderr


def test_a_loader_is_not_measured_over_a_network(run_cli):
    done = run_cli("bench", "loader", "--data", "https://127.0.0.1/x")

    assert done.exit_code == 2
    assert "a loader is measured on local files" in done.stderr


def test_a_loader_is_not_measured_over_no_images(run_cli, tiny_shards):
    done = run_cli("bench", "loader", "--data", tiny_shards, "--images", 0)

    assert done.exit_code == 2
    assert "--images" in done.stderr


def test_the_order_of_a_large_data_set_is_measured_without_it(run_cli):
    done = run_cli(
        *("bench", "order", "--images", 200_000, "--shards", 200, "--global-images", 1024),
        *("--world", 8, "--json"),
    )

    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["steps_per_epoch"] == 195
    assert 0.9 < report["same_shard_rate"] < 1.5
    assert report["node_shards"] < 60


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--images", 10, "--shards", 20), "--images 10 is fewer than --shards 20"),
        (("--world", 7), "world sizes that can: 1, 2, 4"),
    ],
)
def test_an_order_that_cannot_be_is_refused(run_cli, options, told):
    done = run_cli("bench", "order", *options)

    assert done.exit_code == 2
    assert told in done.stderr


def test_two_recipes_of_one_model_are_not_written_into_one_file(run_cli):
    done = run_cli(
        *("bench", "step", "in1k_tiny,in22k_tiny", "--batch", 2, "--device", "cpu"),
        *("--out", "results"),
    )

    assert done.exit_code == 2
    assert "--out: 2 recipes have the model convnext_tiny" in done.stderr


def test_other_models_have_no_depthwise_convolution(run_cli):
    done = run_cli("bench", "depthwise", "--models", "convnext_tiny,resnet50", "--device", "cpu")

    assert done.exit_code == 2
    assert "resnet50 has no depthwise convolutions" in done.stderr


def test_a_folder_that_cannot_be_is_refused_before_anything_is_measured(run_cli, tmp_path):
    (tmp_path / "file").touch()

    done = run_cli("bench", "step", "in1k_tiny", "--device", "cpu", "--out", "file/results")

    assert done.exit_code == 2
    assert "--out file/results: Not a directory" in done.stderr


def test_a_step_of_several_passes_is_refused(run_cli):
    done = run_cli("bench", "step", "in1k_tiny", "--batch", "8", "batch.per_device_images=4")

    assert done.exit_code == 2
    assert "measured as one pass" in done.stderr
