"""A profile's table: the row of each operation, the row of each instant, and the floors beside the times."""

import importlib
import pkgutil
from collections import Counter

import pytest

from kernels import REFERENCE, fused
from model.config import GPTConfig
from model.work import MATMULS, floor
from train import profile
from train.dryrun import Job
from train.profile import COMPILED, COPIES, ELEMENTWISE, IDLE, OTHER, ROWS, Timeline

# Names that profilers show on several GPUs and on a CPU; of long ones the part that tells
NAMES = {
    "matmuls": ["nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "aten::mm"],
    "attention forward": [
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)",
        "aten::_softmax",
        "nanofuse_cpu::attention",
    ],
    "attention backward": [
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x1x1_kernel0_0",
        "void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16, 64>()",
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnBwdSm90<flash::CollectiveMainloopBwdSm90<2>>>>",
        "nanofuse_cpu::attention_backward",
    ],
    "LayerNorm forward": ["void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>()"],
    "LayerNorm backward": [
        "void at::native::(anonymous namespace)::layer_norm_grad_input_kernel_vectorized<float, float>()",
        "nanofuse::add_layer_norm_backward",
    ],
    "GELU forward": ["void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl()>"],
    "GELU backward": ["void at::native::vectorized_elementwise_kernel<4, at::native::GeluBackwardCUDAKernelImpl()>"],
    "cross-entropy": ["aten::_log_softmax_backward_data"],
    "embeddings": [
        "void at::native::(anonymous namespace)::indexSelectLargeIndex<float, long, unsigned int, 2, 2, -2>()",
        "void at::native::(anonymous namespace)::fill_reverse_indices_kernel(long*, int, IntDivider<unsigned int>)",
    ],
    "optimizer": ["void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::NormTwoOps<float>>>"],
    COMPILED: [
        "triton_poi_fused_add_0",
        "## Call CompiledFxGraph fphzi4ywcmi5agigcsya6w7cprrutw5surzwasytp2fztfx4rq6e ##",
    ],
    COPIES: [
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "void at::native::multi_tensor_apply_kernel<at::native::TensorListMetadata<2>, at::native::CopyFunctor<long>>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul>>",
        "aten::copy_",
        "aten::zeros",
    ],
    ELEMENTWISE: [
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>",
        "aten::add_",
        "autograd::engine::evaluate_function: NativeLayerNormBackward0",
        "nanofuse_cpu::random_keep",
    ],
    "communication": ["ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "c10d::allreduce_"],
    OTHER: ["some_mystery_kernel"],
}


def test_a_name_tells_its_row() -> None:
    expected = {name: row for row, names in NAMES.items() for name in names}
    assert {name: profile.row_of(name) for name in expected} == expected
    ours = {
        name: profile.row_of(name)
        for module in pkgutil.iter_modules(fused.__path__, "kernels.fused.")
        for name in vars(importlib.import_module(module.name))
        if name.endswith("_kernel")
    }
    assert len(ours) >= 15
    assert {*ours.values(), *NAMES} <= {*ROWS}
    assert OTHER not in ours.values()


# Instants


def event(name: str, ts: float, dur: float, cat: str = "kernel", tid: int = 7) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": tid, "ts": ts, "dur": dur}


def read(*events: dict, cuda: bool) -> Timeline:
    """The timeline of a trace whose window is 100 to 200, on thread 1."""
    window = event(profile.WINDOW, 100, 100, cat="user_annotation", tid=1)
    named = {"ph": "M", "name": "process_name"}
    return profile.read({"traceEvents": [named, window, *events]}, cuda=cuda)


def test_on_a_gpu_kernels_copies_and_memsets_of_all_streams_count() -> None:
    timeline = read(
        event("nvjet_tst_256x128_64x4", 90, 15),  # two thirds of it before the window
        event("nvjet_tst_256x128_64x4", 110, 30),
        event("Memset (Device)", 140, 5, cat="gpu_memset"),
        event("Memcpy DtoD (Device -> Device)", 145, 5, cat="gpu_memcpy"),
        event("nvjet_tst_256x128_64x4", 160, 10),
        event("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 165, 10, tid=20),  # counts where nothing hides it
        event("nvjet_tst_256x128_64x4", 300, 10),
        # these take no time of the device
        event("aten::mm", 100, 90, cat="cpu_op", tid=1),
        event("cudaLaunchKernel", 105, 3, cat="cuda_runtime", tid=1),
        event(profile.WINDOW, 110, 60, cat="gpu_user_annotation"),
        event("iteration 5", 110, 60, cat="gpu_user_annotation"),
        cuda=True,
    )
    assert timeline.wall == 100
    assert timeline.rows == {"matmuls": 45, COPIES: 10, "communication": 5, IDLE: 40}
    assert timeline.names["matmuls", "nvjet_tst_256x128_64x4"] == 45


def test_on_a_cpu_each_operation_has_its_own_time() -> None:
    timeline = read(
        event("aten::mm", 110, 10, cat="cpu_op", tid=1),  # inside native_layer_norm, but has its own row
        event("aten::native_layer_norm", 110, 50, cat="cpu_op", tid=1),
        event("aten::empty", 120, 10, cat="cpu_op", tid=1),  # inside it too: counts with it
        event("aten::zeros", 170, 10, cat="cpu_op", tid=1),
        event("some::op", 172, 2, cat="cpu_op", tid=1),
        event("aten::mm", 100, 100, cat="cpu_op", tid=2),  # on another thread
        cuda=False,
    )
    assert timeline.rows == {"LayerNorm forward": 40, "matmuls": 10, COPIES: 8, OTHER: 2, IDLE: 40}
    assert timeline.names["LayerNorm forward", "aten::empty"] == 10


# Rows and floors

GPT2 = GPTConfig(vocab_size=50304, bias=False)
RATES = (800e12, 3e11)  # FLOP/s, bytes/s: so slow a memory that bytes decide, also of matmuls
JOB = Job(GPT2, 4, REFERENCE, accumulation=2, several=True)
WORK, FUSED = (JOB.work(fused_gelu=fused) for fused in (False, True))
GELU = ("GELU forward", "GELU backward")


def seconds(*parts: str) -> float:
    return sum(floor(WORK[part], *RATES) for part in parts)


def floors(*seen: str, kernel: str = "") -> dict[str, float]:
    """The floor of each row, where each of `seen` took ten milliseconds."""
    timeline = Timeline(10_000.0 * len(seen), Counter(dict.fromkeys(seen, 10_000.0)), Counter({(seen[0], kernel): 1.0}))
    return {row: least for row, least in profile.floors(timeline, JOB, RATES).items() if least}


def test_floors_stand_in_the_rows_that_do_their_work() -> None:
    expected = {part: seconds(part) for part in WORK if part in ROWS} | {
        "matmuls": seconds(*MATMULS),
        "embeddings": seconds("embedding forward", "embedding backward"),
        ELEMENTWISE: seconds("accumulation"),
    }
    assert floors(*ROWS) == pytest.approx(expected)
    # none is lost where a row was not seen
    rest = seconds(*WORK) - expected["matmuls"]
    assert floors("matmuls") == pytest.approx({"matmuls": expected["matmuls"], OTHER: rest})
    assert floors("matmuls", COMPILED) == pytest.approx({"matmuls": expected["matmuls"], COMPILED: rest})
    # GELU within its matmul: what it still reads and writes is the matmul's
    found = floors(*(row for row in ROWS if row not in GELU), kernel="linear_gelu_fwd_kernel")
    both = (floor(WORK[mlp] + FUSED[gelu], *RATES) for mlp, gelu in zip(("mlp up", "mlp down"), GELU, strict=True))
    assert found["matmuls"] == pytest.approx(seconds("qkv", "attention projection", "head") + sum(both))
    assert not {*GELU, OTHER} & {*found}


def test_without_a_kernel_there_is_no_table_of_idle_time() -> None:
    """CUPTI did not start: torch's profiler then sees the host only."""
    timeline = read(
        event("aten::mm", 110, 10, cat="cpu_op"), event("cudaGraphLaunch", 112, 3, "cuda_runtime"), cuda=True
    )
    assert profile.report(timeline, 5, JOB, RATES).startswith("profile: no table: the profiler saw nothing run")


def test_the_report() -> None:
    rows = {"matmuls": 30_000.0, OTHER: 5_000.0, IDLE: 15_000.0}
    names = {("matmuls", "nvjet"): 30_000.0, (OTHER, "mystery"): 4_000.0, (OTHER, "x" * 100): 1_000.0}
    text = profile.report(Timeline(50_000, Counter(rows), Counter(names)), 5, JOB, RATES)
    heading, _, *lines = text.splitlines()
    assert heading == (
        "profile: 5 steps of 10.000 ms; floors are for 800 TFLOP/s in a matmul, 300 GB/s in a copy, as measured"
    )
    matmuls, total = 1e3 * seconds(*MATMULS), 1e3 * seconds(*WORK)
    assert [line.split() for line in lines[:4]] == [
        ["matmuls", "6.000", "60.0%", f"{matmuls:.3f}", f"{matmuls / 6:.0%}"],
        ["other", "1.000", "10.0%", f"{total - matmuls:.3f}", f"{total - matmuls:.0%}"],
        ["idle", "3.000", "30.0%"],
        ["total", "10.000", "100.0%", f"{total:.3f}", f"{total / 10:.0%}"],
    ]
    assert lines[4] == "other: mystery 0.800 ms, " + "x" * 60 + " 0.200 ms"
