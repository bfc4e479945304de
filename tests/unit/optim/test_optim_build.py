"""A plan and a network become AdamW; the learning rate is set from outside."""

import pytest
import torch

from convnext_cli.catalog.models import find_variant
from convnext_cli.errors import CheckpointError, PlanError
from convnext_cli.models.convnext import build_convnext
from convnext_cli.optim.build import apply_lr, build_optimizer
from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import make_plan
from convnext_cli.recipe.schema import Data, Model, Optim, Recipe


def make(model="convnext_tiny", **optim):
    recipe = Recipe(
        about="test",
        model=Model(name=model),
        data=Data(dataset="imagenet1k"),
        optim=Optim(**optim),
    )
    plan = make_plan(recipe, Cluster(device="cpu"), name="test")
    with torch.device("meta"):
        network = build_convnext(find_variant(model), num_classes=1000)
    return plan, network


def test_the_optimizer_has_the_numbers_of_the_recipe():
    plan, network = make(betas=(0.9, 0.95), eps=1e-7, weight_decay=0.3)

    optimizer = build_optimizer(plan, network)

    assert type(optimizer) is torch.optim.AdamW
    kept, decayed = optimizer.param_groups
    assert (kept["weight_decay"], decayed["weight_decay"]) == (0.0, 0.3)
    assert (decayed["betas"], decayed["eps"]) == ((0.9, 0.95), 1e-7)
    assert "stages.0.0.gamma" in kept["names"]
    assert "stages.0.0.dwconv.weight" in decayed["names"]


def test_a_learning_rate_is_scaled_by_layer():
    plan, network = make(layer_decay=0.8)
    optimizer = build_optimizer(plan, network)

    apply_lr(optimizer, 1e-3)

    lr = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert lr["head.weight"] == 1e-3
    assert lr["stages.3.0.gamma"] == pytest.approx(0.8e-3)
    assert lr["downsample_layers.0.0.weight"] == pytest.approx(1e-3 * 0.8**7)


def test_loaded_moments_lie_as_the_weights_that_go_on_with_them():
    plan, _ = make()
    before, after = (build_convnext(find_variant("convnextv2_atto"), num_classes=3) for _ in "ab")
    after.to(memory_format=torch.channels_last)
    written = build_optimizer(plan, before)
    for weight in before.parameters():
        weight.grad = torch.randn_like(weight)
    written.step()
    optimizer = build_optimizer(plan, after)

    optimizer.load_state_dict(written.state_dict())

    kernel = after.downsample_layers[1][1].weight
    moment = optimizer.state[kernel]["exp_avg"]
    assert moment.stride() == kernel.stride() != before.downsample_layers[1][1].weight.stride()
    assert torch.equal(moment, written.state[before.downsample_layers[1][1].weight]["exp_avg"])


@pytest.mark.parametrize("fused", [True, None])
def test_a_run_goes_on_with_the_kernels_of_its_own_device_whatever_wrote_the_state(fused):
    plan, _ = make()
    network = build_convnext(find_variant("convnextv2_atto"), num_classes=3)
    written, optimizer = build_optimizer(plan, network), build_optimizer(plan, network)
    for weight in network.parameters():
        weight.grad = torch.randn_like(weight)
    written.step()
    optimizer.defaults["fused"] = fused  # as on a GPU, or in fp16
    for group in optimizer.param_groups:
        group["fused"] = fused

    state = written.state_dict()
    for group in state["param_groups"]:
        group["fused"] = not fused
    optimizer.load_state_dict(state)

    assert {group["fused"] for group in optimizer.param_groups} == {fused}
    optimizer.found_inf = torch.ones(()) if fused else None
    optimizer.step()
    counts = {int(moments["step"]) for moments in optimizer.state.values()}
    assert counts == {1 if fused else 2}  # fused AdamW leaves out a step on the device


def test_a_state_of_another_run_brings_its_moments_and_not_its_settings():
    network = build_convnext(find_variant("convnextv2_atto"), num_classes=3)
    decay = {"layer_decay_kind": "single", "weight_decay": 0.05}
    written = build_optimizer(make(layer_decay=0.8, **decay)[0], network)
    for weight in network.parameters():
        weight.grad = torch.randn_like(weight)
    written.step()
    asked = {"layer_decay": 0.9, "betas": (0.8, 0.99), "eps": 1e-6}
    optimizer = build_optimizer(make(**(decay | asked | {"weight_decay": 0.3}))[0], network)
    own = [{**group} for group in optimizer.param_groups]

    optimizer.load_state_dict(written.state_dict())

    settings = ("weight_decay", "betas", "eps", "lr_scale")
    assert [[group[key] for key in settings] for group in optimizer.param_groups] == [
        [group[key] for key in settings] for group in own
    ]
    for weight, moments in written.state.items():
        assert torch.equal(optimizer.state[weight]["exp_avg"], moments["exp_avg"])


def test_a_state_with_other_groups_of_weights_is_refused():
    network = build_convnext(find_variant("convnextv2_atto"), num_classes=3)
    written = build_optimizer(make()[0], network)
    single = make(layer_decay=0.8, layer_decay_kind="single")[0]

    with pytest.raises(CheckpointError, match="in 2 groups, and this run has others, in 2"):
        build_optimizer(single, network).load_state_dict(written.state_dict())


def test_layer_decay_of_a_kind_that_the_model_lacks_is_refused_with_a_hint_that_works():
    plan, network = make("convnextv2_atto", layer_decay=0.9, layer_decay_kind="grouped")

    with pytest.raises(PlanError, match=r"convnextv2_atto: grouped .* \(2, 2, 6, 2\)") as caught:
        build_optimizer(plan, network)

    assert caught.value.hint == "set optim.layer_decay_kind=single"
    assert build_optimizer(*make("convnextv2_atto", layer_decay=0.9, layer_decay_kind="single"))
