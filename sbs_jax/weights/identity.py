"""Identity of the base that adapters belong to: {"path", "seed", "fingerprint"}, kept in every checkpoint of adapters.

The fingerprint identifies a base by its numbers, wherever it is stored.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbs_jax.storage import hub
from sbs_jax.storage.json_files import part
from sbs_jax.weights.arrays import LazyArray


def of_arrays(arrays: Mapping[str, LazyArray]) -> str:
    """Computes the fingerprint of a base, reading its arrays one after the other."""
    fingerprints = {name: fingerprint(jnp.asarray(array.whole().astype(np.float32))) for name, array in arrays.items()}
    return digest({name: [int(x) for x in np.asarray(each)] for name, each in fingerprints.items()})


def digest(fingerprints: Mapping[str, Sequence[int]]) -> str:
    """Combines the fingerprints of all arrays, by name, into one."""
    return hashlib.sha256(repr(sorted((name, list(each)) for name, each in fingerprints.items())).encode()).hexdigest()


@jax.jit
def fingerprint(array: jax.Array) -> jax.Array:
    """Sums a float32 array's bits twice, weighted by position, modulo 2^32.

    The result does not depend on how the array is split over devices.
    """
    bits = jax.lax.bitcast_convert_type(array.astype(jnp.float32), jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        place = place * np.uint32(bits.shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    # Odd weights: a change of any one bit changes both sums. The multipliers are Knuth's and xxHash's.
    weights = [(place * np.uint32(factor)) ^ (place >> 15) | np.uint32(1) for factor in (2654435761, 2246822519)]
    return jnp.stack([jnp.sum(bits * weight, dtype=jnp.uint32) for weight in weights])


def check(found: Mapping[str, Any], expected: Mapping[str, Any], *, owner: str) -> None:
    """Requires the base that the adapters of `owner` were trained on. ValueError for another."""
    if found["fingerprint"] != expected["fingerprint"]:
        raise ValueError(
            f"{owner} has adapters of another base: trained on {described(expected)} (fingerprint "
            f"{expected['fingerprint'][:16]}), got {described(found)} ({found['fingerprint'][:16]}). Give the "
            "base they were trained on."
        )


def absolute(path: str) -> str:
    """Returns the path of a base for checkpoints: absolute; a URL as it is, a model of the hub with a commit."""
    if "://" in path:
        return path
    return str(Path(path).absolute()) if hub.parse(path) is None else hub.pinned(path)


def described(identity: Mapping[str, Any]) -> str:
    """Names a base for a message."""
    return part(str(identity["path"])) if identity["path"] else f"parameters fresh from seed {identity['seed']}"


def base_path(identity: Mapping[str, Any], given: str | None, *, owner: str) -> str | None:
    """Returns the path to read a base from: `given`, or the stored one; None if it is fresh from a seed.

    FileNotFoundError if the path does not exist.
    """
    path = given or identity["path"]
    if path is not None and "://" not in str(path) and not Path(path).exists() and hub.parse(str(path)) is None:
        moved = "" if given else " If it has moved, give its new path with --base."
        raise FileNotFoundError(f"{path}, the base of {owner}, does not exist.{moved}")
    return path
