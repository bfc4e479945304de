"""A system in its process: what is kept of a start among others, and how failures are told."""

import dataclasses
import signal
from pathlib import Path

import pytest
import torch

from convnext_cli.bench import step_process
from convnext_cli.bench.step_process import Start, StepError, StepProcess, Take
from convnext_cli.bench.step_systems import OwnStep
from convnext_cli.data.fetch import default_cache_home
from convnext_cli.errors import PlanError
from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import make_plan
from convnext_cli.recipe.files import load_recipe

CHANGES = ["optim.lr_rule=linear", "batch.global_images=2", "batch.per_device_images=2"]
PLAN = make_plan(
    load_recipe("v2_in1k_atto", CHANGES),
    Cluster(num_nodes=1, devices_per_node=1, device="cpu"),
    name="step_process",
)


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """The folder of kernels that were measured before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = default_cache_home() / "kernels"
    folder.mkdir(parents=True)
    return folder


def build_that_chooses(name, plan):
    """As a step does whose kernels no file has."""
    file = default_cache_home() / "kernels" / "card.json"
    if not file.exists():
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text("{}")
    return lambda: torch.tensor(1.0)


def test_kernels_that_were_timed_among_others_are_kept_nowhere(monkeypatch, cache):
    monkeypatch.setattr(step_process, "build_step", build_that_chooses)
    system = step_process._System("convnext", PLAN)

    assert system.answer(Start(alone=False)).again
    assert list(cache.iterdir()) == []
    assert not system.answer(Start(alone=True)).again
    assert [file.name for file in cache.iterdir()] == ["card.json"]


def test_known_kernels_are_found_and_need_no_second_start(monkeypatch, cache):
    monkeypatch.setattr(step_process, "build_step", build_that_chooses)
    (cache / "card.json").write_text('{"known": 1}')

    assert not step_process._System("convnext", PLAN).answer(Start(alone=False)).again
    assert (cache / "card.json").read_text() == '{"known": 1}'


class RecordedStep(OwnStep):
    """No network at all."""

    ways = ()

    def __init__(self, plan):
        pass

    def __call__(self):
        return torch.tensor(1.0)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_what_was_recorded_among_others_is_recorded_again_alone(monkeypatch, cache, cuda_graphs):
    monkeypatch.setattr(step_process, "build_step", lambda _, plan: RecordedStep(plan))
    plan = dataclasses.replace(PLAN, cuda_graphs=cuda_graphs)

    assert step_process._System("convnext", plan).answer(Start(alone=False)).again == cuda_graphs


def test_a_loss_that_is_not_finite_is_the_users_mistake(monkeypatch, cache):
    monkeypatch.setattr(step_process, "build_step", lambda *_: lambda: torch.tensor(torch.nan))

    with pytest.raises(PlanError, match="timm: the loss is not finite"):
        step_process._System("timm", PLAN).answer(Start(alone=False))


def test_failures_are_told_in_a_line_and_kept_whole():
    mistake = PlanError("wrong", hint="mend it")
    assert step_process._describe(mistake, again=False).cause is mistake
    told = step_process._describe(RuntimeError("first\nsecond"), again=True)
    assert (told.reason, told.again) == ("first", True)
    assert "second" in str(told.cause)
    assert step_process._describe(KeyError("x"), again=False).reason == "KeyError: 'x'"
    full = step_process._describe(torch.OutOfMemoryError("CUDA out of memory."), again=True).cause
    assert isinstance(full, PlanError)
    assert "smaller --batch" in full.hint


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("InductorError: OutOfMemoryError: CUDA out of memory."), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), False),
    ],
)
def test_a_start_that_found_no_memory_among_others_is_made_again(error, lacks):
    assert step_process._lacks_memory(error) == lacks


def test_a_process_that_is_killed_is_told_with_its_exit_code():
    process = StepProcess("timm", PLAN)
    try:
        process._process.kill()

        with pytest.raises(StepError, match=f"exit code {-signal.SIGKILL}, perhaps for want of"):
            process.receive()
        with pytest.raises(StepError, match="exit code"):
            process.take(1)
    finally:
        process.close()


def test_a_process_tells_a_mistake_with_its_hint_and_goes_on():
    process = StepProcess("torchvision", PLAN)  # which has no V2
    try:
        with pytest.raises(StepError, match="torchvision has no convnextv2_atto") as caught:
            process.start(alone=False)
        assert isinstance(caught.value.cause, PlanError)
        assert caught.value.cause.hint == "leave torchvision out of --against"
        process.send(Take(1))
        with pytest.raises(StepError, match="AssertionError"):
            process.receive()
    finally:
        process.close()
    assert not process._process.is_alive()
