"""Precision of a student's weights for prediction: float32, bfloat16, or int8.

Only `Dense` matrices change, the logits' included; embeddings, norms, biases, softmax and all sums stay float32.
Adapters are merged into their matrix first.

float32: as trained.
bfloat16: matrices and their inputs are rounded to bfloat16. Half the memory.
int8: matrices except the logits' are held in int8 with a scale per column (quantized.py). A quarter of the memory. The
codes, which bfloat16 holds exactly, are multiplied with bfloat16 inputs and the sums scaled. On a CPU this is as fast
as int8 times int8, without rounding inputs to 255 steps (docs/speed.md).
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from sbs_jax.student import families, layers, quantized

FLOAT32, BFLOAT16, INT8 = "float32", "bfloat16", "int8"
WEIGHTS = (FLOAT32, BFLOAT16, INT8)


def held(
    structure: families.Structure, parameters: families.Parameters, *, weights: str
) -> tuple[families.Structure, families.Parameters]:
    """Converts a student's weights to a precision; structure and parameters are those of `families.split`.

    Layers must be unrolled, as they are for prediction.
    """
    if weights == FLOAT32:
        return structure, parameters
    model = families.join(structure, parameters)
    for path, module in nnx.iter_modules(model):
        if isinstance(module, layers.Dense):
            is_logits = path[-1] == "logits_dense"
            _hold(module, form=BFLOAT16 if is_logits else weights)
    if model.config.logits_via_embedding:
        model.output_embedder.product_dtype = BFLOAT16
    return families.split(model)


# Compiled once per shape.
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
