"""Arrays in TensorStore (zarr, Orbax's OCDBT) by URL: buckets are read like folders, by slices."""

import contextlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import tensorstore as ts

from sbs_jax.storage import user_files
from sbs_jax.storage.json_files import part
from sbs_jax.weights.arrays import LazyArray

LOCAL = "file://"
# TensorStore reads these whole; those of real checkpoints have kilobytes.
_DESCRIPTIONS = (".zarray", "zarr.json", "manifest.ocdbt")
_LONGEST_DESCRIPTION = 2**26
# A chunk is read whole. T5X's chunks have a few million numbers.
_MOST_IN_CHUNK = 2**32


def orbax_arrays(path: str | Path, *, complete: bool = True) -> dict[str, LazyArray]:
    """Opens the arrays of a directory that Orbax wrote, under the names stored there.

    A missing chunk is an error if `complete`, else zeros. (Orbax stores chunks of zeros too; other writers, and its
    older versions, leave them out.)
    """
    url = url_of(path)
    check_files(path)
    store = ts.KvStore.open({"driver": "ocdbt", "base": url}).result()
    return opened({"driver": "ocdbt", "base": url}, zarr_names(store), fill_missing_data_reads=not complete)


def check_files(path: str | Path) -> None:
    """Checks every file of a local folder as `check_file` does."""
    for folder, _, files in os.walk(path) if "://" not in str(path) else ():
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile, or a link to nothing
                check_file(Path(folder) / file)


def check_file(path: Path) -> None:
    """Requires a regular file, and of a description at most 64 MiB. ValueError names it.

    TensorStore would wait for a pipe, and reads descriptions whole.
    """
    size = user_files.check(path).st_size
    if path.name in _DESCRIPTIONS and size > _LONGEST_DESCRIPTION:
        raise ValueError(
            f"{path} has {size} bytes; a description of arrays has at most {_LONGEST_DESCRIPTION}. "
            "Copy the checkpoint again."
        )


def url_of(path: str | Path) -> str:
    url = str(path) if "://" in str(path) else f"{LOCAL}{Path(path).absolute()}"
    return url.rstrip("/") + "/"


def has(store: ts.KvStore, key: str) -> bool:
    """Looks for a key; a local file, which may be gigabytes, is not read for it."""
    if store.url.startswith(LOCAL):
        return bool(store.list(ts.KvStore.KeyRange(key, f"{key}\0")).result())
    return store.read(key).result().state == "value"


def text(key: bytes) -> str:
    return key.decode("utf-8", "replace")


def zarr_names(store: ts.KvStore) -> dict[str, str]:
    """Lists the arrays of a store, each with the driver that reads it."""
    drivers = {"/.zarray": "zarr", "/zarr.json": "zarr3"}
    found = {}
    for key in map(text, store.list().result()):
        for end, driver in drivers.items():
            if key.endswith(end):
                found[key.removesuffix(end)] = driver
    return found


def opened(kvstore: Mapping[str, Any], drivers: Mapping[str, str], **options: Any) -> dict[str, LazyArray]:
    """Opens arrays concurrently: over a network each one waits for an answer. `options` go into TensorStore's spec."""
    path = kvstore.get("path", "")
    waiting = {
        name: ts.open(
            {"driver": driver, "kvstore": {**kvstore, "path": f"{path}{name}/"}, **options}, read=True, open=True
        )
        for name, driver in drivers.items()
    }
    opened = {}
    for name, future in waiting.items():
        where = f"{kvstore.get('base', path)}: the array {part(name)}"
        try:
            store = future.result()
        except (ValueError, OSError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"{where} cannot be opened: {part(str(error))}. Copy the checkpoint again.") from None
        opened[name] = _lazy(store, where=where)
    return opened


def _lazy(store: ts.TensorStore, *, where: str) -> LazyArray:
    dtype, chunk = store.dtype.numpy_dtype, store.chunk_layout.read_chunk.shape or ()
    if dtype.kind not in "fiu" and dtype != ml_dtypes.bfloat16:
        raise ValueError(f"{where} is of type {dtype}; expected numbers.")
    if math.prod(size or 1 for size in chunk) > _MOST_IN_CHUNK:
        raise ValueError(f"{where} has chunks of {tuple(chunk)}, too large for any memory. The file is damaged.")
    return LazyArray(tuple(store.shape), dtype, lambda index: store[index].read().result())
