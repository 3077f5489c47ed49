"""How much memory a training step takes: arithmetic on shapes, no torch.

With M = B * T tokens, C channels, L blocks, H heads, V vocabulary entries, n parameters; d bytes of the compute dtype,
s of the residual stream's. What a block's forward pass keeps for its backward pass:

| of a block | bytes                     | what                                                                      |
|------------|---------------------------|---------------------------------------------------------------------------|
| LayerNorms | 2 (s M C + 8 M)           | the stream; a mean and a reciprocal deviation a row                        |
| c_attn     | d M C                     | its input                                                                 |
| attention  | 4 d M C + 4 M H           | qkv, of which q, k, v are views; its output, c_proj's input; a log-sum-exp |
| MLP        | d M C + 4 d M C + 4 d M C | its input; what goes into GELU, what comes out                             |
| dropout    | 2 M C                     | the reference's: two masks. The fused kernels keep two seeds               |

The reference's LayerNorm works in float32: of a stream of 2 bytes it keeps 4 M C, of weights of 2 bytes 4 C each.
Attention is as CUDA's flash and cuDNN keep it. torch's on a CPU works in float32, and keeps its operands and its result
in that. By matmuls (`model/attention.py`) copies of q, k and v are kept and, instead of the log-sum-exps, the weights,
d M H T, with dropout those after it and a mask too, (2 d + 1) M H T. With one sequence or one head some of the copies
are views. CUDA's "math" is taken for the same.

recompute="mlp" keeps neither what goes into GELU nor what comes out. "block" keeps of a block its inputs, (s + d) M C,
and attention's result, d M C + 4 M H, or by matmuls only the random bits, 2 M H T; the reference's dropout keeps its
output too, 2 (d M C + M C) in all. Why is said in `model/recompute.py`. What is not kept is there for one block at a
time.

Sharded over N ranks (`train/shard.py`), a rank holds 1/N of weights, moments and gradients, all float32; whole, in the
compute dtype, the embeddings and two blocks, one of them on its way; and for a moment the largest gradient in float32.

What is exact: what the forward pass keeps. Tests compare it with the tensors that are alive after one, byte by byte but
for scalars. What is reckoned: how much the backward pass adds where that is most, in the head and in the last block.
Tests hold the sum to what a CPU's allocator counts. The estimate is the eager step's. Compiled, steps of 6 or 8 blocks
took from 2 % less to 15 % more on a CPU, by torch's version, most with "block". Only the reference's loss in 2 bytes
differs in kind: its float32 copies of the logits go, which is counted. Not counted: gaps between an allocator's blocks,
the code of kernels, and the CUDA context, which is there before free memory is asked for. cuBLAS's workspace is
assumed. What the system counts for a CPU's process is more, by 10 to 50 % in runs of 1 GB: the libraries' code, and the
gaps that malloc leaves.

In CUDA graphs a micro-step's memory lies in its graph's own pool, taken once, at the capture. What the warm-up on a
side stream took is given back before (`torch.cuda.graph` empties the cache); the copy from which the state is put back
afterwards lies in host memory. But that pool serves neither the update, which has its own, nor evaluations, which are
not captured: so these add up, where without graphs the largest counts.
"""

from dataclasses import dataclass, replace

from model.config import GPTConfig
from model.flops import num_params

WORKSPACE = 2 * 2**25  # cuBLAS's: 32 MiB on recent GPUs, for each of two streams
FLOAT32 = 4


@dataclass(frozen=True)
class Step:
    """What decides how much memory one device's part in a training step takes."""

    config: GPTConfig
    batch_size: int  # sequences in a micro-step
    accumulation: int = 1  # micro-steps of this device
    several: bool = False  # whether gradients of several micro-steps or ranks are summed
    dtype_bytes: int = 2  # of the compute dtype; 4: float32, the parameters' own
    stream_bytes: int = 4  # of the residual stream's dtype
    recompute: str = "none"  # one of model.recompute.MODES
    fused: bool = True  # the fused kernels, else the reference
    loss_chunk: int = 0  # rows of logits at a time, fused; 0: all
    compiled: bool = False  # by torch.compile
    graphs: bool = False  # captured in CUDA graphs
    resumed: bool = False  # from a checkpoint, whose moments are on the device twice while they are loaded
    matmuls: bool = False  # attention is computed by matmuls and keeps its weights
    shards: int = 1  # ranks among which weights, moments and gradients are shared out
    cpu: bool = False  # what the device is

    @property
    def tokens(self) -> int:
        return self.batch_size * self.config.block_size

    @property
    def channels(self) -> int:
        """M * C"""
        return self.tokens * self.config.n_embd

    @property
    def row(self) -> int:
        """d M C"""
        return self.channels * self.dtype_bytes

    @property
    def stream(self) -> int:
        """s M C"""
        return self.channels * self.stream_bytes

    @property
    def masked(self) -> bool:
        """Whether dropout keeps masks."""
        return self.config.dropout > 0 and not self.fused

    @property
    def weights(self) -> int:
        """M H T"""
        return self.tokens * self.config.n_head * self.config.block_size


def estimate(step: Step) -> dict[str, int]:
    """Bytes that the device must have for the step, by what they hold; their sum is the step's peak.

    "activations": kept between forward and backward pass, without the head's. "logits": these, their gradient and what
    else the head holds. "workspace": what is needed beyond that, at the moment where it is most.
    """
    kept, head = activations(step), head_peak(step)
    peak = kept + max(head, block_peak(step))
    if step.graphs:
        peak += update_peak(step) + evaluation_peak(step)
    elif step.shards > 1:
        peak += FLOAT32 * max(_embeddings(step), _block_params(step))  # a gradient on its way to the ranks
    peak = max(peak, update_peak(step), start_peak(step))
    workspace = peak - kept - head + (0 if step.cpu else WORKSPACE)
    data = 2 * 16 * step.accumulation * step.tokens  # tokens and targets, int64, of this step and the one before
    return {**state(step), "activations": kept, "logits": head, "workspace": workspace, "data": data}


def state(step: Step) -> dict[str, int]:
    """Bytes from the first step to the last (`train/flat.py`), but for each tensor's padding to 64 elements."""
    n, d = num_params(step.config, non_embedding=False), step.dtype_bytes
    if step.shards > 1:
        share = -(-FLOAT32 * n // step.shards)
        whole = d * (_embeddings(step) + min(2, step.config.n_layer) * _block_params(step))
        return {"weights": share, "copies": whole, "moments": 2 * share, "gradients": share}
    copied = d < FLOAT32
    totals = FLOAT32 * n if step.several and copied else 0
    return {
        "weights": FLOAT32 * n,
        "copies": d * n if copied else 0,
        "moments": 2 * FLOAT32 * n,
        "gradients": d * n + totals,
    }


def _embeddings(step: Step) -> int:
    """How many parameters the embeddings have, which no block holds."""
    return (step.config.vocab_size + step.config.block_size) * step.config.n_embd


def _block_params(step: Step) -> int:
    return (num_params(step.config, non_embedding=False) - _embeddings(step)) // step.config.n_layer


def activations(step: Step) -> int:
    """Bytes that a forward pass keeps for the backward pass, without the head's; its input included."""
    L, mask = step.config.n_layer, step.channels if step.masked else 0
    head_input = 0 if step.loss_chunk else step.row  # in chunks, the gradient is kept in its place
    outside = _norm(step) + head_input
    if step.recompute != "block":
        return mask + L * (_block(step) + 2 * mask) + outside
    dropped = step.row + mask if step.masked else 0
    inputs = L * (step.stream + step.row) - step.row  # no sub-layer's output waits before the first
    return 2 * mask + inputs + L * _attention_result(step) + (2 * L - 1) * dropped + outside


def _block(step: Step) -> int:
    """Bytes that a block keeps, masks aside, where it is not computed again."""
    hidden = 0 if step.recompute == "mlp" else 8 * step.row
    return 2 * _norm(step) + step.row + _attention(step) + step.row + hidden


def _norm(step: Step) -> int:
    rows = 8 * step.tokens
    if step.fused:
        return step.stream + rows
    weights = (1 + step.config.bias) * FLOAT32 * step.config.n_embd if step.dtype_bytes < FLOAT32 else 0
    return FLOAT32 * step.channels + rows + weights


def _attention(step: Step) -> int:
    """Bytes of its operands, its result and c_proj's input."""
    wide = FLOAT32 * step.channels
    if step.matmuls:
        weights = 2 * step.dtype_bytes + 1 if step.config.dropout else step.dtype_bytes
        return 4 * step.row + weights * step.weights
    if step.cpu:
        return 3 * wide + _attention_result(step) + (step.row if step.row < wide else 0)
    return 3 * step.row + _attention_result(step)


def _attention_result(step: Step) -> int:
    """Bytes of what recomputation does not make again."""
    if step.matmuls:
        return 8 * -(-step.weights // 4) if step.config.dropout else 0
    return (FLOAT32 * step.channels if step.cpu else step.row) + 4 * step.tokens * step.config.n_head


def head_kept(step: Step) -> int:
    """Bytes that the head and the loss keep for the backward pass, besides the head's input."""
    V, C = step.config.vocab_size, step.config.n_embd
    if not step.fused:
        return FLOAT32 * step.tokens * V  # log-probabilities
    return step.row + FLOAT32 * V * C if step.loss_chunk else _logits(step, step.tokens)


def head_peak(step: Step) -> int:
    """Bytes of the head and the loss where they are most: in the backward pass, or with a chunk of logits before it."""
    V, C = step.config.vocab_size, step.config.n_embd
    if not step.fused:
        if step.compiled and step.dtype_bytes < FLOAT32:
            return 6 * step.tokens * V  # as measured on a CPU: logits, and one float32 matrix
        return 3 * head_kept(step)  # with the gradients of log-probabilities and of logits
    gradients = step.row + step.dtype_bytes * V * C
    if step.loss_chunk:
        return head_kept(step) + max(gradients, _logits(step, min(step.loss_chunk, step.tokens)))
    return head_kept(step) + gradients + step.row  # the head's input, scaled


def _logits(step: Step, rows: int) -> int:
    """Bytes of rows of logits as the fused kernels lay them out: padded to 16 columns."""
    return step.dtype_bytes * rows * -(-step.config.vocab_size // 16) * 16


def block_peak(step: Step) -> int:
    """Bytes that the last block's backward pass has beside the kept activations, at its MLP or at its attention."""
    C, d = step.config.n_embd, step.dtype_bytes
    whole = d * step.config.vocab_size * C  # the head's weight's gradient waits for the embedding's, to be added to it
    again = {  # what is computed again
        "none": 0,
        "mlp": 8 * step.row,
        "block": _block(replace(step, recompute="none")) - _attention_result(step),
    }[step.recompute]
    mlp = 6 * step.row + 8 * C * C * d if step.fused else 5 * step.row + 4 * C * C * d
    weights = (d if step.config.dropout else 2 * d) * step.weights if step.matmuls else 0
    attention = 8 * step.row + weights - 9 * step.row  # by then the MLP's are gone
    gone = _norm(step) + (0 if step.loss_chunk else step.row)  # the last LayerNorm's and the head's, of what was kept
    return whole + step.stream + again + max(mlp, attention) - gone


def start_peak(step: Step) -> int:
    """Bytes that are needed for a moment before the first step, while parameters or a checkpoint's moments are brought
    to where they stay: then they are there twice."""
    size = state(step)["weights"]
    return 2 * size if step.resumed and not step.cpu else size


def update_peak(step: Step) -> int:
    """Bytes that the update takes for a moment: the reference's gradients in float32, and clipped; new copies."""
    if step.fused or step.shards > 1:
        return 0
    return (2 if step.dtype_bytes < FLOAT32 else 1) * state(step)["weights"]


def evaluation_peak(step: Step) -> int:
    """Bytes of an evaluation's head, which is where it has most."""
    if step.fused:
        return _logits(step, min(step.loss_chunk or step.tokens, step.tokens))
    widened = FLOAT32 if step.dtype_bytes < FLOAT32 else 0
    return (step.dtype_bytes + widened + FLOAT32) * step.tokens * step.config.vocab_size
