"""Weights of an export: the form each is stored in, and how a program turns them into parameters."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from sbs_jax.student import families, quantized
from sbs_jax.weights import names
from sbs_jax.weights.arrays import LazyArray

FLOAT32, BFLOAT16, INT8 = "float32", "bfloat16", "int8"
FORMS = (FLOAT32, BFLOAT16, INT8)


def is_matrix(name: str, array: LazyArray) -> bool:
    """Returns True for kernels and tables, which are nearly all bytes of a student."""
    return (name.endswith("/kernel") or name in names.TABLES) and np.dtype(array.dtype) in (
        np.float32,
        ml_dtypes.bfloat16,
    )


def stored(arrays: Mapping[str, LazyArray], *, form: str) -> dict[str, LazyArray]:
    """Returns the arrays of an export's file. In int8 a matrix is two: `.../codes` and `.../scale` (float32).

    A scale belongs to a column of a kernel, or to a row of a table.
    """
    found: dict[str, LazyArray] = {}
    for name, array in arrays.items():
        if form == FLOAT32 or not is_matrix(name, array):
            found[name] = array
        elif form == BFLOAT16:
            found[name] = _made(array, lambda x: x.astype(ml_dtypes.bfloat16), array.shape, ml_dtypes.bfloat16)
        else:
            by_row = name in names.TABLES
            found[f"{name}/codes"] = _made(array, functools.partial(_packed, "codes", by_row), array.shape, np.int8)
            scales = array.shape[:1] if by_row else array.shape[1:]
            found[f"{name}/scale"] = _made(array, functools.partial(_packed, "scale", by_row), scales, np.float32)
    return found


def _made(array: LazyArray, make: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...], dtype: Any) -> LazyArray:
    """Computes an array whenever it is read, so that one at a time is in memory."""
    return LazyArray(shape, np.dtype(dtype), lambda index: make(array.whole())[index])


def _packed(part: str, by_row: bool, matrix: np.ndarray) -> np.ndarray:
    found = quantized.quantize(jnp.asarray(matrix.T if by_row else matrix), form=quantized.INT8)[part]
    return np.asarray(found.T if by_row and part == "codes" else found)


def parameters(stored: Mapping[str, jax.Array], shapes: Mapping[str, Any], *, form: str) -> families.Parameters:
    """Computes the student's parameters, in the given names and types, from the stored arrays. Traceable."""
    found: families.Parameters = {}
    for name, like in shapes.items():
        if name in stored:
            found[name] = stored[name].astype(like.dtype)
            continue
        codes, scale = stored[f"{name}/codes"].astype(jnp.float32), stored[f"{name}/scale"]
        found[name] = (codes * (scale[:, None] if name in names.TABLES else scale[None, :])).astype(like.dtype)
    return found


def error(arrays: Mapping[str, LazyArray]) -> dict[str, Any]:
    """Measures the error of int8 in the matrices (`quantized.error`): the mean, the largest and its name."""
    errors = {
        name: quantized.error(matrix.T if name in names.TABLES else matrix, form=quantized.INT8)
        for name, array in arrays.items()
        if is_matrix(name, array)
        for matrix in [array.whole().astype(np.float32)]
    }
    worst = max(errors, key=errors.__getitem__)
    return {
        "matrices": len(errors),
        "mean": float(np.mean(list(errors.values()))),
        "largest": errors[worst],
        "of": worst,
    }
