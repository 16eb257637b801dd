"""A student's weights as they are held and multiplied to predict: float32, bfloat16, or int8.

Only the matrices of `t5.Dense` change, among them that of the logits; embeddings, norms, biases, softmax and all sums
stay float32. What adapters put on a matrix becomes part of it first.

float32: as trained.
bfloat16: matrices are held in bfloat16, and what is multiplied with them is rounded to it. Half the memory.
int8: matrices but that of the logits are held in int8 with a scale per column (quantized.py): a quarter of the memory.
Their codes, whole numbers that bfloat16 holds exactly, are multiplied with inputs in bfloat16, and the sums scaled: as
fast on a CPU as products of int8 with int8, without rounding inputs to 255 steps of their largest (docs/speed.md).
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from sbs_jax.student import layers, quantized, t5

FLOAT32, BFLOAT16, INT8 = "float32", "bfloat16", "int8"
WEIGHTS = (FLOAT32, BFLOAT16, INT8)


def held(structure: t5.Structure, parameters: t5.Parameters, *, weights: str) -> tuple[t5.Structure, t5.Parameters]:
    """A student with its weights held so; structure and parameters as `t5.split` gives them.

    Layers must be unrolled, as those that predict are.
    """
    if weights == FLOAT32:
        return structure, parameters
    model = t5.join(structure, parameters)
    for path, module in nnx.iter_modules(model):
        if isinstance(module, layers.Dense):
            is_logits = path[-1] == "logits_dense"
            _hold(module, form=BFLOAT16 if is_logits else weights)
    if model.config.logits_via_embedding:
        model.token_embedder.product_dtype = BFLOAT16
    return t5.split(model)


# Compiled once for each shape.
_quantized = jax.jit(functools.partial(quantized.quantize, form=quantized.INT8))


def _hold(dense: layers.Dense, *, form: str) -> None:
    kernel = dense.merged()
    dense.lora = dense.in_scale = dense.out_scale = None
    dense.product_dtype = BFLOAT16
    if form == BFLOAT16:
        dense.kernel = nnx.Param(kernel.astype(jnp.bfloat16), axes=dense.axes)
        return
    rows, columns = kernel.shape
    dense.kernel = quantized.Kernel((rows, columns), form=quantized.INT8, axes=dense.axes)
    for name, part in _quantized(kernel).items():
        getattr(dense.kernel, name)[...] = part
