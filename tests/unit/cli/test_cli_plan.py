"""`convnext plan`: numbers on stdout as JSON, a table for people on stderr, mistakes with hints."""

import json
import re
import shlex

import pytest

PUBLISHED = ("plan", "in1k_tiny", "--devices", "8", "--nodes", "4")


def test_json_holds_the_published_numbers(run_cli):
    done = run_cli(*PUBLISHED, "--json")

    plan = json.loads(done.stdout)
    assert (done.exit_code, done.stderr) == (0, "")
    assert {
        key: plan[key]
        for key in (
            "steps_per_epoch", "total_steps", "warmup_steps", "accumulate_steps",
            "per_device_images", "global_images", "world_size", "parameters",
        )
    } == {
        "steps_per_epoch": 312, "total_steps": 93_600, "warmup_steps": 6_240, "accumulate_steps": 1,
        "per_device_images": 128, "global_images": 4096, "world_size": 32, "parameters": 28_589_128,
    }  # fmt: skip
    assert round(plan["gmacs"], 2) == 4.46


def test_people_read_a_table_and_stdout_stays_empty(run_cli):
    done = run_cli(*PUBLISHED)

    assert (done.exit_code, done.stdout) == (0, "")
    rows = dict(line.split(None, 1) for line in done.stderr.splitlines())
    assert rows["published"].strip() == "82.1% top-1"
    assert rows["batch"].startswith("4096 images = 128 a device x 32 devices x 1 pass")
    assert rows["steps"].startswith("93,600 (6,240 warm-up) = 300 epochs x 312 steps")
    assert rows["lr"].startswith("0.004 to 1e-06: as the recipe says")
    assert "383,385,600 images read, 1e+19 FLOP = 28.5 device-hours at" in rows["cost"]
    assert rows["cost"].rstrip().endswith("TFLOP/s: 0.89 h on 32")
    assert rows["state"].startswith("0.57 GB a device")


def test_a_piped_table_is_neither_cut_nor_filled_up(run_cli):
    done = run_cli(*PUBLISHED)

    lines = done.stderr.splitlines()
    assert "that fill no step, others every time" in done.stderr
    assert len(lines) == 17
    assert [line for line in lines if line != line.rstrip()] == []


def test_several_devices_are_shown_the_memory_of_every_strategy(run_cli):
    done = run_cli(*PUBLISHED, "compute.strategy=fsdp")
    plan = json.loads(run_cli(*PUBLISHED, "--json").stdout)

    lines = done.stderr.splitlines()[-5:]
    assert [line.split()[0] for line in lines] == ["ddp", "fsdp", "zero1", "zero2", "zero3"]
    assert [line.rstrip().endswith(", chosen") for line in lines] == [False, True] + 3 * [False]
    assert "most of it is activations" in done.stderr
    assert [memory["strategy"] for memory in plan["memory"]][:2] == ["ddp", "fsdp"]
    assert plan["memory"][0]["state"] == plan["state_bytes"] == 20 * 28_589_128
    assert plan["memory"][1]["state"] < plan["state_bytes"] / 30


def test_what_makes_a_step_cheaper_is_told_with_what_it_saves(run_cli):
    done = run_cli(
        "plan", "in1k_base", "progressive.from_px=160", "model.drop_path_kind=skip",
        "compute.fp8=true", "compute.kernels=eager",
    )  # fmt: skip

    assert done.exit_code == 0, done.stderr
    rows = {line[:9].strip(): line[11:].rstrip() for line in done.stderr.splitlines()}
    assert rows["sizes"] == (
        "160 px, 192 from step 37,440, 224 from step 74,880; evaluated at 224 px"
    )
    assert rows["drop path"] == (
        "blocks skip the images that they drop, which saves 2.64 GB of activations a device"
    )
    assert " of 160 px at a sustained 100 TFLOP/s each" in rows["loading"]
    assert rows["saved"] == "47% of the FLOP of the paper's way of training"
    assert "bf16, fp8 in 60 layers (not compiled: " in rows["cluster"]


@pytest.mark.parametrize(
    ("model", "cpus", "verdict"),
    [
        ("convnext_tiny", 16, ", and would wait 87% of the time; smaller images help: pack them"),
        ("convnext_tiny", 96, ": enough for these, but an H100 takes 2 to 4 times as many and may"),
        ("convnext_base", 192, ": enough"),
    ],
)
def test_cores_are_enough_without_a_but_where_a_fast_device_would_not_wait_either(
    run_cli, model, cpus, verdict
):
    done = run_cli(
        "plan", "in1k_tiny", "--devices", "8", "--cpus", cpus, f"model.name={model}",
        "augment.augment_on=device",
    )  # fmt: skip

    row = next(line.rstrip() for line in done.stderr.splitlines() if line.startswith("loading"))
    told = row.partition(" TFLOP/s each")[2]
    assert told == verdict if verdict == ": enough" else told.startswith(verdict)


def test_cores_of_this_machine_are_called_so_and_give_no_advice(run_cli):
    guessed = run_cli(*PUBLISHED, "data.workers=1")
    given = run_cli(*PUBLISHED, "data.workers=1", "--cpus", "1")

    told = "cores a node (as on this machine; --cpus N says a node's) load about"
    assert told in guessed.stderr
    assert "would wait" in guessed.stderr
    assert "smaller images help" not in guessed.stderr
    assert "as on this machine" not in given.stderr
    assert "smaller images help" in given.stderr


def test_the_paper_s_way_has_no_such_rows(run_cli):
    done = run_cli(*PUBLISHED)

    assert not [line for line in done.stderr.splitlines() if line.startswith(("sizes", "saved"))]
    assert "fp8" not in done.stderr


def test_one_device_is_shown_none_of_it(run_cli):
    done = run_cli("plan", "quickstart", "--device", "cpu")

    assert "zero1" not in done.stderr


def test_a_cpu_gets_no_estimate_in_device_hours(run_cli):
    done = run_cli("plan", "quickstart", "--device", "cpu")

    assert done.exit_code == 0
    assert "1 x 1 cpu, fp32" in done.stderr
    assert "device-hours" not in done.stderr


def test_flags_and_overrides_reach_the_plan(run_cli):
    done = run_cli("plan", "in1k_tiny", "optim.lr=2e-3", "--precision", "fp16", "--json")

    plan = json.loads(done.stdout)
    assert (plan["lr"], plan["precision"]) == (2e-3, "fp16")
    assert plan["recipe"]["optim"]["lr"] == 2e-3


def test_a_plan_is_named_after_the_recipe_s_file(run_cli):
    done = run_cli("plan", "recipes/in1k_tiny.yaml", "--json")

    assert json.loads(done.stdout)["name"] == "in1k_tiny"


def test_the_sizes_of_packed_data_are_used(run_cli, tiny_shards):
    done = run_cli(
        "plan", "small_data", "batch.global_images=8", "optim.lr_rule=linear",
        "--data", tiny_shards, "--json",
    )  # fmt: skip

    plan = json.loads(done.stdout)
    assert (plan["train_images"], plan["val_images"], plan["num_classes"]) == (39, 12, 3)
    assert (plan["steps_per_epoch"], plan["dropped_images"]) == (4, 7)
    assert plan["lr"] == pytest.approx(5e-4 / 8)


@pytest.mark.parametrize("folder", ["photos #2", "a: b", "*.d", "123", "null", '"q"', "[x]"])
def test_a_data_set_s_name_is_taken_as_it_is_written(run_cli, tiny_shards, tmp_path, folder):
    (tmp_path / folder).symlink_to(tiny_shards)

    done = run_cli("plan", "small_data", "--data", folder, "batch.global_images=38",
                   "batch.per_device_images=39", "optim.lr_rule=linear", "--json")  # fmt: skip

    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["data_source"] == folder


def test_an_empty_name_of_a_data_set_is_refused(run_cli):
    done = run_cli("plan", "in1k_tiny", "--data", "")

    assert (done.exit_code, done.stdout) == (2, "")
    assert "--data: the name is empty" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ("in1k_tinny", "no recipe in1k_tinny", "did you mean in1k_tiny?"),
        ("in1k_tiny optim.rl=1e-3", "no key optim.rl", "did you mean optim.lr?"),
        ("in1k_tiny optim.lr=fast", "optim.lr: should be a valid number", "--fields optim.lr"),
        ("in1k_tiny optim.lr", "section.key=value is wanted", "optim.lr=2e-3"),
        ("in1k_tiny --devices 24", "do not split over 24 devices", "use 16 devices"),
        ("in1k_tiny batch.global_images=64", "meant for 4096 images", "optim.lr_rule=linear"),
        ("in1k_tiny model.num_classes=10", "head has 10 classes", "model.num_classes=1000"),
        ("in1k_tiny schedule.length=10ep", "6240 warm-up steps", "schedule.warmup=312st"),
        ("quickstart batch.global_images=2048", "has only 1437", "batch.global_images=64"),
        ("in1k_tiny compute.strategy=horovod", "should be 'ddp', 'fsdp'", "--fields"),
        ("in1k_tiny compute.shard_group=node", "is for fsdp", "compute.strategy=fsdp"),
        ("in1k_tiny compute.strategy=zero2 --precision fp16", "no fp16", "compute.strategy=fsdp"),
        ("in1k_tiny progressive.from_px=150", "multiples of 32 px", "progressive.from_px=192"),
        ("in1k_tiny progressive.until=1", "should be less than 1", "--fields"),
        ("in1k_tiny compute.fp8=true --device cpu", "a CPU has no fast fp8", "compute.fp8=false"),
        ("small_data", "number of images is not known", "--data DIR"),
        ("small_data --data nowhere", "nowhere", "convnext data pack"),
        ("in1k_tiny data.mode=stream data.path=a.tar", "a.tar", "train_images"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_with_a_hint_and_no_data(run_cli, arguments, message, hint):
    done = run_cli("plan", *shlex.split(arguments))

    assert (done.exit_code, done.stdout) == (2, "")
    error, blank, told = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert blank == ""
    assert told.startswith("hint: ")
    assert hint in told


@pytest.mark.parametrize(
    "arguments",
    [
        "in1k_tiny model.num_classes=10",
        "in1k_tiny schedule.length=10ep",
        "in1k_tiny data.image_px=16",
        "in1k_tiny optim.min_lr=1",
        "in1k_tiny batch.global_images=64",
        "quickstart batch.global_images=2048",
        "quickstart batch.global_images=1433 optim.lr_rule=none",
        "in1k_tiny compute.channels_last=off",
        "in1k_tiny mix.mixup=off",
        "in1k_tiny compute.shard_group=node",
        "in1k_tiny compute.strategy=zero1 compute.precision=fp16",
        "in1k_tiny compute.strategy=zero3 compute.kernels=fused",
        "compare_resnet50 compute.kernels=fused",
        "in1k_tiny progressive.from_px=150",
        "in1k_tiny compute.fp8=true compute.precision=fp32",
        "in1k_tiny model.name=resnet50 model.drop_path_kind=skip",
    ],
)
def test_the_edit_that_a_hint_names_works(run_cli, arguments):
    words = shlex.split(arguments)
    hint = run_cli("plan", *words).stderr.splitlines()[2]

    edits = re.findall(r"[a-z_]+\.[a-z_0-9]+=[\w.-]+", hint)[:2]

    assert edits
    assert run_cli("plan", *words, *edits).exit_code == 0
