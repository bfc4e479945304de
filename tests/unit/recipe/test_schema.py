"""What a recipe may say: defaults, types, ranges and rules between keys."""

import pytest
from pydantic import ValidationError

from convnext_cli.recipe.durations import Duration
from convnext_cli.recipe.schema import Augment, Recipe


def make_recipe(**sections) -> Recipe:
    return Recipe.model_validate({"about": "a test"} | sections)


def test_the_defaults_are_the_published_recipe_of_tiny():
    recipe = make_recipe()

    assert recipe.model.name == "convnext_tiny"
    assert (recipe.batch.global_images, recipe.optim.lr, recipe.optim.weight_decay) == (
        4096, 4e-3, 0.05,
    )  # fmt: skip
    assert (recipe.schedule.length, recipe.schedule.warmup) == (
        Duration(300, "ep"),
        Duration(20, "ep"),
    )
    assert (recipe.mix.mixup, recipe.mix.cutmix, recipe.mix.label_smoothing) == (0.8, 1.0, 0.1)
    assert recipe.ema.decay == 0.9999


def test_a_recipe_cannot_be_changed():
    recipe = make_recipe()

    with pytest.raises(ValidationError, match="frozen"):
        recipe.optim.lr = 1.0  # type: ignore[misc]  # that is the test


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("optim", "lr", "4e-3"),
        ("optim", "lr", True),
        ("optim", "lr", 0),
        ("optim", "lr", float("inf")),
        ("optim", "lr", float("nan")),
        ("optim", "betas", [0.9, 1.0]),
        ("optim", "betas", [0.9]),
        ("optim", "layer_decay", 1.5),
        ("optim", "clip_norm", 0),
        ("optim", "lr_rule", "lin"),
        ("batch", "global_images", 4096.0),
        ("batch", "global_images", 0),
        ("batch", "per_device_images", "auto"),
        ("schedule", "length", 300),
        ("schedule", "length", "30min"),
        ("evaluate", "every", "30min"),
        ("ema", "decay", 1.0),
        ("compute", "channels_last", 1),
        ("compute", "precision", "fp8"),
        ("model", "drop_path", 1.0),
        ("model", "num_classes", 1),
        ("model", "name", "convnext_tinny"),
        ("data", "dataset", "imagenet"),
        ("data", "image_px", 7),
        ("data", "mean", [0.5, 0.5]),
        ("data", "std", [0.2, 0.0, 0.2]),
        ("augment", "crop_scale", [0.5, 0.1]),
        ("augment", "crop_scale", [0.5, 1.1]),
        ("augment", "crop_ratio", [1.3, 0.7]),
        ("mix", "mixup", 0),
        ("log", "trackers", ["csv", "neptune"]),
        ("log", "trackers", ["csv", "csv"]),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused(section, key, value):
    with pytest.raises(ValidationError) as caught:
        make_recipe(**{section: {key: value}})

    assert caught.value.errors()[0]["loc"][:2] == (section, key)


def test_off_is_null_and_choose_for_me_is_auto():
    recipe = make_recipe(
        mix={"mixup": None, "cutmix": None},
        ema={"decay": None},
        schedule={"warmup": None},
        optim={"clip_norm": None, "layer_decay": None},
        compute={"precision": "auto", "kernels": "auto"},
        model={"num_classes": "auto"},
    )

    assert recipe.ema.decay is None
    assert recipe.model.num_classes == "auto"


def test_checkpoints_may_be_saved_by_wall_time():
    assert make_recipe(checkpoint={"every": "30min"}).checkpoint.every == Duration(30, "min")


def test_a_head_cannot_be_mapped_from_nothing():
    with pytest.raises(ValidationError, match=r"needs init\.weights"):
        make_recipe(init={"head": "map"})

    assert make_recipe(init={"head": "map", "weights": "w.pth"}).init.head == "map"


@pytest.mark.parametrize(
    "key", [{"val_path": "val.tar"}, {"train_images": 5}, {"val_images": 5}, {"allow_pipe": True}]
)
def test_keys_of_stream_mode_are_refused_where_they_would_do_nothing(key):
    with pytest.raises(ValidationError, match=f"data.{next(iter(key))} is for data.mode=stream"):
        make_recipe(data=key)

    assert make_recipe(data={"mode": "stream"} | key).data.mode == "stream"


def test_every_key_explains_itself():
    for name, field in Recipe.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        for key, each in {name: field}.items() if inner is None else inner.items():
            assert len(each.description or "") > 10, f"{name}.{key}"


@pytest.mark.parametrize("policy", ["rand", "rand-m9-mstd0.5-inc1", "rand-n2-p0.5-mmax10-tweights"])
def test_a_policy_in_timms_notation_is_taken(policy):
    assert Augment(rand_augment=policy).rand_augment == policy


@pytest.mark.parametrize("policy", ["foo", "rand-m", "rand-m9.5", "rand-q3", "rand-mstd.5", ""])
def test_another_policy_is_refused_before_anything_starts(policy):
    with pytest.raises(ValidationError, match="a policy in timm's notation is wanted"):
        Augment(rand_augment=policy)


def test_a_path_that_no_shell_has_read_begins_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    recipe = make_recipe(data={"path": "~/images"}, init={"weights": "~/a.pt"})

    assert (recipe.data.path, recipe.init.weights) == ("/home/ada/images", "/home/ada/a.pt")
    assert make_recipe(data={"path": "s3://b/~/images"}).data.path == "s3://b/~/images"
