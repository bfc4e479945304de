"""ZeRO by DeepSpeed, with ddp's checkpoints.

```
stage 1   a device steps on its share of the weights and of AdamW's moments
stage 2   and keeps its share of the gradients alone, exchanged in every pass
stage 3   and of the weights and the averaged weights, fetched layer by layer
```

Weights stay in fp32 and autocast casts, as under ddp; DeepSpeed's own bf16 and fp16 would keep the
averaged weights in that precision, where a decay of .9999 moves nothing.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from convnext_cli.optim.build import check_groups
from convnext_cli.training.sharding import WholeCheckpointStrategy

ZeroStage = Literal[1, 2, 3]

_BUCKET_VALUES = 50_000_000
"""Values that are exchanged at once: 200 MB in fp32."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroStrategy(WholeCheckpointStrategy):
    """A DeepSpeed engine in the place of DDP's wrapper; Lightning's own strategy is for GPUs alone.

    Args:
        stage: What is shared.
        clip_norm: Largest norm of the gradient, which DeepSpeed clips by itself; None: not clipped.
        process_group_backend: nccl or gloo.
    """

    def __init__(
        self, *, stage: ZeroStage, clip_norm: float | None, process_group_backend: str
    ) -> None:
        super().__init__(process_group_backend=process_group_backend)
        self.stage = stage
        self.clip_norm = clip_norm
        self._engine: Any = None
        self._weights: list[nn.Parameter] = []
        self._groups: list[dict[str, Any]] = []

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Build the optimizer as for one device, and hand it and the networks to an engine."""
        super().setup_optimizers(trainer)
        (optimizer,) = self.optimizers
        self._weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        self._groups = optimizer.state_dict()["param_groups"]
        self._engine = self._build_engine(optimizer)
        self.model = self._engine
        self.optimizers = [self._engine.optimizer]
        self._fill_state(step=0.0)

    def _build_engine(self, optimizer: Optimizer) -> Any:  # noqa: ANN401  # DeepSpeed has no types
        if self.root_device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ["LOCAL_RANK"] = str(self.local_rank)  # it asks nobody else
        import deepspeed  # noqa: PLC0415  # optional, and takes seconds

        precision = self.precision_plugin.precision
        # it prints what it builds
        with redirect_stdout(sys.stderr):
            engine, *_ = deepspeed.initialize(
                args=Namespace(device_rank=self.local_rank),
                model=self.task,
                model_parameters=self._weights,
                optimizer=optimizer,
                dist_init_required=False,
                config={
                    "train_micro_batch_size_per_gpu": 1,  # for its own reports only
                    "gradient_accumulation_steps": 1,  # `backward` says which pass is the last
                    "gradient_clipping": self.clip_norm or 0.0,
                    "zero_allow_untested_optimizer": True,
                    "zero_optimization": {
                        "stage": self.stage,
                        "overlap_comm": self.root_device.type == "cuda",
                        "contiguous_gradients": True,
                        "reduce_bucket_size": _BUCKET_VALUES,
                        "allgather_bucket_size": _BUCKET_VALUES,
                        "stage3_prefetch_bucket_size": _BUCKET_VALUES,
                        # weights that stayed whole between steps would miss the averaging
                        "stage3_param_persistence_threshold": 0,
                        "stage3_max_reuse_distance": 0,
                    },
                    "torch_autocast": {
                        "enabled": precision == "bf16-mixed",
                        "dtype": "bfloat16",
                        "lower_precision_safe_modules": [],  # exchange everything in fp32
                    },
                },
            )
        return engine

    @contextmanager
    def block_backward_sync(self) -> Generator[None]:
        """Nothing: `backward` tells the engine."""
        yield

    def backward(
        self,
        closure_loss: Tensor,
        optimizer: Optimizer | None,
        *args: Any,  # noqa: ANN401  # Lightning's signature
        **kwargs: Any,  # noqa: ANN401
    ) -> Tensor:
        """One backward pass by the engine; only the last one of a step is exchanged in stage 1."""
        del optimizer, args, kwargs
        loss = self.precision_plugin.pre_backward(closure_loss, self.task)
        self._engine.set_gradient_accumulation_boundary(self.task.at_step_end)
        self._engine.backward(loss, scale_wrt_gas=False)
        return self.precision_plugin.post_backward(loss, self.task)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | nn.Module | None = None,
        **kwargs: Any,  # noqa: ANN401  # Lightning's signature
    ) -> Any:  # noqa: ANN401
        """The last pass, then clipping and the step by the engine, or none (see `Classifier`)."""
        del optimizer, model, kwargs
        loss = closure()
        self._engine.step()
        # It leaves a step out by itself whose gradient is not finite, on all ranks; it has waited
        # for the device to know.
        overflow = float(self._engine.optimizer.overflow)
        self.task.left_out = torch.full((), overflow, device=self.root_device)
        norm = self._engine.get_global_grad_norm()
        if norm is not None:
            self.task.grad_norm = torch.as_tensor(norm).detach()
        return loss

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole weights on rank 0, nothing elsewhere."""
        state = self.task.state_dict(keep_vars=True)
        if self.stage < 3:
            return {key: self.keep(value) for key, value in state.items()}
        from deepspeed import zero  # noqa: PLC0415  # optional, and takes seconds

        whole: dict[str, Any] = {}
        for key, value in state.items():
            shared = [value] if hasattr(value, "ds_id") else []
            with zero.GatheredParameters(shared):
                whole[key] = self.keep(value)
        return whole

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state on rank 0, as the optimizer of one device writes it."""
        del optimizer
        from deepspeed.utils import safe_get_full_optimizer_state  # noqa: PLC0415

        stepping = self._engine.optimizer.optimizer
        groups = [
            group | {"lr": live["lr"]}
            for group, live in zip(self._groups, stepping.param_groups, strict=True)
        ]
        step = next(iter(stepping.state.values()))["step"].detach().cpu()
        state = {}
        for index, weight in enumerate(self._weights):
            moments = {
                key: self.keep(safe_get_full_optimizer_state(weight, key)) for key in _MOMENTS
            }
            # one that all share would be counted up by all, where it is loaded
            state[index] = {"step": step.clone(), **moments}
        return {"state": state, "param_groups": groups}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Share out the moments; every rank has read all of them.

        Raises:
            CheckpointError: They are about other groups of weights.
        """
        (state,) = checkpoint["optimizer_states"]
        check_groups(self._groups, state["param_groups"])
        if not state["state"]:
            return
        self._fill_state(step=float(state["state"][0]["step"]))
        for index, weight in enumerate(self._weights):
            for key in _MOMENTS:
                self._load_moment(weight, state["state"][index][key], key=key)

    def _fill_state(self, *, step: float) -> None:
        """Give AdamW its state, with empty moments, on this rank's flat share of each group.

        It would make the same at its first step, but DeepSpeed 0.19 looks for the moments of all
        groups after the step of the first one, and finds no others.
        """
        shared = self._engine.optimizer
        stepping = shared.optimizer
        flats = (
            shared.fp32_partitioned_groups_flat
            if self.stage == 3
            else shared.single_partition_of_fp32_groups
        )
        on_device = stepping.defaults["fused"] or stepping.defaults["capturable"]
        for flat in flats:
            stepping.state[flat] = {
                "step": torch.tensor(step, device=flat.device if on_device else "cpu"),
                **{key: torch.zeros_like(flat) for key in _MOMENTS},
            }
        if self.stage < 3:
            shared._hp_optimizer_states_linked = False  # noqa: SLF001  # look again
            shared._lazy_init_hp_params_optimizer_state()  # noqa: SLF001

    def _load_moment(self, weight: nn.Parameter, value: Tensor, *, key: str) -> None:
        from deepspeed import utils  # noqa: PLC0415  # optional, and takes seconds

        value = value.to(self.root_device)
        if self.stage < 3:
            utils.safe_set_full_optimizer_state(weight, value, key)
            return
        # its own way to set a whole tensor takes no size that does not divide
        size = utils.safe_get_local_optimizer_state(weight, key).numel()
        start = self.global_rank * size
        share = value.flatten()[start : start + size]
        share = functional.pad(share, (0, size - share.numel()))
        utils.safe_set_local_optimizer_state(weight, share, key)
