"""Loss curves of 200 steps on the same batches, by the way blocks are computed."""

import torch

from convnext_cli.catalog.ways import Way
from convnext_cli.data.quickstart import read_digits
from convnext_cli.models.convnext import ConvNeXt

STEPS, IMAGES = 200, 16
PLAIN: tuple[Way, Way] = ("plain", "plain")


def train_curve(
    *,
    device: str,
    ways: tuple[Way, Way],
    grn: bool,
    exact: bool = False,
    turned: bool = False,
) -> torch.Tensor:
    """Losses (200) of a small ConvNeXt on handwritten digits.

    Args:
        device: Where.
        ways: Of the two stages.
        grn: V2.
        exact: In float64, not in bfloat16.
        turned: Whether each batch comes in the opposite order: the same numbers, summed otherwise.
    """
    counts, digits = read_digits()
    images = torch.tensor(counts, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = torch.nn.functional.interpolate(images, 32).repeat(1, 3, 1, 1).to(device)
    dtype = torch.float64 if exact else torch.float32
    labels = torch.tensor(digits, dtype=torch.int64, device=device)
    torch.manual_seed(0)
    model = ConvNeXt(
        depths=(1, 1), dims=(32, 64), num_classes=10, layer_scale_init=None if grn else 0.1, grn=grn
    )
    model.to(device, dtype).to(memory_format=torch.channels_last).train()
    model.use_ways(ways)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    losses = []
    for step in range(STEPS):
        rows = order.roll(-step * IMAGES)[:IMAGES]
        rows = rows.flip(0) if turned else rows
        with torch.autocast(device, dtype=torch.bfloat16, enabled=not exact):
            batch = images[rows].to(dtype, memory_format=torch.channels_last)
            logits = model(batch)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


def assert_within_noise(*, device: str, ways: tuple[Way, Way], grn: bool) -> None:
    """The fused curve is as near to float64's as the plain one, in either order of its sums.

    Two orders of the sums alone are too narrow a measure: on a GPU a batch in the opposite order
    changes no more than the sums of weights' gradients, where kernels round in other places, too.
    """
    exact = train_curve(device=device, ways=PLAIN, grn=grn, exact=True)
    plain = train_curve(device=device, ways=PLAIN, grn=grn)
    turned = train_curve(device=device, ways=PLAIN, grn=grn, turned=True)
    fused = train_curve(device=device, ways=ways, grn=grn)
    off, *usual = (float((curve - exact).abs().mean()) for curve in (fused, plain, turned))
    assert exact[-20:].mean() < 0.5 * exact[:20].mean()  # it learns
    assert not torch.equal(plain, turned)  # the order of sums is seen
    assert 0 < off <= 1.5 * max(usual), usual
