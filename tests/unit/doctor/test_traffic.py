"""What is said of a measured network, and of images that are read."""

import pytest

from convnext_cli.doctor.traffic import judge_all_reduce, read_shards


@pytest.mark.parametrize(
    ("backend", "rate", "level"),
    [("nccl", 2e11, "ok"), ("nccl", 1e9, "warning"), ("gloo", 1e9, "ok"), ("gloo", 1e6, "warning")],
)
def test_a_network_is_judged_by_its_largest_exchange(backend, rate, level):
    finding = judge_all_reduce(
        [(1 << 20, 0.01, 1.0), (64 << 20, 0.5, rate)], ranks=16, backend=backend
    )

    assert finding.level == level
    assert finding.found.startswith(f"16 ranks over {backend}: 1 MiB in 10.0 ms")


def test_shards_are_read_and_damage_is_named(tiny_shards, tmp_path):
    train, val = read_shards(str(tiny_shards), cache_dir=tmp_path, images=4)

    assert (train.level, val.level) == ("ok", "ok")
    assert train.found.startswith("train: 4 of ")


def test_a_folder_without_a_data_set_is_a_problem(tmp_path):
    (finding,) = read_shards(str(tmp_path), cache_dir=tmp_path, images=4)

    assert finding.level == "problem"
    assert finding.advice
