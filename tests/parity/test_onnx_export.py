"""An exported network gives the same logits in onnxruntime, for any number of images."""

import numpy as np
import onnxruntime
import pytest
import torch

from convnext_cli.catalog.models import find_variant
from convnext_cli.errors import CheckpointError, StorageError
from convnext_cli.models.convnext import build_convnext
from convnext_cli.models.export import export_onnx


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # onnxscript's own
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["convnextv2_atto", "convnext_tiny"])
def test_onnxruntime_agrees_to_1e_5_for_any_batch(name, tmp_path):
    torch.manual_seed(0)
    model = build_convnext(find_variant(name), num_classes=10).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith(("gamma", "beta")):
                value.uniform_(0.05, 0.2)

    difference = export_onnx(model, tmp_path / "model.onnx", image_px=64)

    assert difference < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for count in (1, 3):
        images = torch.randn(count, 3, 64, 64)
        theirs = session.run(None, {"images": images.numpy()})[0]
        with torch.no_grad():
            np.testing.assert_allclose(theirs, model(images).numpy(), atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_place_that_cannot_be_written_leaves_nothing(tmp_path):
    model = build_convnext(find_variant("convnextv2_atto"), num_classes=3)

    with pytest.raises(StorageError, match="cannot write"):
        export_onnx(model, tmp_path / "nowhere" / "model.onnx", image_px=32)


def test_a_network_that_one_file_cannot_hold_is_refused(tmp_path):
    with torch.device("meta"):
        model = build_convnext(find_variant("convnextv2_huge"), num_classes=1000)

    with pytest.raises(CheckpointError, match=r"the network has 2\.5 GiB of weights"):
        export_onnx(model, tmp_path / "model.onnx", image_px=224)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # onnxscript's own
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_export_with_other_logits_is_not_kept(tmp_path):
    model = build_convnext(find_variant("convnextv2_atto"), num_classes=3)
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)

    with pytest.raises(CheckpointError, match="onnxruntime's logits differ from torch's by nan"):
        export_onnx(model, tmp_path / "model.onnx", image_px=32)
    assert not list(tmp_path.iterdir())
