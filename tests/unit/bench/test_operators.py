"""What kernels are for: names as profilers of CUDA, Inductor and CPUs write them."""

import pytest

from convnext_cli.bench.operators import Launcher, classify

ACCESSOR = "at::GenericPackedTensorAccessor<c10::BFloat16 const, 4ul, at::DefaultPtrTraits, int>"
DIVISOR = "cudnn::reduced_divisor, cudnn::reduced_divisor, int, int)"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        # this project's
        ("depthwise_kernel", "depthwise forward"),
        ("depthwise_input_grad_kernel", "depthwise input gradient"),
        ("depthwise_weight_grad_kernel", "depthwise weight gradient"),
        ("normalise_kernel", "normalisation"),
        ("normalise_backward_kernel", "normalisation"),
        ("mlp_forward_kernel", "fused MLP"),
        ("gelu_grn_sums_kernel", "normalisation"),
        ("gelu_backward_kernel", "elementwise"),
        # PyTorch's depthwise kernels, and cuDNN's that say so
        (
            "void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel_generic"
            f"<c10::BFloat16, int>({ACCESSOR}, ...)",
            "depthwise forward",
        ),
        (
            "void at::native::(anonymous namespace)::conv_depthwise2d_backward_kernel"
            f"<0, 1, c10::BFloat16, int>({ACCESSOR}, ...)",
            "depthwise input gradient",
        ),
        (
            "void at::native::(anonymous namespace)::conv_depthwise2d_grad_weight_kernel"
            f"<float, unsigned int>({ACCESSOR}, ...)",
            "depthwise weight gradient",
        ),
        (
            "void conv2d_c1_k1_nhwc_kernel_specialized<__nv_bfloat16, float, float, 7, 1, 3>"
            f"(float, __nv_bfloat16 const*, {DIVISOR}",
            "depthwise forward",
        ),
        (
            "void dgrad2d_c1_k1_nhwc_kernel_specialized_window<__half, float, float, 5, 1, true>"
            f"(float, __half const*, __half const*, {DIVISOR}",
            "depthwise input gradient",
        ),
        (
            f"void wgrad2d_c1_k1_nhwc_reduction_kernel<__half, float, float>(float, {DIVISOR}",
            "depthwise weight gradient",
        ),
        (
            "sm80_xmma_depthwise_convolution_dgrad_tiling_f16f16_f32f32_f32_nhwckrsc_nhwc_tilesize"
            "1x8x8_1x5x5_1x1x1_1x1x1_stage2_warpsize4x1x1_g64_betaFalse_execute_helper_kernel",
            "depthwise input gradient",
        ),
        ("void wgrad2d_grouped_direct_kernel<float, float, float>", "depthwise weight gradient"),
        # matrix products
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "matrix product"),
        (
            "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute"
            "_segment_k_off_kernel__5x_cublas",
            "matrix product",
        ),
        (
            "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x64_64x3_nn>"
            "(cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x64_64x3_nn::Params)",
            "matrix product",
        ),
        (
            "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, false>"
            "(cublasLt::cublasSplitKParams<float>, float const*)",
            "matrix product",
        ),
        ("triton_tem_fused_addmm_gelu_3", "matrix product"),
        ("aten::addmm", "matrix product"),
        # Inductor
        ("triton_poi_fused_add_mul_permute_7", "elementwise"),
        ("triton_poi_fused_gelu_gelu_backward_12", "elementwise"),
        ("triton_red_fused_convolution_backward_21", "elementwise"),
        ("triton_per_fused_native_layer_norm_backward_9", "normalisation"),
        ("triton_red_fused_cat_native_layer_norm_native_layer_norm_backward_8", "normalisation"),
        ("triton_red_fused_gelu_linalg_vector_norm_4", "normalisation"),
        ("triton_poi_fused__to_copy_5", "copies"),
        ("triton_for_fused_2", "optimizer"),
        # ATen
        (
            "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>"
            "(int, float, float const*)",
            "normalisation",
        ),
        (
            "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float>",
            "normalisation",
        ),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(at::"
            "TensorIteratorBase&, at::native::GeluType)::{lambda()#2}>",
            "elementwise",
        ),
        (
            "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::func_"
            "wrapper_t<float, at::native::sum_functor<float>>>>",
            "elementwise",
        ),
        (
            "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::"
            "TensorIteratorBase&)::{lambda()#3}>",
            "copies",
        ),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<__half, __half, float>", "copies"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("Memset (Device)", "copies"),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::"
            "(anonymous namespace)::FusedOptimizerTensorListMetadata<4>>",
            "optimizer",
        ),
        ("void somebody::elses_kernel<float>(float*)", "other"),
    ],
)
def test_a_name_that_says_it_is_enough(name, kind):
    assert classify(name, ()) == kind


WGRAD = "sm80_xmma_wgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x64x32"
FPROP = "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize64x64x64"
DEPTHWISE, DENSE = (96, 1, 7, 7), (192, 96, 2, 2)


def convolution(weight: tuple[int, ...], *, backward: bool) -> Launcher:
    x = (8, weight[0], 14, 14)
    if backward:
        return Launcher("aten::convolution_backward", (x, x, weight))
    return Launcher("aten::cudnn_convolution", (x, weight))


@pytest.mark.parametrize(
    ("name", "weight", "backward", "kind"),
    [
        (WGRAD, DEPTHWISE, True, "depthwise weight gradient"),
        (WGRAD.replace("wgrad", "dgrad"), DEPTHWISE, True, "depthwise input gradient"),
        (FPROP, DEPTHWISE, False, "depthwise forward"),
        ("void cudnn::an_engine_without_a_direction", DEPTHWISE, True, "depthwise gradients"),
        (WGRAD, DENSE, True, "matrix product"),
        (FPROP, DENSE, False, "matrix product"),
        (FPROP, (96, 3, 4, 4), False, "matrix product"),
        (FPROP, (384, 96, 1, 1), False, "matrix product"),
        ("void nhwcToNchwKernel<float>", DEPTHWISE, True, "copies"),
    ],
)
def test_the_weight_of_the_launching_operator_tells_depthwise_from_dense(
    name, weight, backward, kind
):
    launchers = [convolution(weight, backward=backward), Launcher("ConvolutionBackward0")]

    assert classify(name, launchers) == kind


def test_a_replayed_convolution_counts_as_a_product():
    assert classify(WGRAD, [Launcher("cudaGraphLaunch")]) == "matrix product"


def test_an_operator_of_a_cpu_makes_both_gradients():
    operator = convolution(DEPTHWISE, backward=True)

    assert classify(operator.name, [operator]) == "depthwise gradients"


def test_the_innermost_range_counts():
    step, network = Launcher("Optimizer.step#AdamW.step"), Launcher("network")
    add = Launcher("aten::add")

    assert classify("aten::add", [add, step]) == "optimizer"
    assert classify("aten::add", [add, network, step]) == "elementwise"
    assert classify("aten::add", [add, Launcher("mixing"), network, step]) == "mixing"
    assert classify("aten::lerp_", [Launcher("aten::_foreach_lerp_")]) == "optimizer"


def test_a_kernel_without_a_telling_name_is_its_operators():
    assert classify("kernel_0x1f", [Launcher("aten::mm")]) == "matrix product"
    assert classify("aten::empty", [Launcher("aten::empty"), Launcher("aten::gelu")]) == (
        "elementwise"
    )
