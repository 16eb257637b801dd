"""Frozen base of adapters, loaded one array at a time in the precision its `Tuning` asks for."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from sbs_jax.student import adapters, families, partitioning
from sbs_jax.weights import identity, opening
from sbs_jax.weights.arrays import Watched, shapes


@dataclasses.dataclass(frozen=True)
class Base:
    """The base of adapters in memory: parameters that stay frozen, and those that are trained further.

    `identity` is stored in every checkpoint of adapters: {"path", "seed", "fingerprint"}.
    """

    frozen: families.Parameters
    trained: families.Parameters
    identity: dict[str, Any]


def load(
    config: families.ModelConfig,
    tuning: adapters.Tuning,
    *,
    path: str | None,
    seed: int | None,
    like: Mapping[str, jax.ShapeDtypeStruct],
    partitioner: partitioning.Partitioner,
) -> Base:
    """Loads a base from a checkpoint of any form, or fresh from a seed, onto the shardings of `like` (all names).

    Only one array at a time is in float32: the base of a quantized run may not fit into memory at full precision.
    """
    adapted = adapters.abstract(config, tuning)
    _, plain, axes = families.abstract(config)
    plain_like = partitioner.with_shardings(plain, parameters=plain, axes=axes)
    if path is None and seed is None:
        raise ValueError("These adapters name neither the path of their base nor a seed; give the base.")
    stored = Watched({} if path is None else opening.arrays_of(path, wanted=shapes(plain_like), config=config))
    fresh = _from_seed(config, seed or 0, plain_like) if path is None else {}
    parameters: families.Parameters = {}
    fingerprints: dict[str, list[int]] = {}
    compiled: dict[Any, Callable[[jax.Array], tuple[jax.Array, ...]]] = {}  # one program per kind of array
    for name in plain:
        array = fresh.pop(name) if path is None else stored[name].onto(plain_like[name])
        fingerprints[name] = [int(x) for x in np.asarray(identity.fingerprint(array))]
        parts = [each for each in like if each == name or each.rpartition("/")[0] == name]

        def frozen(array: jax.Array, name: str = name, parts: list[str] = parts) -> tuple[jax.Array, ...]:
            found = adapters.freeze(name, array, shapes=adapted.shapes, form=tuning.base)
            return tuple(found[part] for part in parts)

        shardings = tuple(like[part].sharding for part in parts)
        alike = (array.shape, shardings, tuple(like[part].dtype for part in parts))
        if alike not in compiled:
            compiled[alike] = jax.jit(frozen, out_shardings=shardings)
        parameters |= zip(parts, compiled[alike](array), strict=True)
        del array
    stored.warn(path)
    trained, rest = adapted.split(parameters)
    place = None if path is None else identity.absolute(path)
    origin = {"path": place, "seed": None if path else seed, "fingerprint": identity.digest(fingerprints)}
    return Base(rest, trained, origin)


def _from_seed(
    config: families.ModelConfig, seed: int, like: Mapping[str, jax.ShapeDtypeStruct]
) -> families.Parameters:
    shardings = {name: leaf.sharding for name, leaf in like.items()}
    return jax.jit(lambda: families.init(config, seed=seed)[1], out_shardings=shardings)()
