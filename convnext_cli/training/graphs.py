"""A network's forward and backward pass as CUDA graphs, each launched at once.

Launching a block's kernels one by one takes a host longer than small blocks take the device.

`torch.cuda.make_graphed_callables` does the same, but records in a mode in which a loader's thread
that pins memory meanwhile breaks the recording; torch 2.11 has no other mode for it.

Shapes: N images of H x W pixels, K classes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_WARM_UPS = 3
"""Passes before recording: they compile, and fill caches that recording could not."""


def record_network(network: nn.Module, *, passes: int = 1) -> None:
    """Have a network recorded when it first learns from images of a size, and played from then on.

    What it is recorded with are the images' size, the weights' places in memory and autocast as it
    is then. What is drawn in it follows the device's seed, as if it were not recorded.

    Args:
        network: What learns.
        passes: Of an optimizer step, whose gradients are added up.
    """
    forward: Callable[[Tensor], Tensor] = network.forward
    pool: Any = None
    recordings: dict[torch.Size, _Recording] = {}

    def run(x_NCHW: Tensor) -> Tensor:
        nonlocal pool
        if not (network.training and torch.is_grad_enabled()):
            return forward(x_NCHW)
        if x_NCHW.shape not in recordings:
            pool = pool or torch.cuda.graph_pool_handle()  # sizes take turns in the same memory
            weights = [weight for weight in network.parameters() if weight.requires_grad]
            recordings[x_NCHW.shape] = _Recording(forward, x_NCHW, weights, pool)
        recording = recordings[x_NCHW.shape]
        out_NK: Tensor = _Played.apply(recording, x_NCHW, passes > 1, *recording.weights)
        return out_NK

    network.forward = run


class _Recording:
    """A forward and a backward pass of images of one size, on memory of their own."""

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        x_NCHW: Tensor,
        weights: list[nn.Parameter],
        pool: Any,  # noqa: ANN401  # torch's handle has no public type
    ) -> None:
        device = x_NCHW.device
        self.weights = weights
        self.x_NCHW = x_NCHW.detach().clone()
        self.passes = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        drawn = torch.cuda.get_rng_state(device)  # recording draws, too
        with torch.autocast(
            device.type,
            dtype=torch.get_autocast_dtype(device.type),
            enabled=torch.is_autocast_enabled(device.type),
            cache_enabled=False,  # casts of weights belong to each pass
        ):
            ahead = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            ahead.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(ahead):
                for _ in range(_WARM_UPS):
                    torch.autograd.grad(forward(self.x_NCHW).sum(), weights)
            torch.cuda.current_stream(device).wait_stream(ahead)
            first, second = self.passes
            with torch.cuda.graph(first, pool=pool, capture_error_mode="thread_local"):
                out_NK = forward(self.x_NCHW)
            self.grad_NK = torch.empty_like(out_NK)
            with torch.cuda.graph(second, pool=pool, capture_error_mode="thread_local"):
                self.grads = torch.autograd.grad(out_NK, weights, self.grad_NK)
        self.out_NK = out_NK.detach()
        torch.cuda.set_rng_state(drawn, device)


class _Played(torch.autograd.Function):
    """Plays a recording's passes as one step of the network's graph of gradients."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        recording: _Recording,
        x_NCHW: Tensor,
        adds: bool,  # noqa: FBT001  # torch passes no names
        *weights: Tensor,
    ) -> Tensor:
        del weights  # they are where they were
        ctx.recording, ctx.adds = recording, adds
        recording.x_NCHW.copy_(x_NCHW)
        recording.passes[0].replay()
        return recording.out_NK.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NK: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        recording: _Recording = ctx.recording
        recording.grad_NK.copy_(grad_NK)
        recording.passes[1].replay()
        # A first gradient becomes the weight's own: a copy, where others are added to it, for the
        # next pass overwrites the recording's. Lightning clears gradients after the forward pass.
        grads = [
            grad.clone() if ctx.adds and weight.grad is None else grad.detach()
            for weight, grad in zip(recording.weights, recording.grads, strict=True)
        ]
        return None, None, None, *grads
