"""Twenty optimizer steps against a plain loop of PyTorch and timm.

The loop below uses nothing of this project: timm's network, AdamW, averaging, loss and clipping,
with the learning rate and its layer-wise powers written out by hand. Both sides start from the same
weights and see the same batches, in fp32, two passes a step, without mixup and drop path.
"""

import re
from dataclasses import dataclass

import lightning.pytorch as pl
import numpy as np
import pytest
import timm
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV2, dispatch_clip_grad
from torch import nn
from torch.utils.data import DataLoader

from convnext_cli.data.build import build_mix
from convnext_cli.data.reader import Batch, Sample, collate
from convnext_cli.models.convnext import ConvNeXt
from convnext_cli.optim.ema import make_averaged
from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import DataFacts, make_plan
from convnext_cli.recipe.schema import Recipe
from convnext_cli.training.build import build_trainer
from convnext_cli.training.devices import quiet_lightning
from convnext_cli.training.fit import make_card
from convnext_cli.training.task import Classifier
from convnext_cli.training.throughput import DataClock

STEPS, PASSES, IMAGES, PX, CLASSES = 20, 2, 4, 32, 10
LR, FLOOR, WARMUP, WEIGHT_DECAY, EMA, SMOOTHING = 5e-4, 1e-6, 5, 0.3, 0.9, 0.1

TO_TIMM = [
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    (r"\.grn\.gamma$", ".mlp.grn.weight"),
    (r"\.grn\.beta$", ".mlp.grn.bias"),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]

# timm name -> power of the layer decay, the head having 0
POWERS_OF_TINY = [
    (r"stem\.", 7),
    (r"stages\.0\.", 6),
    (r"stages\.1\.", 5),
    (r"stages\.2\.(downsample|blocks\.[012])\.", 4),
    (r"stages\.2\.blocks\.[345]\.", 3),
    (r"stages\.2\.blocks\.[678]\.", 2),
    (r"stages\.3\.", 1),
    (r"head\.", 0),
]
POWERS_OF_ATTO = [
    (r"stem\.|stages\.0\.blocks\.0\.", 12),
    (r"stages\.0\.blocks\.1\.", 11),
    (r"stages\.1\.(downsample|blocks\.0)\.", 10),
    (r"stages\.1\.blocks\.1\.", 9),
    (r"stages\.2\.(downsample|blocks\.0)\.", 8),
    (r"stages\.2\.blocks\.1\.", 7),
    (r"stages\.2\.blocks\.2\.", 6),
    (r"stages\.2\.blocks\.3\.", 5),
    (r"stages\.2\.blocks\.4\.", 4),
    (r"stages\.2\.blocks\.5\.", 3),
    (r"stages\.3\.(downsample|blocks\.0)\.", 2),
    (r"stages\.3\.blocks\.1\.", 1),
    (r"head\.", 0),
]


@dataclass(frozen=True)
class Case:
    name: str
    depths: tuple[int, ...]
    dims: tuple[int, ...]
    grn: bool
    layer_decay: float
    kind: str
    powers: list[tuple[str, int]]
    clip_norm: float | None


CASES = [
    # a quarter as wide as the real one, to be quick
    Case(
        name="convnext_tiny",
        depths=(3, 3, 9, 3),
        dims=(24, 48, 96, 192),
        grn=False,
        layer_decay=0.8,
        kind="grouped",
        powers=POWERS_OF_TINY,
        clip_norm=None,
    ),
    Case(
        name="convnextv2_atto",
        depths=(2, 2, 6, 2),
        dims=(40, 80, 160, 320),
        grn=True,
        layer_decay=0.9,
        kind="single",
        powers=POWERS_OF_ATTO,
        clip_norm=1.0,
    ),
]


def timm_name(name):
    for pattern, replacement in TO_TIMM:
        name = re.sub(pattern, replacement, name)
    return name


def make_batches():
    """Passes of random images and labels; the same four come again and again, to be learned."""
    generator = torch.Generator().manual_seed(7)
    shape = (4, IMAGES)
    pixels = torch.randint(0, 256, (*shape, 3, PX, PX), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, shape, generator=generator)
    return list(zip(pixels, labels, strict=True)) * (STEPS * PASSES // 4)


def start_weights(model):
    """Values away from the first ones: LayerScale and GRN would hide their blocks otherwise.

    Small ones, so that no unit sleeps: AdamW divides a gradient by its own size, so where that is
    only rounding noise, two right programs take different steps.
    """
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))


class LossOfEachPass(pl.Callback):
    def __init__(self):
        self.losses = []
        self.told = 0.0

    def on_train_batch_end(self, _trainer, pl_module, *_):
        # The sum over the passes of a step so far, of which each has been told already but the last
        self.losses.append(float(pl_module.step_loss) - self.told)
        self.told = 0.0 if pl_module.at_step_end else self.told + self.losses[-1]


def train_ours(case, batches):
    """Losses of all passes, the start weights, and the raw and averaged weights at the end."""
    recipe = Recipe.model_validate(
        {
            "about": "parity",
            "model": {"name": case.name},
            "data": {"image_px": PX},
            "augment": {"erasing": None},
            "mix": {"mixup": None, "cutmix": None, "label_smoothing": SMOOTHING},
            "batch": {"global_images": PASSES * IMAGES, "per_device_images": IMAGES},
            "optim": {
                "lr": LR,
                "lr_images": PASSES * IMAGES,
                "min_lr": FLOOR,
                "weight_decay": WEIGHT_DECAY,
                "layer_decay": case.layer_decay,
                "layer_decay_kind": case.kind,
                "clip_norm": case.clip_norm,
            },
            "schedule": {"length": f"{STEPS}st", "warmup": f"{WARMUP}st"},
            "ema": {"decay": EMA},
        }
    )
    facts = DataFacts(
        train_images=len(batches) * IMAGES, val_images=0, num_classes=CLASSES, source="test"
    )
    plan = make_plan(recipe, Cluster(device="cpu"), name="parity", facts=facts)
    torch.manual_seed(0)
    model = ConvNeXt(
        depths=case.depths,
        dims=case.dims,
        num_classes=CLASSES,
        layer_scale_init=None if case.grn else 1e-6,
        grn=case.grn,
    )
    start_weights(model)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    task = Classifier(
        model,
        averaged=make_averaged(model),
        plan=plan,
        mix=build_mix(plan.recipe, num_classes=plan.num_classes),
        card=make_card(plan, classes=tuple(map(str, range(CLASSES)))),
    )
    seen = LossOfEachPass()
    quiet_lightning()
    trainer = build_trainer(
        plan, callbacks=[seen], clock=DataClock(), checkpoint_io=TorchCheckpointIO()
    )
    none = torch.full((IMAGES,), -1)
    choices = collate([Sample(pixels, 0, 0) for pixels in batches[0][0]]).choices
    passes = [Batch(pixels, labels, none, choices, ()) for pixels, labels in batches]
    loader = DataLoader(passes, batch_size=None)
    trainer.fit(task, train_dataloaders=loader, val_dataloaders=[])
    assert task.step == STEPS
    return seen.losses, first, model.state_dict(), task.ema_model.state_dict()


def train_plainly(case, batches, first):
    """The same in a plain loop, from the weights `first` under their official names."""
    model = timm.create_model(
        case.name,
        depths=case.depths,
        dims=case.dims,
        num_classes=CLASSES,
        drop_path_rate=0.0,
    )
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    renamed = {timm_name(name): value for name, value in first.items()}
    model.load_state_dict({name: value.reshape(shapes[name]) for name, value in renamed.items()})
    kernels = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    groups = []
    for name, weight in model.named_parameters():
        power = next(power for pattern, power in case.powers if re.match(pattern, name))
        groups.append(
            {
                "params": [weight],
                "scale": case.layer_decay**power,
                "weight_decay": WEIGHT_DECAY if name in kernels else 0.0,
            }
        )
    optimizer = create_optimizer_v2(groups, opt="adamwlegacy", lr=LR, weight_decay=0.0)
    average = ModelEmaV2(model, decay=EMA)
    criterion = LabelSmoothingCrossEntropy(SMOOTHING)
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    cosine = np.cos(np.pi * np.arange(STEPS - WARMUP) / (STEPS - WARMUP))
    lr = np.concatenate([np.linspace(0, LR, WARMUP), FLOOR + (LR - FLOOR) * 0.5 * (1 + cosine)])
    losses = []
    model.train()
    for number, (pixels, labels) in enumerate(batches):
        loss = criterion(model((pixels / 255 - mean) / std), labels)
        (loss / PASSES).backward()
        losses.append(loss.item())
        if number % PASSES == PASSES - 1:
            if case.clip_norm is not None:
                dispatch_clip_grad(model.parameters(), case.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = float(lr[number // PASSES]) * group["scale"]
            optimizer.step()
            optimizer.zero_grad()
            average.update(model)
    return losses, model.state_dict(), average.module.state_dict()


@pytest.fixture
def _one_thread():
    # the networks are so small that threads would mostly wait for each other
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_twenty_steps_agree_with_a_plain_loop_of_timm(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    batches = make_batches()

    losses, first, raw, averaged = train_ours(case, batches)
    expected_losses, expected_raw, expected_averaged = train_plainly(case, batches, first)

    assert losses == pytest.approx(expected_losses, rel=0, abs=1e-5)
    for ours, expected in ((raw, expected_raw), (averaged, expected_averaged)):
        for name, value in ours.items():
            torch.testing.assert_close(
                value, expected[timm_name(name)].reshape(value.shape), atol=1e-5, rtol=0
            )
    # and they did learn, every one of them, by far more than the tolerance
    moved = {name: float((averaged[name] - first[name]).abs().max()) for name in first}
    assert min(moved.values()) > 1e-4
    assert float(np.mean(losses[-4:])) < float(np.mean(losses[:4]))
