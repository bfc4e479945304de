"""Every shipped recipe loads, plans, and equals its published row, typed here from the papers."""

import os
import re
from pathlib import Path

import pytest

from convnext_cli.catalog.models import find_variant
from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import Plan, make_plan
from convnext_cli.recipe.files import list_recipes, load_recipe, recipes_folder

IMAGENET_1K, IMAGENET_22K = 1_281_167, 14_197_122
README = recipes_folder() / "README.md"


def plan_of(name: str, *, num_nodes: int = 4) -> Plan:
    cluster = Cluster(num_nodes=num_nodes, devices_per_node=8)
    return make_plan(load_recipe(name), cluster, name=name)


def head_of(name: str) -> str:
    """The comment that a recipe opens with, on one line."""
    text = (recipes_folder() / f"{name}.yaml").read_text()
    return re.sub(r"\n# ?", " ", text.split("\nextends", 1)[0].split("\nabout", 1)[0])


# ConvNeXt Tables 5 and 6, and the commands of the official repository:
# global batch, lr, weight decay, epochs, warm-up epochs, layer decay, mixup, cutmix, label
# smoothing, EMA, head init scale, drop path, top-1
V1 = {
    "in1k_tiny": (4096, 4e-3, 0.05, 300, 20, None, 0.8, 1.0, 0.1, 0.9999, 1.0, 0.1, 82.1),
    "in1k_small": (4096, 4e-3, 0.05, 300, 20, None, 0.8, 1.0, 0.1, 0.9999, 1.0, 0.4, 83.1),
    "in1k_base": (4096, 4e-3, 0.05, 300, 20, None, 0.8, 1.0, 0.1, 0.9999, 1.0, 0.5, 83.8),
    "in1k_large": (4096, 4e-3, 0.05, 300, 20, None, 0.8, 1.0, 0.1, 0.9999, 1.0, 0.5, 84.3),
    "in22k_tiny": (4096, 4e-3, 0.05, 90, 5, None, 0.8, 1.0, 0.1, None, 1.0, 0.0, None),
    "in22k_small": (4096, 4e-3, 0.05, 90, 5, None, 0.8, 1.0, 0.1, None, 1.0, 0.0, None),
    "in22k_base": (4096, 4e-3, 0.05, 90, 5, None, 0.8, 1.0, 0.1, None, 1.0, 0.1, None),
    "in22k_large": (4096, 4e-3, 0.05, 90, 5, None, 0.8, 1.0, 0.1, None, 1.0, 0.1, None),
    "in22k_xlarge": (4096, 4e-3, 0.05, 90, 5, None, 0.8, 1.0, 0.1, None, 1.0, 0.2, None),
    "in1k_384_base": (512, 5e-5, 1e-8, 30, 0, 0.7, None, None, 0.1, None, 0.001, 0.8, 85.1),
    "in1k_384_large": (512, 5e-5, 1e-8, 30, 0, 0.7, None, None, 0.1, None, 0.001, 0.95, 85.5),
} | {
    f"in1k_isotropic_{size}": (
        4096, 4e-3, 0.05, 300, 50, None, 0.8, 1.0, 0.1, 0.9999, 1.0, drop_path, top1,
    )
    for size, drop_path, top1 in (("small", 0.1, 79.7), ("base", 0.2, 82.0), ("large", 0.5, 82.6))
} | {
    f"in22k_in1k_{size}_{px}": (
        512, 5e-5, 1e-8, 30, 0, 0.8, None, None, 0.1, ema, 0.001, drop_path, top1,
    )
    for size, drop_path, ema, tops in (
        ("tiny", 0.0, None, (82.9, 84.1)),
        ("small", 0.1, None, (84.6, 85.8)),
        ("base", 0.2, None, (85.8, 86.8)),
        ("large", 0.3, None, (86.6, 87.5)),
        ("xlarge", 0.4, 0.9999, (87.0, 87.8)),
    )
    for px, top1 in zip((224, 384), tops, strict=True)
}  # fmt: skip

# ConvNeXt V2 Tables 8 to 13; the learning rate is the paper's base rate x batch / 256
V2 = {
    "v2_in1k_atto": (1024, 8e-4, 0.3, 600, 0, 0.9, None, None, 0.2, 0.9999, 0.001, 0.1, 76.7),
    "v2_in1k_femto": (1024, 8e-4, 0.05, 600, 0, 0.9, 0.3, 0.3, 0.2, 0.9999, 0.001, 0.0, 78.5),
    "v2_in1k_pico": (1024, 8e-4, 0.3, 600, 0, 0.9, 0.3, 0.3, 0.2, 0.9999, 0.001, 0.0, 80.3),
    "v2_in1k_nano": (1024, 8e-4, 0.3, 600, 0, 0.9, 0.5, 0.5, 0.2, 0.9999, 0.001, 0.1, 81.9),
    "v2_in1k_tiny": (1024, 3.2e-3, 0.05, 300, 40, 0.9, 0.8, 1.0, 0.1, 0.9999, 0.001, 0.2, 83.0),
    "v2_in1k_base": (1024, 2.5e-3, 0.05, 100, 20, 0.6, 0.8, 1.0, 0.1, 0.9999, 0.001, 0.1, 84.9),
    "v2_in1k_large": (1024, 2.5e-3, 0.05, 100, 20, 0.6, 0.8, 1.0, 0.1, 0.9999, 0.001, 0.2, 85.8),
    "v2_in1k_huge": (1024, 5e-3, 0.05, 50, 10, 0.75, 0.8, 1.0, 0.1, 0.9999, 0.001, 0.3, 86.3),
    "v2_in22k_nano": (4096, 4e-3, 0.05, 90, 5, 0.9, 0.8, 1.0, 0.1, None, 0.001, 0.0, None),
    "v2_in22k_tiny": (4096, 4e-3, 0.05, 90, 5, 0.9, 0.8, 1.0, 0.1, None, 0.001, 0.0, None),
    "v2_in22k_base": (4096, 4e-3, 0.05, 90, 5, 0.8, 0.8, 1.0, 0.1, None, 0.001, 0.1, None),
    "v2_in22k_large": (4096, 4e-3, 0.05, 90, 5, 0.8, 0.8, 1.0, 0.1, None, 0.001, 0.1, None),
    "v2_in22k_huge": (4096, 4e-3, 0.05, 90, 5, 0.8, 0.8, 1.0, 0.1, None, 0.001, 0.3, None),
} | {
    f"v2_in22k_in1k_{size}_{px}": (
        512, 5e-5, 1e-8, epochs, 0, decay, None, None, 0.1, ema, 0.001, drop_path, top1,
    )
    for size, epochs, decay, ema, drop_path, tops in (
        ("nano", 90, 0.9, 0.9999, 0.1, {224: 82.1, 384: 83.4}),
        ("tiny", 90, 0.9, 0.9999, 0.1, {224: 83.9, 384: 85.1}),
        ("base", 30, 0.8, 0.9999, 0.2, {224: 86.8, 384: 87.7}),
        ("large", 30, 0.8, 0.9999, 0.3, {224: 87.3, 384: 88.2}),
        ("huge", 30, 0.85, None, 0.5, {384: 88.7, 512: 88.9}),
    )
    for px, top1 in tops.items()
}  # fmt: skip

PUBLISHED = V1 | V2


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_loads_and_says_what_it_is(name):
    recipe = load_recipe(name)

    assert len(recipe.about) > 10
    assert f"convnext train {name}" in head_of(name) or f" {name} --data" in head_of(name)


@pytest.mark.parametrize("name", list_recipes())
def test_the_accuracy_of_a_recipe_is_one_that_its_model_reached_at_its_size(name):
    recipe = load_recipe(name)
    if recipe.published_top1 is None:
        return

    accuracies = find_variant(recipe.model.name).accuracies
    reached = {round(each.top1, 1) for each in accuracies if each.image_px == recipe.data.image_px}
    assert recipe.published_top1 in reached


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_equals_its_row(name):
    recipe, plan = load_recipe(name), plan_of(name)
    images = IMAGENET_22K if plan.recipe.data.dataset == "imagenet22k" else IMAGENET_1K

    assert (
        recipe.batch.global_images,
        plan.lr,
        recipe.optim.weight_decay,
        plan.epochs,
        plan.warmup_steps / plan.steps_per_epoch,
        recipe.optim.layer_decay,
        recipe.mix.mixup,
        recipe.mix.cutmix,
        recipe.mix.label_smoothing,
        recipe.ema.decay,
        recipe.model.head_init_scale,
        recipe.model.drop_path,
        recipe.published_top1,
    ) == PUBLISHED[name]
    assert plan.steps_per_epoch == images // recipe.batch.global_images
    assert recipe.optim.min_lr == 1e-6
    assert recipe.optim.betas == (0.9, 0.999)
    assert recipe.augment.rand_augment == "rand-m9-mstd0.5-inc1"
    assert recipe.augment.erasing == 0.25
    assert recipe.mix.prob == 1.0
    assert recipe.mix.switch_prob == 0.5
    assert recipe.optim.clip_norm is None


@pytest.mark.parametrize(
    ("name", "steps", "warmup"),
    [
        ("in1k_tiny", 93_600, 6_240),
        ("in1k_isotropic_base", 93_600, 15_600),
        ("in22k_large", 311_940, 17_330),
        ("in22k_in1k_base_224", 75_060, 0),
        ("in1k_384_large", 75_060, 0),
        ("v2_in1k_atto", 750_600, 0),
        ("v2_in1k_tiny", 375_300, 50_040),
        ("v2_in1k_huge", 62_550, 12_510),
        ("v2_in22k_base", 311_940, 17_330),
        ("v2_in22k_in1k_nano_224", 225_180, 0),
    ],
)
def test_a_plan_takes_the_published_number_of_steps(name, steps, warmup):
    plan = plan_of(name)

    assert (plan.total_steps, plan.warmup_steps) == (steps, warmup)


# Nodes of eight GPUs and images a GPU, from the commands of the official repositories and, where
# those have none, so that no gradients are accumulated.
CLUSTERS = (
    (r"in1k_(tiny|small|base|isotropic_small|isotropic_base)", 4, 128),
    (r"in1k_(large|isotropic_large)", 8, 64),
    (r"(v2_)?in22k_(nano|tiny|small|base|large|xlarge|huge)", 16, 32),
    (r"in1k_384_(base|large)", 2, 32),
    (r"(v2_)?in22k_in1k_(nano|tiny|small|base|large)_224", 2, 32),
    (r"(v2_)?in22k_in1k_(nano|tiny|small|base|large)_384", 4, 16),
    (r"in22k_in1k_xlarge_224", 4, 16),
    (r"in22k_in1k_xlarge_384|v2_in22k_in1k_huge_(384|512)", 8, 8),
    (r"v2_in1k_(?!huge).*", 4, 32),
    (r"v2_in1k_huge", 8, 16),
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_runs_on_its_published_cluster_without_accumulation(name):
    nodes, images = next(row[1:] for row in CLUSTERS if re.fullmatch(row[0], name))
    plan = plan_of(name, num_nodes=nodes)

    assert (plan.per_device_images, plan.accumulate_steps) == (images, 1)
    assert f"--devices 8 --nodes {nodes}" in head_of(name)


@pytest.mark.parametrize("name", sorted(set(list_recipes()) - {"quickstart", "small_data"}))
def test_the_head_of_a_recipe_tells_its_steps_cost_and_accuracy(name):
    plan = plan_of(name)

    assert f"{plan.total_steps:,} steps" in head_of(name)
    flop = re.search(r"([\d.]+e\d+) FLOP", head_of(name))
    assert flop is not None
    assert float(flop[1]) == pytest.approx(plan.train_flops, rel=0.05)
    if plan.recipe.published_top1 is not None:
        assert f"{plan.recipe.published_top1:.1f}% top-1" in head_of(name)


@pytest.mark.parametrize(
    "name", [name for name in PUBLISHED if re.match("(v2_)?in22k_(?!in1k)", name)]
)
def test_training_on_22k_has_its_classes_and_no_validation(name):
    plan = plan_of(name)

    assert (plan.num_classes, plan.train_images) == (21_841, IMAGENET_22K)
    assert (plan.eval_every_steps, plan.val_images) == (None, 0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_images_are_evaluated_as_published(name):
    recipe = load_recipe(name)

    wanted = ("center", 0.875) if recipe.data.image_px == 224 else ("warp", 0.875)
    assert (recipe.evaluate.crop, recipe.evaluate.crop_frac) == wanted


@pytest.mark.parametrize("name", PUBLISHED)
def test_layer_decay_has_its_published_form(name):
    recipe = load_recipe(name)
    if recipe.optim.layer_decay is None:
        return

    size = recipe.model.name.split("_")[1]
    single = {"atto", "femto", "pico", "nano", "huge"} | ({"tiny"} if "v2" in name else set())
    assert recipe.optim.layer_decay_kind == ("single" if size in single else "grouped")


def test_fine_tuning_starts_from_the_published_weights_and_heads():
    assert load_recipe("in22k_in1k_base_224").init.source == "raw"
    assert load_recipe("in1k_384_base").init.source == "raw"
    assert load_recipe("in1k_384_large").init.source == "ema"
    assert load_recipe("in1k_384_base").init.head == "keep"
    assert load_recipe("v2_in1k_base").init.head == "reset"
    assert load_recipe("v2_in22k_in1k_base_384").init.head == "reset"
    assert {load_recipe(name).init.weights for name in PUBLISHED} == {None}


def test_a_draw_of_mixup_is_for_as_many_images_as_a_device_had_in_the_official_command():
    published = {
        "in1k_tiny": 128, "in1k_small": 128, "in1k_base": 128, "in1k_large": 64,
        "in1k_isotropic_small": 128, "in1k_isotropic_base": 128, "in1k_isotropic_large": 64,
        "in22k_base": 32, "in22k_large": 32, "in22k_xlarge": 32,
        "v2_in1k_tiny": 32, "v2_in1k_base": 32,
    }  # fmt: skip

    assert {name: load_recipe(name).mix.group_images for name in published} == published


def test_a_comparison_trains_by_the_recipe_of_convnext_tiny():
    ours = load_recipe("in1k_tiny")
    for name in list_recipes():
        if name.startswith("compare_"):
            recipe = load_recipe(name)
            assert (recipe.optim, recipe.schedule) == (ours.optim, ours.schedule)
            assert (recipe.augment, recipe.mix, recipe.batch) == (
                ours.augment, ours.mix, ours.batch,
            )  # fmt: skip


def test_models_with_batch_norm_are_not_averaged():
    assert load_recipe("compare_resnet50").ema.decay is None
    assert load_recipe("compare_swin_tiny").ema.decay == 0.9999


def test_the_learning_rate_of_small_data_is_not_that_of_4096_images():
    recipe = load_recipe("small_data")

    assert recipe.optim.lr / recipe.batch.global_images < 1e-5
    assert recipe.model.num_classes == "auto"


def render_readme() -> str:
    lines = [
        "# Recipes",
        "",
        "Each file opens with the paper's row, the expected number, its cost and its command.",
        "`convnext recipes show NAME` writes one out whole, `convnext recipes diff A B` compares",
        "two.",
        "",
        "| recipe | what | top-1, published | steps | parameters |",
        "|---|---|---|---|---|",
    ]
    for name in list_recipes():
        recipe = load_recipe(name)
        top1 = "" if recipe.published_top1 is None else f"{recipe.published_top1:.1f}"
        steps = parameters = ""
        if recipe.data.dataset is not None:
            plan = (
                plan_of(name) if name != "quickstart" else make_plan(recipe, Cluster(), name=name)
            )
            steps, parameters = f"{plan.total_steps:,}", f"{plan.parameters:,}"
        lines.append(
            f"| [{name}]({name}.yaml) | {recipe.about} | {top1} | {steps} | {parameters} |"
        )
    return "\n".join(lines) + "\n"


def test_the_table_of_recipes_is_up_to_date():
    """`make golden` writes it."""
    if os.environ.get("CONVNEXT_GOLDEN"):
        README.write_text(render_readme())

    assert README.read_text() == render_readme()


def test_the_folder_holds_recipes_and_their_table_only():
    assert {path.suffix for path in Path(recipes_folder()).iterdir()} == {".yaml", ".md"}
