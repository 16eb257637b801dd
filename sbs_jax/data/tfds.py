"""Examples from TensorFlow Datasets. The library is imported at first use, because that takes seconds."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from sbs_jax.data.dataset import Row


def examples(
    name: str, splits: Iterable[str], *, data_dir: str | None
) -> dict[str, tuple[str, Iterable[Mapping[str, Any]]]]:
    """Returns each split's full name (with version) and its examples, with bytes decoded to text.

    The order is the same every time. Downloads what `data_dir` does not have.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir)
    builder.download_and_prepare()
    found = {}
    for split in splits:
        if split in builder.info.splits:
            read_config = tfds.ReadConfig(interleave_cycle_length=1)  # one file after the other: a fixed order
            # The decorator of as_dataset hides its parameters from type checkers.
            read: Any = builder.as_dataset
            raw = read(split=split, shuffle_files=False, read_config=read_config)
            rows = (_plain(example) for example in tfds.as_numpy(raw))
            found[split] = f"tfds:{builder.info.full_name}/{split}", rows
    return found


def rows_sha256(rows: Iterable[Row]) -> str:
    """Hashes rows in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update((json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n").encode())
    return digest.hexdigest()


def _plain(example: Mapping[str, Any]) -> dict[str, Any]:
    """Converts NumPy scalars and bytes to Python numbers and text."""
    plain = {}
    for name, value in example.items():
        if isinstance(value, bytes):
            plain[name] = value.decode("utf-8")
        else:
            plain[name] = value.item() if getattr(value, "shape", None) == () else value
    return plain
