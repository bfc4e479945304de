"""Every derived number of a plan, and what does not fit together."""

import dataclasses
import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from convnext_cli.catalog.models import find_variant
from convnext_cli.errors import PlanError, RecipeError
from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import DataFacts, Plan, make_plan
from convnext_cli.recipe.files import list_recipes, load_recipe

PHOTOS = DataFacts(train_images=3000, val_images=300, num_classes=7, source="photos")
FOUR_NODES = Cluster(num_nodes=4, devices_per_node=8, cpus_per_node=96)


def plan_of(
    *overrides: str,
    recipe: str = "in1k_tiny",
    cluster: Cluster = FOUR_NODES,
    facts: DataFacts | None = None,
) -> Plan:
    return make_plan(load_recipe(recipe, overrides), cluster, name=recipe, facts=facts)


def follow(hint: str | None, *overrides: str, facts: DataFacts | None = None,
           cluster: Cluster = FOUR_NODES, recipe: str = "in1k_tiny") -> Plan:  # fmt: skip
    """Plan again with the overrides that a hint names."""
    named = re.findall(r"[a-z_]+\.[a-z_0-9]+=\S+", hint or "")
    assert named, hint
    return plan_of(*overrides, *named, facts=facts, cluster=cluster, recipe=recipe)


def test_the_paper_s_recipe_takes_93_600_steps_on_four_nodes():
    plan = plan_of()

    assert (plan.steps_per_epoch, plan.total_steps, plan.warmup_steps) == (312, 93_600, 6_240)
    assert (plan.per_device_images, plan.accumulate_steps, plan.world_size) == (128, 1, 32)
    assert plan.dropped_images == 1_281_167 - 312 * 4096
    assert (plan.parameters, round(plan.gmacs, 2)) == (28_589_128, 4.46)
    assert plan.images_read == 93_600 * 4096
    assert plan.train_flops == pytest.approx(1.025e19, rel=1e-3)
    assert plan.state_bytes == 28_589_128 * 20
    assert (plan.eval_per_device_images, plan.eval_every_steps) == (192, 312)


def test_fewer_devices_accumulate_more():
    one = plan_of(cluster=Cluster(num_nodes=1, devices_per_node=8))

    assert (one.per_device_images, one.accumulate_steps) == (128, 4)
    assert one.batch_equation == "4096 images = 128 a device x 8 devices x 4 passes"
    assert plan_of().batch_equation == "4096 images = 128 a device x 32 devices x 1 pass"


def test_more_devices_take_fewer_images_each():
    plan = plan_of(cluster=Cluster(num_nodes=8, devices_per_node=8))

    assert (plan.per_device_images, plan.accumulate_steps) == (64, 1)


@given(world=st.integers(1, 512), images=st.integers(1, 8192), limit=st.integers(1, 512))
@example(world=2, images=5, limit=1)
@settings(max_examples=60)
def test_the_batch_equation_holds_or_the_batch_is_refused(world, images, limit):
    overrides = (
        f"batch.global_images={images}",
        f"batch.per_device_images={limit}",
        "optim.lr_rule=none",
    )
    cluster = Cluster(devices_per_node=world)
    plan, refusal = None, ""
    try:
        plan = plan_of(*overrides, cluster=cluster)
    except PlanError as error:
        refusal = str(error)

    if plan is None:
        assert "batch.global_images" in refusal or "batch.per_device_images" in refusal
        return
    assert plan.per_device_images * world * plan.accumulate_steps == images
    assert plan.per_device_images <= limit
    assert plan.per_device_images % 2 == 0  # mixing pairs neighbours


@pytest.mark.parametrize(
    ("images", "nodes", "devices", "fewer"),
    [(4096, 1, 5, 4), (4096, 1, 24, 16), (4096, 2, 7, 4), (4096, 3, 8, None), (1000, 8, 8, None)],
)
def test_a_batch_that_does_not_split_names_one_that_does_and_devices_of_each_node(
    images, nodes, devices, fewer
):
    settings = (f"batch.global_images={images}", "optim.lr_rule=none")
    cluster = Cluster(num_nodes=nodes, devices_per_node=devices)
    with pytest.raises(PlanError, match=f"do not split over {nodes * devices} devices") as caught:
        plan_of(*settings, cluster=cluster)

    hint = caught.value.hint or ""
    assert follow(hint, *settings, cluster=cluster).global_images <= images
    if fewer is not None:
        assert hint.startswith(f"use {fewer} devices on each node, or use another batch: ")
        few = Cluster(num_nodes=nodes, devices_per_node=fewer)
        assert plan_of(*settings, cluster=few).global_images == images


@pytest.mark.parametrize(
    ("nodes", "devices", "hint"),
    [
        (1, 5000, "use 2048 devices on each node"),
        (10**9, 8, "use 2048 devices at most"),
    ],
)
def test_more_devices_than_pairs_of_images_are_refused(nodes, devices, hint):
    with pytest.raises(PlanError, match="do not split over") as caught:
        plan_of(cluster=Cluster(num_nodes=nodes, devices_per_node=devices))

    assert caught.value.hint == hint


@pytest.mark.parametrize("rule", ["null", "none"])
def test_a_batch_that_splits_into_crumbs_is_refused(rule):
    overrides = ("batch.global_images=4106", "optim.lr_images=4106", f"optim.lr_rule={rule}")
    one = Cluster()
    with pytest.raises(PlanError, match="do not split into even passes of 32 to 128") as caught:
        plan_of(*overrides, cluster=one)

    plan = follow(caught.value.hint, *overrides, cluster=one)
    assert (plan.global_images, plan.accumulate_steps) == (4092, 33)


def test_a_huge_prime_batch_is_refused_at_once():
    facts = dataclasses.replace(PHOTOS, train_images=10**13, num_classes=1000)

    with pytest.raises(PlanError, match="do not split into even passes"):
        plan_of(
            "batch.global_images=2000000000078", "optim.lr_rule=none",
            "batch.per_device_images=10000000", facts=facts, cluster=Cluster(),
        )  # fmt: skip


def test_another_batch_demands_a_rule_for_the_learning_rate_and_prints_all_three():
    with pytest.raises(PlanError, match=r"0.004 is meant for 4096 images .* is 1024") as caught:
        plan_of("batch.global_images=1024")

    hint = caught.value.hint or ""
    assert "optim.lr_rule=linear (lr 0.001)" in hint
    assert "sqrt (lr 0.002)" in hint
    assert "none (lr 0.004)" in hint


@pytest.mark.parametrize(("rule", "lr"), [("none", 4e-3), ("linear", 1e-3), ("sqrt", 2e-3)])
def test_the_learning_rate_follows_its_rule_and_the_plan_says_so(rule, lr):
    plan = plan_of("batch.global_images=1024", f"optim.lr_rule={rule}")

    assert plan.lr == pytest.approx(lr)
    assert f"lr_rule: {rule}" in plan.lr_note


def test_a_rule_does_nothing_at_the_batch_that_the_rate_was_chosen_for():
    plan = plan_of("optim.lr_rule=linear")

    assert (plan.lr, plan.lr_note) == (4e-3, "as the recipe says")


def test_the_classes_of_the_data_are_those_of_the_head_where_it_says_auto():
    assert plan_of(recipe="small_data", facts=PHOTOS, cluster=Cluster()).num_classes == 7


def test_a_head_that_does_not_fit_the_data_is_refused():
    facts = dataclasses.replace(PHOTOS, train_images=10_000)
    with pytest.raises(PlanError, match="head has 1000 classes, but photos has 7") as caught:
        plan_of(facts=facts)

    assert follow(caught.value.hint, facts=facts).num_classes == 7


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(PlanError, match=r"6240 warm-up steps \(20ep\) leave nothing") as caught:
        plan_of("schedule.length=10ep")

    plan = follow(caught.value.hint, "schedule.length=10ep")
    assert (plan.total_steps, plan.warmup_steps) == (3120, 312)


def test_a_run_of_a_few_steps_may_do_without_warm_up():
    with pytest.raises(PlanError, match="leave nothing of 3 steps") as caught:
        plan_of("schedule.length=3st")

    assert follow(caught.value.hint, "schedule.length=3st").warmup_steps == 0


def test_a_length_of_less_than_a_step_is_refused():
    with pytest.raises(PlanError, match="less than one step") as caught:
        plan_of("schedule.length=0.001ep", "schedule.warmup=null")

    assert follow(caught.value.hint, "schedule.warmup=null").total_steps == 312


@pytest.mark.parametrize("rule", ["null", "none"])
@pytest.mark.parametrize("devices", [1, 8, 24])
def test_data_smaller_than_a_batch_is_refused_with_a_batch_that_works(devices, rule):
    facts = dataclasses.replace(PHOTOS, num_classes=1000)
    cluster = Cluster(devices_per_node=devices)
    images = 4096 // devices * devices
    overrides = (f"batch.global_images={images}", f"optim.lr_images={images}",
                 f"optim.lr_rule={rule}")  # fmt: skip
    with pytest.raises(PlanError, match=f"one step takes {images} images, but photos") as caught:
        plan_of(*overrides, facts=facts, cluster=cluster)

    plan = follow(caught.value.hint, *overrides, facts=facts, cluster=cluster)
    assert plan.steps_per_epoch >= 3


@given(train=st.integers(1, 200), world=st.integers(1, 5), limit=st.integers(2, 64))
@settings(max_examples=60)
def test_the_batch_offered_for_few_images_plans_when_followed(train, world, limit):
    facts = dataclasses.replace(PHOTOS, train_images=train)
    cluster = Cluster(devices_per_node=world)
    overrides = (f"batch.global_images={960 * world}", f"batch.per_device_images={limit}")
    with pytest.raises(PlanError, match=f"has only {train} to train on") as caught:
        plan_of(*overrides, facts=facts, cluster=cluster, recipe="small_data")

    hint = caught.value.hint
    if train < world:
        assert hint == f"pack more images, or use fewer devices: {train} at most"
        return
    plan = follow(hint, *overrides, facts=facts, cluster=cluster, recipe="small_data")
    assert plan.steps_per_epoch >= 1


@pytest.mark.parametrize(("train", "offered"), [(30, 30), (31, 30), (63, 62), (2, 2)])
def test_images_too_few_for_the_batch_are_offered_as_one(train, offered):
    facts = dataclasses.replace(PHOTOS, train_images=train)
    with pytest.raises(PlanError, match="one step takes 64 images") as caught:
        plan_of(facts=facts, cluster=Cluster(), recipe="small_data")

    plan = follow(caught.value.hint, facts=facts, cluster=Cluster(), recipe="small_data")
    assert (plan.global_images, plan.recipe.mix.mixup is None) == (offered, False)


def test_where_no_even_batch_fits_the_hint_does_without_mixing():
    facts = dataclasses.replace(PHOTOS, train_images=1)
    overrides = ("batch.global_images=2", "optim.lr_rule=linear")
    with pytest.raises(PlanError, match="has only 1 to train on") as caught:
        plan_of(*overrides, facts=facts, cluster=Cluster(), recipe="small_data")

    hint = caught.value.hint or ""
    assert "pack more images, or" in hint
    plan = follow(hint, *overrides, facts=facts, cluster=Cluster(), recipe="small_data")
    assert plan.global_images == 1


def test_passes_of_an_odd_limit_are_offered_a_batch_that_is_not_empty():
    overrides = ("batch.global_images=5", "batch.per_device_images=2", "optim.lr_rule=none")
    with pytest.raises(PlanError, match="pair neighbours") as caught:
        plan_of(*overrides, cluster=Cluster())

    assert follow(caught.value.hint, *overrides, cluster=Cluster()).global_images == 4


def test_a_recipe_for_any_data_needs_the_data():
    with pytest.raises(PlanError, match="number of images is not known") as caught:
        plan_of(recipe="small_data")

    assert "--data DIR" in (caught.value.hint or "")


def test_the_least_learning_rate_is_below_the_peak():
    with pytest.raises(PlanError, match=r"min_lr 0\.01 is above") as caught:
        plan_of("optim.min_lr=0.01")

    assert follow(caught.value.hint).min_lr == 4e-6


@pytest.mark.parametrize(("name", "px"), [("convnext_tiny", 16), ("resnet50", 31),
                                          ("convnext_isotropic_small", 15)])  # fmt: skip
def test_an_image_that_is_halved_to_nothing_is_refused(name, px):
    overrides = (f"model.name={name}", f"data.image_px={px}")
    with pytest.raises(PlanError, match=f"down to nothing at {px} px") as caught:
        plan_of(*overrides)

    assert follow(caught.value.hint, *overrides).gmacs > 0


def test_a_model_of_one_image_size_refuses_another():
    with pytest.raises(RecipeError, match="swin_tiny takes images of 224 px only"):
        plan_of("data.image_px=256", recipe="compare_swin_tiny")


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("compute.gradient_checkpointing=stages", "has none, found stages"),
        ("model.drop_path_kind=skip", "drops images in its own way"),
        ("model.layer_scale_init=null", "begins as timm makes it, found null"),
        ("model.head_init_scale=0.001", "begins as timm makes it"),
    ],
)
def test_what_a_model_of_timm_would_pass_over_is_refused(asked, why):
    with pytest.raises(PlanError, match=f"resnet50 {why}") as caught:
        plan_of(asked, recipe="compare_resnet50")

    assert follow(caught.value.hint, asked, recipe="compare_resnet50").world_size == 32


def test_parameters_are_those_of_the_network_that_is_built():
    blocks_times_widths = 3 * 96 + 3 * 192 + 9 * 384 + 3 * 768

    without = plan_of("model.layer_scale_init=null")

    assert plan_of().parameters - without.parameters == blocks_times_widths


@pytest.mark.parametrize("recipe", ["in1k_tiny", "in1k_isotropic_large", "v2_in1k_tiny"])
@pytest.mark.parametrize(
    "name",
    ["convnext_tiny", "convnext_isotropic_small", "convnext_isotropic_large", "convnextv2_tiny"],
)
def test_another_architecture_is_trained_with_its_own_layer_scale(recipe, name):
    plan = plan_of(f"model.name={name}", recipe=recipe)

    assert plan.parameters == find_variant(name).parameters_1k


def test_a_gpu_computes_in_bf16_compiled_and_a_cpu_does_neither():
    gpu, cpu = plan_of(), plan_of(cluster=Cluster(device="cpu", cpus_per_node=2))

    assert (gpu.precision, gpu.compile, gpu.channels_last) == ("bf16", True, True)
    assert (cpu.precision, cpu.compile, cpu.channels_last) == ("fp32", False, False)


@pytest.mark.parametrize(
    ("overrides", "cluster", "why"),
    [
        ((), Cluster(device="cpu"), "a CPU has none"),
        (("compute.kernels=eager",), FOUR_NODES, "only a compiled network"),
        (("compute.strategy=fsdp",), FOUR_NODES, "under fsdp weights move"),
        (("compute.strategy=zero1",), FOUR_NODES, "under zero1 weights move"),
        (("model.drop_path_kind=skip",), FOUR_NODES, "what drop_path_kind=skip compiles to"),
    ],
)
def test_cuda_graphs_are_refused_where_they_cannot_be_recorded(overrides, cluster, why):
    asked = (*overrides, "compute.cuda_graphs=true")

    with pytest.raises(PlanError, match=f"compute.cuda_graphs: {why}") as caught:
        plan_of(*asked, cluster=cluster)

    assert not follow(caught.value.hint, *asked, cluster=cluster).recipe.compute.cuda_graphs
    assert plan_of("compute.cuda_graphs=true").cuda_graphs
    assert not plan_of(*overrides, cluster=cluster).cuda_graphs


def test_one_gpu_plays_cuda_graphs_where_it_can_unless_it_is_not_asked_to():
    one = Cluster(devices_per_node=1)

    assert plan_of(cluster=one).cuda_graphs
    assert not plan_of().cuda_graphs  # several GPUs send gradients while others are computed
    assert not plan_of("compute.cuda_graphs=false", cluster=one).cuda_graphs
    assert not plan_of("model.name=resnet50", cluster=one).cuda_graphs


def test_what_is_asked_goes_before_what_fits_the_device():
    plan = plan_of(
        "compute.precision=fp16", "compute.kernels=eager", "data.workers=3",
        "evaluate.per_device_images=50",
    )  # fmt: skip

    assert (plan.precision, plan.compile, plan.workers) == ("fp16", False, 3)
    assert plan.eval_per_device_images == 50


@pytest.mark.parametrize(
    ("device", "cpus", "devices", "workers"),
    [
        ("cuda", 96, 8, 11),
        ("cuda", 1, 1, 1),
        ("cuda", 256, 1, 16),
        ("cpu", 2, 1, 1),
        ("cpu", 1, 1, 0),
    ],
)
def test_loader_processes_share_the_cores_of_a_node(device, cpus, devices, workers):
    cluster = Cluster(device=device, cpus_per_node=cpus, devices_per_node=devices)

    assert plan_of(cluster=cluster).workers == workers


def test_averaged_weights_are_part_of_the_state():
    assert plan_of("ema.decay=null").state_bytes == 28_589_128 * 16


def test_the_state_is_that_of_the_chosen_strategy():
    plan = plan_of("compute.strategy=fsdp", "ema.decay=null")

    share = -(-4 * plan.parameters // 32)
    assert plan.state_bytes == 4 * share
    assert [memory.strategy for memory in plan.memory][:2] == ["ddp", "fsdp"]


def test_a_node_that_shards_among_its_own_devices_holds_more():
    plan = plan_of("compute.strategy=fsdp", "compute.shard_group=node", "ema.decay=null")

    assert plan.state_bytes == 4 * -(-4 * plan.parameters // 8)


def test_zero3_is_not_compiled():
    assert plan_of("compute.strategy=zero2").compile
    assert not plan_of("compute.strategy=zero3").compile
    with pytest.raises(PlanError, match="neither compiled nor fused") as caught:
        plan_of("compute.strategy=zero3", "compute.kernels=compile")
    assert follow(caught.value.hint, "compute.kernels=compile").kernels == "auto"


@pytest.mark.parametrize(
    "overrides",
    [
        ("compute.strategy=zero1", "compute.precision=fp16"),
        ("compute.strategy=ddp", "compute.shard_group=node"),
    ],
)
def test_what_a_strategy_cannot_do_is_refused_with_a_way_out(overrides):
    with pytest.raises(PlanError, match="compute") as caught:
        plan_of(*overrides)

    assert follow(caught.value.hint, *overrides).total_steps == 93_600


def test_images_grow_over_the_schedule_and_cost_less():
    plan, plain = plan_of("progressive.from_px=160"), plan_of()

    assert [(size.image_px, size.first_step) for size in plan.train_sizes] == [
        (160, 0), (192, 37_440), (224, 74_880),
    ]  # fmt: skip
    assert [plan.image_px_at(step) for step in (0, 37_439, 37_440, 74_880, 93_599)] == [
        160, 160, 192, 224, 224,
    ]  # fmt: skip
    pixels = (0.4 * 160**2 + 0.4 * 192**2 + 0.2 * 224**2) / 224**2
    assert plan.train_flops / plain.train_flops == pytest.approx(pixels, rel=1e-3)
    assert plan.saved_flops_frac == pytest.approx(1 - pixels, abs=1e-3)
    assert (plan.gmacs, plan.memory) == (plain.gmacs, plain.memory)
    # The loader must keep up with the smallest images.
    assert plan.device_images_per_second / plain.device_images_per_second == pytest.approx(
        (224 / 160) ** 2, rel=1e-3
    )
    assert plan_of("progressive.from_px=160", cluster=Cluster()).train_sizes == plan.train_sizes


@pytest.mark.parametrize(
    ("overrides", "recipe", "found"),
    [
        (("progressive.from_px=224",), "in1k_tiny", "which are not smaller than data.image_px 224"),
        (("progressive.from_px=150",), "in1k_tiny", "multiples of 32 px for convnext_tiny"),
        (("progressive.from_px=144",), "in1k_tiny", "found 144"),
        (("progressive.from_px=16", "data.image_px=32"), "in1k_tiny", "found 16"),
        (("progressive.from_px=32", "data.image_px=32"), "in1k_tiny", "not smaller"),
        (("progressive.from_px=160", "data.image_px=230"), "in1k_tiny", "found 230"),
        (("progressive.from_px=150",), "in1k_isotropic_small", "multiples of 16 px"),
        (("progressive.from_px=160", "data.mode=stream"), "in1k_tiny", "does not know the step"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_one_that_does(overrides, recipe, found):
    with pytest.raises(PlanError, match=found) as caught:
        plan_of(*overrides, recipe=recipe)

    assert follow(caught.value.hint, *overrides, recipe=recipe).total_steps == 93_600


def test_an_isotropic_model_grows_from_multiples_of_16():
    plan = plan_of("progressive.from_px=144", recipe="in1k_isotropic_small")

    assert [size.image_px for size in plan.train_sizes] == [144, 176, 208, 224]


def test_a_model_of_one_size_refuses_a_smaller_one():
    with pytest.raises(RecipeError, match="takes images of 224 px only, not 160"):
        plan_of("model.name=swin_tiny", "progressive.from_px=160")


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_kernels_keep_two_thirds_of_a_v2_in_any_precision(precision):
    def activations(kernels: str) -> int | None:
        plan = plan_of(
            f"compute.precision={precision}",
            f"compute.kernels={kernels}",
            "model.name=convnextv2_tiny",
        )
        return plan.memory[0].activations

    assert activations("fused") == pytest.approx(activations("eager") * 10 / 15, rel=0.05)


def test_skipping_saves_work_and_activations():
    plan = plan_of("model.drop_path_kind=skip", recipe="in1k_base")
    plain = plan_of(recipe="in1k_base")

    assert plan.saved_flops_frac == pytest.approx(0.24, abs=0.005)
    assert plan.train_flops == pytest.approx(plain.train_flops * (1 - plan.saved_flops_frac))
    assert plan.skipped_bytes == plain.memory[0].activations - plan.memory[0].activations > 2e9
    assert plan.gmacs == plain.gmacs
    assert plan.device_images_per_second > 1.3 * plain.device_images_per_second


def test_nothing_is_skipped_where_nothing_is_dropped():
    plan = plan_of("model.drop_path_kind=skip", "model.drop_path=0")

    assert (plan.saved_flops_frac, plan.skipped_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("recipe", "layers"), [("in1k_tiny", 6), ("in1k_base", 60), ("v2_in1k_huge", 66)]
)
def test_fp8_is_for_the_pointwise_layers_of_wide_blocks(recipe, layers):
    assert plan_of("compute.fp8=true", recipe=recipe).fp8_layers == layers
    assert plan_of(recipe=recipe).fp8_layers == 0


@pytest.mark.parametrize(
    ("overrides", "cluster", "found"),
    [
        ((), Cluster(device="cpu"), "a CPU has no fast fp8"),
        (("compute.precision=fp32",), FOUR_NODES, "compute.precision is fp32"),
        (("compute.precision=fp16",), FOUR_NODES, "compute.precision is fp16"),
        (("compute.strategy=zero2",), FOUR_NODES, "compute.strategy is zero2"),
        (
            ("model.name=convnextv2_atto",),
            FOUR_NODES,
            "for ConvNeXt blocks of 512 channels or more",
        ),
        (("model.name=resnet50",), FOUR_NODES, "for ConvNeXt blocks of 512 channels or more"),
    ],
)
def test_fp8_is_refused_where_it_has_no_place(overrides, cluster, found):
    asked = (*overrides, "compute.fp8=true")

    with pytest.raises(PlanError, match=found) as caught:
        plan_of(*asked, cluster=cluster)

    assert "compute.fp8=false" in caught.value.hint
    assert follow(caught.value.hint, *asked, cluster=cluster).total_steps == 93_600


def test_validation_happens_at_its_interval_and_at_the_end():
    plan = plan_of("evaluate.every=2ep", "schedule.length=5ep", "schedule.warmup=null")

    checked = [step for step in range(1, plan.total_steps + 1) if plan.validates_at(step)]
    assert checked == [624, 1248, 1560]


def test_validation_is_only_at_the_end_where_the_interval_is_null():
    plan = plan_of("evaluate.every=null", "schedule.length=5ep", "schedule.warmup=null")

    assert [s for s in range(1, plan.total_steps + 1) if plan.validates_at(s)] == [1560]


def test_data_without_validation_images_are_not_validated():
    plan = plan_of(recipe="in22k_tiny")

    assert not plan.validates_at(plan.total_steps)


def test_checkpoints_are_saved_by_steps_or_by_seconds():
    by_steps, by_time = plan_of("checkpoint.every=2ep"), plan_of("checkpoint.every=30min")

    assert (by_steps.checkpoint_every_steps, by_steps.checkpoint_every_seconds) == (624, None)
    assert (by_time.checkpoint_every_steps, by_time.checkpoint_every_seconds) == (None, 1800)


@pytest.mark.parametrize("key", ["evaluate.every", "checkpoint.every", "checkpoint.keep_every"])
def test_an_interval_is_at_least_one_step(key):
    plan = plan_of(f"{key}=0.001ep")

    intervals = {
        "evaluate.every": plan.eval_every_steps,
        "checkpoint.every": plan.checkpoint_every_steps,
        "checkpoint.keep_every": plan.checkpoint_keep_every_steps,
    }
    assert intervals[key] == 1


def test_a_plan_as_json_holds_every_number_and_the_whole_recipe():
    plan = plan_of()

    told = json.loads(json.dumps(plan.to_json()))

    assert (told["world_size"], told["global_images"], told["accumulate_steps"]) == (32, 4096, 1)
    assert told["recipe"]["schedule"] == {"length": "300ep", "warmup": "20ep"}
    assert told["cluster"]["num_nodes"] == 4
    missing = {field.name for field in dataclasses.fields(Plan)} - set(told)
    assert missing == set()


@pytest.mark.parametrize("name", list_recipes())
def test_planning_twice_gives_the_same_plan(name):
    recipe, facts = load_recipe(name), PHOTOS if name == "small_data" else None
    cluster = Cluster()

    first = make_plan(recipe, cluster, name=name, facts=facts)

    assert first == make_plan(recipe, cluster, name=name, facts=facts)


@given(
    train=st.integers(1, 10**8), val=st.integers(0, 10**6), classes=st.integers(2, 30_000),
    world=st.integers(1, 4096), images=st.integers(1, 10**6), length=st.floats(1e-3, 1e3),
    warmup=st.one_of(st.none(), st.floats(1e-3, 1e3)), px=st.integers(8, 4096),
    from_px=st.one_of(st.none(), st.integers(1, 128).map(lambda n: 32 * n), st.integers(16, 4096)),
    drop_path_kind=st.sampled_from(["scale", "skip"]),
)  # fmt: skip
@settings(max_examples=100)
def test_any_recipe_plans_or_says_why_not(
    train, val, classes, world, images, length, warmup, px, from_px, drop_path_kind
):
    facts = DataFacts(train_images=train, val_images=val, num_classes=classes, source="data")
    recipe = load_recipe("small_data", [
        f"batch.global_images={images}", "optim.lr_rule=sqrt", f"schedule.length={length}ep",
        f"schedule.warmup={'null' if warmup is None else f'{warmup}ep'}", f"data.image_px={px}",
        f"progressive.from_px={'null' if from_px is None else from_px}",
        f"model.drop_path_kind={drop_path_kind}", "model.drop_path=0.5",
    ])  # fmt: skip
    plan, hint = None, None
    try:
        plan = make_plan(recipe, Cluster(devices_per_node=world), name="x", facts=facts)
    except PlanError as error:
        hint = error.hint

    if plan is None:
        assert hint
        return
    assert 0 <= plan.warmup_steps < plan.total_steps
    assert plan.steps_per_epoch * images + plan.dropped_images == train


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (("batch.global_images=39",), "a device takes 39 images a step"),
        (("batch.per_device_images=1",), "a device takes 1 images a pass"),
    ],
)
def test_a_pass_that_would_part_a_mixed_pair_is_refused(overrides, found):
    settings = (*overrides, "optim.lr_rule=none")
    with pytest.raises(PlanError, match=found) as caught:
        plan_of(*settings, cluster=Cluster())

    assert follow(caught.value.hint, *settings, cluster=Cluster()).per_device_images % 2 == 0


def test_without_mixing_a_pass_may_hold_an_odd_number_of_images():
    overrides = ("mix.mixup=null", "mix.cutmix=null", "batch.global_images=39")

    plan = plan_of(*overrides, "optim.lr_rule=none", cluster=Cluster())

    assert plan.per_device_images == 39


@pytest.mark.parametrize(
    ("device", "asked", "used"),
    [("cuda", "auto", "device"), ("cpu", "auto", "cpu"), ("cuda", "cpu", "cpu")],
)
def test_rand_augment_happens_on_a_gpu_with_few_cores_where_nothing_else_is_asked(
    device, asked, used
):
    plan = plan_of(f"augment.augment_on={asked}", cluster=Cluster(device=device, cpus_per_node=2))

    assert plan.augment_on == used


def test_rand_augment_takes_no_time_of_a_gpu_where_cores_have_enough():
    node = Cluster(devices_per_node=8, cpus_per_node=96)

    fast, slow = plan_of(cluster=node), plan_of("model.name=convnext_large", cluster=node)

    assert (fast.augment_on, slow.augment_on) == ("device", "cpu")
    assert slow.loader_images_per_second >= 2 * slow.device_images_per_second


def test_cores_that_also_augment_load_fewer_images():
    node = Cluster(devices_per_node=8, cpus_per_node=64)
    here, there = (
        plan_of(f"augment.augment_on={place}", cluster=node) for place in ("cpu", "device")
    )

    assert here.loader_images_per_second < there.loader_images_per_second
    assert here.device_images_per_second == there.device_images_per_second
    assert plan_of(cluster=Cluster(device="cpu")).device_images_per_second is None
