"""The benchmarks run at toy size, so that they are whole when somebody needs a number."""

import json

import pytest

PEERS = {"timm", "timm-unfetched", "timm-plain", "torchvision", "webdataset"}


def test_peers_are_measured_beside_the_loader(run_process, tiny_shards):
    done = run_process(
        *("bench", "loader", "--data", tiny_shards, "--against", ",".join(PEERS)),
        *("--image-px", 32),
        *("--batch", 8, "--images", 16, "--rounds", 1, "--workers", 1, "--json"),
    )

    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["failed"] == {}
    systems = {rate["system"]: rate for rate in report["rates"]}
    assert set(systems) == {"convnext", "convnext-device", *PEERS}
    assert all(rate["images_per_core_second"] > 0 for rate in systems.values())
    pairs = {(pair["ours"], pair["peer"]) for pair in report["ratios"]}
    assert pairs == {(ours, peer) for ours in ("convnext", "convnext-device") for peer in PEERS}
    stages = [stage["name"] for stage in report["stages"]]
    assert stages == ["read", "decode", "resize and flip", "RandAugment", "draw"]
    assert report["limit_frac"]["convnext"] > 0


def test_a_peer_that_is_not_installed_is_left_out_with_its_reason(run_process, tiny_shards):
    pytest.importorskip("torchvision")
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("DALI is installed here")

    done = run_process(
        *("bench", "loader", "--data", tiny_shards, "--against", "dali", "--image-px", 32),
        *("--batch", 8, "--images", 8, "--rounds", 1, "--workers", 1),
    )

    assert done.exit_code == 0, done.stderr
    assert "dali was left out: dali ended: ModuleNotFoundError" in done.stderr


def test_what_is_no_peer_is_refused(run_cli, tiny_shards):
    done = run_cli("bench", "loader", "--data", tiny_shards, "--against", "tmim")

    assert done.exit_code == 2
    assert "there is no system named tmim" in done.stderr
    assert "timm-plain" in done.stderr


def test_a_loader_is_not_measured_over_a_network(run_cli):
    done = run_cli("bench", "loader", "--data", "https://127.0.0.1/x")

    assert done.exit_code == 2
    assert "a loader is measured on local files" in done.stderr


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


def test_whole_steps_are_measured_beside_their_peers(run_process):
    done = run_process(
        *("bench", "step", "v2_in1k_atto", "--batch", 2, "--size", 32, "--device", "cpu"),
        *("--steps", 2, "--rounds", 2, "--against", "timm,timm-eager,torchvision", "--json"),
    )

    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    rates = {rate["system"]: rate for rate in report["rates"]}
    assert set(rates) == {"convnext", "timm", "timm-eager"}
    assert list(report["failed"]) == ["torchvision"]
    assert [pair["peer"] for pair in report["ratios"]] == ["timm", "timm-eager"]
    for rate in rates.values():
        assert 0 < rate["low"] <= rate["images_per_second"] <= rate["high"]
        assert 0 < rate["loss"] < 20
        assert rate["peak_bytes"] is None
    assert report["flops_per_image"] == pytest.approx(6 * 0.55e9 / 49, rel=0.05)
    assert (report["images"], report["precision"], report["compiled"]) == (2, "fp32", False)


def test_torchvision_takes_the_same_steps(run_process):
    done = run_process(
        *("bench", "step", "in1k_tiny", "--batch", 2, "--size", 32, "--device", "cpu"),
        *("--steps", 1, "--rounds", 1, "--against", "torchvision", "mix.cutmix=null"),
    )

    assert done.exit_code == 0, done.stderr
    assert "torchvision" in done.stderr.split("times as fast")[1]
    assert "left out" not in done.stderr


def test_a_step_of_several_passes_is_refused(run_cli):
    done = run_cli("bench", "step", "in1k_tiny", "--batch", "8", "batch.per_device_images=4")

    assert done.exit_code == 2
    assert "measured as one pass" in done.stderr
