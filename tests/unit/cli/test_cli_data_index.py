import json
import shutil

import fsspec
import pytest

from convnext_cli.data.card import read_card
from convnext_cli.recipe.schema import expand_home_text


@pytest.fixture
def foreign(tiny_shards, tmp_path):
    """Shards without an index."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    for shard in tiny_shards.glob("*.tar"):
        shutil.copy(shard, folder)
    return folder


def test_shards_are_indexed_checked_and_ready_to_train(run_cli, foreign, tmp_path):
    done = run_cli("data", "index", foreign, "--out", tmp_path / "out", "--workers", 1)

    assert done.exit_code == 0, done.stderr
    assert f"convnext train small_data --data {tmp_path / 'out'}" in done.stderr
    assert run_cli("data", "check", tmp_path / "out", "--deep").exit_code == 0
    order = run_cli("data", "order", tmp_path / "out", "--global-images", 8, "--step", 2, "--json")
    assert len(json.loads(order.stdout)["samples"]) == 8


def test_a_home_folder_that_no_shell_has_read_is_named_so_that_it_can_be_pasted(
    run_cli, foreign, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))

    done = run_cli("data", "index", foreign, "--out=~/out", "--workers", 1)

    assert f"convnext data check {tmp_path}/out\n" in done.stderr
    assert expand_home_text("~/out") == str(tmp_path / "out")
    assert expand_home_text("s3://~/out") == "s3://~/out"


def test_the_same_command_again_reads_nothing(run_cli, foreign, tmp_path):
    command = ("data", "index", foreign, "--out", tmp_path / "out", "--json")
    first = json.loads(run_cli(*command).stdout)

    again = json.loads(run_cli(*command).stdout)

    assert (first["reused_shards"], again["reused_shards"]) == (0, 4)
    assert again["fingerprint"] == first["fingerprint"]


def test_what_is_printed_for_shards_elsewhere_can_be_pasted(run_cli, foreign, tmp_path):
    memory = fsspec.filesystem("memory")
    for shard in foreign.glob("val-*.tar"):
        memory.pipe(f"/elsewhere/{shard.name}", shard.read_bytes())

    done = run_cli("data", "index", "memory://elsewhere", "--out", tmp_path / "out")

    assert f"convnext data check {tmp_path / 'out'}" in done.stderr
    assert "convnext train" not in done.stderr  # it has nothing to train on
    checked = run_cli("data", "check", tmp_path / "out")
    assert checked.exit_code == 0, checked.stderr


def test_folders_named_train_and_val_are_the_splits(run_cli, foreign, tmp_path):
    for name in ("train", "val"):
        (foreign / name).mkdir()
        shutil.move(foreign / f"{name}-000000.tar", foreign / name / "0.tar")

    done = run_cli(
        *("data", "index", foreign / "train", foreign / "val", "--out", tmp_path / "out", "--json")
    )

    assert json.loads(done.stdout)["images"] == {"train": 16, "val": 12}


def test_test_shards_beside_validation_shards_are_left_out_and_told(run_cli, foreign, tmp_path):
    shutil.copy(foreign / "train-000002.tar", foreign / "test-000000.tar")

    done = run_cli("data", "index", foreign, "--out", tmp_path / "out", "--workers", 1)

    assert "not indexed: 1 test shards (name them with --val)" in done.stderr
    assert {shard.name for shard in read_card(tmp_path / "out").splits["val"].shards} == {
        "val-000000.tar"
    }


def test_what_is_refused_leaves_no_folder(run_cli, tmp_path):
    (tmp_path / "train-0.tar").write_bytes(b"")

    done = run_cli("data", "index", tmp_path / "train-0.tar", "--out", tmp_path / "out")

    assert done.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_shards_of_a_folder_can_be_named_for_validation(run_cli, foreign, tmp_path):
    val = foreign / "train-000001.tar"

    done = run_cli("data", "index", foreign, "--val", val, "--out", tmp_path / "out", "--json")

    assert json.loads(done.stdout)["images"] == {"train": 35, "val": 16}


def test_the_index_of_our_own_shards_is_the_packers(run_cli, foreign, tiny_shards, tmp_path):
    names = tmp_path / "names"
    names.write_text("cross\ndisc\nsquare\n")

    done = run_cli(
        *("data", "index", foreign, "--out", tmp_path / "out", "--classes", names, "--json"),
        *("--workers", 2),
    )

    report = json.loads(done.stdout)
    assert report["images"] == {"train": 39, "val": 12}
    assert (
        report["fingerprint"]
        == json.loads((tiny_shards / "dataset.json").read_text())["fingerprint"]
    )
    for index in tiny_shards.glob("*.npz"):
        assert (tmp_path / "out" / index.name).read_bytes() == index.read_bytes()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--label", "pickle"), "labels are in cls, txt or json:FIELD"),
        (("--classes", "absent.txt"), "--classes absent.txt cannot be read"),
    ],
)
def test_what_cannot_be_is_one_sentence(run_cli, foreign, tmp_path, more, told):
    done = run_cli("data", "index", foreign, "--out", tmp_path / "out", *more)

    assert done.exit_code == 2
    assert told in done.stderr


def test_the_order_of_a_step_names_the_images_of_one_device(run_cli, tiny_shards):
    command = ("data", "order", tiny_shards, "--global-images", 8, "--epoch", 1, "--step", 3)

    whole = json.loads(run_cli(*command, "--json").stdout)
    shares = [
        json.loads(run_cli(*command, "--world", 4, "--rank", rank, "--json").stdout)["samples"]
        for rank in range(4)
    ]

    assert [sample for share in shares for sample in share] == whole["samples"]
    assert whole["samples"][0]["key"].startswith("train-00000")
    assert (whole["epoch"], whole["step"], whole["order"]) == (1, 3, "full")
    assert "of 4 images" not in run_cli(*command).stderr
    assert "8 images" in run_cli(*command).stderr


def test_steps_of_a_run_may_be_counted_through(run_cli, tiny_shards):
    command = ("data", "order", tiny_shards, "--global-images", 8, "--json")

    assert (
        run_cli(*command, "--step", 7).stdout == run_cli(*command, "--epoch", 1, "--step", 3).stdout
    )


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--epoch", 0, "--step", 9), "epochs have 4 steps"),
        (("--world", 3, "--rank", 1), "world sizes that can: 1, 2, 4, 8"),
        (("--world", 3), "a world of 3 cannot share global batches of 8 images"),
        (("--world", 4, "--rank", 4), "no rank 4 in a world of 4: ranks count from 0, here 0 to 3"),
        (("--rank", 1), "no rank 1 in a world of 1: ranks count from 0, here 0 alone"),
        (("--global-images", 100), "fewer than one global batch"),
    ],
)
def test_an_order_that_cannot_be_is_one_sentence(run_cli, tiny_shards, more, told):
    done = run_cli("data", "order", tiny_shards, "--global-images", 8, *more)

    assert done.exit_code == 2
    assert told in done.stderr
