import re

import numpy as np
import pytest
import torch
from torch._inductor.utils import run_and_get_code

from convnext_cli.data.order import image_seed, seeded_random
from convnext_cli.data.randaugment import (
    NOTHING,
    OPS,
    apply_ops,
    apply_ops_pillow,
    build_policy,
    compile_affine,
    draw_ops,
)

MEAN = (0.485, 0.456, 0.406)


def policy_of(text: str = "rand-m9-mstd0.5-inc1"):
    return build_policy(text, image_px=32, mean=MEAN, interpolation="bicubic")


def some_images(count: int = 12, height: int = 33, width: int = 29) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def drawn(text: str, sample: int, *, epoch: int = 0) -> np.ndarray:
    with seeded_random(image_seed(0, epoch=epoch, sample=sample)):
        return draw_ops(policy_of(text))


def some_ops(count: int = 12, text: str = "rand-m9-n3-p1.0-inc1") -> np.ndarray:
    return np.stack([drawn(text, n) for n in range(count)])


def applied(images: torch.Tensor, ops: np.ndarray) -> torch.Tensor:
    return apply_ops(images, ops, mean=MEAN, interpolation="bicubic")


def test_half_of_the_layers_do_something_and_all_operations_come():
    ops = some_ops(600, "rand-m9-mstd0.5-inc1")

    done = ops[:, :, 0] != NOTHING
    assert ops.shape == (600, 2, 2)
    assert 0.45 < done.mean() < 0.55
    names = {OPS[int(place)] for place in ops[done][:, 0]}
    assert names == {op.name for op in policy_of().ops}


def test_choices_follow_from_the_stream_alone():
    text = "rand-m9-mstd0.5-inc1"
    first, second = (drawn(text, 5, epoch=1) for _ in range(2))
    other = drawn(text, 5, epoch=2)

    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_an_image_does_not_depend_on_the_others_of_its_batch():
    images, ops = some_images(), some_ops()

    together = applied(images, ops)

    for n in range(len(images)):
        assert torch.equal(applied(images[n : n + 1], ops[n : n + 1])[0], together[n])


def test_the_batch_that_came_is_not_changed_and_its_memory_format_does_not_matter():
    images = some_images()
    spread = images.to(memory_format=torch.channels_last)

    result = applied(images, some_ops())

    assert torch.equal(images, some_images())
    assert torch.equal(applied(spread, some_ops()), result)
    assert not torch.equal(result, images)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 3)])
def test_tiny_images_keep_their_size(size):
    images = some_images(24, *size)

    assert applied(images, some_ops(24)).shape == images.shape


def test_no_operation_leaves_the_pixels():
    nothing = np.full((12, 2, 2), (NOTHING, 0), dtype=np.float32)

    assert torch.equal(applied(some_images(), nothing), some_images())
    assert torch.equal(
        apply_ops_pillow(some_images()[0], nothing[0], policy=policy_of()), some_images()[0]
    )


def test_empty_corners_are_filled_with_the_mean_colour():
    ops = np.array([[[OPS.index("TranslateX"), 100]]], dtype=np.float32)

    result = applied(some_images(1), ops)

    assert result[0, :, 0, 0].tolist() == [124, 116, 104]
    assert len(result.flatten(2).unique(dim=2)[0, 0]) == 1


@pytest.mark.parametrize("text", ["rand-x9", "random", "rand-m9-t3a", "rand-mfoo3"])
def test_a_policy_that_is_not_understood_is_refused(text):
    with pytest.raises(ValueError, match=f"RandAugment policy '{text}'"):
        policy_of(text)


def test_compiled_the_affine_operations_are_one_kernel_with_the_same_pixels():
    names = ("ShearX", "ShearY", "TranslateXRel", "TranslateYRel", "Rotate")
    values = (0.2, -0.3, 0.25, -0.1, 17.0)
    ops = np.array([[(OPS.index(name), value)] for name, value in zip(names, values, strict=True)])
    images = torch.randint(0, 256, (5, 3, 24, 32), dtype=torch.uint8)
    torch._dynamo.reset()
    compile_affine.cache_clear()

    def run():
        return apply_ops(
            images, ops.astype(np.float32), mean=MEAN, interpolation="bicubic", compiled=True
        )

    moved, (code,) = run_and_get_code(run)

    # The sums are made in another order, and a value is cut off.
    off = (moved.int() - applied(images, ops.astype(np.float32)).int()).abs()
    assert off.max() <= 1
    assert (off > 0).float().mean() < 0.01
    assert len(re.findall(r"buf\d+ = empty_strided_cpu", code)) == 1
