import gc
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from convnext_cli.data.slots import Slots
from convnext_cli.errors import DeviceError


def images(value: int, count: int = 2) -> list[torch.Tensor]:
    return [torch.full((4, 4, 3), value + i, dtype=torch.uint8) for i in range(count)]


def arrived(slots: Slots, slot: int, value: int, count: int = 2) -> torch.Tensor:
    """What the main process gets of a parcel."""
    tensor: torch.Tensor = pickle.loads(pickle.dumps(slots.fill(slot, images(value, count))))
    return tensor


def test_pixels_arrive_as_they_were_put_in():
    slots = Slots(slots=2, images=3, image_px=4)

    pixels = arrived(slots, slots.take(), 7)

    assert pixels.shape == (2, 3, 4, 4)
    assert pixels[0].unique().tolist() == [7]
    assert pixels[1].unique().tolist() == [8]


def test_smaller_images_take_the_slot_of_larger_ones():
    slots = Slots(slots=2, images=3, image_px=8)
    smaller, larger = slots.take(), slots.take()

    full = pickle.loads(
        pickle.dumps(slots.fill(larger, [torch.full((8, 8, 3), 9, dtype=torch.uint8)] * 3))
    )
    pixels = arrived(slots, smaller, 7, count=3)

    assert (pixels.shape, full.shape) == ((3, 3, 4, 4), (3, 3, 8, 8))
    assert [image.unique().tolist() for image in pixels] == [[7], [8], [9]]
    assert full.unique().tolist() == [9]
    assert pixels.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "part", [lambda p: p, lambda p: p[1:, 0], lambda p: p.permute(0, 2, 3, 1).numpy()[1]]
)
def test_a_slot_is_taken_while_any_part_of_its_pixels_is_held(part):
    slots = Slots(slots=1, images=2, image_px=4)
    slot = slots.take()

    held = part(arrived(slots, slot, 7))
    gc.collect()
    assert slots.take() is None

    del held
    gc.collect()
    assert slots.take() == slot


def test_a_batch_that_was_given_away_unseen_frees_its_slot():
    slots = Slots(slots=1, images=2, image_px=4)
    first = slots.take()

    arrived(slots, first, 7)

    assert slots.take() == first


def as_made(made: object) -> object:
    return made


class Doubles(torch.utils.data.Dataset):
    """Batches of one number, in a slot as long as there is one."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots

    def __getitem__(self, asked: tuple[int, int | None]) -> object:
        value, slot = asked
        return torch.stack(images(value)) if slot is None else self.slots.fill(slot, images(value))


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_batches_that_are_all_kept_are_all_right(start_method):
    slots = Slots(slots=3, images=2, image_px=4)
    asked = ((value, slots.take()) for value in range(12))

    loader = DataLoader(
        Doubles(slots),
        sampler=asked,
        batch_size=None,
        num_workers=2,
        multiprocessing_context=start_method,
        collate_fn=as_made,
    )
    kept = list(loader)

    assert [int(batch.flatten()[0]) for batch in kept] == list(range(12))
    assert slots.take() is None  # all that there are, are held


def test_shared_memory_without_room_is_told_in_a_sentence(monkeypatch):
    def refuse(tensor: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)

    with pytest.raises(DeviceError, match=r"no room for 0\.30 GB in shared memory") as refused:
        Slots(slots=10, images=200, image_px=224)

    assert "--shm-size=16g" in str(refused.value.hint)
    assert "--workers 0" in str(refused.value.hint)


def test_more_memory_than_there_is_is_told_in_a_sentence():
    with pytest.raises(DeviceError, match="no room for"):
        Slots(slots=1 << 20, images=1 << 12, image_px=10_000)
