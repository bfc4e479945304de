import json

import pytest
import torch
from safetensors import safe_open

from convnext_cli.catalog.models import find_variant
from convnext_cli.models.convnext import build_convnext
from convnext_cli.models.weights import CARD_KEY, ModelCard, read_weights


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = build_convnext(find_variant("convnextv2_atto"), num_classes=7)
    path = tmp_path / "convnextv2_atto_1k_224_ema.pt"
    torch.save({"model": model.state_dict()}, path)
    return path


def test_inspect_says_what_a_file_is(run_cli, checkpoint):
    told = run_cli("weights", "inspect", checkpoint)
    data = json.loads(run_cli("weights", "inspect", checkpoint, "--json").stdout)

    assert told.exit_code == 0
    assert told.stdout == ""
    assert "convnextv2_atto, 3,389,647 parameters, float32" in told.stderr
    assert data["layout"] == "official"
    assert data["architecture"] == "convnextv2_atto"
    assert data["num_classes"] == 7
    assert data["weights"] == "ema"
    assert data["non_finite"] == 0


def test_nan_weights_are_told(run_cli, tmp_path):
    state = build_convnext(find_variant("convnextv2_atto"), num_classes=3).state_dict()
    state["norm.weight"][5] = torch.nan
    torch.save(state, tmp_path / "x.pth")

    told = run_cli("weights", "inspect", tmp_path / "x.pth")

    assert "1 values are NaN or infinite" in told.stderr


def test_convert_writes_the_same_values_and_keeps_what_is_there(run_cli, checkpoint, tmp_path):
    out = tmp_path / "timm.safetensors"

    first = run_cli("weights", "convert", checkpoint, "--to", "timm", "--out", out)
    again = run_cli("weights", "convert", checkpoint, "--to", "timm", "--out", out)
    forced = run_cli("weights", "convert", checkpoint, "--to", "timm", "--out", out, "--force")

    assert (first.exit_code, again.exit_code, forced.exit_code) == (0, 2, 0)
    assert f"{out} exists already" in again.stderr
    with safe_open(out, "pt") as file:
        assert "stages.0.blocks.0.conv_dw.weight" in file.keys()  # noqa: SIM118  # not a dict
    before, after = read_weights(checkpoint).state, read_weights(out).state
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_file_that_cannot_say_how_images_are_prepared_is_told(run_cli, tmp_path):
    state = build_convnext(find_variant("convnext_tiny"), num_classes=2).state_dict()
    card = ModelCard(
        variant="convnext_tiny", num_classes=2, image_px=64, classes=("cat", "dog"),
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic", crop="center",
        crop_frac=1.0,
    )  # fmt: skip
    torch.save({"model": state, CARD_KEY: card.to_dict()}, tmp_path / "run.pth")
    told = {}
    for name in ("x.pth", "x.safetensors"):
        out = tmp_path / name
        done = run_cli(
            *("weights", "convert", tmp_path / "run.pth", "--to", "torchvision", "--out", out)
        )
        told[read_weights(out).card] = "a .safetensors keeps both" in done.stderr

    assert told == {None: True, card: False}


@pytest.mark.parametrize(
    ("to", "name", "sentence"),
    [
        ("torchvision", "x.pth", "convnextv2_atto has no place in the torchvision layout"),
        ("timm", "x.onnx", "for --to timm the name ends in .pth or .pt or .safetensors"),
        ("huggingface", "x.pth", "for --to huggingface it is a folder"),
        ("official", "nodir/x.pth", "nodir is no writable folder"),
        ("timm", "nodir/x.safetensors", "nodir is no writable folder"),
        ("onnx", "nodir/x.onnx", "nodir is no writable folder"),
    ],
)
def test_what_cannot_be_written_gets_a_sentence(run_cli, checkpoint, tmp_path, to, name, sentence):
    told = run_cli("weights", "convert", checkpoint, "--to", to, "--out", tmp_path / name)

    assert told.exit_code == 2
    assert sentence in told.stderr
    assert "hint: " in told.stderr
    assert not (tmp_path / name).exists()


def test_a_size_is_not_taken_for_a_layout_that_has_none(run_cli, checkpoint, tmp_path):
    out = tmp_path / "x.pth"

    told = run_cli(
        "weights", "convert", checkpoint, "--to", "timm", "--out", out, "--image-px", "384"
    )

    assert told.exit_code == 2
    assert "--image-px 384: weights in the timm layout take images of any size" in told.stderr
    assert not out.exists()


def test_a_22k_head_becomes_one_for_1k_and_the_missing_class_is_named(run_cli, tmp_path):
    model = build_convnext(find_variant("convnextv2_atto"), num_classes=21_841)
    torch.save({"model": model.state_dict()}, tmp_path / "x.pth")
    out = tmp_path / "mapped.pth"

    told = run_cli(
        "weights", "convert", tmp_path / "x.pth", "--to", "official", "--out", out, "--map-head"
    )

    assert told.exit_code == 0
    assert "999 of 1000 rows; n04399382 starts afresh" in told.stderr
    found = read_weights(out)
    assert found.num_classes == 1000
    assert torch.equal(found.state["head.weight"][0], model.head.weight[359])


def test_pre_trained_weights_have_no_head_to_map_or_to_export(run_cli, checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)["model"]
    bare = {key: v for key, v in state.items() if not key.startswith(("norm.", "head."))}
    torch.save({"model": bare}, tmp_path / "fcmae.pt")

    mapped = run_cli(
        *("weights", "convert", "fcmae.pt", "--to", "official", "--out", "x.pth", "--map-head")
    )
    exported = run_cli("weights", "convert", "fcmae.pt", "--to", "onnx", "--out", "x.onnx")

    assert (mapped.exit_code, exported.exit_code) == (2, 2)
    assert "fcmae.pt has no head whose classes could be mapped" in mapped.stderr
    assert "fcmae.pt has no head to export" in exported.stderr
    assert not (tmp_path / "x.pth").exists()
    assert not (tmp_path / "x.onnx").exists()


def test_nan_weights_are_not_exported(run_cli, checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)["model"]
    state["norm.weight"][5] = torch.nan
    torch.save(state, tmp_path / "nan.pth")

    told = run_cli("weights", "convert", "nan.pth", "--to", "onnx", "--out", "x.onnx")

    assert told.exit_code == 2
    assert "nan.pth: 1 of its values are NaN or infinite" in told.stderr
    assert not (tmp_path / "x.onnx").exists()


def test_a_folder_for_transformers_may_have_a_dot_in_its_name(run_cli, checkpoint, tmp_path):
    told = run_cli("weights", "convert", checkpoint, "--to", "huggingface", "--out", "atto.v1.5")

    assert told.exit_code == 0
    assert {path.name for path in (tmp_path / "atto.v1.5").iterdir()} == {
        "config.json",
        "model.safetensors",
    }


def test_a_folder_is_no_file_and_a_file_no_folder_even_by_force(run_cli, checkpoint, tmp_path):
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "file").touch()

    as_file = run_cli(
        *("weights", "convert", checkpoint, "--to", "timm", "--out", "folder.pth", "--force")
    )
    as_folder = run_cli(
        *("weights", "convert", checkpoint, "--to", "huggingface", "--out", "file", "--force")
    )

    assert (as_file.exit_code, as_folder.exit_code) == (2, 2)
    assert "--out folder.pth: this is a folder" in as_file.stderr
    assert "--out file: for --to huggingface it is a folder" in as_folder.stderr


def test_images_too_small_for_the_network_are_refused_at_once(run_cli, checkpoint):
    told = run_cli(
        *("weights", "convert", checkpoint, "--to", "onnx", "--out", "x.onnx", "--image-px", "8")
    )

    assert told.exit_code == 2
    assert "--image-px" in told.stderr


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_weights_that_are_not_whole_are_not_converted(run_cli, checkpoint, tmp_path, damage):
    state = torch.load(checkpoint, weights_only=True)["model"]
    key = "stages.0.0.dwconv.bias"
    state[key] = state[key][:3]
    if damage == "missing":
        del state[key]
    torch.save(state, tmp_path / "half.pth")

    told = run_cli("weights", "convert", "half.pth", "--to", "timm", "--out", "x.pth")

    assert told.exit_code == 2
    assert f"half.pth: {key} is {'missing' if damage == 'missing' else '(3,)'}" in told.stderr
    assert "hint: name another file" in told.stderr
    assert not (tmp_path / "x.pth").exists()
