"""GPT-2 (Radford et al. 2019), with nanoGPT's parameter names, initialisation and forward signature.

A block returns two tensors: the residual stream, and the last sub-layer's output (`branch`), which is not yet added to
it. So every residual addition and the LayerNorm after it are one operation, `ops.add_layer_norm`:

    x, branch = embedding(idx), None
    for each block:   x, h = add_layer_norm(branch, x);  branch = attention(h)
                      x, h = add_layer_norm(branch, x);  branch = mlp(h)
    x, h = add_layer_norm(branch, x);  logits = h @ wte.T

Precision. Parameters, LayerNorm statistics and the loss are float32. The constructor's `Precision` sets the rest.
Matmuls and attention run in its `compute` dtype, and LayerNorm writes its output in it. The residual stream has its
`stream` dtype. A matmul has one of two kinds of weights:

- A model by itself casts each weight to the compute dtype where it is used. Gradients arrive in float32. nanoGPT's
  autocast computes the same. Here the casts are explicit, because fused ops have no autocast rule.
- In training, the optimizer keeps copies of all parameters in the compute dtype beside the float32 ones, and updates
  both. The model computes with the copies (`read_copies`). Then nothing is cast, and gradients are the copies'.

With float32 nothing is cast, and there are no copies.

Gradients. They are autograd's, unless the optimizer says where they belong (`put_gradients`). Then the fused operations
write them there, or add to what is there, and autograd never sees them.

Memory. `recompute` chooses what is kept for the backward pass and what is computed again: `model/recompute.py`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels import REFERENCE, Grads, Ops
from model.attention import KVCache, causal_attention
from model.config import GPTConfig
from model.generate import generate
from model.recompute import recomputed
from model.work import flops_per_token, num_params

A100_FLOPS = 312e12  # a second, bfloat16, of which nanoGPT estimates the MFU


@dataclass(frozen=True)
class Precision:
    """The dtypes that a model computes in. Its parameters are float32."""

    compute: torch.dtype = torch.float32  # of matmuls and attention
    stream: torch.dtype = torch.float32  # of the residual stream


class Weights(nn.Module):
    """A layer with a weight, perhaps a bias, and perhaps the optimizer's copies of them (`GPT.read_copies`) and the
    places of their gradients (`GPT.put_gradients`)."""

    weight_copy: Tensor | None = None
    bias_copy: Tensor | None = None
    grads: Grads | None = None

    def weights(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) to compute with: the copies, or else the parameters, cast to `dtype`."""
        if self.weight_copy is not None:
            return self.weight_copy, self.bias_copy
        bias = getattr(self, "bias", None)  # an embedding has none
        if dtype is None:
            return self.weight, bias
        return self.weight.to(dtype), None if bias is None else bias.to(dtype)


class Linear(Weights, nn.Linear):
    def __init__(self, n_in: int, n_out: int, bias: bool, ops: Ops) -> None:
        super().__init__(n_in, n_out, bias=bias)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), computed in x's dtype."""
        return self.ops.linear(x, *self.weights(x.dtype), self.grads)


class Embedding(Weights, nn.Embedding):
    """A table; `ops.embedding` reads it."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # there torch imports Dynamo for it, which takes two seconds
            super().reset_parameters()


class LayerNorm(Weights):
    """LayerNorm with an optional bias. It first adds the last sub-layer's output to the stream."""

    def __init__(self, config: GPTConfig, ops: Ops, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None
        self.ops, self.dropout, self.dtype = ops, config.dropout, dtype

    def forward(self, x: Tensor, branch: Tensor | None, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, branch (B, T, C) -> (x + dropout(branch), its LayerNorm in `dtype`); branch None adds nothing. seed: of
        the dropout, from `ops.seeds`."""
        p = self.dropout if self.training else 0.0
        return self.ops.add_layer_norm(branch, x, *self.weights(), self.dtype, p, seed, self.grads)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, ops: Ops, layer: int, backend: str) -> None:
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, config.bias, ops)
        self.c_proj = Linear(config.n_embd, config.n_embd, config.bias, ops)
        self.n_head, self.dropout, self.layer, self.backend = config.n_head, config.dropout, layer, backend

    def forward(self, h: Tensor, cache: KVCache | None) -> Tensor:
        p = self.dropout if self.training else 0.0
        layer = 0 if cache is None else self.layer  # unread in training: where graphs break, each number is compiled
        return self.c_proj(causal_attention(self.c_attn(h), self.n_head, p, self.backend, cache, layer))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig, ops: Ops) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, config.bias, ops)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, config.bias, ops)
        self.ops, self.gelu = ops, config.gelu

    def forward(self, h: Tensor) -> Tensor:
        weights = *self.c_fc.weights(h.dtype), *self.c_proj.weights(h.dtype)
        return self.ops.mlp(h, *weights, self.gelu, self.c_fc.grads, self.c_proj.grads)


class Block(nn.Module):
    def __init__(
        self, config: GPTConfig, ops: Ops, layer: int, dtype: torch.dtype, attention: str, recompute: str
    ) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config, ops, dtype)
        self.attn = CausalSelfAttention(config, ops, layer, attention)
        self.ln_2 = LayerNorm(config, ops, dtype)
        self.mlp = MLP(config, ops)
        self.recompute = recompute

    def forward(
        self, x: Tensor, branch: Tensor | None, cache: KVCache | None, seeds: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        def compute(x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
            x, h = self.ln_1(x, branch, seeds[0])
            x, h = self.ln_2(x, self.attn(h, cache), seeds[1])
            return x, recomputed(self.mlp, h, keep_random=False) if self.recompute == "mlp" else self.mlp(h)

        return recomputed(compute, x, branch, keep_random=True) if self.recompute == "block" else compute(x, branch)


class GPT(nn.Module):
    """A GPT whose head shares its weight with the token embedding.

    precision: see the module's docstring. attention: one of `model.attention.BACKENDS`. recompute: one of
    `model.recompute.MODES`.
    """

    def __init__(
        self,
        config: GPTConfig,
        ops: Ops = REFERENCE,
        *,
        precision: Precision = Precision(),
        attention: str = "auto",
        recompute: str = "none",
    ) -> None:
        super().__init__()
        self.config, self.ops, self.precision = config, ops, precision
        compute = precision.compute
        # built in nanoGPT's order, so that the same seed draws the same weights
        self.transformer = nn.ModuleDict(
            {
                "wte": Embedding(config.vocab_size, config.n_embd),
                "wpe": Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(
                    Block(config, ops, layer, compute, attention, recompute) for layer in range(config.n_layer)
                ),
                "ln_f": LayerNorm(config, ops, compute),
            }
        )
        self.lm_head = Linear(config.n_embd, config.vocab_size, False, ops)
        self.transformer.wte.weight = self.lm_head.weight
        if self.lm_head.weight.is_meta:
            return  # there are no values
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # two a layer, their outputs add to the stream (GPT-2, section 2.3)
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None, dloss: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(logits, loss) of idx (B, T) int64.

        With targets (B, T) int64, -1 for positions that do not count: logits (B, T, V), or None if the loss is fused
        with the head; and the mean loss, a float32 scalar. Without targets: the logits of the last position, (B, 1, V),
        and None. With a cache, idx continues the tokens in it. dloss: () float32, the gradient that the backward pass
        will be given, if it is known (`kernels/fused/linear_cross_entropy.py`). ValueError if there are more than
        block_size tokens.
        """
        T, start = idx.size(1), 0 if cache is None else cache.length
        if start + T > self.config.block_size:
            raise ValueError(f"idx: got {start + T} tokens, expected at most {self.config.block_size} (block_size)")
        p = self.config.dropout if self.training else 0.0
        tr = self.transformer
        (wte, _), (wpe, _) = tr.wte.weights(), tr.wpe.weights()
        n = 2 * len(tr.h) + 1
        seeds = self.ops.seeds(n, idx.device) if p > 0 else (None,) * n
        grads = None if tr.wte.grads is None else (tr.wte.grads, tr.wpe.grads)
        x = self.ops.embedding(idx, wte, wpe[start : start + T], self.precision.stream, p, seeds[0], grads)
        branch = None
        seeds = (None, *seeds[1:])  # the embedding had the first one, and the first LayerNorm drops nothing
        for i, block in enumerate(tr.h):
            x, branch = block(x, branch, cache, seeds[2 * i : 2 * i + 2])
        if cache is not None:
            cache.length += T
        if targets is None:
            _, h = tr.ln_f(x[:, -1:], branch[:, -1:])
            return self.lm_head(h), None
        _, h = tr.ln_f(x, branch, seeds[-1])
        del branch  # nothing reads it again, and the logits need room
        weight, _ = self.lm_head.weights(h.dtype)
        loss, logits = self.ops.linear_cross_entropy(h, weight, targets, dloss=dloss, grads=self.lm_head.grads)
        return logits, loss

    def read_copies(self, copies: Mapping[nn.Parameter, Tensor]) -> None:
        """From now on, compute with these copies of the parameters, in the compute dtype. Code that changes a parameter
        must change its copy too. The copies are not in the state_dict."""
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, f"{name}_copy", copies[parameter])

    def put_gradients(
        self, places: Mapping[nn.Parameter, Tensor], partials: Mapping[nn.Module, Tensor], accumulate: bool
    ) -> None:
        """From now on, backward passes write the parameters' gradients to these places, or add to them if `accumulate`;
        of LayerNorms, the partial sums of `ops.sum_partials`. Only for operations that can do so."""
        own = {p: place.data for p, place in places.items()}  # each with a version counter of its own
        for module in self.modules():
            if isinstance(module, LayerNorm):
                module.grads = Grads(partials[module].data, None, accumulate)
            elif isinstance(module, Weights):
                module.grads = Grads(own[module.weight], own.get(getattr(module, "bias", None)), accumulate)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters, by default without the position embeddings; the tied head counts once."""
        return num_params(self.config, non_embedding)

    def crop_block_size(self, block_size: int) -> None:
        """Keep only the first `block_size` positions, for shorter sequences. ValueError if it would grow."""
        if block_size > self.config.block_size:
            raise ValueError(f"block_size: got {block_size}, expected at most the model's {self.config.block_size}")
        self.config = dataclasses.replace(self.config, block_size=block_size)
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict[str, float] | None = None) -> "GPT":
        """`model.pretrained.load_gpt2`; only `dropout` may be overridden, as in nanoGPT, else ValueError."""
        from model.pretrained import load_gpt2  # imported here, because it imports this file

        options = override_args or {}
        if unknown := options.keys() - {"dropout"}:
            raise ValueError(f"override_args: got {', '.join(sorted(unknown))}, expected dropout or nothing")
        return load_gpt2(model_type, **options)

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.AdamW:
        """torch's AdamW, fused on "cuda". (`python -m train` has its own, `train/optim.py`.)"""
        groups = param_groups(self, weight_decay)
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type == "cuda")

    def estimate_mfu(self, fwdbwd_per_iter: int, dt: float) -> float:
        """Model FLOPs utilisation of an A100, as in nanoGPT, of `fwdbwd_per_iter` sequences in `dt` seconds."""
        flops = flops_per_token(self.config) * self.config.block_size * fwdbwd_per_iter
        return flops / dt / A100_FLOPS

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        """idx (B, T) int64, followed by `max_new_tokens` drawn from the model. `model/generate.py` can stream them."""
        tokens = generate(self, idx, max_new_tokens, temperature, top_k)
        return torch.cat([idx, *(token[:, None] for token in tokens)], dim=1)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: tensors of 2 or more dimensions (matmul weights, embeddings) decay; biases and LayerNorms do not.

    Each group has the order of named_parameters, so that optimizer states of nanoGPT's checkpoints fit.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
