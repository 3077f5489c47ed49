"""The Triton kernels, a file each, read as a lecture: formula, kernels, launches, autograd rule, public function.

What each means is said by the function of the same name in `kernels/reference.py`. Importing these files needs Triton.
"""

from kernels.fused import adamw, cross_entropy, embedding, layer_norm, mlp
from kernels.ops import Ops

FUSED = Ops(
    name="fused",
    embedding=embedding.embedding,
    layer_norm=layer_norm.layer_norm,
    add_layer_norm=layer_norm.add_layer_norm,
    mlp=mlp.mlp,
    linear_cross_entropy=cross_entropy.linear_cross_entropy,
    adamw=adamw.adamw,
)
