"""What a kernel or an operator of a training step is for, told by its name and its launchers.

```
range        what was open on the host when it was launched: mixing, optimizer     RANGES
name         decisive names: own kernels, depthwise, Inductor's, ATen's            KERNELS
convolution  depthwise or dense by the shape of its weight, the direction by name  DIRECTIONS
name         matrix products, and convolutions launched out of sight               PRODUCTS
launcher     the nearest operator whose name says it
```

cuDNN computes depthwise and dense convolutions by kernels of the same names, such as
`sm80_xmma_wgrad_implicit_gemm_...`, so the weight's shape in the launching operator decides. What a
CUDA graph replays has no launching operator; there a convolution counts as depthwise only where its
name says so.

Conventions: dense convolutions (stem and downsampling) are matrix products over patches; a kernel
that a compiler fused counts as normalisation if any of it is; sums of bias gradients and the loss
are elementwise, and so is the pointwise part of GRN.

Source: names as torch 2.x, cuDNN 9, cuBLAS 13 and Inductor write them into traces.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

OperatorClass = Literal[
    "depthwise forward",
    "depthwise input gradient",
    "depthwise weight gradient",
    "depthwise gradients",  # both, where one operator makes them, as on a CPU
    "matrix product",
    "fused MLP",
    "normalisation",
    "elementwise",
    "optimizer",
    "mixing",
    "copies",
    "other",
]

OPERATOR_CLASSES: Final[tuple[OperatorClass, ...]] = get_args(OperatorClass)

MIXING_RANGE: Final = "mixing"
NETWORK_RANGE: Final = "network"
"""Names of `record_function` ranges; the second one ends the reach of the optimizer's, within whose
step Lightning has the closure run."""

Table = tuple[tuple[str, OperatorClass], ...]

RANGES: Final[tuple[tuple[str, OperatorClass | None], ...]] = (
    (rf"^{MIXING_RANGE}$", "mixing"),
    (rf"^{NETWORK_RANGE}$", None),
    (r"^Optimizer\.", "optimizer"),
    (r"^aten::(_foreach_|_fused_adam)", "optimizer"),
)

KERNELS: Final[Table] = (
    # this project's own
    (r"^depthwise_input_grad_kernel", "depthwise input gradient"),
    (r"^depthwise_weight_grad", "depthwise weight gradient"),
    (r"^depthwise_kernel", "depthwise forward"),
    (r"^mlp_\w+_kernel", "fused MLP"),
    (r"^(normalise|(gelu_)?grn)_(\w+_)?kernel", "normalisation"),
    (r"^(gelu_(backward_)?|layer_scale_grad_|sum_kept_)kernel", "elementwise"),
    # memory alone
    (r"^Mem[a-z]+ |copy_kernel_cuda|nchwToNhwc|nhwcToNchw|AddPaddingKernel", "copies"),
    (r"CatArrayBatchedCopy|^aten::(copy_|cat|fill_|zero_)$", "copies"),
    (r"^triton_poi_fused_(_to_copy_|clone_|permute_|transpose_|view_|t_)+\d+$", "copies"),
    # Inductor's, named after the operators that it fused; convolutions in them are bias gradients
    (r"^triton_tem_|^triton_mm", "matrix product"),
    (r"^triton_for_|^triton_\w*(_foreach_|lerp|adam)", "optimizer"),
    (r"^(triton|cpp)_\w*(layer_norm|vector_norm|var_mean|rsqrt)", "normalisation"),
    (r"^(triton|cpp)_", "elementwise"),
    # PyTorch's depthwise kernels; cuDNN's own, of one channel (c1) and one filter (k1) a group
    (r"conv_depthwise2d_forward|\bconv2d_c1_k1|depthwise\w*_fprop", "depthwise forward"),
    (r"conv_depthwise2d_backward|dgrad2d_c1_k1|depthwise\w*_dgrad", "depthwise input gradient"),
    (r"conv_depthwise2d_grad_weight|wgrad2d_c1_k1|depthwise\w*_wgrad", "depthwise weight gradient"),
    # ATen's
    (r"multi_tensor_apply_kernel", "optimizer"),
    (r"layer_norm|GammaBeta|PartGradGammaBeta|RowwiseMoments|NormTwoOps", "normalisation"),
    (r"^aten::(linalg_vector_)?norm$|^LinalgVectorNormBackward", "normalisation"),
    (r"elementwise_kernel|\breduce_kernel|[sS]oft[mM]ax|nll_loss|index_\w*kernel", "elementwise"),
    (r"indexing_backward|indexFunc|RadixSort|^aten::(index_\w+|randperm)$", "elementwise"),
    (r"^aten::(bernoulli_|gelu(_backward)?|(addcmul|add|sub|mul|div)_?)$", "elementwise"),
    (r"^aten::(sum|mean|sqrt|masked_fill_?|where|_?log_softmax\w*)$", "elementwise"),
)
"""By any part of a name; the first that fits."""

DIRECTIONS: Final[Table] = (
    (r"dgrad|bwd_?data|backward_?(input|data)", "depthwise input gradient"),
    (r"wgrad|bwd_?filter|backward_?(weight|filter)", "depthwise weight gradient"),
)

PRODUCTS: Final[Table] = (
    (r"\bconv2d_grouped_direct", "depthwise forward"),
    (r"\bdgrad2d_grouped_direct", "depthwise input gradient"),
    (r"\bwgrad2d_grouped_direct", "depthwise weight gradient"),
    (r"gemm|nvjet|cutlass|splitKreduce|gemv|xmma|convolve|fprop|dgrad|wgrad", "matrix product"),
    (r"^aten::(addmm|mm|bmm|baddbmm|matmul|linear|_addmm_activation)$", "matrix product"),
)

_CONVOLUTION: Final = re.compile(r"^aten::(\w*convolution\w*|conv2d|_conv_depthwise2d\w*)$")


@dataclass(frozen=True)
class Launcher:
    """An operator or a range that was open on the host when a kernel was launched."""

    name: str
    shapes: tuple[tuple[int, ...], ...] = ()
    """Of its tensors, in the order of its arguments; empty for what is no tensor."""

    @property
    def convolves(self) -> bool:
        """Whether it is a convolution or its gradients."""
        return _CONVOLUTION.match(self.name) is not None

    @property
    def depthwise(self) -> bool:
        """Whether it convolves each channel on its own: the weight is (C, 1, height, width)."""
        if self.name.startswith("aten::_conv_depthwise2d"):
            return True
        place = 2 if "backward" in self.name else 1
        weight = self.shapes[place] if len(self.shapes) > place else ()
        return len(weight) == 4 and weight[0] > 1 and weight[1] == 1  # (O, I, H, W)


def classify(name: str, launchers: Sequence[Launcher]) -> OperatorClass:
    """What a kernel is for.

    Args:
        name: Of a kernel; on a CPU, of an operator.
        launchers: Innermost first; for an operator, itself is the first one.
    """
    ranges = (kind for launcher in launchers for kind in _iter_ranges(launcher.name))
    within = next(ranges, None)
    if within is not None:
        return within
    found = _look_up(name, KERNELS)
    if found is not None:
        return found
    convolution = next((each for each in launchers if each.convolves), None)
    if convolution is not None and convolution.depthwise:
        if "backward" not in convolution.name:
            return "depthwise forward"
        return _look_up(name, DIRECTIONS) or "depthwise gradients"
    if convolution is not None:
        return "matrix product"
    for each in (name, *(launcher.name for launcher in launchers)):
        found = _look_up(each, (*KERNELS, *PRODUCTS))
        if found is not None:
            return found
    return "other"


def _iter_ranges(name: str) -> Iterator[OperatorClass | None]:
    return (kind for pattern, kind in RANGES if re.search(pattern, name))


def _look_up(name: str, table: Table) -> OperatorClass | None:
    return next((kind for pattern, kind in table if re.search(pattern, name)), None)
