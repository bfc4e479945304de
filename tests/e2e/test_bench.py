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
