"""Names of operations, as profilers show them on several GPUs and on a CPU, and the rows that they belong to."""

import importlib
import pkgutil

import pytest

from kernels import fused
from train.kernel_names import COMPILED, COPIES, ELEMENTWISE, GELU_BACKWARD, GELU_FORWARD, OTHER, ROWS, row_of

NAMES = {
    "matmuls": [
        # cuBLAS on Hopper, Blackwell and Ampere; CUTLASS as cuBLAS has it; Inductor's template
        "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT",
        "nvjet_hsh_128x256_64x4_2x1_v_bz_NNT",
        "nvjet_sm100_tst_64x32_64x16_2x1_2cta_h_bz_splitK_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas",
        "sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x16_stage4_warpsize2x2x1_ffma_aligna4_alignc4_execute_kernel",
        "ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_tn",
        "ampere_bf16_s1688gemm_bf16_128x128_ldg8_f2f_stages_32x1_nt",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_64x64_32x6_nn_align8>(...)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16, __nv_bfloat16, float, __nv_bfloat16, true>()",
        "triton_tem_fused_addmm_gelu_3",
        "aten::mm",
        "aten::addmm",
        "mkldnn::_linear_pointwise",
    ],
    "attention forward": [
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0",
        "cudnn_generated_fort_native_sdpa_sm80_flash_fprop_wmma_f16_knob_3_64x64x128_4x1x1_kernel0_0",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, false, ...>>",
        "void flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 128, 4, ...>>",
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90<2>>>>",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::bmm",
        "aten::_softmax",
    ],
    "attention backward": [
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x1x1_kernel0_0",
        "void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16, 64>()",
        "void cudnn::fusion::convert_dq_to_16bits<true, __nv_bfloat16>()",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<64, ...>>",
        "void pytorch_flash::flash_bwd_dot_do_o_kernel<true, Flash_bwd_kernel_traits<64>>",
        "void pytorch_flash::flash_bwd_convert_dq_kernel<Flash_bwd_kernel_traits<64>>",
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnBwdSm90<flash::CollectiveMainloopBwdSm90<2>>>>",
        "void cutlass::device_kernel<flash::FlashAttnBwdPreprocess<cute::tuple<cute::C<128>>, cutlass::bfloat16_t>>",
        "void cutlass::device_kernel<flash::FlashAttnBwdPostprocessConvertdQ<cute::tuple<cute::C<64>>>>",
        "fmha_cutlassB_bf16_aligned_64x64_k64_sm80(PyTorchMemEffAttention::AttentionBackwardKernel<cutlass::bfloat16_t>)",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ],
    "LayerNorm forward": [
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>(int, float, float const*)",
        "aten::native_layer_norm",
    ],
    "LayerNorm backward": [
        "void at::native::(anonymous namespace)::layer_norm_grad_input_kernel_vectorized<float, float>(float const*)",
        "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float, float, 64u, 1u>(...)",
        "aten::native_layer_norm_backward",
        "nanofuse::add_layer_norm_backward",
    ],
    "GELU forward": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(at::TensorIteratorBase&, "
        "at::native::GeluType)::{lambda()#2}, std::array<char*, 2ul>>",
        "aten::gelu",
    ],
    "GELU backward": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::GeluBackwardCUDAKernelImpl(...)>",
        "aten::gelu_backward",
    ],
    "cross-entropy": [
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float, "
        "at::native::(anonymous namespace)::LogSoftMaxForwardEpilogue>(float*, float const*, int)",
        "void at::native::(anonymous namespace)::nll_loss_forward_reduce_cuda_kernel_2d<float, float, long>(float*)",
        "aten::_log_softmax_backward_data",
    ],
    "embeddings": [
        "void at::native::(anonymous namespace)::indexSelectLargeIndex<float, long, unsigned int, 2, 2, -2, true>()",
        "void at::native::(anonymous namespace)::embedding_backward_feature_kernel<float, float, long>(long const*)",
        "void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<at_cuda_detail::cub::DeviceRadixSortPolicy<long>>()",
        "aten::embedding_dense_backward",
    ],
    "optimizer": [
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
        "FusedOptimizerTensorListMetadata<4>, at::native::(anonymous namespace)::FusedAdamMathFunctor<float, 4>>",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::NormTwoOps<float, float>>>",
        "aten::_fused_adamw_",
    ],
    COMPILED: [
        "triton_poi_fused_add_0",
        "triton_red_fused_native_layer_norm_native_layer_norm_backward_5",
        "triton_per_fused__to_copy_add_native_layer_norm_1",
        "triton_poi_fused__scaled_dot_product_flash_attention_backward_3",
        "## Call CompiledFxGraph fphzi4ywcmi5agigcsya6w7cprrutw5surzwasytp2fztfx4rq6e ##",
        "Torch-Compiled Region: 0/0",
    ],
    COPIES: [
        "Memcpy DtoD (Device -> Device)",
        "Memcpy HtoD (Pinned -> Device)",
        "Memset (Device)",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda(...)>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul>>",
        "aten::copy_",
        "aten::zero_",
    ],
    ELEMENTWISE: [
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>, ...>",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::func_wrapper_t<float, sum>>>",
        "aten::add_",
    ],
    "communication": [
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL",
        "ncclKernel_AllReduce_RING_LL_Sum_float(ncclDevComm*, unsigned long, ncclWork*)",
        "gloo:all_reduce",
        "c10d::allreduce_",
    ],
    OTHER: ["some_mystery_kernel", "aten::cumsum", ""],
}
OURS = {
    "add_layer_norm_fwd_kernel": "LayerNorm forward",
    "add_layer_norm_bwd_kernel": "LayerNorm backward",
    "gelu_fwd_kernel": "GELU forward",
    "gelu_bwd_kernel": "GELU backward",
    "linear_gelu_fwd_kernel": GELU_FORWARD,
    "linear_gelu_bwd_kernel": GELU_BACKWARD,
    "cross_entropy_fwd_kernel": "cross-entropy",
    "cross_entropy_bwd_kernel": "cross-entropy",
    "scale_kernel": "cross-entropy",
    "embedding_fwd_kernel": "embeddings",
    "embedding_bwd_pieces_kernel": "embeddings",
    "embedding_bwd_wte_kernel": "embeddings",
    "embedding_bwd_wpe_kernel": "embeddings",
    "adamw_norm_kernel": "optimizer",
    "adamw_update_kernel": "optimizer",
}


@pytest.mark.parametrize(("row", "name"), [(row, name) for row, names in NAMES.items() for name in names])
def test_a_name_tells_its_row(row: str, name: str) -> None:
    assert row in ROWS
    assert row_of(name) == row


def test_every_kernel_of_ours_has_its_row() -> None:
    found = {}
    for module in pkgutil.iter_modules(fused.__path__, "kernels.fused."):
        for name in vars(importlib.import_module(module.name)):
            if name.endswith("_kernel"):
                found[name] = row_of(name)
    assert found == OURS
