"""FUSED: the bundle of Triton kernels. Importing it needs Triton; `kernels.select` does so when it is asked for."""

from kernels.adamw import adamw
from kernels.embedding import embedding
from kernels.layer_norm import add_layer_norm, layer_norm
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_gelu import mlp
from kernels.ops import Ops

FUSED = Ops(
    name="fused",
    embedding=embedding,
    layer_norm=layer_norm,
    add_layer_norm=add_layer_norm,
    mlp=mlp,
    linear_cross_entropy=linear_cross_entropy,
    adamw=adamw,
)
