"""One step of training, and what a gradient that is not finite leaves as it is."""

import copy
import dataclasses
import io
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from convnext_cli.data.augment import Choices
from convnext_cli.data.build import build_mix
from convnext_cli.data.reader import Batch, Unusable
from convnext_cli.errors import CheckpointError, DataError
from convnext_cli.models.convnext import ConvNeXt
from convnext_cli.optim.build import build_optimizer
from convnext_cli.optim.ema import make_averaged
from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import DataFacts, make_plan
from convnext_cli.recipe.schema import Recipe
from convnext_cli.training.fit import make_card
from convnext_cli.training.task import CHECKPOINT_KEY, Classifier

IMAGES, PX, CLASSES = 4, 32, 3


class Stepper:
    """A Classifier and AdamW, driven as Lightning drives them."""

    def __init__(self, *, fused: bool, per_device_images: int = IMAGES) -> None:
        recipe = Recipe.model_validate(
            {
                "about": "test",
                "model": {"name": "convnextv2_atto"},
                "data": {"image_px": PX},
                "batch": {"global_images": IMAGES, "per_device_images": per_device_images},
                "optim": {"lr": 1e-3, "lr_images": IMAGES, "clip_norm": 1.0},
                "schedule": {"length": "20st", "warmup": None},
                "ema": {"decay": 0.9},
            }
        )
        facts = DataFacts(train_images=80, val_images=0, num_classes=CLASSES, source="test")
        plan = make_plan(recipe, Cluster(device="cpu"), name="test", facts=facts)
        torch.manual_seed(0)
        model = ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 16, 16), num_classes=CLASSES, grn=True)
        self.task = Classifier(
            model,
            averaged=make_averaged(model),
            plan=plan,
            mix=build_mix(recipe, num_classes=CLASSES),
            card=make_card(plan, classes=("a", "b", "c")),
        )
        self.optimizer = build_optimizer(plan, model)
        if fused:  # as on a GPU; a CPU has a fused AdamW, too
            groups = self.optimizer.param_groups
            self.optimizer = torch.optim.AdamW(
                [group | {"fused": True, "foreach": None} for group in groups], fused=True
            )

    def __call__(self, spoil: Callable[[Tensor], Tensor] = lambda loss: loss) -> None:
        generator = torch.Generator().manual_seed(self.task.step)
        shape = (IMAGES, 3, PX, PX)
        batch = Batch(
            torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
            torch.randint(0, CLASSES, (IMAGES,), generator=generator),
            torch.arange(IMAGES),
            Choices(np.zeros((IMAGES, 0, 0), np.float32), np.zeros((IMAGES, 6), np.int32)),
            (),
        )

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self.task.training_step(batch, 0)
            spoil(loss).backward()
            self.task.configure_gradient_clipping(self.optimizer)
            return loss

        self.task.optimizer_step(0, 0, self.optimizer, closure)

    def state(self) -> dict[str, Tensor]:
        moments = {
            f"{number}/{key}": value
            for number, entry in enumerate(self.optimizer.state.values())
            for key, value in entry.items()
        }
        return copy.deepcopy(dict(self.task.state_dict()) | moments)


def test_a_checkpoint_with_other_classes_is_refused_before_its_weights_are_looked_at():
    task = Stepper(fused=False).task
    saved = task.card.to_dict() | {"num_classes": CLASSES + 1}

    with pytest.raises(CheckpointError, match=r"with 4 classes, and this run trains .* with 3"):
        task.check_fits({CHECKPOINT_KEY: saved})


def test_a_checkpoint_of_a_run_with_other_weights_is_refused_in_a_sentence():
    checkpoint = save(Stepper(fused=False))
    plain, scaled = Stepper(fused=False).task, Stepper(fused=False).task
    plain.ema_model = None
    scaled.model.stages[0][0].gamma = torch.nn.Parameter(torch.ones(8))

    with pytest.raises(CheckpointError, match=r"ema_model\.\S+ is there alone"):
        plain.check_fits(checkpoint)
    with pytest.raises(CheckpointError, match=r"model\.stages\.0\.0\.gamma is missing there"):
        scaled.check_fits(checkpoint)


def test_a_row_that_spans_a_checkpoint_is_to_the_bit_that_of_a_run_left_alone():
    def start_ranks() -> list[Stepper]:
        ranks = [Stepper(fused=False) for _ in range(2)]

        def reduce(own: Tensor, reduce_op: str) -> Tensor:
            assert reduce_op == "sum"
            return sum((rank.task.loss_sum for rank in ranks), torch.zeros_like(own))

        for number, rank in enumerate(ranks):
            strategy = SimpleNamespace(reduce=reduce)
            rank.task._trainer = SimpleNamespace(global_rank=number, strategy=strategy)
        return ranks

    def total(ranks: list[Stepper]) -> float:
        return sum(rank.task.loss_sum.item() for rank in ranks)

    alone, saved = start_ranks(), []
    for _ in range(6):
        for rank in alone:
            rank()
        checkpoint: dict = {"state_dict": alone[0].task.state_dict()}
        alone[0].task.on_save_checkpoint(checkpoint)
        parts = [(rank.task.state_dict(), rank.optimizer.state_dict()) for rank in alone]
        saved.append((checkpoint, copy.deepcopy(parts)))
    for checkpoint, parts in saved:
        resumed = start_ranks()
        for rank, (weights, moments) in zip(resumed, parts, strict=True):
            rank.task.load_state_dict(weights)
            rank.optimizer.load_state_dict(moments)
            rank.task.on_load_checkpoint(checkpoint)
        for _ in range(checkpoint[CHECKPOINT_KEY]["step"], 6):
            for rank in resumed:
                rank()
        assert total(resumed) == total(alone)


def save(stepper: Stepper) -> dict:
    """What a checkpoint of a run of one rank holds, read back as a resume reads it."""
    strategy = SimpleNamespace(reduce=lambda own, reduce_op: own)
    stepper.task._trainer = SimpleNamespace(global_rank=0, strategy=strategy)
    checkpoint: dict = {"state_dict": stepper.task.state_dict()}
    stepper.task.on_save_checkpoint(checkpoint)
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_row_is_the_mean_of_its_steps_also_where_they_had_other_numbers_of_passes():
    def mean(task: Classifier) -> float:
        return task.loss_sum.item() / (task.loss_steps.item() * task.step_passes)

    before = Stepper(fused=False)
    for _ in range(3):
        before()
    after = Stepper(fused=False, per_device_images=IMAGES // 2)

    after.task.on_load_checkpoint(save(before))

    assert (before.task.step_passes, after.task.step_passes) == (1, 2)
    assert mean(after.task) == mean(before.task)


@pytest.mark.parametrize("rank", [0, 1])
def test_images_that_no_row_has_told_of_are_told_by_the_attempt_that_goes_on(rank):
    before, after = Stepper(fused=False), Stepper(fused=False)
    before()
    before.task.bad = [Unusable(3, "train-000000.tar/3", "its bytes are others")]
    after.task._trainer = SimpleNamespace(global_rank=rank)

    after.task.on_load_checkpoint(save(before))

    assert after.task.bad == (before.task.bad if rank == 0 else [])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_moves_nothing(fused, factor):
    stepper = Stepper(fused=fused)
    stepper()
    before, loss, grad_norm = stepper.state(), stepper.task.loss_sum, stepper.task.grad_norm

    stepper(lambda loss: loss * factor)

    after = stepper.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert stepper.task.left_out == 1
    assert stepper.task.step == 2
    assert torch.equal(stepper.task.loss_sum, loss)
    assert stepper.task.loss_steps == 1
    assert torch.isfinite(grad_norm)
    assert not torch.isfinite(stepper.task.grad_norm)


def test_a_run_goes_on_after_a_step_that_was_left_out_alike_on_the_device_and_on_the_host():
    steppers = [Stepper(fused=fused) for fused in (False, True)]

    for stepper in steppers:
        for step in range(4):
            stepper((lambda loss: loss * float("nan")) if step == 1 else lambda loss: loss)

    host, device = (stepper.state() for stepper in steppers)
    assert host.keys() == device.keys()
    for key, value in host.items():
        torch.testing.assert_close(value, device[key], atol=1e-6, rtol=1e-5, msg=key)
    assert {float(value) for key, value in device.items() if key.endswith("/step")} == {3}
    assert [float(stepper.task.left_out) for stepper in steppers] == [0, 0]
    assert [int(stepper.task.loss_steps) for stepper in steppers] == [3, 3]


def test_a_loss_that_is_not_finite_is_not_in_the_sum_of_the_row():
    stepper = Stepper(fused=True)
    stepper()
    loss = stepper.task.loss_sum.clone()
    with torch.no_grad():
        stepper.task.model.head.bias[0] = float("nan")

    stepper()

    assert not torch.isfinite(stepper.task.step_loss)
    assert torch.equal(stepper.task.loss_sum, loss)


def test_the_first_step_may_be_left_out():
    stepper = Stepper(fused=True)

    stepper(lambda loss: loss * float("nan"))
    stepper()

    assert {float(entry["step"]) for entry in stepper.optimizer.state.values()} == {1}
    assert all(torch.isfinite(weight).all() for weight in stepper.task.parameters())


def test_both_weight_sets_lie_in_memory_alike_so_that_one_pass_averages_them():
    stepper = Stepper(fused=True)

    stepper.task.to_channels_last()
    stepper()

    pairs = zip(
        stepper.task.model.named_parameters(), stepper.task.ema_model.parameters(), strict=True
    )
    for (name, weight), average in pairs:
        assert weight.stride() == average.stride(), name
    kernel = stepper.task.model.stages[0][0].dwconv.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert stepper.optimizer.state[kernel]["exp_avg"].stride() == kernel.stride()


@pytest.mark.parametrize(
    ("mode", "where", "hint"),
    [
        ("indexed", "in test", "convnext data check DIR"),
        ("stream", "in val.tar", "data.val_images=2"),
    ],
)
def test_another_number_of_validation_images_than_known_ends_a_run(mode, where, hint):
    task = Stepper(fused=False).task
    data = task.plan.recipe.data.model_copy(update={"mode": mode, "val_path": "val.tar"})
    recipe = task.plan.recipe.model_copy(update={"data": data})
    task.plan = dataclasses.replace(task.plan, val_images=5, recipe=recipe)
    task.val_scores.update(torch.zeros(3, CLASSES), torch.tensor([0, 1, -1]))

    with pytest.raises(DataError, match=f"counted 2 images instead of 5 {where}") as caught:
        task.compute_validation()

    assert hint in str(caught.value.hint)
