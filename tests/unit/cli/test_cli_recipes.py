"""`convnext recipes`: list, show, diff and check."""

import json

import pytest

from convnext_cli.recipe.files import list_fields, list_recipes, load_recipe


def test_the_list_names_every_recipe_with_its_published_accuracy(run_cli):
    done = run_cli("recipes", "list")

    assert (done.exit_code, done.stdout) == (0, "")
    rows = {line.split()[0]: line for line in done.stderr.splitlines()[1:]}
    assert list(rows) == list_recipes()
    assert "82.1  ConvNeXt-T, ImageNet-1K from scratch at 224 px" in rows["in1k_tiny"]
    assert "in22k_large" in rows


def test_the_list_as_json_is_data_on_stdout(run_cli):
    done = run_cli("recipes", "list", "--json")

    listed = {each["name"]: each for each in json.loads(done.stdout)}
    assert done.stderr == ""
    assert list(listed) == list_recipes()
    assert listed["in22k_in1k_xlarge_384"] == {
        "name": "in22k_in1k_xlarge_384",
        "model": "convnext_xlarge",
        "image_px": 384,
        "published_top1": 87.8,
        "about": "ConvNeXt-XL, from ImageNet-22K weights to ImageNet-1K at 384 px",
    }


def test_a_shown_recipe_can_be_saved_and_is_the_same_one(run_cli, tmp_path):
    done = run_cli("recipes", "show", "v2_in1k_huge", "optim.lr=1e-3")
    (tmp_path / "mine.yaml").write_text(done.stdout)

    assert (done.exit_code, done.stderr) == (0, "")
    assert load_recipe(tmp_path / "mine.yaml") == load_recipe("v2_in1k_huge", ["optim.lr=1e-3"])
    assert run_cli("recipes", "check", "mine.yaml").exit_code == 0


def test_a_recipe_as_json_holds_every_key(run_cli):
    done = run_cli("recipes", "show", "in1k_tiny", "--json")

    shown = json.loads(done.stdout)
    assert shown["schedule"] == {"length": "300ep", "warmup": "20ep"}
    assert shown["optim"]["clip_norm"] is None


def test_every_key_is_explained_with_its_default(run_cli):
    done = run_cli("recipes", "show", "--fields")

    rows = {line.split()[0]: line for line in done.stderr.splitlines()[1:]}
    assert list(rows) == list_fields()
    assert "0.004" in rows["optim.lr"]
    assert "Paper: 4e-3 (fine-tuning 5e-5)." in rows["optim.lr"]


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("optim.lr", ["optim.lr"]),
        ("ema", ["ema.decay"]),
        (
            "mix",
            [
                "mix.mixup",
                "mix.cutmix",
                "mix.prob",
                "mix.switch_prob",
                "mix.group_images",
                "mix.label_smoothing",
            ],
        ),
        ("seed", ["seed"]),
    ],
)
def test_a_key_or_a_section_can_be_explained_alone(run_cli, key, names):
    done = run_cli("recipes", "show", "--fields", key, "--json")

    assert list(json.loads(done.stdout)) == names


def test_a_mistyped_key_gets_the_nearest_one(run_cli):
    done = run_cli("recipes", "show", "--fields", "optim.layerdecay")

    assert done.exit_code == 2
    assert done.stderr.splitlines()[2] == "hint: did you mean optim.layer_decay?"


def test_show_asks_which_recipe(run_cli):
    done = run_cli("recipes", "show")

    assert done.exit_code == 2
    assert "convnext recipes list" in done.stderr


def test_a_difference_is_told_key_by_key(run_cli):
    done = run_cli("recipes", "diff", "in1k_tiny", "in1k_base", "--json")

    assert json.loads(done.stdout) == {
        "about": {
            "in1k_tiny": "ConvNeXt-T, ImageNet-1K from scratch at 224 px",
            "in1k_base": "ConvNeXt-B, ImageNet-1K from scratch at 224 px",
        },
        "published_top1": {"in1k_tiny": 82.1, "in1k_base": 83.8},
        "model.name": {"in1k_tiny": "convnext_tiny", "in1k_base": "convnext_base"},
        "model.drop_path": {"in1k_tiny": 0.1, "in1k_base": 0.5},
    }


def test_a_difference_reads_as_the_recipes_are_written(run_cli):
    done = run_cli("recipes", "diff", "in1k_tiny", "v2_in1k_huge")

    rows = {line.split()[0]: line.split()[1:] for line in done.stderr.splitlines()}
    assert rows["optim.layer_decay"] == ["null", "0.75"]
    assert rows["schedule.length"] == ["300ep", "50ep"]


def test_recipes_that_are_the_same_are_said_to_be(run_cli):
    done = run_cli("recipes", "diff", "in1k_tiny", "in1k_tiny")

    assert (done.exit_code, done.stderr) == (0, "in1k_tiny and in1k_tiny do not differ\n")


def test_all_shipped_recipes_hold(run_cli):
    done = run_cli("recipes", "check", "--json")

    assert done.exit_code == 0
    assert json.loads(done.stdout) == dict.fromkeys(list_recipes())


def test_a_recipe_that_does_not_hold_is_named_with_its_reason(run_cli, tmp_path):
    (tmp_path / "typo.yaml").write_text("extends: in1k_tiny\noptim:\n  rl: 1e-3\n")
    (tmp_path / "short.yaml").write_text("extends: in1k_tiny\nschedule:\n  length: 10ep\n")

    done = run_cli("recipes", "check", "in1k_tiny", "typo.yaml", "short.yaml")

    assert done.exit_code == 2
    good, typo, short, error = done.stderr.splitlines()
    assert good == "in1k_tiny: ok"
    assert "no key optim.rl" in typo
    assert "did you mean optim.lr?" in typo
    assert "6240 warm-up steps" in short
    assert error == "error: 2 of 3 recipes do not hold: typo.yaml, short.yaml"


def test_what_is_found_wrong_is_data_too(run_cli):
    done = run_cli("recipes", "check", "nowhere.yaml", "--json")

    assert done.exit_code == 2
    assert "no recipe nowhere.yaml" in json.loads(done.stdout)["nowhere.yaml"]


def test_more_than_one_key_to_explain_is_refused_rather_than_left_out(run_cli):
    done = run_cli("recipes", "show", "--fields", "optim.lr", "optim.betas")

    assert done.exit_code == 2
    assert "found optim.betas as well" in done.stderr
    assert "hint: " in done.stderr
