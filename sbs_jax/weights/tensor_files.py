"""Files of arrays, one array in memory at a time: safetensors (read, written) and PyTorch's format (read)."""

import importlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from sbs_jax.storage.json_files import brief, part
from sbs_jax.weights.arrays import Index, LazyArray

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}


def write_safetensors(file: Path, arrays: Mapping[str, LazyArray], *, dtype: np.dtype | None) -> None:
    """Writes one array at a time; the library's own writer needs all of them in memory.

    `dtype` None keeps each array's type, which may also be int8 or uint8.
    """
    codes = {np.dtype(each): code for code, each in {**DTYPES, "I8": np.int8, "U8": np.uint8}.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in arrays.items():
        stored = array.dtype if dtype is None else dtype
        end = offset + int(np.prod(array.shape)) * stored.itemsize
        header[name] = {"dtype": codes[stored], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for array in arrays.values():
            with np.errstate(over="ignore"):  # `Watched` names what becomes infinite
                values = array.whole().astype(dtype or array.dtype)
            out.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
            del values  # before the next one is read


def read_safetensors(file: Path) -> dict[str, LazyArray]:
    """Opens the arrays of a file, which is mapped and read by slices."""
    try:
        opened = safetensors.safe_open(file, framework="np")
    except safetensors.SafetensorError as error:
        reason = part(str(error))
        raise ValueError(f"{file} is not a complete safetensors file ({reason}). Download it again.") from None
    arrays = {}
    for name in opened.keys():  # noqa: SIM118  (it has no iterator)
        array = opened.get_slice(name)
        code = array.get_dtype()
        if code not in DTYPES:
            raise ValueError(f"{file}: {brief(name)} is of type {code}; expected one of {', '.join(DTYPES)}.")
        arrays[name] = LazyArray(tuple(array.get_shape()), np.dtype(DTYPES[code]), array.__getitem__)
    return arrays


def read_torch(file: Path) -> dict[str, LazyArray]:
    """Opens a file in PyTorch's own format, mapped and read by slices. Needs PyTorch."""
    try:
        torch: Any = importlib.import_module("torch")  # not `import`: the type checks run without it
    except ImportError as error:
        raise FileNotFoundError(
            f"{file.name} in {file.parent} needs PyTorch, which is not installed. Install it (pip install "
            "'sbs-jax[parity]'), or take a revision of the model that has safetensors."
        ) from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of many types; a pickle that would run code is refused here too
        raise ValueError(
            f"{file} holds something other than PyTorch's weights ({type(error).__name__}: {part(str(error))}). It "
            "was not loaded; take a revision of the model that has safetensors."
        ) from None
    if not isinstance(state, Mapping) or not all(isinstance(each, torch.Tensor) for each in state.values()):
        raise ValueError(f"{file} is {type(state).__name__}; expected PyTorch's weights, a tensor for each name.")

    def lazy(tensor: Any) -> LazyArray:
        def read(index: Index) -> np.ndarray:
            part = tensor[index]
            if part.dtype == torch.bfloat16:
                return part.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return part.numpy()

        dtype = ml_dtypes.bfloat16 if tensor.dtype == torch.bfloat16 else str(tensor.dtype).removeprefix("torch.")
        return LazyArray(tuple(tensor.shape), np.dtype(dtype), read)

    return {name: lazy(tensor) for name, tensor in state.items()}
