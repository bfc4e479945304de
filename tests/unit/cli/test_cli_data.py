"""`convnext data pack` and `check`, as a person types them."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from convnext_cli.data.card import read_card


def test_pack_says_what_it_wrote_and_what_to_do_next(run_cli, image_folder, tmp_path):
    done = run_cli("data", "pack", image_folder, "packed", "--workers", 1)

    assert (done.exit_code, done.stdout) == (0, "")
    assert f"{image_folder}: class folders" in done.stderr
    assert "train 48 3 1 " in " ".join(done.stderr.split())
    for command in ("data check packed", "data show packed", "train small_data --data packed"):
        assert f"convnext {command}" in done.stderr
    assert (tmp_path / "packed" / "dataset.json").is_file()


def test_commands_to_paste_hold_a_path_with_a_space_as_one_word(run_cli, image_folder, tmp_path):
    done = run_cli("data", "pack", image_folder, "packed odd", "--workers", 1)
    other = run_cli("data", "pack", image_folder / "train", "packed odd", "--seed", 1)

    for command in ("data check", "data show", "train small_data --data"):
        assert f"convnext {command} 'packed odd'\n" in done.stderr
    assert "rm -r 'packed odd'\n" in other.stderr


def test_pack_writes_json_to_stdout_alone(run_cli, image_folder, tmp_path):
    folder = image_folder / "train"
    (folder / "disc" / "empty.jpg").touch()
    options = ("--val-fraction", 0.2, "--images-per-shard", 20, "--resize-short", 16, "--seed", 3)

    done = run_cli("data", "pack", folder, "packed", *options, "--workers", 1, "--json")

    told = json.loads(done.stdout)
    assert done.exit_code == 0
    assert told["kind"] == "folders"
    assert told["classes"] == 3
    assert sum(told["images"].values()) == 48
    assert told["shards"]["train"] == -(-told["images"]["train"] // 20)
    assert told["unreadable"] == 1
    with tarfile.open(tmp_path / "packed" / "train-000000.tar") as tar:
        image = tar.extractfile(next(m for m in tar if m.name.endswith(".jpg")))
        with Image.open(io.BytesIO(image.read())) as packed:
            assert packed.size == (20, 16)


def test_pack_says_when_nothing_is_there_to_measure_accuracy_on(run_cli, image_folder):
    without = run_cli("data", "pack", image_folder / "train", "without", "--workers", 1)
    with_some = run_cli("data", "pack", image_folder, "with", "--workers", 1)
    plan = run_cli(
        "plan", "small_data", "--data", "without", "batch.global_images=48", "optim.lr_rule=none"
    )

    assert "no validation images: accuracy will not be measured; to set some" in without.stderr
    assert "no validation images" not in with_some.stderr
    assert "without: 48 training, no validation images: accuracy will not" in plan.stderr


def test_pack_points_to_what_was_left_out(run_cli, image_folder):
    (image_folder / "train" / "disc" / "empty.jpg").touch()

    done = run_cli("data", "pack", image_folder, "packed", "--workers", 1)

    assert "1 files were left out; see packed/unreadable.csv" in done.stderr


def test_the_same_command_again_says_that_all_was_done(run_cli, image_folder):
    command = ("data", "pack", image_folder, "packed", "--workers", 1)
    run_cli(*command)

    done = run_cli(*command)

    assert done.exit_code == 0
    assert "2 shards were finished before" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("pack", "absent", "out"), "error: there is no absent"),
        (("pack", ".", "out", "--val-fraction", "2"), "is not between 0 and 1"),
        (("check", "absent"), "error: there is no folder absent"),
        (("check", "."), "holds no dataset.json"),
    ],
)
def test_a_mistake_is_one_sentence_a_hint_and_exit_code_2(run_cli, arguments, sentence):
    done = run_cli("data", *arguments)

    assert (done.exit_code, done.stdout) == (2, "")
    assert sentence in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr


def test_check_of_sound_data_tells_totals_and_ends_well(run_cli, tiny_shards):
    done = run_cli("data", "check", tiny_shards, "--deep")

    assert (done.exit_code, done.stdout) == (0, "")
    assert "3 classes" in done.stderr
    assert "40..40 (40)" in done.stderr
    assert "every byte and every image is as it was packed" in done.stderr


def test_check_of_damaged_data_gives_json_and_exit_code_2(run_cli, image_folder, tmp_path):
    run_cli("data", "pack", image_folder, "packed", "--workers", 1)
    shard = tmp_path / "packed" / "val-000000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)

    done = run_cli("data", "check", "packed", "--json")

    assert done.exit_code == 2
    assert json.loads(done.stdout)["damage"] == [
        {
            "where": "val-000000.tar",
            "what": "its bytes are not those that were packed (sha256)",
        },
        {
            "where": "val-000000.tar",
            "what": "val/cross/004: its bytes are not those that were indexed",
        },
    ]
    assert "error: packed is damaged: val-000000.tar" in done.stderr


def test_check_warns_of_images_that_are_in_train_and_val(run_cli, image_folder):
    source = image_folder / "train" / "disc" / "000.jpg"
    (image_folder / "val" / "disc" / "twin.jpg").write_bytes(source.read_bytes())
    run_cli("data", "pack", image_folder, "packed", "--workers", 1)

    done = run_cli("data", "check", "packed")

    assert done.exit_code == 0
    assert "1 images of val are in train, too, such as val/disc/twin = train/disc/000" in (
        done.stderr
    )


@pytest.mark.timeout(120)
def test_ctrl_c_ends_with_75_and_the_same_command_goes_on(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "images" / name / "0.png")
        for number in range(1, 250):
            (tmp_path / "images" / name / f"{number}.png").hardlink_to(
                tmp_path / "images" / name / "0.png"
            )
    command = [sys.executable, "-m", "convnext_cli", "data", "pack", "images", "packed"]
    command += ["--workers", "2", "--images-per-shard", "10"]
    out = tmp_path / "packed"

    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    give_up = time.monotonic() + 60
    while not list(out.glob("pack-state/train-*.json")) and time.monotonic() < give_up:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
    _, stderr = process.communicate(timeout=60)
    left = {path.name for path in out.iterdir()}
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert process.returncode == 75, stderr
    assert "packing was interrupted after" in stderr
    assert "Traceback" not in stderr
    assert "dataset.json" not in left
    assert not any(name.endswith(".tmp") for name in left)
    assert again.returncode == 0, again.stderr
    assert "were finished before" in again.stderr


def test_show_makes_the_folder_of_its_sheet(run_cli, tiny_shards, tmp_path):
    options = ("--images", 2, "data.image_px=32", "--recipe", "small_data")

    done = run_cli("data", "show", tiny_shards, "--out", "new/deep/sheet.png", *options)

    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "new" / "deep" / "sheet.png").is_file()


def test_the_order_of_a_run_leaves_out_what_the_run_left_out(run_cli, tiny_shards, tmp_path):
    def samples(*options) -> list:
        return json.loads(run_cli("data", "order", tiny_shards, *options, "--json").stdout)[
            "samples"
        ]

    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("about: a test\nbatch: {global_images: 8}\n")
    plan = {"data_fingerprint": read_card(tiny_shards).fingerprint, "data_source": "packed"}
    (run / "plan.json").write_text(json.dumps(plan))
    (run / "skips.json").write_text('{"skips": [[1, 2]]}')

    of_run = [samples("--run", "a", "--step", step) for step in (0, 1)]
    plain = [samples("--global-images", 8, "--step", step) for step in (0, 3)]
    assert of_run == plain

    (run / "plan.json").write_text(json.dumps(plan | {"data_fingerprint": "0" * 64}))
    refused = run_cli("data", "order", tiny_shards, "--run", "a")
    assert refused.exit_code == 2
    assert f"the data set packed, and that is not what {tiny_shards} holds" in refused.stderr


@pytest.mark.parametrize("option", ["--seed", "--epoch", "--step"])
def test_a_number_that_no_generator_takes_is_refused(run_cli, tiny_shards, option):
    done = run_cli("data", "order", tiny_shards, "--global-images", 8, option, 2**64)

    assert done.exit_code == 2
    assert option in done.stderr


@pytest.mark.parametrize("command", ["check", "order", "show"])
def test_the_example_of_the_help_runs_on_a_small_data_set(run_cli, tiny_shards, tmp_path, command):
    (tmp_path / "packed").symlink_to(tiny_shards)
    told = " ".join(run_cli("data", command, "--help").stdout.split())
    example = told.partition("Example: convnext ")[2].partition(" Arguments:")[0]

    done = run_cli(*example.split())

    assert example.startswith(f"data {command} packed")
    assert done.exit_code == 0, done.stderr
