"""Evaluation of a loaded model on a packed data set, in this process."""

import io
import shlex
import socket
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional
from torchmetrics.classification import MulticlassCalibrationError
from torchvision import models

from convnext_cli.catalog.models import find_variant
from convnext_cli.data.augment import eval_side_px
from convnext_cli.data.card import DatasetCard, Shard, Split, index_name, write_card
from convnext_cli.data.index import scan_shard, write_index
from convnext_cli.errors import CheckpointError, DataError, DeviceError, Hung, UserError
from convnext_cli.models.convnext import build_convnext
from convnext_cli.plan.cluster import Cluster
from convnext_cli.training.evaluation import (
    DealtSampler,
    EvaluationSetup,
    check_classes,
    evaluate_model,
)
from convnext_cli.training.loading import (
    AskedView,
    LoadedModel,
    Preprocessing,
    apply_asked,
    choose_preprocessing,
    guess_image_px,
    published_crop,
)
from convnext_cli.training.report import Report

CLASSES = ("circle", "line", "star")
VIEW = Preprocessing(
    image_px=32,
    crop="warp",
    crop_frac=1.0,
    interpolation="bicubic",
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    reason="as the checkpoint says",
)


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def png(number: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels(number)).save(sink, "PNG")
    return sink.getvalue()


def pack(folder: Path, images: list[bytes], *, classes: tuple[str, ...] = CLASSES) -> str:
    """A data set whose split val holds these images, labelled 0, 1, 2, 0, ..."""
    path = folder / "val-000000.tar"
    with tarfile.open(path, "w") as tar:
        for number, image in enumerate(images):
            label = str(number % len(classes)).encode()
            for extension, data in (("png", image), ("cls", label)):
                member = tarfile.TarInfo(f"{number:04d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    scan = scan_shard(path)
    write_index(scan.index, folder / index_name(path.name))
    shard = Shard(path.name, images=len(images), bytes=scan.num_bytes, sha256=scan.sha256)
    counts = [len(images[k :: len(classes)]) for k in range(len(classes))]
    split = Split(name="val", shards=(shard,), class_images=tuple(counts))
    write_card(DatasetCard(classes=classes, splits={"val": split}, options={}), folder)
    return str(folder)


def model_of(network: nn.Module, *, classes: tuple[str, ...] = CLASSES) -> LoadedModel:
    return LoadedModel(
        name="convnextv2_atto",
        path="model.ckpt",
        network=network.eval(),
        num_classes=3,
        classes=classes,
        source="raw",
        preprocessing=VIEW,
    )


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(1)
    network = build_convnext(find_variant("convnextv2_atto"), num_classes=3)
    nn.init.normal_(network.head.weight, std=0.5)
    return network.eval()


def evaluate(
    model: LoadedModel,
    data: str,
    *,
    batch: int = 4,
    precision: str = "fp32",
    workers: int = 0,
    devices: int = 1,
) -> Report:
    cluster = Cluster(devices_per_node=devices, device="cpu")
    setup = EvaluationSetup(
        cluster=cluster, precision=precision, per_device_images=batch, workers=workers
    )
    return evaluate_model(model, data=data, split="val", setup=setup)


def test_a_full_device_is_told_with_a_smaller_batch(network, tmp_path, monkeypatch):
    def forward(_x: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr(network, "forward", forward)

    with pytest.raises(
        DeviceError, match=r"batches of 4 images \(CUDA out .* 2.00 GiB\.\)"
    ) as full:
        evaluate(model_of(network), pack(tmp_path, [png(0)]))

    assert full.value.hint == "take smaller ones, which change no score: --batch 2"


@pytest.mark.filterwarnings("ignore:::lightning")
def test_ranks_that_cannot_meet_are_told_in_a_sentence(network, tmp_path, monkeypatch):
    data = pack(tmp_path, [png(0)])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        for name, value in (told | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(Hung, match=f"the ranks did not meet at 127.0.0.1:{port}") as caught:
            evaluate(model_of(network), data, devices=2)

    assert "MASTER_PORT" in str(caught.value.hint)


def test_scores_are_those_of_a_plain_loop(tmp_path: Path, network: nn.Module):
    data = pack(tmp_path, [png(n) for n in range(10)])
    x = torch.stack([torch.from_numpy(pixels(n)).permute(2, 0, 1) for n in range(10)])
    labels = torch.arange(10) % 3
    with torch.no_grad():
        logits = network((x / 255 - 0.5) / 0.25)
    guesses = logits.argmax(1)

    report = evaluate(model_of(network), data)

    assert report.images == 10
    assert report.top1 == pytest.approx(100 * float((guesses == labels).float().mean()))
    assert report.top5 == 100.0
    assert report.loss == pytest.approx(float(functional.cross_entropy(logits, labels)), rel=1e-5)
    calibration = MulticlassCalibrationError(3, n_bins=15)(logits.softmax(1), labels)
    assert report.ece == pytest.approx(float(calibration), abs=1e-5)
    for row in report.per_class:
        own = labels == row.label
        assert (row.name, row.images) == (CLASSES[row.label], int(own.sum()))
        assert row.correct == int((guesses[own] == row.label).sum())
    assert sum(pair.images for pair in report.worst_pairs) == int((guesses != labels).sum())
    assert report.images_per_second > 0


@pytest.mark.filterwarnings("ignore:::lightning")
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_the_batch_size_changes_no_score(tmp_path: Path, network: nn.Module, batch: int):
    data = pack(tmp_path, [png(n) for n in range(7)])
    whole = evaluate(model_of(network), data, batch=7)

    parts = evaluate(model_of(network), data, batch=batch)

    assert parts.images == 7
    assert (parts.top1, parts.per_class) == (whole.top1, whole.per_class)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)


@pytest.mark.filterwarnings("ignore:::lightning")
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_is_none_is_named(tmp_path: Path, network: nn.Module, workers: int):
    images = [png(n) for n in range(4)]
    images[2] = images[2][: len(images[2]) // 2]
    data = pack(tmp_path, images)

    with pytest.raises(DataError, match=r"val-000000\.tar/0002: damaged") as caught:
        evaluate(model_of(network), data, workers=workers)

    assert "\n" not in str(caught.value)
    assert "data check" in (caught.value.hint or "")


@pytest.mark.filterwarnings("ignore:::lightning")
def test_outputs_that_are_not_finite_are_no_accuracy(tmp_path: Path, network: nn.Module):
    data = pack(tmp_path, [png(n) for n in range(4)])
    network.head.bias.data[1] = float("nan")

    with pytest.raises(UserError, match="non-finite outputs for 4 of 4"):
        evaluate(model_of(network), data)


def test_an_absent_split_names_those_that_are_there(tmp_path: Path, network: nn.Module):
    data = pack(tmp_path, [png(0)])
    setup = EvaluationSetup(
        cluster=Cluster(device="cpu"), precision="fp32", per_device_images=4, workers=0
    )

    with pytest.raises(DataError, match="no images in a split named test, only in: val") as caught:
        evaluate_model(model_of(network), data=data, split="test", setup=setup)

    assert "--split val" in (caught.value.hint or "")


def test_fp16_on_a_cpu_is_refused(tmp_path: Path, network: nn.Module):
    with pytest.raises(DeviceError, match="fp16 needs a GPU"):
        evaluate(model_of(network), str(tmp_path), precision="fp16")


@given(num_images=st.integers(1, 60), world=st.integers(1, 9), batch=st.integers(1, 20))
def test_all_ranks_together_see_the_batches_of_one_process(num_images: int, world: int, batch: int):
    def places(*, rank: int, world: int) -> list[list[tuple[int, int]]]:
        sampler = DealtSampler(num_images, rank=rank, world=world, batch=batch)
        return [share.places for share in sampler]

    alone = places(rank=0, world=1)
    dealt = [places(rank=rank, world=world) for rank in range(world)]

    assert len({len(batches) for batches in dealt}) == 1
    together = [each for turn in zip(*dealt, strict=True) for each in turn]
    assert together[: len(alone)] == alone
    assert all(sample == -1 for each in together[len(alone) :] for _, sample in each)
    seen = [sample for each in together for _, sample in each if sample != -1]
    assert seen == list(range(num_images))


def card(*classes: str) -> DatasetCard:
    return DatasetCard(classes=classes, splits={}, options={})


def test_the_same_classes_in_the_same_order_fit(network: nn.Module):
    check_classes(model_of(network), card(*CLASSES), data="shapes")


def test_another_number_of_classes_is_refused(network: nn.Module):
    with pytest.raises(DataError, match="tells 3 classes apart, but cats has 2"):
        check_classes(model_of(network), card("lion", "puma"), data="cats")


def test_the_hint_for_other_classes_is_a_command_that_can_be_pasted(network: nn.Module):
    model = model_of(network)

    for classes in (("lion", "puma"), ("circle", "line", "square")):
        with pytest.raises(DataError) as caught:
            check_classes(model, card(*classes), data="../packed odd")
        command = caught.value.hint.partition(": ")[2]
        assert shlex.split(command) == [
            *("convnext", "finetune", "--from", model.path, "--data", "../packed odd")
        ]


def test_other_classes_are_refused_by_name(network: nn.Module):
    with pytest.raises(DataError, match="square is none of the model's"):
        check_classes(model_of(network), card("circle", "line", "square"), data="shapes")


def test_the_same_classes_in_another_order_are_refused(network: nn.Module):
    with pytest.raises(DataError, match="another order: label 0 is line"):
        check_classes(model_of(network), card("line", "circle", "star"), data="shapes")


def test_a_checkpoint_without_class_names_takes_any(network: nn.Module):
    check_classes(model_of(network, classes=()), card("a", "b", "c"), data="letters")


@pytest.mark.parametrize(
    ("name", "image_px"),
    [
        ("convnext_base_22k_1k_384.pth", 384),
        ("convnextv2_huge_22k_512_ema.pt", 512),
        ("convnext_tiny_1k_224_ema.pth", 224),
        ("convnext-large-384-22k-1k", 384),
        ("tiny_384x384.pth", 384),
        ("convnext_tiny_bs512.pth", None),
        ("checkpoint-288.pth", None),
        ("model.safetensors", None),
        ("step=00003840.ckpt", None),
    ],
)
def test_the_name_of_a_released_file_tells_its_size(name: str, image_px: int | None):
    assert guess_image_px(name) == image_px


def test_published_evaluations_warp_from_384_px_on():
    assert published_crop(224) == ("center", 0.875)
    assert published_crop(384) == ("warp", 1.0)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (AskedView(), (224, "center", 0.9)),
        (AskedView(image_px=288), (288, "center", 0.9)),
        (AskedView(image_px=384), (384, "warp", 1.0)),
        (AskedView(image_px=384, crop="center"), (384, "center", 0.875)),
        (AskedView(image_px=384, crop_frac=1.0), (384, "center", 1.0)),
        (AskedView(crop="warp"), (224, "warp", 1.0)),
        (AskedView(crop="center"), (224, "center", 0.9)),
        (AskedView(crop_frac=0.95), (224, "center", 0.95)),
    ],
)
def test_what_is_asked_replaces_what_the_model_says(asked: AskedView, expected: tuple):
    own = Preprocessing(
        image_px=224,
        crop="center",
        crop_frac=0.9,
        interpolation="bilinear",
        mean=VIEW.mean,
        std=VIEW.std,
        reason="",
    )

    view = apply_asked(own, asked)

    assert (view.image_px, view.crop, view.crop_frac) == expected
    assert view.interpolation == "bilinear"


@pytest.mark.parametrize(
    ("name", "image_px", "smallest_px"),
    [("convnext_tiny", 31, 32), ("convnext_isotropic_small", 15, 16)],
)
def test_images_of_which_nothing_would_be_left_are_refused(name, image_px, smallest_px):
    weights = SimpleNamespace(variant=find_variant(name), card=None, layout="official")

    with pytest.raises(CheckpointError, match=f"--image-px {image_px}: {name} halves") as refused:
        choose_preprocessing(weights, AskedView(image_px=image_px), file_name="model.pth")

    assert f"--image-px {smallest_px}" in str(refused.value.hint)
    smallest = AskedView(image_px=smallest_px)
    assert choose_preprocessing(weights, smallest, file_name="model.pth").image_px == smallest_px


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_weights_of_torchvision_are_evaluated_as_torchvision_does(size):
    name = f"convnext_{size}"
    weights = SimpleNamespace(variant=find_variant(name), card=None, layout="torchvision")
    theirs = models.get_model_weights(name).IMAGENET1K_V1.transforms()

    plain = choose_preprocessing(weights, AskedView(), file_name=f"{name}-983f1562.pth")
    large = choose_preprocessing(weights, AskedView(image_px=384), file_name="model.pth")

    short_px = eval_side_px(plain.image_px, crop_frac=plain.crop_frac)
    assert ([short_px], [plain.image_px]) == (theirs.resize_size, theirs.crop_size)
    assert plain.interpolation == theirs.interpolation.value
    assert (list(plain.mean), list(plain.std)) == (theirs.mean, theirs.std)
    assert (large.crop, large.crop_frac) == ("warp", 1.0)


def test_a_share_of_a_warp_makes_no_sense():
    with pytest.raises(UserError, match="keeps the whole image"):
        apply_asked(VIEW, AskedView(crop="warp", crop_frac=0.9))
