"""What this machine must have for what is asked."""

import pytest
import torch

from convnext_cli.errors import DeviceError
from convnext_cli.plan.cluster import Cluster
from convnext_cli.training import devices
from convnext_cli.training.devices import check_devices, check_fp8, check_strategy

TWO = Cluster(device="cpu", devices_per_node=2)


def test_convolutions_of_fp32_are_in_fp32_on_a_gpu(monkeypatch):
    monkeypatch.setattr(devices, "_check_gpus", lambda *_, **__: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)

    check_devices(Cluster(device="cuda"), precision="fp32")

    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6)])
def test_a_gpu_without_fp8_is_refused(capability):
    with pytest.raises(
        DeviceError, match=f"this one has {capability[0]}.{capability[1]}"
    ) as caught:
        check_fp8(capability)

    assert "compute.fp8=false" in caught.value.hint


def test_fp8_without_torchao_is_refused_with_two_ways_out(monkeypatch):
    monkeypatch.setattr(devices, "find_spec", lambda _: None)

    with pytest.raises(DeviceError, match="needs torchao, which is not installed") as caught:
        check_fp8((9, 0))

    assert "pip install 'convnext[fp8]'" in caught.value.hint
    assert "compute.fp8=false" in caught.value.hint


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0)])
def test_a_gpu_with_fp8_and_torchao_is_taken(capability, monkeypatch):
    monkeypatch.setattr(devices, "find_spec", lambda name: name)

    check_fp8(capability)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_zero_without_deepspeed_is_refused_with_two_ways_out(name, monkeypatch):
    monkeypatch.setattr(devices, "find_spec", lambda _: None)

    with pytest.raises(DeviceError, match=f"{name} needs DeepSpeed, which is not") as caught:
        check_strategy(TWO, strategy=name)

    assert "pip install 'convnext[deepspeed]'" in caught.value.hint
    assert "compute.strategy=fsdp" in caught.value.hint
    check_strategy(TWO, strategy="fsdp")
    check_strategy(Cluster(device="cpu"), strategy=name)
