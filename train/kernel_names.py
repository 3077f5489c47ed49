"""Which part of a step an operation belongs to, told by its name: kernels' on a GPU, torch's operations' on a CPU."""

import re

COMPILED, ELEMENTWISE, COPIES, BOOKKEEPING = "torch.compile", "elementwise, sums", "copies, memsets", "bookkeeping"
GELU_FORWARD, GELU_BACKWARD = "matmul + GELU forward", "matmul + GELU backward"  # one kernel each
OTHER, IDLE = "other", "idle"

# The rows of a profile, in the order that it is printed in.
ROWS = (
    "matmuls",
    GELU_FORWARD,
    GELU_BACKWARD,
    "attention forward",
    "attention backward",
    "LayerNorm forward",
    "LayerNorm backward",
    "GELU forward",
    "GELU backward",
    "cross-entropy",
    "embeddings",
    "optimizer",
    COMPILED,
    ELEMENTWISE,
    COPIES,
    "communication",
    BOOKKEEPING,
    OTHER,
    IDLE,
)

# What they do is told by the operation that they are a part of, if any.
UNSPECIFIC = {ELEMENTWISE, COPIES, BOOKKEEPING, OTHER}

# The first pattern that is found in a name decides. Inductor's names list what they fuse and CUTLASS is in many a
# kernel of attention, so the special ones come before the general ones.
PATTERNS = tuple(
    (row, re.compile(pattern))
    for row, pattern in (
        ("communication", r"^nccl|^ncclDevKernel|^nccl:|^gloo:|^c10d::|^_?all_?reduce"),
        ("matmuls", r"^triton_(tem|mm)_\w*?(mm|matmul)"),
        (COMPILED, r"^triton_[a-z0-9]+_|^cpp_fused|CompiledFxGraph|Torch-Compiled|CompiledFunction|AOTDispatcher"),
        (COMPILED, r"^TorchDynamo|^Pregraph"),
        (BOOKKEEPING, r"^autograd::|^torch::autograd::|^\w+Backward\d*$"),
        # cuDNN's fprop and bprop, flash-attn 2, 3 and 4, xformers' fmha; torch's on a CPU, there bmm is attention's
        ("attention backward", r"(flash|Flash|[aA]tt(entio)?n).*([bB]wd|bprop|[bB]ackward)|fmha_cutlassB"),
        ("attention backward", r"dot_do_o|convert_dq|^aten::_softmax_backward"),
        ("attention forward", r"flash|Flash|fmha|sdpa|[aA]ttention|^aten::(bmm|baddbmm|_?softmax|_safe_softmax)$"),
        (GELU_FORWARD, r"^linear_gelu_fwd_kernel"),
        (GELU_BACKWARD, r"^linear_gelu_bwd_kernel"),
        ("matmuls", r"^nanofuse::(mlp|linear_gelu)"),
        ("LayerNorm backward", r"layer_norm_(bwd|backward|grad)|GammaBeta|cuComputeGradInput"),
        ("LayerNorm forward", r"layer_norm|LayerNorm|RowwiseMoments"),
        ("GELU backward", r"gelu_b(wd|ackward)|GeluBackward"),
        ("GELU forward", r"gelu|Gelu"),
        ("cross-entropy", r"cross_entropy|nll_loss|[sS]oft_?[mM]ax|^scale_kernel"),
        ("embeddings", r"[eE]mbedding|index_?[sS]elect|gather_kernel|RadixSort|SortKV|sum_and_scatter|krn_partial"),
        ("embeddings", r"compute_grad_weight|compute_num_of_partial|^aten::(sort|bincount|searchsorted)"),
        ("optimizer", r"adamw|Adam|multi_tensor_apply|NormTwoOps|vector_norm|_amp_"),
        (
            "matmuls",
            r"nvjet|gemm|gemv|cutlass|xmma|cublas|splitK|sm\d\d_|^aten::(mm|addmm|_addmm|linear|matmul)|mkldnn",
        ),
        (
            COPIES,
            r"^Mem(cpy|set)|copy|Copy|FillFunctor|^aten::(_to_copy|to|clone|contiguous|cat|stack|fill_|zero_|(zero|one)s(_like)?|full(_like)?)$",
        ),
        (ELEMENTWISE, r"at::native.*(elementwise|reduce|dropout|distribution)"),
        (
            ELEMENTWISE,
            r"^aten::(add|sub|mul|div|neg|abs|pow|sqrt|rsqrt|reciprocal|clamp|where|sum|mean|any|all)_?$|^aten::_foreach_",
        ),
        (ELEMENTWISE, r"^aten::(eq|ne|gt|ge|lt|le|is\w+|logical_\w+|bitwise_\w+|bernoulli_|native_dropout|dropout)$"),
        (BOOKKEEPING, r"^aten::(as_strided|view|_unsafe_view|reshape|flatten|t|transpose|permute|expand|slice\w*)$"),
        (
            BOOKKEEPING,
            r"^aten::(select|narrow|unsqueeze|unbind|split|alias|detach_?|empty\w*|resize_|resolve_\w+|item|_local_scalar_dense)$|^detach$",
        ),
    )
)


def row_of(name: str) -> str:
    """The row of ROWS that an operation of this name belongs to; OTHER where nothing is known of it."""
    return next((row for row, pattern in PATTERNS if pattern.search(name)), OTHER)
