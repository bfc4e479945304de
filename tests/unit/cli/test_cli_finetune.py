"""The recipe that fine-tuning chooses, as a function of checkpoint and data."""

import itertools

import pytest
import torch

from convnext_cli.catalog.datasets import imagenet1k_wnids, imagenet22k_wnids
from convnext_cli.catalog.models import VARIANTS, find_variant
from convnext_cli.cli import finetune as finetuning
from convnext_cli.cli.finetune import (
    Start,
    TargetData,
    choose_recipe,
    find_override,
    fit_recipe,
    read_target,
)
from convnext_cli.data.card import DatasetCard, write_card
from convnext_cli.errors import CheckpointError, DataError, RecipeError
from convnext_cli.models.build import build_model
from convnext_cli.models.convnext import build_convnext
from convnext_cli.models.weights import CARD_KEY
from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import DataFacts, make_plan
from convnext_cli.recipe.files import list_recipes, load_recipe
from convnext_cli.runs.layout import RunDir
from convnext_cli.training.fit import load_start_weights, make_card

IN1K = TargetData(kind="imagenet1k", classes=imagenet1k_wnids())
IN22K = TargetData(kind="imagenet22k", classes=imagenet22k_wnids())
CATS = TargetData(kind="own", classes=("lion", "lynx", "puma"))


def start(name: str, num_classes: int | None, **more: object) -> Start:
    return Start(variant=find_variant(name), num_classes=num_classes, **more)


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large", "xlarge"])
@pytest.mark.parametrize("image_px", [224, 384])
def test_an_official_22k_head_on_imagenet_1k_takes_the_published_recipe(size: str, image_px: int):
    choice = choose_recipe(
        start(f"convnext_{size}", 21_841), IN1K, overrides=[f"data.image_px={image_px}"]
    )

    assert choice.recipe == f"in22k_in1k_{size}_{image_px}"
    assert "21,841 classes" in choice.reason


def test_without_a_word_on_the_size_224_px_are_taken():
    choice = choose_recipe(start("convnext_base", 21_841), IN1K)

    assert choice.recipe == "in22k_in1k_base_224"


@pytest.mark.parametrize("size", ["base", "large"])
def test_a_1k_model_goes_to_384_px_when_asked(size: str):
    choice = choose_recipe(start(f"convnext_{size}", 1000), IN1K, overrides=["data.image_px=384"])

    assert choice.recipe == f"in1k_384_{size}"


@pytest.mark.parametrize("size", ["atto", "femto", "pico", "nano", "tiny", "base", "large", "huge"])
def test_a_masked_autoencoder_takes_the_v2_recipe_of_its_size(size: str):
    choice = choose_recipe(start(f"convnextv2_{size}", None), IN1K)

    assert choice.recipe == f"v2_in1k_{size}"


@pytest.mark.parametrize("size", ["nano", "tiny", "base", "large", "huge"])
def test_a_v2_with_a_22k_head_takes_the_recipe_after_it(size: str):
    choice = choose_recipe(start(f"convnextv2_{size}", 21_841), IN1K)

    assert choice.recipe.startswith(f"v2_in22k_in1k_{size}_")


def test_own_images_take_small_data_with_the_checkpoints_shape():
    choice = choose_recipe(
        start("convnextv2_atto", 10, image_px=32, classes=tuple("abcdefghij")), CATS
    )

    assert choice.recipe == "small_data"
    assert {"model.name=convnextv2_atto", "data.image_px=32", "init.head=reset"} <= set(
        choice.overrides
    )
    assert "3 classes" in choice.reason


def test_the_head_is_kept_where_the_classes_are_the_same():
    choice = choose_recipe(start("convnextv2_atto", 3, classes=CATS.classes), CATS)

    assert "init.head=keep" in choice.overrides


def test_as_many_classes_of_unknown_name_do_not_keep_the_head():
    choice = choose_recipe(start("convnext_tiny", 3), CATS)

    assert "init.head=reset" in choice.overrides


@pytest.mark.parametrize(("num_classes", "target"), [(1000, IN1K), (21_841, IN22K)])
def test_a_published_head_is_kept_on_the_data_set_that_it_was_trained_on(num_classes, target):
    choice = choose_recipe(start("convnextv2_small", num_classes), target)

    assert "init.head=keep" in choice.overrides
    assert "its head is kept" in choice.reason


def test_a_1k_model_of_another_kind_says_that_nothing_is_published():
    choice = choose_recipe(start("convnext_tiny", 1000), IN1K)

    assert choice.recipe == "small_data"
    assert "no published recipe" in choice.reason


@pytest.mark.parametrize(("image_px", "crop"), [(224, "center"), (384, "warp"), (512, "warp")])
@pytest.mark.parametrize("num_classes", [None, 1000, 21_841])
def test_whatever_is_chosen_is_evaluated_as_published_for_the_size(num_classes, image_px, crop):
    asked = [f"data.image_px={image_px}"]

    choice = choose_recipe(start("convnextv2_tiny", num_classes), IN1K, overrides=asked)

    recipe = load_recipe(choice.recipe, [*choice.overrides, *asked, "init.weights=x"])
    assert (recipe.data.image_px, recipe.evaluate.crop) == (image_px, crop)


@pytest.mark.parametrize("num_classes", [1000, 21_841])
def test_images_are_normalised_as_the_checkpoint_knows_them(num_classes):
    half = (0.5, 0.5, 0.5)

    choice = choose_recipe(start("convnext_tiny", num_classes, mean=half, std=half), IN1K)

    data = load_recipe(choice.recipe, [*choice.overrides, "init.weights=x"]).data
    assert (data.mean, data.std) == (half, half)


@pytest.mark.parametrize("name", ["small_data", "in1k_tiny"])
def test_a_named_recipe_normalises_as_the_checkpoint_knows_it_unless_it_says_how(name):
    half, own = (0.5, 0.5, 0.5), ("data.std=[0.2,0.2,0.2]",)

    choice = fit_recipe(name, start("convnext_tiny", 3, mean=half, std=half), overrides=own)

    data = load_recipe(name, [*choice.overrides, *own]).data
    assert (data.mean, data.std) == (half, (0.2, 0.2, 0.2))
    assert not any(override.startswith("data.std") for override in choice.overrides)


def list_choices() -> dict[tuple[str, str], list[str]]:
    """(recipe, architecture) of every choice there can be, with the overrides of one of them."""
    choices = {}
    for variant, num_classes, target, px in itertools.product(
        [variant for variant in VARIANTS.values() if variant.family != "timm"],
        [None, 3, 1000, 21_841],
        [IN1K, IN22K, CATS],
        [None, 224, 288, 384, 512],
    ):
        asked = [] if px is None else [f"data.image_px={px}"]
        choice = choose_recipe(
            Start(variant=variant, num_classes=num_classes), target, overrides=asked
        )
        choices[choice.recipe, variant.name] = [*choice.overrides, *asked]
    return choices


def test_every_choice_is_a_shipped_recipe_that_plans_the_checkpoints_architecture():
    for (name, architecture), overrides in list_choices().items():
        recipe = load_recipe(name, [*overrides, "init.weights=x"])
        assert recipe.model.name == architecture
        asked = recipe.model.num_classes
        facts = DataFacts(
            train_images=100_000,
            val_images=100,
            num_classes=asked if isinstance(asked, int) else 10,
            source="test",
        )
        make_plan(recipe, Cluster(), name=name, facts=facts)


def test_every_published_fine_tuning_recipe_is_chosen_for_something():
    published = {name for name in list_recipes() if "_in1k_" in name or name.startswith("v2_in22k")}

    assert {name for name, _ in list_choices()} == published | {
        "in1k_384_base",
        "in1k_384_large",
        "small_data",
    }


def test_a_comparison_model_cannot_be_a_start():
    with pytest.raises(CheckpointError, match="resnet50"):
        choose_recipe(start("resnet50", 1000), IN1K)


def test_a_published_recipe_refuses_another_architecture():
    with pytest.raises(RecipeError, match="convnext_tiny") as caught:
        fit_recipe("in22k_in1k_base_224", start("convnext_tiny", 21_841))

    hint = caught.value.hint or ""
    fixed = hint.rpartition(": ")[2]
    assert (
        fit_recipe("in22k_in1k_base_224", start("convnext_tiny", 21_841), overrides=[fixed]).recipe
        == "in22k_in1k_base_224"
    )


def test_small_data_takes_the_checkpoints_architecture():
    choice = fit_recipe("small_data", start("convnextv2_pico", 1000))

    assert choice.overrides == ("model.name=convnextv2_pico",)


def test_the_last_override_counts():
    overrides = ["data.image_px=64", "optim.lr=1e-3", "data.image_px=96"]

    assert find_override("data.image_px", overrides) == 96
    assert find_override("model.name", overrides) is None


def test_a_data_set_is_known_by_its_classes(tmp_path):
    for name, classes in (("in1k", imagenet1k_wnids()), ("cats", CATS.classes)):
        (tmp_path / name).mkdir()
        write_card(DatasetCard(classes=classes, splits={}, options={}), tmp_path / name)

    assert read_target(str(tmp_path / "in1k"), []).kind == "imagenet1k"
    assert read_target(None, [f"data.path={tmp_path / 'cats'}"]) == CATS


def test_without_a_data_set_nothing_can_be_chosen():
    with pytest.raises(DataError, match="no data set"):
        read_target(None, [])


def test_a_head_can_be_mapped_from_a_checkpoint(run_cli, tmp_path, monkeypatch):
    model = build_convnext(find_variant("convnextv2_atto"), num_classes=21_841)
    torch.save({"model": model.state_dict()}, tmp_path / "x.pth")
    write_card(DatasetCard(classes=imagenet1k_wnids(), splits={}, options={}), tmp_path)
    begun = []
    monkeypatch.setattr(finetuning, "run_training", lambda recipe, **more: begun.append(recipe))

    done = run_cli("finetune", "--from", "x.pth", "--data", tmp_path, "--map-head")

    assert done.exit_code == 0, done.stderr
    assert (begun[0].init.weights, begun[0].init.head) == ("x.pth", "map")


def test_a_run_that_finds_a_better_checkpoint_meanwhile_asks_for_no_other_recipe(
    run_cli, tmp_path, monkeypatch
):
    model = build_convnext(find_variant("convnextv2_atto"), num_classes=3)
    run = RunDir(tmp_path / "source")
    run.checkpoints.mkdir(parents=True)
    run.recipe.touch()
    run.plan.touch()
    torch.save({"model": model.state_dict()}, run.last)
    write_card(DatasetCard(classes=CATS.classes, splits={}, options={}), tmp_path)
    begun = []
    monkeypatch.setattr(finetuning, "run_training", lambda recipe, **more: begun.append(recipe))

    before = run_cli("finetune", "--from", f"{run.root}/", "--data", tmp_path)
    run.best.symlink_to(run.last.name)
    after = run_cli("finetune", "--from", run.root, "--data", tmp_path)

    assert (before.exit_code, after.exit_code) == (0, 0), after.stderr

    assert begun[0] == begun[1]
    facts = DataFacts(train_images=99, val_images=0, num_classes=3, source="packed")
    plan = make_plan(begun[0], Cluster(), name="x", facts=facts)
    assert f"from {run.best}" in load_start_weights(build_model(plan), plan, classes=CATS.classes)


@pytest.mark.parametrize("head", ["keep", "reset"])
def test_weights_that_are_not_finite_are_no_start_unless_they_are_left_out(tmp_path, head):
    model = build_convnext(find_variant("convnextv2_atto"), num_classes=3)
    model.head.bias.data[0] = torch.nan
    torch.save({"model": model.state_dict()}, tmp_path / "x.pth")
    asked = [f"init.weights={tmp_path / 'x.pth'}", f"init.head={head}", "model.num_classes=3"]
    plan = make_plan(
        load_recipe("small_data", ["model.name=convnextv2_atto", *asked]),
        Cluster(),
        name="x",
        facts=DataFacts(train_images=99, val_images=0, num_classes=3, source="packed"),
    )

    if head == "reset":
        load_start_weights(build_model(plan), plan, classes=CATS.classes)
    else:
        with pytest.raises(CheckpointError, match="1 of its values are NaN or infinite"):
            load_start_weights(build_model(plan), plan, classes=CATS.classes)


def test_other_normalisation_than_the_weights_know_is_told(tmp_path):
    asked = ["model.name=convnextv2_atto", f"init.weights={tmp_path / 'x.pth'}"]
    facts = DataFacts(train_images=99, val_images=0, num_classes=3, source="packed")
    plans = [
        make_plan(load_recipe("small_data", [*asked, *own]), Cluster(), name="x", facts=facts)
        for own in ([], ["data.mean=[0.5,0.5,0.5]"])
    ]
    model = build_model(plans[0])
    card = make_card(plans[1], classes=CATS.classes)
    torch.save({"state_dict": model.state_dict(), CARD_KEY: card.to_dict()}, tmp_path / "x.pth")

    told, same = (load_start_weights(model, plan, classes=CATS.classes) for plan in plans)

    assert "normalised with data.mean=[0.5, 0.5, 0.5] data.std=[0.229, 0.224, 0.225]" in told
    assert "normalised" not in same


def test_a_run_whose_start_is_gone_is_told_how_to_go_on(run_cli, tmp_path):
    run = RunDir(tmp_path / "runs" / "mine")
    run.root.mkdir(parents=True)
    run.recipe.write_text("about: begun\n")
    run.plan.write_text("{}\n")

    done = run_cli("finetune", "--from", "gone.pth", "--data", "shards", "--name", "mine")

    assert done.exit_code == 2
    assert "convnext train runs/mine/recipe.yaml --name mine --runs-dir runs" in done.stderr
