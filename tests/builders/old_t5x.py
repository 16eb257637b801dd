"""Checkpoints in the forms that T5X wrote before Orbax."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import parity_cases as cases
import tensorstore as ts
from flax import serialization, traverse_util

from sbs_jax.student import t5
from sbs_jax.weights import names


def old_form(
    folder: Path, config: t5.T5Config, *, scanned: bool, version: int = 3, axis: int = 1, heads_apart: bool = False
) -> None:
    """Writes a checkpoint as T5X did before Orbax: msgpack with the small arrays, gzipped zarr for the others."""
    parameters = cases.parameters(config)
    heads = config.num_heads, config.head_dim
    for name, values in parameters.items():
        if heads_apart and "attention/" in name and name.endswith("kernel"):
            shape = (*heads, -1) if "/out/" in name else (-1, *heads)
            parameters[name] = values.reshape(shape)
    tree: dict[str, np.ndarray] = {}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name in names.of(parameters):
        if scanned and name.layer is not None:
            stacks.setdefault(name.scanned, {})[name.layer] = parameters[name.ours]
        else:
            tree[name.t5x] = parameters[name.ours]
    for name, layers in stacks.items():
        tree[name] = np.stack([layers[i] for i in sorted(layers)], axis=axis)
    flat: dict[str, Any] = {"state/step": np.int32(3)}
    for name, values in tree.items():
        if values.ndim < 2:
            flat[f"target/{name}"] = values
            continue
        stored = values
        if version < 3:
            stored = values.astype(ml_dtypes.bfloat16).view(np.uint16)
        place = "target." + name.replace("/", ".")
        metadata = {"shape": values.shape, "chunks": [max(1, values.shape[0] // 2), *values.shape[1:]]}
        metadata["compressor"] = {"id": "gzip"}
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder}/{place}/"}}
        made = ts.open({**spec, "dtype": stored.dtype.name, "metadata": metadata}, create=True).result()
        made.write(stored).result()
        described = {"driver": "zarr", "dtype": stored.dtype.name, "metadata": {"shape": list(values.shape)}}
        if version < 3:  # older versions named the path beside the store
            flat[f"target/{name}"] = described | {"kvstore": {"driver": "gfile"}, "path": place}
        else:
            flat[f"target/{name}"] = described | {"kvstore": {"driver": "gfile", "path": f"{place}/"}}
    contents = {"version": version, "optimizer": traverse_util.unflatten_dict(flat, sep="/")}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(contents))
