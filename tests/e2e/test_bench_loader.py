"""The benchmark of loaders runs at toy size, so that it is whole when somebody needs a number."""

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
